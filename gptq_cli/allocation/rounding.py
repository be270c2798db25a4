"""Quick rounding of a block, or of the head, for a measurement.

The calibration batches run through the unquantized block once, and all of its layers are rounded
with the Hessians of what they saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gptq_cli.config.layer import HEAD
from gptq_cli.models.paused_forwards import Hook, Stage, given, hooked
from gptq_cli.models.skeleton import place
from gptq_cli.quantization.block_loop import (
    Forwards,
    gather_inputs,
    head_forwards,
    nothing_seen,
)
from gptq_cli.quantization.layers import Inputs, LayerSolver
from gptq_cli.quantization.routed_experts import RoutedInputs, quantize_experts
from gptq_cli.quantization.run_state import Run
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.solver.hessian import HessianAccumulator, HessianOfBatches

Weights = dict[str, Tensor]
Gathered = dict[Stage, HessianAccumulator | RoutedInputs]


def run_batches(forwards: Forwards, hidden: HiddenStates, run: Run) -> Gathered:
    """Run the calibration batches through a block; return what each stage sees over all."""
    (passage,) = forwards.passages
    stages = forwards.stages[0]
    sums: dict[Stage, Any] = {}
    for stage in stages:
        sums[stage] = nothing_seen(stage, forwards, run)

    def noting(stage: Stage, batch: int) -> Hook:
        def note(module: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
            inputs = given(module, args)
            if isinstance(sums[stage], RoutedInputs):  # it keeps them until all were seen
                inputs = inputs.clone()
            sums[stage].add(batch, inputs)

        return note

    for batch, forward in enumerate(passage.forwards):
        number = passage.first_batch + batch
        hooks = []
        for stage in stages:
            hooks.append((passage.called[stage.names[0]], noting(stage, number)))
        with hooked(hooks):
            output = forward()
        hidden[batch] = output
    return summed(sums, run)


def summed(sums: Mapping[Stage, HessianOfBatches | RoutedInputs], run: Run) -> Gathered:
    """Return Hessians over the batches of all processes, and the inputs of experts as they are."""
    gathered: Gathered = {}
    for stage, inputs in sums.items():
        if isinstance(inputs, RoutedInputs):
            gathered[stage] = inputs
        else:
            gathered[stage] = run.ranks.sum_hessians(inputs, len(run.batches))
    return gathered


def round_layers(gathered: Gathered, linears: Mapping[str, nn.Module], solver: LayerSolver) -> None:
    """Round all layers of a block; `linears` get the weights, and the run keeps the layers."""
    run = solver.run
    for stage, inputs in gathered.items():
        if isinstance(inputs, RoutedInputs):
            quantize_experts(inputs, linears, solver)
            continue
        layers = [run.layers[name] for name in stage.names]
        for solved in solver.solve([layers], Inputs.of(inputs), run.ranks):
            solver.put_back(solved, linears)
            run.keep([(solved.layer, solved.quantized)])


def rounded_head(hidden: HiddenStates, solver: LayerSolver) -> Tensor | None:
    """Return the rounded weight of the head; None if the head is not a unit."""
    run = solver.run
    if HEAD not in run.layers:
        return None
    with head_forwards([hidden], run) as forwards:
        sums = gather_inputs(forwards.stages[0], forwards, run)
    (inputs,) = summed(sums, run).values()
    assert isinstance(inputs, HessianAccumulator)
    (solved,) = solver.solve([[run.layers[HEAD]]], Inputs.of(inputs), run.ranks)
    return solved.quantized.dequantize(run.stream.dtype)


@contextmanager
def replaced(linear: nn.Module, weight: Tensor | None) -> Iterator[None]:
    """Give `linear` another weight in the body; None leaves it as it is."""
    before = linear.get_parameter("weight")
    if weight is not None:
        place(linear, "weight", weight)
    try:
        yield
    finally:
        place(linear, "weight", before)


def weights_of(linears: Mapping[str, nn.Module]) -> Weights:
    """Return the present weights of linears by name."""
    return {name: linear.get_parameter("weight") for name, linear in linears.items()}


def put_weights(linears: Mapping[str, nn.Module], weights: Weights) -> None:
    """Give linears these weights."""
    for name, weight in weights.items():
        place(linears[name], "weight", weight)
