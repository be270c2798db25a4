"""The JSON Schema of a configuration file, for editors and other checkers.

What it refuses, the program refuses as well. It has the ranges, sizes, names and most conflicts;
it cannot compare two numbers, so it does not see a batch that is larger than `nsamples`, and it
leaves the newest version of an engine to the program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gptq_cli.config.fields import AUTO, SIZE_UNITS, accepted_by
from gptq_cli.config.layer import BITS, FORMATS, HOLDS, PRESETS
from gptq_cli.config.schema import DEFAULTS, NO_LORA, QuantizeConfig
from gptq_cli.config.serving import ANY, ENGINES, Engine

# the newest draft that yaml-language-server promises to read
DRAFT = "http://json-schema.org/draft-07/schema#"
KEEPS = "^-:"  # the beginning of a rule that keeps its layers unquantized
# A rule with +: or -: is no regular expression for other checkers; the usual mistake is *.mlp.
RULE = "^([+-]:)?(?![*+?])"

Schema = dict[str, Any]
NULL = {"type": "null"}
_AVERAGE = {"required": ["bits"], "properties": {"bits": {"not": {"enum": [*BITS, None]}}}}
GROUP_SIZE = {"type": "integer", "minimum": -1, "not": {"const": 0}}


def config_schema() -> Schema:
    """Return the JSON Schema of a configuration file; each field has its meaning and its values."""
    schema = QuantizeConfig.model_json_schema(ref_template="#/definitions/{model}")
    fields = schema["properties"]
    fields |= {name: fields[name] | more for name, more in _narrowed().items()}
    defaults = DEFAULTS.model_dump(mode="json")  # with the values of the default preset
    for name, info in QuantizeConfig.model_fields.items():
        field = _or_null(fields[name])
        field["description"] = f"{info.description}. Accepts {accepted_by(info)}."
        field.pop("title", None)
        field["default"] = defaults[name]
        fields[name] = field
    schema["description"] = schema["description"].partition("\n")[0]
    definitions = schema.pop("$defs", {})
    _narrow_rules(definitions["LayerOverrides"])
    return {
        "$schema": DRAFT,
        **schema,
        "title": "gptq configuration",
        "allOf": _conflicts(),
        "definitions": definitions,
    }


def _narrowed() -> dict[str, Schema]:
    """Return what pydantic does not know of the values of some fields."""
    sizes = [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _size_pattern()}]
    rule = {"$ref": "#/definitions/LayerOverrides"}
    found: dict[str, Schema] = {
        "group_size": {"anyOf": [GROUP_SIZE, {"const": AUTO}]},
        "preset": {"enum": list(PRESETS)},
        "target": {"anyOf": [{"type": "string", "pattern": _target_pattern()}, NULL]},
        "protect": {"anyOf": [{"type": "string", "format": "regex"}, NULL]},
        "allow_bits": {"anyOf": [_two_of(BITS), NULL]},
        "lora": {"anyOf": [*_one_or_many(min_length=1), NULL]},
        "dataset": {"anyOf": [*_one_or_many(min_length=0), NULL]},
        "text_column": {"anyOf": [*_one_or_many(min_length=1), NULL]},
        "dynamic": {
            "propertyNames": {"pattern": RULE},
            "patternProperties": {KEEPS: {"type": "object", "maxProperties": 0}},
            "additionalProperties": rule,
        },
    }
    for name in ("target_size", "max_shard_size", "max_ram", "max_vram"):
        found[name] = {"anyOf": sizes}
    return found


def _narrow_rules(overrides: Schema) -> None:
    """Add to the settings of a rule what pydantic does not know."""
    overrides["properties"]["group_size"] = dict(GROUP_SIZE)
    for field in overrides["properties"].values():
        field.pop("title", None)
    overrides["allOf"] = [
        _not_together({"desc_act": True, "act_group_aware": True}),
        _not_together({"signed_scales": True, "sym": False}),
    ]


def _or_null(field: Schema) -> Schema:
    """Return `field` with null, which means the same as a field that is left out."""
    if "anyOf" in field:
        return field | {"anyOf": _with_null(field["anyOf"])}
    if "enum" in field:
        values = {key: value for key, value in field.items() if key != "type"}
        return values | {"enum": [*field["enum"], None]}
    return field | {"type": [field["type"], "null"]}


def _with_null(options: list[Schema]) -> list[Schema]:
    if NULL in options:
        return options
    return [*options, NULL]


def _size_pattern() -> str:
    """Return the pattern of a size in text: a number above 0 with a unit in any case."""
    letters = set()
    for unit in SIZE_UNITS:
        letters.add("".join(f"[{letter}{letter.lower()}]" for letter in unit))
    units = "|".join(sorted(letters))
    return rf"^(?=.*[1-9])[0-9]{{1,18}}(\.[0-9]{{1,9}})? ?({units})$"


def _target_pattern() -> str:
    """Return the pattern of an engine, which a version and a platform may follow."""
    engines = "|".join(map(_engine_pattern, ENGINES))
    return f"^({engines}|{ANY})$"


def _engine_pattern(engine: Engine) -> str:
    pattern = re.sub(r"\W", r"\\\g<0>", engine.name).replace(r"\-", "-")
    if engine.newest:
        pattern += r"(@[0-9]{1,9}(\.[0-9]{1,9}){0,3})?"
    platforms = "|".join(filter(None, engine.platforms))
    if platforms:
        pattern += f"(/({platforms}))?"
    return pattern


def _two_of(widths: Sequence[int]) -> Schema:
    """Return the schema of a list with at least two different `widths`."""
    all_equal = [{"items": {"const": width}} for width in widths]
    return {
        "type": "array",
        "items": {"enum": list(widths)},
        "minItems": 2,
        "not": {"anyOf": all_equal},
    }


def _one_or_many(min_length: int) -> list[Schema]:
    """Return the schemas of a text that is not empty, and of a list of texts."""
    texts = {"type": "string", "minLength": min_length}
    return [{"type": "string", "minLength": 1}, {"type": "array", "items": texts, "minItems": 1}]


# ---------------------------------------------------------------- conflicts between fields


def _conflicts() -> list[Schema]:
    """Return the conditions that several fields meet together, as `schema.conflicts` checks them.

    A field of null counts as left out.
    """
    found = [
        _not_together({"desc_act": True, "act_group_aware": True}),
        _not_together({"signed_scales": True, "sym": False}),
        {"not": {"allOf": [_given("target_size"), _given("target_kl")]}},
        {"if": _given("protect"), "then": _allocates()},
        {"if": {"not": _given("nsamples")}, "then": _batches_of_the_default()},
        _no_adapter_beside_others(),
        *_rules_against_all_layers(),
    ]
    width = {"required": ["bits"], "properties": {"bits": {"enum": list(BITS[:-1])}}}
    for goal in ("target_size", "target_kl"):
        found.append({"not": {"allOf": [_given(goal), {"anyOf": [width, _AVERAGE]}]}})
    for format in FORMATS:
        found += _limits_of(format)
    return found


def _not_together(values: dict[str, Any]) -> Schema:
    """Return the condition that these fields do not all have these values."""
    return {"not": _having(values)}


def _having(values: dict[str, Any]) -> Schema:
    """Return the condition that these fields have these values."""
    properties = {name: {"const": value} for name, value in values.items()}
    return {"required": list(values), "properties": properties}


def _given(name: str) -> Schema:
    return {"required": [name], "properties": {name: {"not": NULL}}}


def _allocates() -> Schema:
    """Return the condition that layers get widths by the harm that each does."""
    goals = [_given(goal) for goal in ("target_size", "target_kl", "allow_bits")]
    return {"anyOf": [_AVERAGE, *goals]}


def _batches_of_the_default() -> Schema:
    return {"properties": {"batch_size": {"maximum": DEFAULTS.nsamples}}}


def _no_adapter_beside_others() -> Schema:
    several = {"type": "array", "minItems": 2, "contains": {"const": NO_LORA}}
    return {"properties": {"lora": {"not": several}}}


def _rules_against_all_layers() -> list[Schema]:
    """Return the conditions on rules that follow from the settings of all layers."""
    ungrouped = _having({"desc_act": False})
    symmetric = _having({"sym": True})
    aware = {"allOf": [_having({"act_group_aware": True}), {"not": ungrouped}]}
    signed = {"allOf": [_having({"signed_scales": True}), {"not": symmetric}]}
    return [
        {"if": _having({"desc_act": True}), "then": _each_rule({"not": aware})},
        {"if": _having({"sym": False}), "then": _each_rule({"not": signed})},
    ]


def _each_rule(condition: Schema) -> Schema:
    """Return the condition that each rule that changes settings meets another one."""
    rules = {"patternProperties": {KEEPS: True}, "additionalProperties": condition}
    return {"properties": {"dynamic": rules}}


def _limits_of(format: str) -> list[Schema]:
    """Return the conditions on the widths, groups and orders that a format stores."""
    holds = HOLDS[format]
    chosen = _having({"format": format})
    if format == DEFAULTS.format:  # gptq_v2, which an asymmetric grid gets, stores the same
        chosen = {"anyOf": [chosen, {"not": _given("format")}]}
    widths = list(holds.bits)
    allowed = {"properties": {"allow_bits": {"items": {"enum": widths}}}}
    columns = {"anyOf": [{"const": -1}, {"multipleOf": holds.columns}]}
    layers: list[Schema] = [
        {"properties": {"bits": {"enum": [*widths, None]}, "group_size": columns}},
        _each_rule({"properties": {"bits": {"enum": widths}}}),
    ]
    if not holds.g_idx:
        in_order = _having({"static_groups": True})
        moved = {"allOf": [_having({"desc_act": True}), {"not": in_order}]}
        layers.append({"not": moved})
    open_ = {"anyOf": [_allocates(), _having({"group_size": AUTO})]}
    uniform = {"allOf": [chosen, {"not": open_}]}
    return [{"if": chosen, "then": allowed}, {"if": uniform, "then": {"allOf": layers}}]
