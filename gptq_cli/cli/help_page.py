"""The help of the program and of its commands, as plain text for any width."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

NARROW, WIDE = 24, 34  # columns of names on narrow terminals and on others
WIDE_TERMINAL = 76
COMMAND_NAMES = 19
WIDEST = 110  # longer lines are hard to read
EXAMPLE = "Example: "
OF_TYPER = ("help", "install_completion", "show_completion")  # their help is a sentence

Row = tuple[str, str]  # names, meaning


def program_page(context: Any, groups: Mapping[str, Mapping[str, str]]) -> str:
    """Return the help of the program: its commands in groups, and its own options."""
    width = _width()
    parts = ["Usage: gptq COMMAND [OPTIONS]", *_paragraphs(context.command.help, width)]
    for title, commands in groups.items():
        parts.append(_section(title, list(commands.items()), width, names=COMMAND_NAMES))
    options = [_row(item) for item in context.command.get_params(context)]
    parts.append(_section("Options", options, width))
    return "\n\n".join(parts)


def command_page(context: Any, shown: Sequence[str]) -> str:
    """Return the help of a command: its description, and its options under their titles.

    If `shown` is not empty, only parameters of these names appear, in this order and under one
    title.
    """
    width = _width()
    command = context.command
    parameters = command.get_params(context)
    arguments = [item.metavar for item in parameters if item.param_type_name == "argument"]
    usage = " ".join(["Usage:", context.command_path, *arguments, "[OPTIONS]"])
    if shown:
        by_name = {item.name: item for item in parameters}
        sections = {"Options": [_row(by_name[name]) for name in (*shown, "help")]}
    else:
        sections = _by_title(parameters)
    parts = [usage, *_paragraphs(command.help, width)]
    for title, rows in sections.items():
        parts.append(_section(title, rows, width))
    return "\n\n".join(parts)


def _by_title(parameters: Sequence[Any]) -> dict[str, list[Row]]:
    """Return the rows of all parameters under their titles, those of arguments first."""
    sections: dict[str, list[Row]] = {}
    for item in sorted(parameters, key=lambda item: item.param_type_name):
        title = getattr(item, "rich_help_panel", None) or "Options"
        sections.setdefault(title, []).append(_row(item))
    return sections


def _width() -> int:
    return min(WIDEST, get_terminal_size().columns)


def _row(parameter: Any) -> Row:
    """Return the names of a parameter with the word for its value, and its meaning."""
    text = str(parameter.help or "")
    if parameter.name in OF_TYPER:
        text = text[:1].lower() + text[1:].rstrip(".")
    if parameter.param_type_name == "argument":
        return parameter.metavar, text
    names = [*sorted(parameter.opts, key=len), *parameter.secondary_opts]
    words = ", ".join(names)
    if not parameter.is_flag:
        words += f" {parameter.metavar}"
    return words, text


def _section(title: str, rows: Sequence[Row], width: int, names: int | None = None) -> str:
    """Return the rows below their title; a name that is too long has a line of its own."""
    if names is None:
        names = NARROW
        if width >= WIDE_TERMINAL:
            names = WIDE
    lines = [_bold(title)]
    for name, meaning in rows:
        first, *rest = wrap(meaning, width - names, break_on_hyphens=False) or [""]
        if len(name) + 4 <= names:
            lines.append(f"  {name}".ljust(names) + first)
        else:
            lines += [f"  {name}", " " * names + first]
        lines += [" " * names + line for line in rest]
    return "\n".join(line.rstrip() for line in lines)


def _paragraphs(text: str, width: int) -> list[str]:
    """Return the paragraphs of a docstring for this width.

    Tables, whose rows are indented, stay as they are. A long example continues on the next line.
    """
    paragraphs = []
    for paragraph in cleandoc(text).split("\n\n"):
        if paragraph.startswith(EXAMPLE):
            lines = []
            for line in paragraph.splitlines():
                lines.append(" \\\n    ".join(wrap(line, width - 4, break_on_hyphens=False)))
        elif "\n  " in paragraph:
            lines = paragraph.splitlines()
        else:
            lines = wrap(paragraph, width, break_on_hyphens=False)
        paragraphs.append("\n".join(lines))
    return paragraphs


def _bold(title: str) -> str:
    """Return a title, in bold on a terminal that may be styled."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    if not is_terminal or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return title
    return f"\x1b[1m{title}\x1b[0m"
