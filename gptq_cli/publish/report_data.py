"""Checks of the data of a run and of an evaluation, which others may have written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

MOST_BLOCKS, MOST_LAYERS = 10_000, 1_000_000
MOST_POINTS = 1000  # of a frontier
MOST_TOKEN_COUNTS = 1_000_000  # layers with experts times the experts of the widest one
LONGEST_TEXT = 100_000


class Damaged(ValueError):
    """Data that cannot be shown; the text says where and why."""


def printable(text: str) -> str:
    """Return `text` with U+FFFD in place of each letter that cannot be shown."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(letter: str) -> str:
    if letter.isprintable():
        return letter
    return "\ufffd"


def _printable_if_text(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    return value


def _finite_or_none(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value


Text = Annotated[str, BeforeValidator(_printable_if_text), Field(max_length=LONGEST_TEXT)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Index = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Width = Annotated[int, Field(strict=True, ge=1, le=32)]
Number = Annotated[float, Field(strict=True, ge=0, lt=1e15)]
Share = Annotated[float | None, Field(strict=True), AfterValidator(_finite_or_none)]


class Layer(BaseModel):
    """A solved layer; see `LayerReport`."""

    name: Text
    block: Index
    bits: Width
    relative_error: Share
    rtn_relative_error: Share
    damp_percent: Number
    damp_retries: Count
    tokens: Count
    fallback: Text | None = None
    rtn_rows: Count | None = None
    asymmetric_calibration: Share = None
    loss_ratio: Share = None


class Block(BaseModel):
    """Time and memory of a block; see `BlockFinished`."""

    index: Index
    seconds: Number
    host_bytes: Count
    device_bytes: Count


class Experts(BaseModel):
    """Tokens of each expert of a layer; see `ExpertsCovered`."""

    name: Text
    tokens: Annotated[list[Count], Field(min_length=1)]


class Settings(BaseModel):
    """The part of the configuration that the page shows."""

    moe_uncovered: Text = ""


class Allocation(BaseModel):
    """The sizes and the expected KL of one choice of widths; see `allocation.run.Entry`."""

    bits: Number
    bytes: Annotated[Count, Field(gt=0)]
    expected_kl: Annotated[float, Field(strict=True, lt=1e15, allow_inf_nan=False)]


class Choice(BaseModel):
    """The widths that a run with a goal chose, and those that it chose from."""

    units: Text = ""
    frontier: Annotated[list[Allocation], Field(max_length=MOST_POINTS)]
    uniform: Annotated[list[Allocation], Field(max_length=MOST_POINTS)]
    chosen: Allocation


class Evaluation(BaseModel):
    """The result of `gptq eval-ppl --json`; a baseline comes with `kl` and `top1_agreement`."""

    perplexity: Number
    windows: Count
    seqlen: Count
    dataset: Text
    dtype: Text
    dataset_config: Text | None = None
    dataset_split: Text | None = None
    dataset_revision: Text | None = None
    baseline_perplexity: Number | None = None
    kl: Number | None = None
    top1_agreement: Number | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Evaluation:
        compared = self.kl is not None and self.top1_agreement is not None
        if self.baseline_perplexity is not None and not compared:
            raise ValueError("a baseline has no kl or no top1_agreement beside it")
        return self


class Run(BaseModel):
    """The data of a run, as `gptq quantize --report` writes it."""

    name: Text
    model: Text
    commit: Text | None
    version: Text
    command: Text
    bytes_before: Count
    bytes_after: Annotated[Count, Field(gt=0)]
    bits_per_weight: Number
    seconds: Number
    tokens: Count
    peak_host_bytes: Count
    peak_device_bytes: Count
    config: Settings
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MOST_LAYERS)]
    blocks: Annotated[list[Block], Field(max_length=MOST_BLOCKS)]
    experts: Annotated[list[Experts], Field(max_length=MOST_BLOCKS)] = []
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Run:
        widest = max([len(layer.tokens) for layer in self.experts], default=0)
        if widest * len(self.experts) > MOST_TOKEN_COUNTS:
            raise ValueError(f"{len(self.experts)} layers of {widest} experts are too many")
        return self


def checked_run(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known fields of a run's data; raise Damaged if a value is missing or wrong."""
    return _checked(Run, content)


def checked_choice(content: object) -> dict[str, Any]:
    """Return the known fields of a choice; raise Damaged if a value is missing or wrong."""
    return _checked(Choice, content)


def checked_evaluation(content: object) -> dict[str, Any]:
    """Return the known fields of an evaluation; raise Damaged if a value is missing or wrong."""
    return _checked(Evaluation, content)


def _checked(kind: type[BaseModel], content: object) -> dict[str, Any]:
    try:
        return kind.model_validate(content).model_dump()
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_input=False, include_context=False)
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            field = ".".join(map(str, first["loc"]))
            message = f"{field}: {message}"
        if others:
            message += f", and {len(others)} more"
        raise Damaged(message) from None
