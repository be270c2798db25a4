"""The state of a run, which the parts of the block loop share.

`Run` is one run as one of its processes sees it. `Record` keeps what its result is made of,
`Limits` end it, and `FinishedBlocks` saves its blocks and restores them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import GateError, PausedError
from gptq_cli.events import (
    BlockFinished,
    Event,
    ExpertsCovered,
    LayerReport,
    LayerSolved,
    Report,
    Resumed,
)
from gptq_cli.models.block_calls import Container
from gptq_cli.models.paused_forwards import Prober
from gptq_cli.models.stream import Batch, ModelStream
from gptq_cli.planning.estimate import solving_bytes
from gptq_cli.planning.run_plan import LayerPlan, RunPlan
from gptq_cli.runtime.memory import Memory, PauseBudget
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.quantized_linear import QuantizedLinear

# The state of one batch: hidden states of the quantized model, and of the unquantized one if there
# is one, and the containers that the blocks pass on beside them.
BatchState = tuple[tuple[Tensor, ...], list[Any]]

MOST_SHARE = 1 / 20  # of the time of a run
BYTES_PER_SECOND = 1e9  # of hidden states that are hashed and written; assumed

Keep = Callable[[Sequence[tuple[LayerPlan, QuantizedLinear]]], None]


def keep_nothing(layers: Sequence[tuple[LayerPlan, QuantizedLinear]]) -> None:
    """Forget solved layers, which another process writes."""
    del layers


@dataclass(frozen=True, slots=True)
class OutputGradients:
    """The sum G [O, O] of g gᵀ over the gradients g at the outputs of a layer, of `tokens`."""

    sums: Tensor
    tokens: int


class Gradients(Protocol):
    """The gradients of all loss-aware layers; `gradients.SummedGradients` implements it."""

    def of(self, layer: LayerPlan) -> OutputGradients:
        """Return those of one layer, on the device; all processes of a run must ask for it."""

    def factors(self, layers: Sequence[LayerPlan]) -> Sequence[Tensor]:
        """Return the factors of tokens [n] for each batch, for layers with the same inputs.

        There are none if the layers weigh their tokens alike. All processes must ask for it.
        """


@dataclass(slots=True)
class Run:
    """One run, as one of its processes sees it.

    `batches` holds the token ids [batch, seqlen] of all calibration batches; `ranks` gives this
    process a share of them. `keep` receives the solved layers, `saved` each finished block.
    """

    config: QuantizeConfig
    plan: RunPlan
    stream: ModelStream
    ranks: Ranks
    batches: Sequence[Batch]
    record: Record
    limits: Limits
    keep: Keep = keep_nothing
    saved: FinishedBlocks = field(init=False)
    budget: PauseBudget = field(init=False)
    layers: dict[str, LayerPlan] = field(init=False)  # those to quantize, by name
    prober: Prober = field(default_factory=Prober)
    gradients: Gradients | None = None  # of the loss-aware layers, if there are any

    @property
    def report(self) -> Report:
        """The listener that receives all events."""
        return self.record

    def __post_init__(self) -> None:
        config, device, processes = self.config, self.stream.device, self.ranks.local_world_size
        memory = Memory(device, config.max_vram_bytes, config.max_ram_bytes, processes)
        solving = solving_bytes(self.plan, config, device.type, self.ranks.size)
        self.budget = PauseBudget(memory, self.record, solving)
        self.layers = {layer.name: layer for layer in self.plan.quantized}


class Record:
    """Passes every event on and keeps the parts of a result: layers, blocks, memory peaks in bytes.

    If a block is repeated, its layers are kept once.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._layers: dict[str, LayerReport] = {}
        self._experts: dict[str, ExpertsCovered] = {}
        self.blocks: list[BlockFinished] = []
        self.host_bytes = 0
        self.device_bytes = 0
        self.resumed_blocks = 0
        self.already_done = False

    @property
    def layers(self) -> list[LayerReport]:
        """The reports of layers, in the order in which the layers were first solved."""
        return list(self._layers.values())

    @property
    def experts(self) -> list[ExpertsCovered]:
        """The coverage of each layer of experts, in the same order."""
        return list(self._experts.values())

    def for_manifest(self) -> dict[str, Any]:
        """Return layers and experts for the manifest, without the seconds, which vary."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            del layer["seconds"]
        return {"layers": layers, "experts": [asdict(covered) for covered in self.experts]}

    def take_over(self, manifest: Mapping[str, Any]) -> None:
        """Take the record of the earlier call that finished the output of `manifest`."""
        self.already_done = True
        self._add(
            [LayerReport(**layer, seconds=0.0) for layer in manifest.get("layers", ())],
            [ExpertsCovered(**layer) for layer in manifest.get("experts", ())],
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerSolved):
            self._add([event.report])
        elif isinstance(event, ExpertsCovered):
            self._add(experts=[event])
        elif isinstance(event, BlockFinished):
            self.blocks.append(event)
            self.host_bytes = max(self.host_bytes, event.host_bytes)
            self.device_bytes = max(self.device_bytes, event.device_bytes)
        elif isinstance(event, Resumed):
            self.resumed_blocks = event.index
            self._add(event.layers, event.experts)
        self._report(event)

    def _add(
        self, layers: Iterable[LayerReport] = (), experts: Iterable[ExpertsCovered] = ()
    ) -> None:
        self._layers |= {layer.name: layer for layer in layers}
        self._experts |= {covered.name: covered for covered in experts}


class Limits:
    """The limits of a run: the block loop asks before each block and layer, and after each layer.

    If `max_seconds` is None, the time is not limited. `spent` of these seconds are over already.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        max_seconds: float | None = None,
        spent: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._now = config, now
        self._rounded: set[str] = set()  # names, since a layer may be solved again
        self._longest = 0.0
        self._seconds = math.inf
        if max_seconds is not None:
            self._seconds = max_seconds
        self._end = now() + self._seconds - spent

    @property
    def has_end(self) -> bool:
        """Whether the time is limited."""
        return math.isfinite(self._seconds)

    def check_time_for_block(self, what: str = "block") -> None:
        """Raise PausedError E_PAUSED if a block as long as the longest so far would be late.

        `what` is the word for it: the steps of a pass are limited, too.
        """
        if self._now() + self._longest > self._end:
            self._pause(f"the next {what} would not finish", what)

    def check_time_together(self, ranks: Ranks, what: str = "block") -> None:
        """Raise PausedError E_PAUSED on all processes if the leader's next block would be late."""
        pause = None
        if ranks.is_leader:
            try:
                self.check_time_for_block(what)
            except PausedError as error:
                pause = str(error), error.hint
        (pause,) = ranks.broadcast([pause])
        if pause is not None:
            message, hint = pause
            raise PausedError("E_PAUSED", message, hint=hint)

    def check_time(self, what: str = "the current block") -> None:
        """Raise PausedError E_PAUSED if the time is over; `what` is done only as a whole."""
        if self._now() > self._end:
            self._pause(f"{what}, which will start over, did not finish")

    def _pause(self, why: str, what: str = "block") -> NoReturn:
        """Raise PausedError; if blocks are kept, WorkKept shows the command that resumes."""
        hint = None
        if not self._longest:
            hint = f"this call has finished no {what}: allow more time"
        limit = f"--max-runtime ({self._seconds:g} s)"
        raise PausedError("E_PAUSED", f"{why} within {limit}", hint=hint)

    def add_block(self, seconds: float) -> None:
        """Note how long a block took."""
        self._longest = max(self._longest, seconds)

    def check_fallbacks(self, layers: Iterable[LayerReport]) -> None:
        """Count the `layers` that were rounded to nearest.

        Layers of resumed blocks count as well, although their run may have had other limits.
        Raises GateError E_NUM_FALLBACKS if there are too many.
        """
        allowed = self._config.max_fallbacks
        for layer in layers:
            if not layer.fallback:
                continue
            self._rounded.add(layer.name)
            if layer.fallback in ("inputs", "hessian") and self._config.on_numeric_fault == "error":
                text = f"an earlier call rounded `{layer.name}` to nearest"
                raise GateError(
                    "E_NUM_FALLBACKS",
                    f"{text}, but --on-numeric-fault is error now",
                    hint="use --on-numeric-fault rtn, or --resume never",
                )
            if allowed is not None and len(self._rounded) > allowed:
                count = f"{len(self._rounded)} layers had to be rounded to nearest"
                raise GateError(
                    "E_NUM_FALLBACKS",
                    f"{count}, the last `{layer.name}`, but --max-fallbacks allows {allowed}",
                    hint="use more or other calibration text, or allow more",
                )


