"""The block loop: each transformer block is loaded, quantized stage by stage, run on, and dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from gptq_cli.config.layer import LayerConfig
from gptq_cli.engine.factor import NonFiniteHessianError, NotPositiveDefiniteError, Prepared, prepare
from gptq_cli.engine.grid import ScaleRangeError
from gptq_cli.engine.hessian import HessianAccumulator
from gptq_cli.engine.layer import QuantizedLinear
from gptq_cli.engine.solve import solve
from gptq_cli.errors import GateError, InputError
from gptq_cli.models.lockstep import waiting_batches
from gptq_cli.models.skeleton import place
from gptq_cli.models.stages import Prober, Stage, watch_inputs
from gptq_cli.models.stream import LoadedBlock, ModelStream
from gptq_cli.pipeline.activations import HiddenStates
from gptq_cli.pipeline.events import (
    BlockStarted,
    LayerReport,
    LayerSolved,
    LayerStarted,
    PhaseStarted,
    Report,
    Warned,
)
from gptq_cli.pipeline.memory import WaitingRoom, block_finished, give_back_freed_tensors
from gptq_cli.pipeline.plan import HEAD, LayerPlan, RunPlan
from gptq_cli.pipeline.resume import SavedBlocks

Keep = Callable[[LayerPlan, QuantizedLinear], None]
Runs = Iterable[Callable[[], object]]


def quantize_blocks(
    stream: ModelStream,
    plan: RunPlan,
    batches: Sequence[Tensor],
    *,
    true_sequential: bool,
    keep: Keep,
    saved: SavedBlocks,
    report: Report,
) -> None:
    """Quantize every layer of `plan`, calibrated on token ids [batch, seqlen] each; `keep` gets each solved layer.

    Begins after the blocks that `saved` has, and gives it each finished block; the head counts as the last one.
    GateError E_NUM_* when activations or Hessians are not usable, located by layer; InputError E_ARCH when a planned
    layer is never called.
    """
    layers = {layer.name: layer for layer in plan.quantized}
    solver = LayerSolver(stream, keep, report)
    give_back_freed_tensors()
    report(PhaseStarted("embeddings", f"{len(batches)} batches"))
    hidden = HiddenStates(stream.embed(batches), stream.device)
    prober, room = Prober(), WaitingRoom(stream.device, report)
    for index in range(saved.restore(stream, [hidden]), stream.n_blocks):
        started = time.perf_counter()
        report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
        with stream.block(index) as block:
            quantize_block(block, layers, hidden, solver, prober, room, true_sequential=true_sequential)
        saved.finished(index, stream, [hidden])
        report(block_finished(index, stream, started))
    if HEAD in layers:
        report(PhaseStarted("head", HEAD))
        quantize_head(stream, layers, batches, hidden, solver)
        saved.finished(stream.n_blocks, stream, [])


def quantize_block(
    block: LoadedBlock,
    layers: Mapping[str, LayerPlan],
    hidden: HiddenStates,
    solver: LayerSolver,
    prober: Prober,
    room: WaitingRoom,
    *,
    true_sequential: bool,
) -> None:
    """Solve the block's layers, move `hidden` past it; `true_sequential`: each stage sees earlier ones quantized.

    The batches wait inside the block while its stages are solved, if `room` takes them; otherwise the block is run
    again for each stage, with the same results.
    """
    linears = {name: linear for name, linear in block.linears.items() if name in layers}
    runs = [partial(_run, block, hidden, batch) for batch in range(len(hidden))]
    probe = prober(block.module, block.linears, runs[0])
    stages = probe.stages(linears)
    _check_reached(linears, stages)
    called_once = all(stage.calls == 1 for stage in stages)
    if true_sequential and called_once and room.takes(len(hidden), probe.waiting_bytes):
        quantize_in_lockstep(stages, linears, layers, runs, hidden, solver)
        return
    for together in [[stage] for stage in stages] if true_sequential else [stages]:
        quantize_stages(together, linears, layers, runs, solver)
    for batch, run in enumerate(runs):
        hidden[batch] = run()


def quantize_in_lockstep(
    stages: Sequence[Stage],
    linears: Mapping[str, nn.Module],
    layers: Mapping[str, LayerPlan],
    runs: Sequence[Callable[[], Tensor]],
    hidden: HiddenStates,
    solver: LayerSolver,
) -> None:
    """Solve each stage when all `runs` have come to it and wait; `hidden` becomes what they return in the end."""
    with waiting_batches(stages, linears, runs) as batches:
        for stage in stages:
            together = [layers[name] for name in stage.names]
            hessian = HessianAccumulator(together[0].in_features, solver.device)
            for inputs in batches.reach(stage):
                hessian.add(inputs)
            solver.solve(together, linears, hessian)
            del hessian  # before there is the next one
        for batch, output in enumerate(batches.finish()):
            hidden[batch] = output


def quantize_stages(
    stages: Sequence[Stage],
    linears: Mapping[str, nn.Module],
    layers: Mapping[str, LayerPlan],
    runs: Runs,
    solver: LayerSolver,
) -> None:
    """Gather one Hessian a stage over all `runs`, then solve the stage's layers with it."""
    hessians = {stage: HessianAccumulator(layers[stage.names[0]].in_features, solver.device) for stage in stages}
    watch_inputs(stages, linears, lambda stage, inputs: hessians[stage].add(inputs), runs)
    for stage in stages:
        solver.solve([layers[name] for name in stage.names], linears, hessians.pop(stage))


