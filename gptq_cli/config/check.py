"""Values against what their fields accept: the findings of pydantic in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gptq_cli.config.fields import LayerOverrides, accepted_by
from gptq_cli.config.finding import Finding, KeyPath, shown, suggestion
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
    """Return the findings about single `values` of a `model`, without conflicts between values."""
    findings = []
    for detail in error.errors(include_url=False):
        if detail["type"] != "conflict":
            findings.append(_finding(detail, values, model))
    return _deepest(findings)


def refusal(findings: Sequence[Finding]) -> ConfigError:
    """Return one error for all findings (at least one), with the field names of Python callers."""
    return ConfigError.of(
        [Problem(finding.code, finding.message(), finding.hint) for finding in findings]
    )


def _deepest(findings: list[Finding]) -> list[Finding]:
    """Return one finding for each place and code.

    A union reports each of its members; the member that got deepest into the value knows best.
    """
    first: dict[tuple[KeyPath, str], Finding] = {}
    above: set[KeyPath] = set()
    for finding in findings:
        path = finding.paths[0]
        first.setdefault((path, finding.code), finding)
        if path[0] != "dynamic":
            above.update(path[:length] for length in range(1, len(path)))
    return [finding for (path, _), finding in first.items() if path not in above]


def _finding(detail: ErrorDetails, values: Mapping[str, Any], model: type[BaseModel]) -> Finding:
    path = _path(detail["loc"])
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
    value = value_at(values, path)
    if detail["loc"][-1] == "[key]":  # pydantic's name for a key that is itself the bad value
        value = path[-1]
    field = _field_of(path)
    predicate = f"must be {_accepted(path, field, model)}, got {shown(value)}{_item(path)}"
    return Finding((path,), _code(detail, value), predicate, _hint(field, value, model))


def _path(loc: tuple[str | int, ...]) -> KeyPath:
    """Return the place in the values: indices stay, pydantic's names for members of a union go."""
    if loc[0] == "dynamic":
        return tuple(part for part in loc[:3] if part != "[key]")
    return (loc[0], *(part for part in loc[1:] if isinstance(part, int)))


def value_at(values: Any, path: KeyPath) -> Any:
    """Return the value at `path`, or the key itself if the path ends at one that has no value."""
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return part
    return values


def _field_of(path: KeyPath) -> str:
    """Return the field that defines the values at `path`; settings of rules are fields, too."""
    if path[0] == "dynamic" and len(path) > 2:
        return str(path[2])
    return str(path[0])


def _unknown(path: KeyPath, model: type[BaseModel]) -> Finding:
    known = tuple(model.model_fields)
    if len(path) > 1:
        known = tuple(LayerOverrides.__annotations__)
    hint = suggestion(str(path[-1]), known) or f"known are: {', '.join(known)}"
    return Finding((path,), "E_CFG_UNKNOWN_KEY", "is not a known key", hint)


def _accepted(path: KeyPath, field: str, model: type[BaseModel]) -> str:
    if path[0] != "dynamic" or len(path) != 2:
        return accepted_by(model.model_fields[field])
    if isinstance(path[1], str):
        return "a mapping of settings such as {bits: 8}"
    return "a text"


def _item(path: KeyPath) -> str:
    """Return the end of a message that tells which item of a list is meant, counted from 1."""
    if path[0] == "dynamic":
        return ""
    counts = [str(part + 1) for part in path[1:] if isinstance(part, int)]
    return f" as item {'.'.join(counts)}" if counts else ""


def _code(detail: ErrorDetails, value: object) -> str:
    if detail["type"] == "literal_error":
        wants_text = detail["ctx"]["expected"].startswith("'")
        accepted = (str,) if wants_text else (int, float)
        # To Python, true is a number.
        in_kind = isinstance(value, accepted) and not isinstance(value, bool)
    else:
        in_kind = detail["type"] in OUT_OF_RANGE
    return "E_CFG_RANGE" if in_kind else "E_CFG_TYPE"


def _hint(field: str, value: object, model: type[BaseModel]) -> str | None:
    annotation = model.model_fields[field].annotation
    if annotation is bool:
        return _hint_for_truth(value)
    if field == "group_size" and value == 0:
        return "write -1 for one group per row"
    if field == "damp_percent" and not isinstance(value, str):
        return "typical values are 0.01 to 0.1"
    if isinstance(value, str):
        return _hint_for_text(field, value, model)
    return None


def _hint_for_truth(value: object) -> str | None:
    word = str(value).lower()
    if word in {"yes", "on", "y", "1", "true"}:
        return "write true, without quotes"
    if word in {"no", "off", "n", "0", "false"}:
        return "write false, without quotes"
    return None


def _hint_for_text(field: str, value: str, model: type[BaseModel]) -> str | None:
    try:
        float(value)
    except ValueError:
        return suggestion(value, _choices(field, model))
    return f"write {value.strip()} without quotes"


def _choices(field: str, model: type[BaseModel]) -> Sequence[str]:
    """Return the words that a field accepts, none if it accepts any text."""
    if field in NAMES:
        return NAMES[field]
    schema = model.model_json_schema()["properties"][field]
    words: list[object] = []
    for option in (schema, *schema.get("anyOf", ())):
        words += option.get("enum", ())
    return [word for word in words if isinstance(word, str)]
