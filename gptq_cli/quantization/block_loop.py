"""The block loop: each transformer block is loaded, quantized stage by stage, run on, and dropped.

As many batches as fit wait inside the block; for the others the block is run again for each stage.
Both see the same. A block that runs out of memory is done once more, with less.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.config.rules import keeping
from gptq_cli.errors import InputError
from gptq_cli.events import BlockStarted, PhaseStarted, Warned
from gptq_cli.models.block_calls import State
from gptq_cli.models.experts import Experts
from gptq_cli.models.paused_forwards import PausedForwards, pause_forwards
from gptq_cli.models.stages import Stage, watch_inputs
from gptq_cli.models.stream import LoadedBlock
from gptq_cli.planning.run_plan import HEAD
from gptq_cli.quantization.layers import LayerSolver
from gptq_cli.quantization.routed_experts import RoutedInputs, quantize_experts
from gptq_cli.quantization.run_state import Run
from gptq_cli.runtime.hidden_states import HiddenStates
from gptq_cli.runtime.memory import (
    Memory,
    block_finished,
    give_back_freed_tensors,
    out_of_memory,
    reason,
)
from gptq_cli.solver.hessian import HessianOfBatches

Seen = list[tuple[Stage, Any]]


def quantize_blocks(run: Run) -> None:
    """Quantize every layer of the plan, block by block; the head counts as the last block.

    Begins after the blocks that `run.saved` has, and gives it each finished one.
    Raises GateError E_NUM_* when activations or Hessians are not usable, located by layer; InputError E_ARCH when a
    planned layer is never called; ResourceError E_OOM if the memory does not suffice; PausedError E_PAUSED.
    """
    stream = run.stream
    solver = LayerSolver(run)
    states = embed(run)
    for index in range(run.saved.restore(stream, states), stream.n_blocks):
        started = time.perf_counter()
        run.report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
        run.limits.check_time_for_block()
        with stream.block(index) as block:
            quantize_block(block, states, solver)
        run.saved.finished(index, stream, states)
        done = block_finished(index, stream, started)
        run.report(done)
        run.limits.add_block(done.seconds)
        run.budget.memory.check_host()
    if HEAD in run.layers:
        run.report(PhaseStarted("head", HEAD))
        quantize_head(states, solver)
        run.saved.finished(stream.n_blocks, stream, [])


def embed(run: Run) -> list[HiddenStates]:
    """Return the hidden states of this process's batches before the first block, and a copy for the unquantized model.

    There is a copy only if some layer follows the unquantized model (asymmetric_calibration).
    """
    share = run.ranks.share(len(run.batches))
    mine = run.batches[share.start : share.stop]
    count = len(run.batches)
    give_back_freed_tensors()
    run.report(PhaseStarted("embeddings", f"{count} batch{'es' * (count != 1)}"))
    hidden = HiddenStates(run.stream.embed(mine), run.budget.memory, share.start, count)
    if run.plan.asymmetric:
        return [hidden, hidden.copy()]
    return [hidden]


def quantize_block(block: LoadedBlock, states: Sequence[HiddenStates], solver: LayerSolver) -> None:
    """Solve the block's layers and move each of `states` past the block.

    The first of `states` passes through the quantized block, the second, if there is one, through the block as it was.
    With `true_sequential` each stage sees the earlier ones quantized. As many batches as the memory takes wait inside
    the block while its stages are solved; for the others the block is run again for each stage, with the same results.
    """
    run = solver.run
    passages = [Passage.through(block, states[0], run.layers)]
    for original in states[1:]:
        passages.append(Passage.through(block.unquantized_copy(), original, run.layers))
    first = passages[0]
    probe = run.prober(block.module, block.called, first.runs[0])
    stages = probe.stages(first.called)
    _check_reached(first.called, stages)
    n_waiting = 0
    if run.config.true_sequential and all(stage.calls == 1 for stage in stages):
        n_waiting = run.budget.places(len(states[0]), probe.waiting_bytes, len(passages))
    with ExitStack() as waiting:
        for passage in passages:
            waiting.enter_context(passage.waiting(stages, n_waiting))
        if run.config.true_sequential:
            for stage in stages:
                quantize_stages([stage], passages, solver)
        else:
            quantize_stages(stages, passages, solver)
        for passage in passages:
            passage.finish()


def quantize_stages(
    stages: Sequence[Stage], passages: Sequence[Passage], solver: LayerSolver
) -> None:
    """Gather what each stage sees over all batches, then solve the layers of each stage with it."""
    layers, first = solver.run.layers, passages[0]
    gathered = {stage: _nothing_seen(stage, passages, solver) for stage in stages}
    for batch, seen in enumerate(
        zip(*(passage.inputs(stages) for passage in passages), strict=True), first.first
    ):
        for calls in zip(*seen, strict=True):
            stage = calls[0][0]
            gathered[stage].add(batch, *(inputs for _, inputs in calls))
    for stage in stages:
        inputs = gathered.pop(stage)
        if isinstance(inputs, RoutedInputs):
            quantize_experts(inputs, first.linears, solver)
        else:
            hessian = solver.run.ranks.sum_hessians(inputs, first.n_all)
            solver.solve([layers[name] for name in stage.names], first.linears, hessian)


def quantize_head(states: Sequence[HiddenStates], solver: LayerSolver) -> None:
    """Solve the output head, whose inputs are the final hidden states as the model's own forward normalises them."""
    run = solver.run
    linears = {HEAD: run.stream.output_linear}
    with run.stream.head() as logits:
        passages = []
        for hidden in states:
            mine = run.batches[hidden.first : hidden.first + len(hidden)]
            runs = [partial(_head, logits, ids, hidden, number) for number, ids in enumerate(mine)]
            passages.append(Passage(linears, linears, runs, hidden))
        quantize_stages([Stage((HEAD,), 1)], passages, solver)


