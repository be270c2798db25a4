"""The block loop: each transformer block is loaded, quantized stage by stage, run on, and dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from gptq_cli.config.layer import Uncovered
from gptq_cli.engine.hessian import HessianAccumulator
from gptq_cli.errors import InputError
from gptq_cli.models.experts import Experts, Routed
from gptq_cli.models.lockstep import waiting_batches
from gptq_cli.models.stages import Prober, Stage, watch_inputs
from gptq_cli.models.stream import LoadedBlock, ModelStream
from gptq_cli.pipeline.activations import HiddenStates
from gptq_cli.pipeline.events import BlockStarted, PhaseStarted, Report
from gptq_cli.pipeline.experts import ExpertStage
from gptq_cli.pipeline.memory import WaitingRoom, block_finished, give_back_freed_tensors
from gptq_cli.pipeline.plan import HEAD, LayerPlan, RunPlan
from gptq_cli.pipeline.solver import Keep, LayerSolver

Seen = HessianAccumulator | ExpertStage


def quantize_blocks(
    stream: ModelStream,
    plan: RunPlan,
    batches: Sequence[Tensor],
    *,
    true_sequential: bool,
    moe_uncovered: Uncovered = "error",
    keep: Keep,
    report: Report,
) -> None:
    """Quantize every layer of `plan`, calibrated on token ids [batch, seqlen] each; `keep` gets each solved layer.

    GateError E_NUM_* when activations or Hessians are not usable, located by layer; InputError E_ARCH when a planned
    layer is never called.
    """
    layers = {layer.name: layer for layer in plan.quantized}
    solver = LayerSolver(stream, keep, report, moe_uncovered)
    give_back_freed_tensors()
    report(PhaseStarted("embeddings", f"{len(batches)} batches"))
    hidden = HiddenStates(stream.embed(batches), stream.device)
    original = hidden.copy() if plan.asymmetric else None
    prober, room = Prober(), WaitingRoom(stream.device, report)
    for index in range(stream.n_blocks):
        started = time.perf_counter()
        report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
        with stream.block(index) as block:
            quantize_block(block, layers, hidden, original, solver, prober, room, true_sequential=true_sequential)
        report(block_finished(index, stream, started))
    if HEAD in layers:
        report(PhaseStarted("head", HEAD))
        quantize_head(stream, layers, batches, hidden, original, solver)


@dataclass(frozen=True, slots=True)
class Passage:
    """One way of the batches through a block: its planned linears by name, and a forward for each batch."""

    linears: Mapping[str, nn.Module]
    called: Mapping[str, nn.Module]  # by the forward itself: these linears, but experts as a whole
    runs: Sequence[Callable[[], Tensor]]
    hidden: HiddenStates  # before the block, and after it once `runs` have been run to their end

    @classmethod
    def through(cls, block: LoadedBlock, hidden: HiddenStates, names: Container[str]) -> Passage:
        linears = {name: linear for name, linear in block.linears.items() if name in names}
        planned = set(linears.values())
        called = {name: module for name, module in block.called.items() if planned & set(module.modules())}
        return cls(linears, called, [partial(_run, block, hidden, batch) for batch in range(len(hidden))], hidden)


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

    `original` passes through the block as it was. The batches wait inside the block while its stages are solved, if
    `room` takes them; otherwise the block is run again for each stage, with the same results.
    """
    passages = [Passage.through(block, hidden, layers)]
    if original is not None:
        passages.append(Passage.through(block.twin(), original, layers))
    probe = prober(block.module, block.called, passages[0].runs[0])
    stages = probe.stages(passages[0].called)
    _check_reached(passages[0].called, stages)
    called_once = all(stage.calls == 1 for stage in stages)
    if true_sequential and called_once and room.takes(len(hidden) * len(passages), probe.waiting_bytes):
        quantize_in_lockstep(stages, layers, passages, solver)
        return
    for together in [[stage] for stage in stages] if true_sequential else [stages]:
        quantize_stages(together, layers, passages, solver, true_sequential=true_sequential)
    for passage in passages:
        for batch, run in enumerate(passage.runs):
            passage.hidden[batch] = run()


