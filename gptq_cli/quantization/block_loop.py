"""The block loop: load each transformer block, quantize it stage by stage, run it, and drop it.

A stage is a set of linears that see the same input, such as q_proj, k_proj and v_proj. Read on in
`layers.py`, which turns the inputs of a stage into quantized weights, and in `solver/solve.py`,
which rounds the columns of a weight.

As many batches as fit in memory are paused inside the block while its stages are solved. For the
other batches the block runs again for each stage. Both ways give the same results.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gptq_cli.config.layer import HEAD, keeping
from gptq_cli.errors import InputError
from gptq_cli.events import BlockStarted, PhaseStarted, Warned
from gptq_cli.models.block_calls import State
from gptq_cli.models.experts import Experts
from gptq_cli.models.paused_forwards import (
    PausedForwards,
    Seen,
    Stage,
    pause_forwards,
    watch_inputs,
)
from gptq_cli.models.stream import LoadedBlock, token_ids
from gptq_cli.quantization.layers import Inputs, LayerSolver, weight_for_shifts
from gptq_cli.quantization.routed_experts import RoutedInputs, quantize_experts
from gptq_cli.quantization.run_state import Run
from gptq_cli.runtime.memory import (
    Memory,
    block_finished,
    give_back_freed_tensors,
    out_of_memory,
    reason,
)
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.solver.hessian import HessianOfBatches

# What is seen of some stages in the forward of one batch: one entry for each call of a stage.
StageInputs = list[Seen]


def quantize_blocks(run: Run) -> None:
    """Quantize every layer of the plan, block by block; the output head counts as the last block.

    The loop starts after the blocks that `run.saved` has and saves each block that it finishes.
    Raises GateError E_NUM_* if activations or Hessians are not usable, with the layer's name;
    InputError E_ARCH if the model never calls a planned layer; ResourceError E_OOM; PausedError.
    """
    stream, solver = run.stream, LayerSolver(run)
    states = embed(run)  # also if the run resumes: it records how the model calls its blocks
    n_finished = run.saved.restore(stream, states)
    for index in range(n_finished, stream.n_blocks):
        started = time.perf_counter()
        run.report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
        run.limits.check_time_for_block()
        with stream.block(index) as block, block_forwards(block, states, run) as forwards:
            # Later stages see the quantized weights of earlier ones,
            for together in forwards.stages:
                quantize_stages(together, forwards, solver)
            # and the next block sees the outputs of the quantized one.
            forwards.finish()
        run.saved.finished(index, stream, states)
        done = block_finished(index, stream, started)
        run.report(done)
        run.limits.add_block(done.seconds)
        run.budget.memory.check_host()
    if HEAD in run.layers:
        run.report(PhaseStarted("head", HEAD))
        with head_forwards(states, run) as forwards:
            quantize_stages(forwards.stages[0], forwards, solver)
        run.saved.finished(stream.n_blocks, stream, [])


def quantize_stages(together: Sequence[Stage], forwards: Forwards, solver: LayerSolver) -> None:
    """Gather the inputs of some stages over all batches, then quantize the layers of each stage."""
    run = solver.run
    gathered = gather_inputs(together, forwards, run)
    for stage in together:
        inputs = gathered.pop(stage)
        if isinstance(inputs, RoutedInputs):
            quantize_experts(inputs, forwards.linears, solver)
            continue
        hessian = run.ranks.sum_hessians(inputs, len(run.batches))
        layers = [run.layers[name] for name in stage.names]
        for solved in solver.solve([layers], Inputs.of(hessian), run.ranks):
            solver.put_back(solved, forwards.linears)
            solver.finish([solved])


def gather_inputs(
    together: Sequence[Stage], forwards: Forwards, run: Run
) -> dict[Stage, HessianOfBatches | RoutedInputs]:
    """Return what each stage sees over this process's batches: a Hessian, or inputs of experts."""
    gathered = {stage: nothing_seen(stage, forwards, run) for stage in together}
    for batch, seen in forwards.inputs(together):
        # `seen` has the calls of each passage; the passages make the same calls in the same order.
        for same_call in zip(*seen, strict=True):
            inputs = [call.inputs for call in same_call]
            residuals = [call.residual for call in same_call if call.residual is not None]
            gathered[same_call[0].stage].add(batch, *inputs, *residuals)
    return gathered


def embed(run: Run) -> list[HiddenStates]:
    """Return the hidden states of this process's batches before the first block.

    If some layer follows the unquantized model (asymmetric_calibration), a second copy of the
    hidden states will pass through the unquantized blocks.
    """
    n_batches = len(run.batches)
    share = run.ranks.share(n_batches)
    mine = run.batches[share.start : share.stop]
    give_back_freed_tensors()
    noun = "batches"
    if n_batches == 1:
        noun = "batch"
    run.report(PhaseStarted("embeddings", f"{n_batches} {noun}"))
    hidden = HiddenStates(run.stream.embed(mine), run.budget.memory, share.start, n_batches)
    if run.plan.asymmetric:
        return [hidden, hidden.copy()]
    return [hidden]