class Store(Protocol):
    """The finished blocks on the disk, which only the leader has.

    `resume.BlockStore` is the one implementation; naming it here would be a circle of imports.
    """

    n_finished: int
    times: SavingTimes

    def read(self) -> list[BatchState]:
        """Return the state of every batch after the last finished block, on the host."""

    def read_back(self) -> None:
        """Begin to read back what was written of finished blocks, while the caller continues."""

    def save(self, block: int, batches: list[BatchState] | None) -> None:
        """Make the blocks up to `block` durable, with the state of `batches` after them."""


class FinishedBlocks:
    """The finished blocks of a run of `n_steps` blocks: the first `n_finished` of them.

    The output head counts as the last block. Only the leader has a `store`: it sends the saved
    states to the other ranks and gathers theirs.
    """

    def __init__(self, ranks: Ranks, n_steps: int, store: Store | None = None) -> None:
        self._ranks, self._n_steps, self._store = ranks, n_steps, store
        n_finished = None
        if store is not None:
            n_finished = store.n_finished
        self.n_finished = ranks.broadcast(n_finished)

    @property
    def complete(self) -> bool:
        """Whether every block is finished."""
        return self.n_finished == self._n_steps

    def restore(self, stream: ModelStream, hidden: Sequence[HiddenStates]) -> int:
        """Load `hidden`, and what the blocks of `stream` pass on, as saved; return `n_finished`."""
        if not self.n_finished:
            return 0
        saved = None
        if self._store is not None:
            saved = self._store.read()
        batches = self._ranks.scatter(saved, hidden[0].n_all)
        states_by_model = zip(*(states for states, _ in batches), strict=True)
        for of_model, states in zip(hidden, states_by_model, strict=True):
            of_model.restore(states)
        for containers, (_, passed_on) in zip(stream.carried, batches, strict=True):
            _fill(containers, passed_on, stream.device)
        return self.n_finished

    def finished(self, block: int, stream: ModelStream, hidden: Sequence[HiddenStates]) -> None:
        """Read back the tensors of `block`, and save the blocks up to it if it is time to.

        `hidden` are the states after it.
        """
        if self._store is not None:
            self._store.read_back()
        if block + 1 == self._n_steps:
            if self._store is not None:
                self._store.save(block, None)
        else:
            due = None
            if self._store is not None:
                n_bytes = sum(of_model.nbytes for of_model in hidden)
                due = self._store.times.is_due(self._ranks.size * n_bytes)
            if not self._ranks.broadcast(due):
                return
            batches = self._ranks.gather(_batches(stream, hidden))
            if self._store is not None:
                self._store.save(block, batches)
        self.n_finished = block + 1

    def save_every_block(self) -> None:
        """Save after every block from now on."""
        if self._store is not None:
            self._store.times.always = True


