"""`gptq schema`: the JSON Schemas of what goes in and what comes out, the first for editors too."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Annotated, Any

import typer

from gptq_cli.cli.console import write_result
from gptq_cli.config.fields import accepted_by
from gptq_cli.config.finding import nearest, shown
from gptq_cli.config.layer import PRESETS
from gptq_cli.config.schema import DEFAULTS, QuantizeConfig
from gptq_cli.config.serving_table import TARGETS
from gptq_cli.errors import ConfigError

KINDS = ("config", "output")

DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that yaml-language-server promises to read
FILE = "gptq.schema.json"
MODELINE = f"# yaml-language-server: $schema={FILE}"


def schema(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="config|output", help="of configuration files, or of what --json prints"
        ),
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
        raise ConfigError(
            "E_CFG_RANGE", f"there are schemas of config and output, got {shown(kind)}", hint=hint
        )
    if kind == "config":
        write_result(json.dumps(config_schema(), indent=2, ensure_ascii=False))
    else:
        write_result(
            files("gptq_cli.cli")
            .joinpath("output.schema.json")
            .read_text(encoding="utf-8")
            .rstrip("\n")
        )


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, each field with its meaning and what it accepts."""
    schema = QuantizeConfig.model_json_schema(ref_template="#/definitions/{model}")
    fields = schema["properties"]
    effective = DEFAULTS.model_dump(
        mode="json"
    )  # what a run really has, which the default preset decides
    for name, info in QuantizeConfig.model_fields.items():
        fields[name]["description"] = f"{info.description}. Accepts {accepted_by(info)}."
        fields[name].pop("title", None)
        if "default" in fields[name]:
            fields[name]["default"] = effective[name]
    fields["preset"]["enum"] = list(PRESETS)
    fields["target"]["enum"] = [*TARGETS, None]
    schema["description"] = schema["description"].partition("\n")[0]
    definitions = schema.pop("$defs", {})
    return {"$schema": DRAFT, **schema, "title": "gptq configuration", "definitions": definitions}