def nothing_seen(stage: Stage, forwards: Forwards, run: Run) -> HessianOfBatches | RoutedInputs:
    name, limited = stage.names[0], run.config.limit_massive_tokens
    experts = []
    for passage in forwards.passages:
        module = passage.called[name]
        if isinstance(module, Experts):
            experts.append(module)
    if experts:
        return RoutedInputs(name, experts, limited)
    in_features, weight = run.layers[name].in_features, None
    if len(forwards.passages) > 1 and len(stage.names) == 1:
        weight = weight_for_shifts(run.layers[name], forwards.passages[1].linears[name])
    factors: Sequence[Tensor] = ()
    if run.gradients is not None and stage.calls == 1:
        factors = run.gradients.factors([run.layers[name] for name in stage.names])
    device = run.stream.device
    return HessianOfBatches(in_features, device, limited=limited, weight=weight, factors=factors)


# ------------------------------------------------------------ forwards through a block


@dataclass(frozen=True, slots=True)
class Forwards:
    """Forwards of all batches through a block, or through what follows the blocks.

    The first of `passages` is the quantized model. If there is a second one, it is the unquantized
    model. `stages` lists the stages in order; stages in one list are solved with the same forward.

    For a block of Llama, a passage has the seven linears of the block and one forward for each
    batch, and the stages are [[q, k, v]], [[o]], [[gate, up]], [[down]]. With a mixture of experts
    the passage calls the experts as one module, which is a stage of its own.
    """

    passages: Sequence[Passage]
    stages: Sequence[Sequence[Stage]]

    @property
    def linears(self) -> Mapping[str, nn.Module]:
        """The planned linears of the quantized model, by name."""
        return self.passages[0].linears

    def inputs(self, together: Sequence[Stage]) -> Iterator[tuple[int, Sequence[StageInputs]]]:
        """Yield the number of each batch and the inputs of the stages, one entry per passage."""
        of_batches = zip(*(passage.inputs(together) for passage in self.passages), strict=True)
        yield from enumerate(of_batches, self.passages[0].first_batch)

    def finish(self) -> None:
        """Run every batch to the end of the block; its output replaces its hidden states."""
        for passage in self.passages:
            passage.finish()


@contextmanager
def block_forwards(
    block: LoadedBlock, states: Sequence[HiddenStates], run: Run
) -> Iterator[Forwards]:
    """Start the forwards of `states` through `block`, paused in it as far as the memory allows.

    With `true_sequential` each stage sees the earlier ones quantized. Raises InputError E_ARCH if
    the block's forward does not call a planned linear.
    """
    passages = [Passage.through(block, states[0], run.layers)]
    for original in states[1:]:
        passages.append(Passage.through(block.unquantized_copy(), original, run.layers))
    first = passages[0]
    probe = run.prober(block.module, block.called, first.forwards[0], residuals=len(passages) > 1)
    stages = probe.stages(first.called)
    _check_reached(first.called, stages)
    if not run.config.true_sequential:
        yield Forwards(passages, [stages])
        return
    n_paused = 0
    if all(stage.calls == 1 for stage in stages):
        n_paused = run.budget.n_paused(
            len(states[0]), probe.waiting_bytes, len(passages), probe.forward_bytes
        )
    with ExitStack() as paused:
        for passage in passages:
            paused.enter_context(passage.paused(stages, n_paused))
        yield Forwards(passages, [[stage] for stage in stages])


@contextmanager
def head_forwards(states: Sequence[HiddenStates], run: Run) -> Iterator[Forwards]:
    """Start the forwards of `states` through the final norm and the output head of the model."""
    linears = {HEAD: run.stream.output_linear}
    with run.stream.head() as logits:
        passages = []
        for hidden in states:
            mine = run.batches[hidden.first_batch : hidden.first_batch + len(hidden)]
            forwards = []
            for number, batch in enumerate(mine):
                forwards.append(partial(_head, logits, token_ids(batch), hidden, number))
            passages.append(Passage(run.stream.output_linear, linears, linears, forwards, hidden))
        yield Forwards(passages, [[Stage((HEAD,), 1)]])


def _head(
    logits: Callable[[Tensor, State], Tensor], ids: Tensor, hidden: HiddenStates, batch: int
) -> Tensor:
    return logits(ids, hidden[batch])


def _check_reached(linears: Mapping[str, nn.Module], stages: Sequence[Stage]) -> None:
    missed = set(linears)
    for stage in stages:
        missed.difference_update(stage.names)
    if not missed:
        return
    names = sorted(missed)
    raise InputError(
        "E_ARCH",
        f"the model's forward never calls {len(names)} linears of the block, so they cannot be "
        f"calibrated, first `{names[0]}`",
        hint=f"keep them: {keeping(names, in_all_blocks=True).option}",
    )


