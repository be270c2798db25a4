"""Mixtures of experts: each expert calibrated on the tokens that it is sent, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor, nn

from gptq_cli.errors import GateError
from gptq_cli.events import ExpertsCovered
from gptq_cli.models.experts import Experts, Routed
from gptq_cli.planning.estimate import expert_cost
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.layers import LayerSolver, SolvedLayer
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from gptq_cli.solver.hessian import HessianAccumulator

LISTED = 8  # experts that an error names


@dataclass(frozen=True, slots=True)
class RoutedInputs:
    """What the experts of a block are given, batch by batch, on each way through the block, the quantized one first.

    Who is sent where is what the first way says. Kept are inputs, not Hessians: there is one of these at a time.
    """

    name: str  # what the names of the experts' linears begin with
    experts: Sequence[Experts]  # of each way
    batches: list[tuple[Routed, ...]] = field(default_factory=list)

    def add(self, batch: int, *inputs: Routed) -> None:
        """One batch on all ways."""
        del batch  # they come in order
        self.batches.append(inputs)

    def rows(self) -> list[tuple[Tensor, ...]]:
        """For each expert, which rows it is sent of each batch."""
        return list(zip(*(self.experts[0].rows(first) for first, *_ in self.batches), strict=True))

    def hessian(
        self, number: int, rows: Sequence[Tensor | slice], device: torch.device, *, down: bool
    ) -> HessianAccumulator:
        """Of what expert `number` is given in `rows` of the batches, or of what it then gives its down_proj."""
        expert = self.experts[0][number]
        hessian = HessianAccumulator(
            (expert.down_proj if down else expert.up_proj).in_features, device
        )
        for batch, mine in zip(self.batches, rows, strict=True):
            inputs = _taken(batch, mine)
            if down:
                inputs = [
                    way.intermediate(number, given)
                    for way, given in zip(self.experts, inputs, strict=True)
                ]
            hessian.add(*inputs)
        return hessian


def quantize_experts(
    inputs: RoutedInputs, linears: Mapping[str, nn.Module], solver: LayerSolver
) -> None:
    """Solve the planned layers expert by expert; with `true_sequential` down_proj sees what quantized gate and up give.

    GateError E_NUM_EXPERT where an expert saw no token and the policy is "error".
    """
    ranks, true_sequential = solver.run.ranks, solver.run.config.true_sequential
    inputs = replace(inputs, batches=ranks.all_gather(inputs.batches))
    rows = inputs.rows()
    tokens = [sum(map(len, batches)) for batches in rows]
    report_coverage(inputs.name, tokens, solver)
    planned = [_planned(expert, solver.run.layers, linears) for expert in inputs.experts[0]]

    def solve(number: int) -> list[SolvedLayer]:
        expert, mine = inputs.experts[0][number], rows[number]
        last = [layer for layer in planned[number] if linears[layer.name] is expert.down_proj]
        parts = [([layer for layer in planned[number] if layer not in last], False), (last, True)]
        parts = [(part, down) for part, down in parts if part]
        gathered = (
            []
            if true_sequential
            else [_hessian(inputs, number, mine, solver, down=down) for _, down in parts]
        )
        found = []
        for part, down in parts:  # a Hessian lives no longer than it is used
            hessian = (
                gathered.pop(0) if gathered else _hessian(inputs, number, mine, solver, down=down)
            )
            for solved in solver.solve(part, hessian, SINGLE_PROCESS):
                solver.put_back(solved, linears)
                found.append(solved)
            del hessian
        return found

    costs = [expert_cost(mine, seen) for mine, seen in zip(planned, tokens, strict=True)]
    for found, is_mine in ranks.map_units(solve, costs):
        for solved in found:
            if not is_mine:
                solver.put_back(solved, linears)
            solver.finish(solved)


def _planned(
    expert: nn.Module, layers: Mapping[str, LayerPlan], linears: Mapping[str, nn.Module]
) -> list[LayerPlan]:
    own = set(expert.children())
    return [layers[name] for name, linear in linears.items() if name in layers and linear in own]


def _hessian(
    inputs: RoutedInputs, number: int, rows: Sequence[Tensor], solver: LayerSolver, *, down: bool
) -> HessianAccumulator:
    if any(map(len, rows)):
        return inputs.hessian(number, rows, solver.device, down=down)
    if solver.policy.moe_uncovered == "all-tokens":
        return inputs.hessian(number, [slice(None)] * len(rows), solver.device, down=down)
    hessian = inputs.hessian(number, rows, solver.device, down=down)
    hessian.add_identity()
    return hessian


def report_coverage(name: str, tokens: Sequence[int], solver: LayerSolver) -> None:
    """Tell how many tokens each expert of the layer `name` was sent; GateError E_NUM_EXPERT as the policy says."""
    uncovered = tuple(number for number, seen in enumerate(tokens) if not seen)
    solver.run.report(ExpertsCovered(name, tuple(tokens), min(tokens), median(tokens), uncovered))
    if uncovered and solver.policy.moe_uncovered == "error":
        listed = ", ".join(map(str, uncovered[:LISTED])) + (
            ", ..." if len(uncovered) > LISTED else ""
        )
        raise GateError(
            "E_NUM_EXPERT",
            f"{len(uncovered)} of {len(tokens)} experts of `{name}` were sent no calibration token: {listed}",
            hint="use more or other text (--nsamples, --dataset), or say --moe-uncovered rtn or all-tokens",
        )


def _taken(batch: Sequence[Routed], rows: Tensor | slice) -> list[Tensor]:
    """The same rows on each way; where another way sends no such token, the first one's stands in."""
    first, *others = (way.hidden[rows] for way in batch)
    if batch[0].experts is None:
        others = [torch.where(other.any(-1, keepdim=True), other, first) for other in others]
    return [first, *others]
