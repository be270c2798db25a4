"""What was said on the command line as the configuration takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptq_cli.config.rules import parse_rule
from gptq_cli.config.schema import FIELDS
from gptq_cli.errors import ConfigError


def said_fields(said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the configuration among the options `said`, as the configuration takes them."""
    lists = {"dataset": _one_or_many(said["dataset"]), "dynamic": _rules(said["dynamic"])}
    return {key: value for key, value in {**said, **lists}.items() if key in FIELDS}


def _one_or_many(dataset: list[str] | None) -> str | list[str] | None:
    return dataset[0] if dataset and len(dataset) == 1 else dataset or None


def _rules(texts: list[str] | None) -> Mapping[str, Any] | None:
    """`dynamic` from its rules; an empty list is "not said"."""
    rules: dict[str, Any] = {}
    for rule, settings in map(parse_rule, texts or ()):
        if rule in rules:
            raise ConfigError("E_CFG_CONFLICT", f"--dynamic says {rule!r} twice", hint="keep one of them")
        if not settings and not rule.startswith("-:"):
            hint = f"write '{rule}={{bits: 8}}', or '-:{rule.removeprefix('+:')}' to keep the layers"
            raise ConfigError("E_CFG_MISSING", f"--dynamic {rule!r} says nothing to change", hint=hint)
        rules[rule] = settings
    return rules or None
