"""`gptq schema`: the JSON Schemas of what goes in and what comes out."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Annotated

import typer

from gptq_cli.cli.console import write_result
from gptq_cli.config.finding import nearest, shown
from gptq_cli.config.json_schema import config_schema
from gptq_cli.errors import ConfigError

KINDS = ("config", "output")


def schema(
    kind: Annotated[
        str,
        typer.Argument(metavar="config|output", help="of configuration files, or of what --json prints"),
    ] = "config",
) -> None:
    """Print the JSON Schema of the configuration, or of --json output.

    A YAML file that begins with the line
    # yaml-language-server: $schema=gptq.schema.json
    is then completed and checked by editors as one writes.

    Example: gptq schema > gptq.schema.json
    """
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        hint = f"did you mean {near}?" if near else None
        raise ConfigError("E_CFG_RANGE", f"there are schemas of config and output, got {shown(kind)}", hint=hint)
    if kind == "config":
        write_result(json.dumps(config_schema(), indent=2, ensure_ascii=False))
    else:
        write_result(files("gptq_cli.cli").joinpath("output.schema.json").read_text(encoding="utf-8").rstrip("\n"))