def quantize_in_lockstep(
    stages: Sequence[Stage], layers: Mapping[str, LayerPlan], passages: Sequence[Passage], solver: LayerSolver
) -> None:
    """Solve each stage of the first of `passages` when all batches have come to it and wait, in all passages."""
    with ExitStack() as stack:
        waiting = [stack.enter_context(waiting_batches(stages, way.called, way.runs)) for way in passages]
        for stage in stages:
            seen = _nothing_seen(stage, layers, passages, solver)
            for inputs in zip(*(batches.reach(stage) for batches in waiting), strict=True):
                seen.add(*inputs)
            _solve(stage, seen, layers, passages[0], solver)
            del seen, inputs  # before there is the next one
        for passage, batches in zip(passages, waiting, strict=True):
            for batch, output in enumerate(batches.finish()):
                passage.hidden[batch] = output


def quantize_stages(
    stages: Sequence[Stage],
    layers: Mapping[str, LayerPlan],
    passages: Sequence[Passage],
    solver: LayerSolver,
    *,
    true_sequential: bool,
) -> None:
    """Gather one Hessian a stage over all batches, then solve the stage's layers of the first of `passages` with it."""
    seen = {stage: _nothing_seen(stage, layers, passages, solver, true_sequential) for stage in stages}
    quantized, *originals = passages
    for batch, run in enumerate(quantized.runs):
        before = [_inputs(stages, passage, batch) for passage in originals]
        watch_inputs(stages, quantized.called, partial(_add, seen, before), run)
    for stage in stages:
        _solve(stage, seen.pop(stage), layers, quantized, solver)


def quantize_head(
    stream: ModelStream,
    layers: Mapping[str, LayerPlan],
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    original: HiddenStates | None,
    solver: LayerSolver,
) -> None:
    """Solve the output head, whose inputs are the final hidden states as the model's own forward normalises them."""
    with stream.head() as logits:
        passages = [
            Passage(
                {HEAD: stream.output_linear},
                {HEAD: stream.output_linear},
                [partial(_head, logits, ids, way, n) for n, ids in enumerate(batches)],
                way,
            )
            for way in (hidden, original)
            if way is not None
        ]
        quantize_stages([Stage((HEAD,), 1)], layers, passages, solver, true_sequential=True)


def _run(block: LoadedBlock, hidden: HiddenStates, batch: int) -> Tensor:
    return block.run(batch, hidden[batch])


def _head(logits: Callable[[Tensor, Tensor], Tensor], ids: Tensor, hidden: HiddenStates, batch: int) -> Tensor:
    return logits(ids, hidden[batch])


def _nothing_seen(
    stage: Stage,
    layers: Mapping[str, LayerPlan],
    passages: Sequence[Passage],
    solver: LayerSolver,
    true_sequential: bool = True,
) -> Seen:
    name = stage.names[0]
    experts = [module for passage in passages if isinstance(module := passage.called[name], Experts)]
    if experts:
        return ExpertStage(name, experts, layers, true_sequential)
    return HessianAccumulator(layers[name].in_features, solver.device)


def _solve(stage: Stage, seen: Seen, layers: Mapping[str, LayerPlan], passage: Passage, solver: LayerSolver) -> None:
    if isinstance(seen, ExpertStage):
        seen.solve(solver, passage.linears)
    else:
        solver.solve([layers[name] for name in stage.names], passage.linears, seen)


def _inputs(stages: Sequence[Stage], passage: Passage, batch: int) -> dict[Stage, list[Any]]:
    """What the stages see in one batch, in the order of their calls."""
    seen: dict[Stage, list[Any]] = {stage: [] for stage in stages}
    watch_inputs(stages, passage.called, lambda stage, inputs: seen[stage].append(inputs.clone()), passage.runs[batch])
    return seen


def _add(seen: Mapping[Stage, Seen], originals: Sequence[Mapping[Stage, list[Any]]], stage: Stage, inputs: Any) -> None:
    if isinstance(inputs, Routed):
        inputs = inputs.clone()  # kept, while the forward goes on
    seen[stage].add(inputs, *(before[stage].pop(0) for before in originals))


def _check_reached(linears: Mapping[str, nn.Module], stages: Sequence[Stage]) -> None:
    missed = sorted(set(linears) - {name for stage in stages for name in stage.names})
    if missed:
        raise InputError(
            "E_ARCH", f"the model's forward never calls `{missed[0]}`, so it cannot be calibrated",
            hint=f"keep it: --dynamic '-:{missed[0]}'",
        )  # fmt: skip
