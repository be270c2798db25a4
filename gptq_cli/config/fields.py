"""The types of the fields of a configuration, and the findings about values that they refuse.

Each type holds the words for what it accepts; errors of pydantic become findings in these words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from gptq_cli.config.layer import (
    BITS,
    FORMATS,
    PRESETS,
    BitWidth,
    DampMode,
    OnFault,
    ScaleSearch,
    Uncovered,
    flaw_of,
)
from gptq_cli.config.serving import ANY, TARGETS, find_target, target_hint
from gptq_cli.errors import ConfigError, Finding, KeyPath, Problem, one_of, shown, suggestion

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
AUTO = "auto"  # in place of a group size
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class Accepts:
    """The accepted values of a field, in the words of an error message."""

    text: str


def accepted_by(field: FieldInfo) -> str:
    """Return the words for what a field accepts; every field of the configuration has them."""
    for item in field.metadata:
        if isinstance(item, Accepts):
            return item.text
    raise TypeError("a field needs an Accepts among its metadata")


class Panel:
    """Titles of the groups that options form in `--help`."""

    ALGORITHM = "Algorithm"
    SWITCHES = "Algorithm, on or off"  # their long names stand apart
    ALLOCATION = "Bits where they count"
    LAYERS = "Layers"
    TEXT = "Text"
    OUTPUT = "Output"
    RUN = "Run"
    GATE = "Comparison"


@dataclass(frozen=True, slots=True)
class Option:
    """The command-line option of a field, as far as the field's type and name do not define it.

    `names` are the spellings, --field-name by default and --field-name/--no-field-name for a
    switch; `metavar` is the word for a value; `note` continues the field's description.
    """

    panel: str
    names: tuple[str, ...] = ()
    metavar: str | None = None
    note: str = ""


def size_in_bytes(size: int | str) -> int:
    """Return the bytes in "5GB", "500 MiB" or a plain number; ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", str(size))
    if not match or match[2].upper() not in SIZE_UNITS:
        raise ValueError(f"not a size: {size!r}")
    n_bytes = int(Decimal(match[1]) * SIZE_UNITS[match[2].upper()])
    if n_bytes <= 0:
        raise ValueError(f"not a positive size: {size!r}")
    return n_bytes


def _bits(bits: float) -> float:
    if bits in BITS:
        return int(bits)
    if bits.is_integer() or not BITS[0] < bits < BITS[-1]:
        raise ValueError("bits")
    return bits


def _widths(widths: list[BitWidth]) -> list[BitWidth]:
    if len(set(widths)) < 2:
        raise ValueError("widths")
    return sorted(set(widths))


def _group_size(columns: int) -> int:
    if columns == 0 or columns < -1:
        raise ValueError("group_size")
    return columns


def _group_size_or_auto(columns: int | str) -> int | str:
    if isinstance(columns, int):
        return _group_size(columns)
    if columns != AUTO:
        raise PydanticCustomError("int_type", "group_size")
    return columns


def _size(size: int | str) -> int | str:
    size_in_bytes(size)
    return size


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError("preset")
    return name


def _target(name: str | None) -> str | None:
    if name not in (None, ANY) and find_target(name) is None:
        raise ValueError("target")
    return name


def _rule(rule: str) -> str:
    if reason := flaw_of(rule):
        raise PydanticCustomError("regex", "{reason}", {"reason": reason})
    return rule


