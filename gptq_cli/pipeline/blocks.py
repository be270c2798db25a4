"""The block loop: each transformer block is loaded, quantized stage by stage, run on, and dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from gptq_cli.config.layer import FaultPolicy
from gptq_cli.config.rules import keeping
from gptq_cli.engine.hessian import HessianOfBatches
from gptq_cli.errors import InputError
from gptq_cli.models.experts import Experts
from gptq_cli.models.recording import State
from gptq_cli.models.stages import Prober, Stage
from gptq_cli.models.stream import LoadedBlock, ModelStream
from gptq_cli.pipeline.activations import HiddenStates
from gptq_cli.pipeline.events import BlockStarted, PhaseStarted, Report
from gptq_cli.pipeline.experts import RoutedInputs, quantize_experts
from gptq_cli.pipeline.memory import WaitingRoom, block_finished, give_back_freed_tensors
from gptq_cli.pipeline.passage import Passage
from gptq_cli.pipeline.resume import FinishedBlocks
from gptq_cli.pipeline.run_plan import HEAD, LayerPlan, RunPlan
from gptq_cli.pipeline.solver import Keep, LayerSolver
from gptq_cli.pipeline.team import ALONE, Team


def quantize_blocks(
    stream: ModelStream,
    plan: RunPlan,
    batches: Sequence[Tensor],
    *,
    true_sequential: bool,
    policy: FaultPolicy,
    room: WaitingRoom,
    keep: Keep,
    saved: FinishedBlocks,
    report: Report,
    team: Team = ALONE,
) -> None:
    """Quantize every layer of `plan`, calibrated on token ids [batch, seqlen] each; `keep` gets each solved layer.

    `team` shares the batches and the solving. Begins after the blocks that `saved` has, and gives it each finished
    block; the head counts as the last one.
    GateError E_NUM_* when activations or Hessians are not usable, located by layer; InputError E_ARCH when a planned
    layer is never called; ResourceError E_OOM if the memory of `room` does not suffice.
    """
    layers = {layer.name: layer for layer in plan.quantized}
    solver = LayerSolver(stream, keep, report, policy, [len(batch) for batch in batches], team)
    share = team.share(len(batches))
    mine = batches[share.start : share.stop]
    give_back_freed_tensors()
    report(PhaseStarted("embeddings", f"{len(batches)} batch{'es' if len(batches) != 1 else ''}"))
    hidden = HiddenStates(stream.embed(mine), room.memory, share.start, len(batches))
    original = hidden.copy() if plan.asymmetric else None
    states = [way for way in (hidden, original) if way is not None]
    prober = Prober()
    for index in range(saved.restore(stream, states), stream.n_blocks):
        started = time.perf_counter()
        report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
        with stream.block(index) as block:
            quantize_block(block, layers, hidden, original, solver, prober, room, true_sequential=true_sequential)
        saved.finished(index, stream, states)
        report(block_finished(index, stream, started))
        room.memory.check_host()
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
    room: WaitingRoom,
    *,
    true_sequential: bool,
) -> None:
    """Solve the block's layers, move `hidden` past it; `true_sequential`: each stage sees earlier ones quantized.

    `original` passes through the block as it was. As many batches as `room` takes wait inside the block while its
    stages are solved; for the others the block is run again for each stage, with the same results.
    """
    ways = [Passage.through(block, hidden, layers)]
    if original is not None:
        ways.append(Passage.through(block.twin(), original, layers))
    probe = prober(block.module, block.called, ways[0].runs[0])
    stages = probe.stages(ways[0].called)
    _check_reached(ways[0].called, stages)
    may_wait = true_sequential and all(stage.calls == 1 for stage in stages)
    n_waiting = room.places(len(hidden), probe.waiting_bytes, len(ways)) if may_wait else 0
    with ExitStack() as waiting:
        for way in ways:
            waiting.enter_context(way.waiting(stages, n_waiting))
        for together in [[stage] for stage in stages] if true_sequential else [stages]:
            quantize_stages(together, layers, ways, solver, true_sequential=true_sequential)
        for way in ways:
            way.finish()


def quantize_stages(
    stages: Sequence[Stage],
    layers: Mapping[str, LayerPlan],
    ways: Sequence[Passage],
    solver: LayerSolver,
    *,
    true_sequential: bool,
) -> None:
    """Gather what each stage sees over all batches, then solve the stage's layers of the first of `ways` with it."""
    gathered = {stage: _nothing_seen(stage, layers, ways, solver) for stage in stages}
    for batch, seen in enumerate(zip(*(way.inputs(stages) for way in ways), strict=True), ways[0].first):
        for calls in zip(*seen, strict=True):
            stage = calls[0][0]
            gathered[stage].add(batch, *(inputs for _, inputs in calls))
    for stage in stages:
        inputs = gathered.pop(stage)
        if isinstance(inputs, RoutedInputs):
            quantize_experts(inputs, layers, ways[0].linears, solver, true_sequential=true_sequential)
        else:
            hessian = solver.team.hessian(inputs, ways[0].n_all)
            solver.solve([layers[name] for name in stage.names], ways[0].linears, hessian)


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

        ways = [passage(states) for states in (hidden, original) if states is not None]
        quantize_stages([Stage((HEAD,), 1)], layers, ways, solver, true_sequential=True)


def _head(logits: Callable[[Tensor, State], Tensor], ids: Tensor, hidden: HiddenStates, batch: int) -> Tensor:
    return logits(ids, hidden[batch])


def _nothing_seen(
    stage: Stage, layers: Mapping[str, LayerPlan], ways: Sequence[Passage], solver: LayerSolver
) -> HessianOfBatches | RoutedInputs:
    name = stage.names[0]
    experts = [module for way in ways if isinstance(module := way.called[name], Experts)]
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
