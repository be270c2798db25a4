"""`gptq schema`: the JSON Schemas of configuration files and of --json output."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Annotated

import typer

from gptq_cli.cli.console import write_result
from gptq_cli.errors import ConfigError, nearest, shown

KINDS = ("config", "output")

FILE = "gptq.schema.json"
MODELINE = f"# yaml-language-server: $schema={FILE}"


def schema(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="config|output", help="schema of configuration files, or of --json output"
        ),
    ] = "config",
) -> None:
    """Print the JSON Schema of the configuration, or of --json output.

    Editors complete and check a YAML file that begins with the line
    # yaml-language-server: $schema=gptq.schema.json

    Example: gptq schema > gptq.schema.json
    """
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        hint = f"did you mean {near}?" if near else None
        message = f"there are schemas of config and output, got {shown(kind)}"
        raise ConfigError("E_CFG_RANGE", message, hint=hint)
    if kind == "config":
        from gptq_cli.config.json_schema import config_schema

        write_result(json.dumps(config_schema(), indent=2, ensure_ascii=False))
    else:
        file = files("gptq_cli.cli").joinpath("output.schema.json")
        write_result(file.read_text(encoding="utf-8").rstrip("\n"))