TRUTH = Accepts("true or false")
Bits = Annotated[BitWidth, Accepts(one_of(BITS))]
AVERAGE: dict[str, Any] = {"type": "number", "not": {"multipleOf": 1}}
AVERAGE |= {"exclusiveMinimum": BITS[0], "exclusiveMaximum": BITS[-1]}
AverageBits = Annotated[
    BitWidth | Annotated[float, AfterValidator(_bits)],
    WithJsonSchema({"anyOf": [{"enum": [*BITS]}, AVERAGE]}),
    Accepts(f"{one_of(BITS)}, or an average such as 3.5"),
]
Widths = Annotated[
    list[BitWidth] | None,
    AfterValidator(lambda widths: widths if widths is None else _widths(widths)),
    Accepts(f"a list of two or more of {', '.join(map(str, BITS))}, or null"),
]
Divergence = Annotated[float | None, Field(gt=0), Accepts("a number above 0, or null")]
Pattern = Annotated[
    str | None,
    AfterValidator(lambda pattern: pattern and _rule(pattern)),
    Accepts("a regular expression, or null"),
]
GroupSize = Annotated[
    int,
    AfterValidator(_group_size),
    Accepts("a positive number of columns, or -1 for one group per row"),
]
GroupSizeOrAuto = Annotated[
    int | str,
    AfterValidator(_group_size_or_auto),
    Accepts("a positive number of columns, -1 for one group per row, or auto"),
]
Unfit = Annotated[Literal["error", "keep"], Accepts("error or keep")]
DampPercent = Annotated[float, Field(gt=0, lt=1), Accepts("a number strictly between 0 and 1")]
Damping = Annotated[DampMode, Accepts(one_of(get_args(DampMode)))]
Search = Annotated[ScaleSearch, Accepts(one_of(get_args(ScaleSearch)))]
FollowStrength = Annotated[
    Annotated[float, Field(ge=0, le=1)] | Literal["auto"], Accepts("a number from 0 to 1, or auto")
]
Sweeps = Annotated[int, Field(ge=0), Accepts("a whole number of 0 or more")]
Size = Annotated[
    int | str, AfterValidator(_size), Accepts("a size such as 5GB or 500MiB, or a number of bytes")
]
Flag = Annotated[bool, TRUTH]
Count = Annotated[int, Field(gt=0), Accepts("a whole number of 1 or more")]
Text = Annotated[str, Field(min_length=1), Accepts("a text that is not empty")]
Name = Annotated[Text | None, Accepts("a name or null")]
Rule = Annotated[str, AfterValidator(_rule)]
PresetName = Annotated[str, AfterValidator(_preset), Accepts(one_of([*PRESETS]))]
Target = Annotated[
    str | None,
    AfterValidator(_target),
    Accepts("an engine, ENGINE@VERSION, ENGINE/PLATFORM or null"),
]
Experts = Annotated[Uncovered, Accepts(one_of(get_args(Uncovered)))]
Fault = Annotated[OnFault, Accepts(one_of(get_args(OnFault)))]


