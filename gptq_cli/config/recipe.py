"""Configurations that ship with the program and are called by name."""

from __future__ import annotations

import os
from pathlib import Path

from gptq_cli.config.finding import nearest
from gptq_cli.errors import ConfigError

FOLDER = Path(__file__).with_name("recipes")


def recipes() -> dict[str, Path]:
    """The file of each recipe by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def describe_recipe(file: Path) -> str:
    """What a recipe is for: its first comment that is not for editors."""
    comments = (line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next(comment for comment in comments if not comment.startswith("yaml-language-server"))


def find_config(file: Path) -> Path:
    """`file`, or the recipe of that name if there is no such file; ConfigError E_CFG_FILE if it could be neither."""
    known = recipes()
    name = str(file)
    if os.path.lexists(file) or file.name != name or file.suffix:
        return file
    if name in known:
        return known[name]
    near = nearest(name, known)
    hint = f"did you mean the recipe {near}?" if near else "`gptq recipes` lists the names; a file needs its suffix"
    raise ConfigError("E_CFG_FILE", f"there is no file and no recipe `{name}`", hint=hint)
