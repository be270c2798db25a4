"""`gptq schema`: the JSON Schemas of configuration files and of --json output."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Annotated, Any

import typer

from gptq_cli.cli.console import write_result
from gptq_cli.config.fields import accepted_by
from gptq_cli.config.layer import PRESETS
from gptq_cli.config.schema import DEFAULTS, QuantizeConfig
from gptq_cli.config.serving import TARGETS
from gptq_cli.errors import ConfigError, nearest, shown

KINDS = ("config", "output")

# the newest draft that yaml-language-server promises to read
DRAFT = "http://json-schema.org/draft-07/schema#"
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
        write_result(json.dumps(config_schema(), indent=2, ensure_ascii=False))
    else:
        file = files("gptq_cli.cli").joinpath("output.schema.json")
        write_result(file.read_text(encoding="utf-8").rstrip("\n"))


def _targets() -> str:
    """Return the pattern of an engine with a version or a platform."""
    names = "|".join(map(re.escape, TARGETS))
    return rf"^({names})(@[0-9.]+)?(/[a-z]+)?$"


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file; each field has its meaning and its values."""
    schema = QuantizeConfig.model_json_schema(ref_template="#/definitions/{model}")
    fields = schema["properties"]
    defaults = DEFAULTS.model_dump(mode="json")  # with the values of the default preset
    for name, info in QuantizeConfig.model_fields.items():
        field = fields[name]
        field["description"] = f"{info.description}. Accepts {accepted_by(info)}."
        field.pop("title", None)
        if "default" in field:
            field["default"] = defaults[name]
    fields["preset"]["enum"] = list(PRESETS)
    fields["target"]["anyOf"] = [
        {"enum": [*TARGETS, None]},
        {"type": "string", "pattern": _targets()},
    ]
    schema["description"] = schema["description"].partition("\n")[0]
    definitions = schema.pop("$defs", {})
    return {"$schema": DRAFT, **schema, "title": "gptq configuration", "definitions": definitions}