def quantize_head(
    stream: ModelStream,
    layers: Mapping[str, LayerPlan],
    batches: Sequence[Tensor],
    hidden: HiddenStates,
    solver: LayerSolver,
) -> None:
    """Solve the output head, whose inputs are the final hidden states as the model's own forward normalises them."""
    with stream.head() as logits:
        runs = (partial(logits, ids, hidden[batch]) for batch, ids in enumerate(batches))
        quantize_stages([Stage((HEAD,), 1)], {HEAD: stream.output_linear}, layers, runs, solver)


class LayerSolver:
    """Solves layers that share an input, puts the dequantized weights back and hands the codes to `keep`."""

    def __init__(self, stream: ModelStream, keep: Keep, report: Report) -> None:
        self._stream, self._keep, self._report = stream, keep, report
        self.device = stream.device

    def solve(self, layers: Sequence[LayerPlan], linears: Mapping[str, nn.Module], inputs: HessianAccumulator) -> None:
        """Quantize `layers`, all of which have seen `inputs`."""
        hessian = inputs.hessian
        prepared: dict[LayerConfig, Prepared] = {}
        for layer in layers:
            assert layer.config is not None
            started = time.perf_counter()
            self._report(LayerStarted(layer.name))
            with located(layer):
                if layer.config not in prepared:
                    prepared[layer.config] = prepare(hessian, layer.config, inputs.tokens)
                factor = prepared[layer.config]
                weight = self._stream.stored_weight(layer.name)
                solution = solve(weight.T if layer.transposed else weight, hessian, factor, layer.config)
            linear = linears[layer.name]
            dequantized = solution.quantized.dequantize(linear.get_parameter("weight").dtype)
            place(linear, "weight", dequantized.T if layer.transposed else dequantized)
            self._keep(layer, solution.quantized)
            self._warn(layer, factor)
            self._report(
                LayerSolved(
                    LayerReport(
                        name=layer.name,
                        block=layer.block,
                        bits=layer.config.bits,
                        group_size=layer.config.group_size,
                        relative_error=solution.relative_error,
                        rtn_relative_error=solution.rtn_relative_error,
                        damp_percent=factor.damp_percent,
                        damp_retries=factor.retries,
                        dead_columns=factor.dead_columns,
                        tokens=inputs.tokens,
                        seconds=time.perf_counter() - started,
                    )
                )
            )

    def _warn(self, layer: LayerPlan, factor: Prepared) -> None:
        if factor.retries:
            used = f"damp_percent was raised to {factor.damp_percent:g} to make its Hessian positive definite"
            self._report(Warned("W_NUM_DAMPING", f"layer `{layer.name}`: {used}"))
        if factor.dead_columns:
            seen = f"{factor.dead_columns} of {layer.in_features} inputs were always zero, their weights become zero"
            self._report(Warned("W_NUM_DEAD", f"layer `{layer.name}`: {seen}"))


@contextmanager
def located(layer: LayerPlan) -> Iterator[None]:
    """Turn what the maths refuses into an error that names the layer."""
    where = f"layer `{layer.name}` (block {layer.block})"
    try:
        yield
    except NonFiniteHessianError as error:
        raise GateError(
            "E_NUM_ACT",
            f"{where}: its inputs hold NaN or infinity",
            hint="run the model in float32 or bfloat16: --dtype float32",
        ) from error
    except NotPositiveDefiniteError as error:
        raise GateError(
            "E_NUM_HESSIAN", f"{where}: {error}",
            hint=f"use more calibration text, or keep the layer: --dynamic '-:{layer.name}'",
        ) from error  # fmt: skip
    except ScaleRangeError as error:
        raise InputError(
            "E_CKPT_NONFINITE", f"{where}: its weights are not finite or beyond the range of float16",
            hint="download the checkpoint again, or keep the layer with --dynamic",
        ) from error  # fmt: skip


def _run(block: LoadedBlock, hidden: HiddenStates, batch: int) -> Tensor:
    return block.run(batch, hidden[batch])


def _check_reached(linears: Mapping[str, nn.Module], stages: Sequence[Stage]) -> None:
    missed = sorted(set(linears) - {name for stage in stages for name in stage.names})
    if missed:
        raise InputError(
            "E_ARCH", f"the model's forward never calls `{missed[0]}`, so it cannot be calibrated",
            hint=f"keep it: --dynamic '-:{missed[0]}'",
        )  # fmt: skip
