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

from gptq_cli.config.layer import FaultPolicy
from gptq_cli.config.rules import keeping
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import InputError
from gptq_cli.events import BlockStarted, PhaseStarted, Report, Warned
from gptq_cli.models.block_calls import State
from gptq_cli.models.experts import Experts
from gptq_cli.models.paused_forwards import WaitingBatches, waiting_batches
from gptq_cli.models.stages import Prober, Stage, watch_inputs
from gptq_cli.models.stream import LoadedBlock, ModelStream
from gptq_cli.planning.run_plan import HEAD, LayerPlan, RunPlan
from gptq_cli.quantization.layers import Keep, LayerSolver
from gptq_cli.quantization.resume import FinishedBlocks
from gptq_cli.quantization.routed_experts import RoutedInputs, quantize_experts
from gptq_cli.runtime.hidden_states import HiddenStates
from gptq_cli.runtime.memory import Memory, WaitingRoom, block_finished, give_back_freed_tensors, out_of_memory, reason
from gptq_cli.runtime.ranks import SINGLE_PROCESS, Ranks
from gptq_cli.solver.hessian import HessianOfBatches

Seen = list[tuple[Stage, Any]]


def quantize_blocks(
    stream: ModelStream,
    plan: RunPlan,
    batches: Sequence[Tensor],
    *,
    true_sequential: bool,
    policy: FaultPolicy,
    budget: WaitingRoom,
    keep: Keep,
    saved: FinishedBlocks,
    report: Report,
    team: Ranks = SINGLE_PROCESS,
) -> None:
    """Quantize every layer of `plan`, calibrated on token ids [batch, seqlen] each; `keep` gets each solved layer.

    `team` shares the batches and the solving. Begins after the blocks that `saved` has, and gives it each finished
    block; the head counts as the last one.
    GateError E_NUM_* when activations or Hessians are not usable, located by layer; InputError E_ARCH when a planned
    layer is never called; ResourceError E_OOM if the memory of `budget` does not suffice.
    """
    layers = {layer.name: layer for layer in plan.quantized}
    solver = LayerSolver(stream, keep, report, policy, [len(batch) for batch in batches], team)
    share = team.share(len(batches))
    mine = batches[share.start : share.stop]
    give_back_freed_tensors()
    report(PhaseStarted("embeddings", f"{len(batches)} batch{'es' if len(batches) != 1 else ''}"))
    hidden = HiddenStates(stream.embed(mine), budget.memory, share.start, len(batches))
    original = hidden.copy() if plan.asymmetric else None
    states = [way for way in (hidden, original) if way is not None]
    prober = Prober()
    for index in range(saved.restore(stream, states), stream.n_blocks):
        started = time.perf_counter()
        report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
        with stream.block(index) as block:
            quantize_block(block, layers, hidden, original, solver, prober, budget, true_sequential=true_sequential)
        saved.finished(index, stream, states)
        report(block_finished(index, stream, started))
        budget.memory.check_host()
    if HEAD in layers:
        report(PhaseStarted("head", HEAD))
        quantize_head(stream, layers, mine, hidden, original, solver)
        saved.finished(stream.n_blocks, stream, [])


def quantize_block(
    block: LoadedBlock,
    layers: Mapping[str, LayerPlan],
    hidden: HiddenStates,
    original: HiddenStates | None,
    solver: LayerSolver,
    prober: Prober,
    budget: WaitingRoom,
    *,
    true_sequential: bool,
) -> None:
    """Solve the block's layers, move `hidden` past it; `true_sequential`: each stage sees earlier ones quantized.

    `original` passes through the block as it was. As many batches as `budget` takes wait inside the block while its
    stages are solved; for the others the block is run again for each stage, with the same results.
    """
    streams = [Passage.through(block, hidden, layers)]
    if original is not None:
        streams.append(Passage.through(block.unquantized_copy(), original, layers))
    probe = prober(block.module, block.called, streams[0].runs[0])
    stages = probe.stages(streams[0].called)
    _check_reached(streams[0].called, stages)
    may_wait = true_sequential and all(stage.calls == 1 for stage in stages)
    n_waiting = budget.places(len(hidden), probe.waiting_bytes, len(streams)) if may_wait else 0
    with ExitStack() as waiting:
        for way in streams:
            waiting.enter_context(way.waiting(stages, n_waiting))
        for together in [[stage] for stage in stages] if true_sequential else [stages]:
            quantize_stages(together, layers, streams, solver, true_sequential=true_sequential)
        for way in streams:
            way.finish()


