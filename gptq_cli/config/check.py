"""What is wrong with a set of values, in the words of a person: each value against what its field accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gptq_cli.config.fields import Accepts, LayerOverrides
from gptq_cli.config.finding import Finding, KeyPath, name_of, nearest, shown
from gptq_cli.config.layer import PRESETS
from gptq_cli.config.serving_table import TARGETS
from gptq_cli.errors import ConfigError, Problem

NAMES = {"preset": tuple(PRESETS), "target": TARGETS}
OUT_OF_RANGE = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
    "value_error",
    "string_pattern_mismatch",
    "string_too_short",
    "too_short",
}


def findings_of(
    error: ValidationError, values: Mapping[str, Any], model: type[BaseModel]
) -> list[Finding]:
    """What pydantic has against single `values` of a `model`, conflicts between them not."""
    details = [detail for detail in error.errors(include_url=False) if detail["type"] != "conflict"]
    return _deepest([_finding(detail, values, model) for detail in details])


def refusal(findings: Sequence[Finding]) -> ConfigError:
    """One error for all findings (at least one), in which fields have the names that Python callers give them."""
    return ConfigError.of(
        [
            Problem(f.code, f"{' and '.join(map(name_of, f.paths))} {f.predicate}", f.hint)
            for f in findings
        ]
    )


def _deepest(findings: list[Finding]) -> list[Finding]:
    """One finding a place: a union reports each of its members, and the deepest one knows best."""
    once = {(finding.paths[0], finding.code): finding for finding in reversed(findings)}
    deep = {path[:n] for path, _ in once for n in range(1, len(path)) if path[0] != "dynamic"}
    return [finding for (path, _), finding in reversed(once.items()) if path not in deep]


def _finding(detail: ErrorDetails, values: Mapping[str, Any], model: type[BaseModel]) -> Finding:
    path = _path(detail["loc"])
    value = path[-1] if detail["loc"][-1] == "[key]" else value_at(values, path)
    kind = detail["type"]
    if kind == "missing":
        hint = "4 is the usual choice" if path == ("bits",) else None
        return Finding((path,), "E_CFG_MISSING", "is required", hint)
    if kind == "extra_forbidden":
        return _unknown(path, model)
    if kind == "regex":
        reason = detail["ctx"]["reason"]
        hint = "rules are regular expressions: write \\. for a dot and .* for anything"
        return Finding((path,), "E_CFG_REGEX", f"is not a regular expression: {reason}", hint)
    field = str(path[2] if len(path) > 2 and path[0] == "dynamic" else path[0])
    predicate = f"must be {_accepted(path, field, model)}, got {shown(value)}{_item(path)}"
    return Finding((path,), _code(detail, value), predicate, _hint(field, value, model))


def _path(loc: tuple[str | int, ...]) -> KeyPath:
    """The place in the values: indices stay, pydantic's names for the members of a union go."""
    if loc[0] == "dynamic":
        return tuple(part for part in loc[:3] if part != "[key]")
    return (loc[0], *(part for part in loc[1:] if isinstance(part, int)))


def value_at(values: Any, path: KeyPath) -> Any:
    """The value at `path`, or a key itself where the path ends at one that has no value."""
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return part
    return values


def _unknown(path: KeyPath, model: type[BaseModel]) -> Finding:
    known = tuple(LayerOverrides.__annotations__) if len(path) > 1 else tuple(model.model_fields)
    near = nearest(str(path[-1]), known)
    hint = f"did you mean {near}?" if near else "known are: " + ", ".join(known)
    return Finding((path,), "E_CFG_UNKNOWN_KEY", "is not a known key", hint)


def _accepted(path: KeyPath, field: str, model: type[BaseModel]) -> str:
    if path[0] == "dynamic" and len(path) == 2:
        return (
            "a text" if not isinstance(path[1], str) else "a mapping of settings such as {bits: 8}"
        )
    metadata = model.model_fields[field].metadata
    return next(item.text for item in metadata if isinstance(item, Accepts))


def _item(path: KeyPath) -> str:
    counts = (
        [str(part + 1) for part in path[1:] if isinstance(part, int)]
        if path[0] != "dynamic"
        else []
    )
    return f" as item {'.'.join(counts)}" if counts else ""


def _code(detail: ErrorDetails, value: object) -> str:
    if detail["type"] == "literal_error":
        wants_text = detail["ctx"]["expected"].startswith("'")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        right_type = isinstance(value, str) if wants_text else is_number
        return "E_CFG_RANGE" if right_type else "E_CFG_TYPE"
    return "E_CFG_RANGE" if detail["type"] in OUT_OF_RANGE else "E_CFG_TYPE"


def _hint(field: str, value: object, model: type[BaseModel]) -> str | None:
    annotation = model.model_fields[field].annotation
    if annotation is bool:
        return _hint_for_truth(value)
    if field == "group_size" and value == 0:
        return "for one group per row write -1"
    if field == "damp_percent" and not isinstance(value, str):
        return "typical values are 0.01 to 0.1"
    if isinstance(value, str):
        return _hint_for_text(field, value, model)
    return None


def _hint_for_truth(value: object) -> str | None:
    word = str(value).lower()
    if word in {"yes", "on", "y", "1", "true"}:
        return "write true, without quotes"
    return "write false, without quotes" if word in {"no", "off", "n", "0", "false"} else None


def _hint_for_text(field: str, value: str, model: type[BaseModel]) -> str | None:
    try:
        float(value)
    except ValueError:
        choices = _choices(field, model)
        near = nearest(value, choices) if choices else None
        return f"did you mean {near}?" if near else None
    return f"write {value.strip()} without quotes"


def _choices(field: str, model: type[BaseModel]) -> tuple[str, ...]:
    if field in NAMES:
        return NAMES[field]
    schema = model.model_json_schema()["properties"][field]
    options = [schema, *schema.get("anyOf", ())]
    return tuple(
        word for option in options for word in option.get("enum", ()) if isinstance(word, str)
    )