class LayerOverrides(TypedDict, total=False):
    """The settings that a `+:` rule of `dynamic` may change."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    bits: Bits
    group_size: GroupSize
    sym: Flag
    desc_act: Flag
    act_group_aware: Flag
    static_groups: Flag
    signed_scales: Flag
    scale_search: Search
    refine_sweeps: Sweeps
    asymmetric_calibration: FollowStrength
    loss_aware: Flag
    damp_mode: Damping
    damp_percent: DampPercent


ENGINES_ARE = f"engines are {', '.join(TARGETS)}"
NAMES = {"preset": tuple(PRESETS), "target": TARGETS, "device": ("auto", "cpu", "cuda")}
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


def refusal(findings: Sequence[Finding], model: type[BaseModel]) -> ConfigError:
    """Return one error for all findings (at least one), with the field names of Python callers."""
    from gptq_cli.config.python_names import renamed

    problems = []
    for finding in findings:
        problem = Problem(finding.code, finding.message(), finding.hint)
        problems.append(renamed(problem, model.model_fields))
    return ConfigError.of(problems)


def _deepest(findings: list[Finding]) -> list[Finding]:
    """Return one finding for each place.

    A union reports each of its members; the member that got deepest into the value knows best, and
    of these the first.
    """
    first: dict[KeyPath, Finding] = {}
    above: set[KeyPath] = set()
    for finding in findings:
        path = finding.paths[0]
        first.setdefault(path, finding)
        if path[0] != "dynamic":
            above.update(path[:length] for length in range(1, len(path)))
    return [finding for path, finding in first.items() if path not in above]


def _finding(detail: ErrorDetails, values: Mapping[str, Any], model: type[BaseModel]) -> Finding:
    path = _path(detail["loc"])
    kind = detail["type"]
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
    hint = suggestion(str(path[-1]), known)
    if hint is None and len(path) > 1:
        hint = f"known are: {', '.join(known)}"
    elif hint is None:
        hint = "`gptq schema` prints all keys"
    return Finding((path,), "E_CFG_UNKNOWN_KEY", "is not a known key", hint)


def _accepted(path: KeyPath, field: str, model: type[BaseModel]) -> str:
    if field == "bits" and path[0] == "dynamic":  # of one layer, which has no average
        return one_of(BITS)
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
    if isinstance(value, int | float):
        return _hint_for_number(field, value, model)
    if isinstance(value, str):
        return _hint_for_text(field, value, model)
    return None


def format_hint(word: str) -> str:
    """Return the hint for a format that is not one of `FORMATS`."""
    usual = "most engines load gptq or compressed-tensors; `gptq plan` shows which"
    return suggestion(word, FORMATS) or usual


def _hint_for_number(field: str, value: float, model: type[BaseModel]) -> str | None:
    if field == "bits" and value > BITS[-1]:
        return f"{BITS[-1]} bits are the most; a rule `-:NAME` of dynamic keeps a layer as it is"
    if field == "bits" and value < BITS[0]:
        return f"{BITS[0]} bits are the fewest"
    if field in ("nsamples", "seqlen"):
        return f"the default is {model.model_fields[field].default}"
    if field == "device" and type(value) is int and value >= 0:
        return f"did you mean cuda:{value}?"
    return None


def _hint_for_truth(value: object) -> str | None:
    word = str(value).lower()
    if word in {"yes", "on", "y", "1", "true"}:
        return "write true, without quotes"
    if word in {"no", "off", "n", "0", "false"}:
        return "write false, without quotes"
    return None


def _hint_for_text(field: str, value: str, model: type[BaseModel]) -> str | None:
    if field == "target":
        return target_hint(value) or suggestion(value, TARGETS) or ENGINES_ARE
    if field == "format":
        return format_hint(value)
    if field == "device" and value.isdecimal():
        return _hint_for_number(field, int(value), model)
    if _takes_numbers(model.model_fields[field].annotation):
        with suppress(ValueError):
            float(value)
            return f"write {value.strip()} without quotes"
    return suggestion(value, words_of(field, model))


def _takes_numbers(annotation: object) -> bool:
    """Return whether a value of this type, or of a part of it, may be a number."""
    if isinstance(annotation, int) or annotation in (int, float):  # of a Literal, or the type
        return True
    return any(map(_takes_numbers, get_args(annotation)))


def words_of(field: str, model: type[BaseModel]) -> Sequence[str]:
    """Return the words that a field accepts, none if it accepts any text."""
    if field in NAMES:
        return NAMES[field]
    schema = model.model_json_schema()["properties"][field]
    words: list[object] = []
    for option in (schema, *schema.get("anyOf", ())):
        words += option.get("enum", ())
    return [word for word in words if isinstance(word, str)]


def seconds(
    duration: str | None, option: str = "--max-runtime", *, plain: bool = False
) -> float | None:
    """Return the seconds of "3h30m", "90m" or "45s"; ConfigError E_CFG_RANGE for anything else.

    With `plain`, a number without a unit is seconds. Schedulers read such a number as minutes.
    """
    if duration is None:
        return None
    total = 0
    written = duration
    if plain and duration.isdecimal():
        written += "s"
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", written)
    if match is not None:
        hours, minutes, rest = match.groups(default="0")
        total = 3600 * int(hours) + 60 * int(minutes) + int(rest)
    if not total:
        raise ConfigError(
            "E_CFG_RANGE",
            f"{option} must be a time such as 3h30m, 90m or 45s, got {duration!r}",
            hint="write hours with h, minutes with m, seconds with s",
        )
    return total
