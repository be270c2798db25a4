"""`gptq recipes`: configurations that ship with the program."""

from __future__ import annotations

from typing import Annotated

import typer

from gptq_cli.cli.console import Console, aligned, fitted
from gptq_cli.cli.options import AsJson
from gptq_cli.config.resolve import describe_recipe
from gptq_cli.config.resolve import recipes as known_recipes
from gptq_cli.errors import ConfigError, nearest


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="recipe to print; default list all", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that --config takes by name, or print one.

    gptq quantize MODEL --config vllm-4bit runs one unchanged. To make your
    own configuration, print a recipe into a file and edit it.

    Example: gptq recipes vllm-4bit > my.yaml
    """
    console, known = Console(as_json), known_recipes()
    if name is None:
        described = {recipe: describe_recipe(file) for recipe, file in known.items()}
        indent = max(map(len, described)) + 2
        lines = [fitted(line, indent) for line in aligned([*described.items()])]
        console.result({"recipes": described}, "\n".join(lines), "\n".join(described))
        return
    if name not in known:
        near = nearest(name, known)
        hint = "gptq recipes lists them"
        if near:
            hint = f"did you mean {near}?"
        raise ConfigError("E_CFG_FILE", f"there is no recipe `{name}`", hint=hint)
    text = known[name].read_text(encoding="utf-8").rstrip("\n")
    console.document({"name": name, "text": text}, text)