class SavingTimes:
    """Tells when to save: if saving takes at most a twentieth of the time since the last save.

    With `always` it is time after every block.
    """

    def __init__(self, *, always: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self.always, self._now, self._last = always, now, now()

    def is_due(self, nbytes: int) -> bool:
        """Return whether to save this many bytes now."""
        return self.always or self._now() - self._last >= nbytes / BYTES_PER_SECOND / MOST_SHARE

    def saved(self) -> None:
        """Restart the interval."""
        self._last = self._now()


def _batches(stream: ModelStream, hidden: Sequence[HiddenStates]) -> list[BatchState]:
    """Return the state of each batch of this process."""
    states_of_batches = zip(*(of_model.stored for of_model in hidden), strict=True)
    batches: list[BatchState] = []
    for states, containers in zip(states_of_batches, stream.carried, strict=True):
        batches.append((states, [_copied(container) for container in containers]))
    return batches


def _copied(container: Container) -> dict[Any, Any] | list[Any]:
    if isinstance(container, MutableMapping):
        return dict(container)
    return list(container)


def _fill(containers: Sequence[Container], passed_on: Sequence[Any], device: torch.device) -> None:
    for container, saved in zip(containers, passed_on, strict=True):
        saved = tree_map_only(Tensor, lambda tensor: tensor.to(device), saved)
        if isinstance(container, MutableMapping):
            container.update(saved)
        else:
            container.extend(saved)
