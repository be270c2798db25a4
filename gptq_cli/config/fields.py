"""The types of the fields of a configuration, each with the words for what it accepts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, get_args

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from gptq_cli.config.finding import one_of
from gptq_cli.config.layer import (
    BITS,
    PRESETS,
    BitWidth,
    DampMode,
    OnFault,
    ScaleSearch,
    Uncovered,
)
from gptq_cli.config.rules import flaw_of
from gptq_cli.config.serving_table import TARGETS

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
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


def _group_size(columns: int) -> int:
    if columns == 0 or columns < -1:
        raise ValueError("group_size")
    return columns


def _size(size: int | str) -> int | str:
    size_in_bytes(size)
    return size


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError("preset")
    return name


def _target(name: str | None) -> str | None:
    if name not in (None, *TARGETS):
        raise ValueError("target")
    return name


def _rule(rule: str) -> str:
    if reason := flaw_of(rule):
        raise PydanticCustomError("regex", "{reason}", {"reason": reason})
    return rule


TRUTH = Accepts("true or false")
Bits = Annotated[BitWidth, Accepts(one_of(BITS))]
GroupSize = Annotated[
    int,
    AfterValidator(_group_size),
    Accepts("a positive number of columns, or -1 for one group per row"),
]
DampPercent = Annotated[float, Field(gt=0, lt=1), Accepts("a number strictly between 0 and 1")]
Damping = Annotated[DampMode, Accepts(one_of(get_args(DampMode)))]
Search = Annotated[ScaleSearch, Accepts(one_of(get_args(ScaleSearch)))]
Strength = Annotated[float, Field(ge=0, le=1), Accepts("a number from 0 to 1")]
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
Target = Annotated[str | None, AfterValidator(_target), Accepts(", ".join(TARGETS) + " or null")]
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
    asymmetric_calibration: Strength
    damp_mode: Damping
    damp_percent: DampPercent