class Passage:
    """One forward for each batch of `hidden`, through a block or what follows the blocks.

    `linears` are the planned linears of `module` by name. `called` is what the forward itself
    calls: these linears, but a mixture of experts as a whole. Each of `forwards` runs one batch
    from the start.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Module],
        called: Mapping[str, nn.Module],
        forwards: Sequence[Callable[[], State]],
        hidden: HiddenStates,
    ) -> None:
        self._module, self.linears, self.called = module, linears, called
        self.forwards, self._hidden = forwards, hidden
        self.first_batch = hidden.first_batch
        self._paused: PausedForwards | None = None
        self._n_paused = 0

    @classmethod
    def through(cls, block: LoadedBlock, hidden: HiddenStates, names: Container[str]) -> Passage:
        """Return the passage of `hidden` through `block`, with the linears that `names` holds."""
        linears = {name: linear for name, linear in block.linears.items() if name in names}
        planned = set(linears.values())
        called = {}
        for name, module in block.called.items():
            if planned.intersection(module.modules()):
                called[name] = module
        forwards = [partial(_forward, block, hidden, batch) for batch in range(len(hidden))]
        return cls(block.module, linears, called, forwards, hidden)

    @contextmanager
    def paused(self, stages: Sequence[Stage], n_batches: int) -> Iterator[None]:
        """Pause the forwards of the first `n_batches` batches at each of `stages`."""
        runs = self.forwards[:n_batches]
        with pause_forwards(stages, self.called, runs, self._module) as paused:
            self._paused, self._n_paused = paused, n_batches
            yield

    def inputs(self, together: Sequence[Stage]) -> Iterator[StageInputs]:
        """Yield the inputs of the stages for each batch; paused batches allow one stage at once."""
        if self._paused is not None and self._n_paused:
            (stage,) = together
            for seen in self._paused.reach(stage):
                yield [seen]
        for forward in self.forwards[self._n_paused :]:
            yield _watched(together, self.called, forward, self._module)

    def finish(self) -> None:
        """Run every batch to its end; its output replaces its hidden states."""
        if self._paused is not None:
            for batch, output in enumerate(self._paused.finish()):
                self._hidden[batch] = output
        for batch in range(self._n_paused, len(self.forwards)):
            self._hidden[batch] = self.forwards[batch]()


def _forward(block: LoadedBlock, hidden: HiddenStates, batch: int) -> State:
    return block.run(batch, hidden[batch])


def _watched(
    together: Sequence[Stage],
    called: Mapping[str, nn.Module],
    forward: Callable[[], object],
    module: nn.Module,
) -> StageInputs:
    found: StageInputs = []

    def note(seen: Seen) -> None:
        found.append(seen.clone())

    watch_inputs(together, called, note, forward, module)
    return found


# ------------------------------------------------------------ out of memory


def quantize_all_blocks(run: Run) -> None:
    """Run `quantize_blocks`; if the memory runs out in a block, repeat this block once with less.

    The run then frees all memory and resumes from what is saved, as the next call would, so that
    it writes the same bytes. From then on it saves every block. A second shortage in the same
    block ends the run, and so does the first one if several processes work together, because the
    others wait for this process in the middle of the block.
    """
    run.budget.memory.enforce()
    repeated = None
    while not run.saved.complete:  # it is from the start if an earlier call only had to publish
        try:
            quantize_blocks(run)
        except Exception as error:
            if not _may_repeat(run, repeated, error):
                raise
            why = reason(error)
        else:
            return
        repeated = run.saved.n_finished
        _free_memory(run.stream.device)
        run.budget.shrink_after_oom()
        run.saved.save_every_block()
        name = HEAD
        if repeated < run.stream.n_blocks:
            name = run.stream.block_name(repeated)
        less = "no batch pauses inside it, and half as many inside later blocks"
        advice = _advice(run.budget.memory)
        text = f"out of memory in `{name}`, which runs again with less: {less}; {advice} ({why})"
        run.report(Warned("W_OOM_RETRY", text))


def _may_repeat(run: Run, repeated: int | None, error: Exception) -> bool:
    """Return whether a second try of the first unfinished block can succeed after `error`."""
    if not out_of_memory(error) or run.ranks.size > 1 or run.saved.n_finished == repeated:
        return False
    # A second try would hold as much as the user's --max-ram forbids.
    return not run.budget.memory.is_over_limit()


def _free_memory(device: torch.device) -> None:
    """Return memory that no tensor uses to the device."""
    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each thread that has waited (torch's notes on CUDA). The
        # function does not exist in builds for the CPU.
        if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _advice(memory: Memory) -> str:
    if memory.device.type != "cuda":
        return "a smaller --max-ram pauses fewer batches from the start"
    if memory.max_device_bytes is not None:
        return "a larger --max-vram avoids it"
    return "fewer --nsamples or a shorter --seqlen avoid it"