def _head(
    logits: Callable[[Tensor, State], Tensor], ids: Tensor, hidden: HiddenStates, batch: int
) -> Tensor:
    return logits(ids, hidden[batch])


def _nothing_seen(
    stage: Stage, passages: Sequence[Passage], solver: LayerSolver
) -> HessianOfBatches | RoutedInputs:
    name = stage.names[0]
    called = [passage.called[name] for passage in passages]
    experts = [module for module in called if isinstance(module, Experts)]
    if experts:
        return RoutedInputs(name, experts)
    return HessianOfBatches(solver.run.layers[name].in_features, solver.device)


def _check_reached(linears: Mapping[str, nn.Module], stages: Sequence[Stage]) -> None:
    missed = sorted(set(linears) - {name for stage in stages for name in stage.names})
    if missed:
        raise InputError(
            "E_ARCH",
            f"the model's forward never calls {len(missed)} linears of the block, so they cannot be calibrated, "
            f"first `{missed[0]}`",
            hint=f"keep them: {keeping(missed, in_all_blocks=True)[1]}",
        )


class Passage:
    """A forward of a block, or of what follows the blocks, for each batch of `hidden`; planned `linears` by name.

    `called` is what the forward calls by itself: these linears, but experts as a whole.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        called: Mapping[str, nn.Module],
        runs: Sequence[Callable[[], State]],
        hidden: HiddenStates,
    ) -> None:
        self.linears, self.called, self.runs, self._hidden = linears, called, runs, hidden
        self.first, self.n_all = hidden.first, hidden.n_all
        self._waiting: PausedForwards | None = None
        self._n_waiting = 0

    @classmethod
    def through(cls, block: LoadedBlock, hidden: HiddenStates, names: Container[str]) -> Passage:
        """The way of `hidden` through `block`, with those of its linears that `names` holds."""
        linears = {name: linear for name, linear in block.linears.items() if name in names}
        planned = set(linears.values())
        called = {
            name: module for name, module in block.called.items() if planned & set(module.modules())
        }
        return cls(
            linears,
            called,
            [partial(_run, block, hidden, batch) for batch in range(len(hidden))],
            hidden,
        )

    @contextmanager
    def waiting(self, stages: Sequence[Stage], n_batches: int) -> Iterator[None]:
        """The first `n_batches` wait at each of `stages` until they are told to go on."""
        with pause_forwards(stages, self.called, self.runs[:n_batches]) as self._waiting:
            self._n_waiting = n_batches
            yield

    def inputs(self, together: Sequence[Stage]) -> Iterator[Seen]:
        """For each batch, every input of the stages `together`, which are one stage if batches wait."""
        if self._waiting is not None and self._n_waiting:
            (stage,) = together
            for seen in self._waiting.reach(stage):
                yield [(stage, seen)]
        for run in self.runs[self._n_waiting :]:
            yield _watched(together, self.called, run)

    def finish(self) -> None:
        """Let every batch run to its end; `hidden` becomes what comes out."""
        if self._waiting is not None:
            for batch, output in enumerate(self._waiting.finish()):
                self._hidden[batch] = output
        for batch in range(self._n_waiting, len(self.runs)):
            self._hidden[batch] = self.runs[batch]()


def _run(block: LoadedBlock, hidden: HiddenStates, batch: int) -> State:
    return block.run(batch, hidden[batch])


def _watched(
    together: Sequence[Stage], called: Mapping[str, nn.Module], run: Callable[[], object]
) -> Seen:
    seen: Seen = []
    # A copy: what comes later in the forward may write into an input.
    watch_inputs(together, called, lambda stage, inputs: seen.append((stage, inputs.clone())), run)
    return seen


def quantize_all_blocks(run: Run) -> None:
    """Do what `run.saved` has not yet; a block that runs out of memory is done once more, with less.

    Where memory runs out, all of it is given back and the run resumes from what is saved, as the next call would, with
    the same bytes. From then on every block is saved. A second shortage in the same block ends the run. So does the
    first one in a run of several processes, since the others wait for this one in the middle of the block.
    """
    run.budget.memory.enforce()
    done_again = None
    while not run.saved.complete:
        try:
            quantize_blocks(run)
        except Exception as error:
            if not out_of_memory(error) or run.ranks.size > 1 or run.saved.first == done_again:
                raise
            if run.budget.memory.is_over_limit():
                raise  # of the user's --max-ram: a second try would hold as much
            why = reason(error)
        else:
            return
        done_again = run.saved.first
        _give_back(run.stream.device)
        run.budget.shrink_after_oom()
        run.saved.save_every_block()
        name = HEAD
        if done_again < run.stream.n_blocks:
            name = run.stream.block_name(done_again)
        again = f"`{name}` is done again with no batch waiting inside it, later blocks with half as many"
        advice = _advice(run.budget.memory)
        run.report(Warned("W_OOM_RETRY", f"memory ran out: {again}; {advice} ({why})"))


def _give_back(device: torch.device) -> None:
    """Let the device have what no tensor needs any more."""
    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each thread that has waited (torch's notes on CUDA); not in builds for the CPU
        getattr(torch._C, "_cuda_clearCublasWorkspaces", int)()
        torch.cuda.empty_cache()


def _advice(memory: Memory) -> str:
    if memory.device.type != "cuda":
        return "a smaller --max-ram lets fewer wait from the start"
    if memory.max_device_bytes is not None:
        return "a larger --max-vram avoids it"
    return "fewer --nsamples or a shorter --seqlen avoid it"