def quantize_stages(
    stages: Sequence[Stage],
    layers: Mapping[str, LayerPlan],
    streams: Sequence[Passage],
    solver: LayerSolver,
    *,
    true_sequential: bool,
) -> None:
    """Gather what each stage sees over all batches, then solve the stage's layers of the first of `streams` with it."""
    gathered = {stage: _nothing_seen(stage, layers, streams, solver) for stage in stages}
    for batch, seen in enumerate(zip(*(way.inputs(stages) for way in streams), strict=True), streams[0].first):
        for calls in zip(*seen, strict=True):
            stage = calls[0][0]
            gathered[stage].add(batch, *(inputs for _, inputs in calls))
    for stage in stages:
        inputs = gathered.pop(stage)
        if isinstance(inputs, RoutedInputs):
            quantize_experts(inputs, layers, streams[0].linears, solver, true_sequential=true_sequential)
        else:
            hessian = solver.team.sum_hessians(inputs, streams[0].n_all)
            solver.solve([layers[name] for name in stage.names], streams[0].linears, hessian)


def quantize_head(
    stream: ModelStream,
    layers: Mapping[str, LayerPlan],
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    original: HiddenStates | None,
    solver: LayerSolver,
) -> None:
    """Solve the output head, whose inputs are the final hidden states as the model's own forward normalises them."""
    linears = {HEAD: stream.output_linear}
    with stream.head() as logits:

        def passage(states: HiddenStates) -> Passage:
            runs = [partial(_head, logits, ids, states, n) for n, ids in enumerate(batches)]
            return Passage(linears, linears, runs, states)

        streams = [passage(states) for states in (hidden, original) if states is not None]
        quantize_stages([Stage((HEAD,), 1)], layers, streams, solver, true_sequential=True)


def _head(logits: Callable[[Tensor, State], Tensor], ids: Tensor, hidden: HiddenStates, batch: int) -> Tensor:
    return logits(ids, hidden[batch])


def _nothing_seen(
    stage: Stage, layers: Mapping[str, LayerPlan], streams: Sequence[Passage], solver: LayerSolver
) -> HessianOfBatches | RoutedInputs:
    name = stage.names[0]
    experts = [module for way in streams if isinstance(module := way.called[name], Experts)]
    return RoutedInputs(name, experts) if experts else HessianOfBatches(layers[name].in_features, solver.device)


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
        self._waiting: WaitingBatches | None = None
        self._n_waiting = 0

    @classmethod
    def through(cls, block: LoadedBlock, hidden: HiddenStates, names: Container[str]) -> Passage:
        """The way of `hidden` through `block`, with those of its linears that `names` holds."""
        linears = {name: linear for name, linear in block.linears.items() if name in names}
        planned = set(linears.values())
        called = {name: module for name, module in block.called.items() if planned & set(module.modules())}
        return cls(linears, called, [partial(_run, block, hidden, batch) for batch in range(len(hidden))], hidden)

    @contextmanager
    def waiting(self, stages: Sequence[Stage], n_batches: int) -> Iterator[None]:
        """The first `n_batches` wait at each of `stages` until they are told to go on."""
        with waiting_batches(stages, self.called, self.runs[:n_batches]) as self._waiting:
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


def _watched(together: Sequence[Stage], called: Mapping[str, nn.Module], run: Callable[[], object]) -> Seen:
    seen: Seen = []
    # A copy: what comes later in the forward may write into an input.
    watch_inputs(together, called, lambda stage, inputs: seen.append((stage, inputs.clone())), run)
    return seen


def do_blocks(
    stream: ModelStream,
    plan: RunPlan,
    config: QuantizeConfig,
    ids: Tensor,
    keep: Keep,
    saved: FinishedBlocks,
    report: Report,
    team: Ranks,
) -> None:
    """Do what `saved` has not yet, as one process of `team`.

    Where memory runs out, all of it is given back and the run goes on from what is saved, as the next call would: the
    same bytes. From then on every block is saved. What runs out a second time in the same block ends the run; so does
    the first time in one process of several, since the others wait for it in the middle of that block.
    """
    memory = Memory(stream.device, config.max_vram_bytes, config.max_ram_bytes, team.local_world_size)
    memory.enforce()
    budget = WaitingRoom(memory, report)
    done_again = None
    while not saved.complete:
        try:
            quantize_blocks(
                stream,
                plan,
                ids.split(config.batch_size),
                true_sequential=config.true_sequential,
                policy=config.fault_policy,
                budget=budget,
                keep=keep,
                saved=saved,
                report=report,
                team=team,
            )
        except Exception as error:
            if not out_of_memory(error) or team.size > 1 or saved.first == done_again:
                raise
            why = reason(error)
        else:
            return
        done_again = saved.first
        _give_back(stream.device)
        budget.shrink_after_oom()
        saved.save_every_block()
        name = HEAD if done_again == stream.n_blocks else stream.block_name(done_again)
        again = f"`{name}` is done again with no batch waiting inside it, later blocks with half as many"
        report(Warned("W_OOM_RETRY", f"memory ran out: {again}; {_advice(memory)} ({why})"))


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
