"""The events of a run as data: the pipeline reports them, the command line shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptq_cli.files import BytesDone

if TYPE_CHECKING:
    from gptq_cli.config.serving import Verdict


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """A part of the command began.

    `name` is "source", "calibration", "probe", "gradients", "embeddings", "head", "copy", "verify"
    or "manifest" in `quantize`, and "dataset" or "evaluation" in `evaluate_perplexity`. In both,
    "device" names the device, and "text" tells how chats became text. "resume" tells which work of
    an earlier call is used. `detail` is a few words about it.
    """

    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """The plan of the run, made before any weight is read.

    `engines` tells for each serving engine whether it will load the output. `target` is the
    engine that the user chose, or None.
    """

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
    """The result for one solved layer.

    `relative_error` is relative to the energy of the layer's output on the calibration tokens:
    tr(E H E') / tr(W H W'). `rtn_relative_error` is the same for round-to-nearest on the min/max
    grid of the layer's groups; if `rtn_rows` is not None, it was measured on so many rows, and is
    an estimate. `damp_percent` is the damping that was used, in the configuration's `damp_mode`.
    `asymmetric_calibration` is the strength with which the layer follows the unquantized model, the
    mean over its outputs; None if it does not. The `seconds` of layers that are solved together are
    divided by their number of weights. `fallback` is the reason if the layer was rounded to
    nearest: its inputs were not finite ("inputs"), its Hessian could not be factored ("hessian"),
    or it saw no tokens ("tokens"). Its errors are then those of the weights, with the identity as
    H. `loss_ratio` tells what loss-aware rounding gains: tr(G E H E') as a share of what it would
    be without it; None if the layer was rounded without gradients.
    """

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
    rtn_rows: int | None = None
    asymmetric_calibration: float | None = None
    loss_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class BlockStarted:
    """A block begins, or begins again after it ran out of memory.

    Its layers are then reported again.
    """

    index: int
    n_blocks: int
    name: str


@dataclass(frozen=True, slots=True)
class LayerStarted:
    """A layer is about to be solved."""

    name: str


@dataclass(frozen=True, slots=True)
class LayerSolved:
    """A layer has been solved."""

    report: LayerReport


@dataclass(frozen=True, slots=True)
class ExpertsCovered:
    """The number of calibration tokens that each expert of a layer received.

    A token counts once for each expert that receives it. `name` is the prefix of the names of the
    experts' linears, and `uncovered` lists the indices of the experts without a token.
    """

    name: str
    tokens: tuple[int, ...]
    min_tokens: int
    median_tokens: float
    uncovered: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockFinished:
    """A block is finished.

    `seconds` is the time of this block, `host_bytes` the memory of the process now, `device_bytes`
    the peak so far (0 without an accelerator).
    """

    index: int
    n_blocks: int
    name: str
    seconds: float
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class StepsDone:
    """A pass in reverse has done `done` of `total` steps; a part of a step counts as this part.

    A step is a block forward, the output head, or a block in reverse. When the present phase began,
    `before` steps were done.
    """

    done: float
    total: int
    before: int = 0


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning: something that the user should know, but that did not stop the run."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Noted:
    """A note: a choice that was made for the user, or something that will have no effect."""

    text: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run resumes: the first `index` of `n_blocks` blocks are read from `directory`.

    `layers` and `experts` are the reports about these blocks.
    """

    index: int
    n_blocks: int
    directory: Path
    layers: tuple[LayerReport, ...] = ()
    experts: tuple[ExpertsCovered, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkKept:
    """The run ends early, but its finished blocks stay in `directory`.

    Without `blocks` it has finished none, but its gradients or its widths. If `failed`, the same
    call would fail again.
    """

    directory: Path
    failed: bool = False
    blocks: bool = True


@dataclass(frozen=True, slots=True)
class EngineSaid:
    """A line that a serving engine wrote before it failed."""

    engine: str
    line: str


Event = (
    PhaseStarted
    | BytesDone
    | StepsDone
    | RunPlanned
    | BlockStarted
    | LayerStarted
    | LayerSolved
    | ExpertsCovered
    | BlockFinished
    | Warned
    | Noted
    | Resumed
    | WorkKept
    | EngineSaid
)
Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing with `event`; the default of callers that want no events."""
    del event
