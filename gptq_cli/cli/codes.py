"""The codes of errors and warnings: the text about each and an example, from codes.yaml."""

from __future__ import annotations

from importlib.resources import files

import yaml


def explanations() -> dict[str, str]:
    """Return the text for each code, in the order of the file."""
    return {code: entry["text"].strip() for code, entry in _entries().items()}


def examples() -> dict[str, str]:
    """Return the example for each code: what is there, the command, what it prints."""
    return {code: entry["example"].strip() for code, entry in _entries().items()}


def _entries() -> dict[str, dict[str, str]]:
    file = files("gptq_cli.cli").joinpath("codes.yaml")
    entries: dict[str, dict[str, str]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return entries
