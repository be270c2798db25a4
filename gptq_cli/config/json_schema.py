"""The configuration as a JSON Schema, for editors."""

from __future__ import annotations

from typing import Any

from gptq_cli.config.engines import TARGETS
from gptq_cli.config.fields import Accepts
from gptq_cli.config.presets import PRESETS
from gptq_cli.config.schema import DEFAULTS, QuantizeConfig

DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that yaml-language-server promises to read
FILE = "gptq.schema.json"
MODELINE = f"# yaml-language-server: $schema={FILE}"


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, each field with its meaning and what it accepts."""
    schema = QuantizeConfig.model_json_schema(ref_template="#/definitions/{model}")
    fields = schema["properties"]
    effective = DEFAULTS.model_dump(mode="json")  # what a run really has, which the default preset decides
    for name, info in QuantizeConfig.model_fields.items():
        accepts = next((item.text for item in info.metadata if isinstance(item, Accepts)), None)
        fields[name]["description"] = f"{info.description}. Accepts {accepts}." if accepts else f"{info.description}."
        fields[name].pop("title", None)
        if "default" in fields[name]:
            fields[name]["default"] = effective[name]
    fields["preset"]["enum"] = list(PRESETS)
    fields["target"]["enum"] = [*TARGETS, None]
    schema["description"] = schema["description"].partition("\n")[0]
    definitions = schema.pop("$defs", {})
    return {"$schema": DRAFT, **schema, "title": "gptq configuration", "definitions": definitions}
