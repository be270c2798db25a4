"""What happened during a run, as data: the pipeline reports, the command line shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptq_cli.config.serving import Verdict


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """A part of the run began: "plan", "calibration", "embeddings", "blocks", "head", "copy", "publish"."""

    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """What will be done, known before any weight is read, and who will load it, as `target` demands or not."""

    model: str
    n_blocks: int
    n_quantized: int
    n_kept: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    engines: tuple[Verdict, ...] = ()
    target: str | None = None


Fallback = Literal["inputs", "hessian", "tokens"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One solved layer. Errors are relative to the layer's output energy on the calibration tokens:
    tr(E H E') / tr(W H W'); `rtn_relative_error` is the same for round-to-nearest on the min/max grid of its groups.
    `damp_percent` is what was used, in the configuration's `damp_mode`. Layers solved together share their `seconds` by
    their weights. `fallback` says why a layer was rounded to nearest: its inputs were not finite, its Hessian could not
    be factored, it saw no tokens; its errors are then those of the weights, H being the identity."""

    name: str
    block: int
    bits: int
    group_size: int
    relative_error: float
    rtn_relative_error: float
    damp_percent: float
    damp_retries: int
    dead_columns: int
    tokens: int
    seconds: float
    fallback: Fallback | None = None


@dataclass(frozen=True, slots=True)
class BlockStarted:
    """A block begins, or begins again because it ran out of memory: then its layers are told of again, too."""

    index: int
    n_blocks: int
    name: str


@dataclass(frozen=True, slots=True)
class LayerStarted:
    """The layer now at work, for a progress view."""

    name: str


@dataclass(frozen=True, slots=True)
class LayerSolved:
    report: LayerReport


@dataclass(frozen=True, slots=True)
class ExpertsCovered:
    """How many calibration tokens each expert of a layer was sent; a token counts once for each expert it is sent to.

    `name` is what the names of the experts' linears begin with, `uncovered` are the numbers of experts without a token.
    """

    name: str
    tokens: tuple[int, ...]
    min_tokens: int
    median_tokens: float
    uncovered: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockFinished:
    """`seconds` of this block, `host_bytes` resident now, `device_bytes` peak so far (0 without an accelerator)."""

    index: int
    n_blocks: int
    name: str
    seconds: float
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the user should know and that did not stop the run."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run goes on where an earlier one ended: `index` blocks of `n_blocks`, with what was said of their layers and
    experts, are taken from `directory`."""

    index: int
    n_blocks: int
    directory: Path
    layers: tuple[LayerReport, ...] = ()
    experts: tuple[ExpertsCovered, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkKept:
    """The run ends early; what it has finished stays in `directory`. `failed`: the same call would end so again."""

    directory: Path
    failed: bool = False


Event = (
    PhaseStarted
    | RunPlanned
    | BlockStarted
    | LayerStarted
    | LayerSolved
    | ExpertsCovered
    | BlockFinished
    | Warned
    | Resumed
    | WorkKept
)
Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The report of a caller who wants none."""
    del event
