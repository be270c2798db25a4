"""Quantize mixtures of experts: each expert is calibrated on the tokens that it is sent."""

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
    """The inputs of the experts of a block, batch by batch, in the quantized model first.

    If there is a second model, it is the unquantized one; the router of the first model decides
    which tokens an expert gets. Inputs are kept, not Hessians, so that one Hessian lives at a time.
    """

    name: str  # the prefix of the names of the experts' linears
    experts: Sequence[Experts]  # of each model
    batches: list[tuple[Routed, ...]] = field(default_factory=list)

    def add(self, batch: int, *inputs: Routed) -> None:
        """Add the inputs of one batch in each model; batches come in order."""
        del batch  # the signature is that of HessianOfBatches.add
        self.batches.append(inputs)

    def rows(self) -> list[tuple[Tensor, ...]]:
        """Return the rows that each expert is sent, one tensor for each batch."""
        return list(zip(*(self.experts[0].rows(first) for first, *_ in self.batches), strict=True))

    def hessian(
        self, number: int, rows: Sequence[Tensor | slice], device: torch.device, *, down: bool
    ) -> HessianAccumulator:
        """Return the Hessian of `rows` of the batches in expert `number`.

        With `down` it is that of the inputs of down_proj, else that of the inputs of the expert.
        """
        expert = self.experts[0][number]
        in_features = expert.up_proj.in_features
        if down:
            in_features = expert.down_proj.in_features
        hessian = HessianAccumulator(in_features, device)
        for batch, mine in zip(self.batches, rows, strict=True):
            inputs = _taken(batch, mine)
            if down:
                for model, experts in enumerate(self.experts):
                    inputs[model] = experts.intermediate(number, inputs[model])
            hessian.add(*inputs)
        return hessian


def quantize_experts(
    inputs: RoutedInputs, linears: Mapping[str, nn.Module], solver: LayerSolver
) -> None:
    """Solve the planned layers expert by expert; each of the ranks solves some of the experts.

    With `true_sequential` down_proj sees the outputs of quantized gate_proj and up_proj. Raises
    GateError E_NUM_EXPERT if an expert is sent no token and the policy is "error".
    """
    ranks = solver.run.ranks
    inputs = replace(inputs, batches=ranks.all_gather(inputs.batches))
    rows = inputs.rows()
    tokens = [sum(map(len, batches)) for batches in rows]
    report_coverage(inputs.name, tokens, solver)
    planned = []
    for expert in inputs.experts[0]:
        planned.append(_planned(expert, solver.run.layers, linears))

    def solve(number: int) -> list[SolvedLayer]:
        return _solve_expert(inputs, number, rows[number], planned[number], linears, solver)

    costs = [expert_cost(layers, seen) for layers, seen in zip(planned, tokens, strict=True)]
    for solved_layers, is_mine in ranks.map_units(solve, costs):
        for solved in solved_layers:
            if not is_mine:
                solver.put_back(solved, linears)
            solver.finish(solved)


def _planned(
    expert: nn.Module, layers: Mapping[str, LayerPlan], linears: Mapping[str, nn.Module]
) -> list[LayerPlan]:
    own = set(expert.children())
    return [layers[name] for name, linear in linears.items() if name in layers and linear in own]


def _solve_expert(
    inputs: RoutedInputs,
    number: int,
    rows: Sequence[Tensor],
    layers: Sequence[LayerPlan],
    linears: Mapping[str, nn.Module],
    solver: LayerSolver,
) -> list[SolvedLayer]:
    """Solve the `layers` of one expert, down_proj last, and put their weights back."""
    down_proj = inputs.experts[0][number].down_proj
    last = [layer for layer in layers if linears[layer.name] is down_proj]
    others = [layer for layer in layers if linears[layer.name] is not down_proj]
    parts = [(part, down) for part, down in ((others, False), (last, True)) if part]
    hessians = {}
    if not solver.run.config.true_sequential:  # both parts see the expert as it was
        for _, down in parts:
            hessians[down] = _hessian(inputs, number, rows, solver, down=down)
    solved_layers = []
    for part, down in parts:
        if down not in hessians:
            hessians[down] = _hessian(inputs, number, rows, solver, down=down)
        for solved in solver.solve(part, hessians.pop(down), SINGLE_PROCESS):
            solver.put_back(solved, linears)
            solved_layers.append(solved)
    return solved_layers


def _hessian(
    inputs: RoutedInputs, number: int, rows: Sequence[Tensor], solver: LayerSolver, *, down: bool
) -> HessianAccumulator:
    used: Sequence[Tensor | slice] = rows
    covered = any(map(len, rows))
    if not covered and solver.policy.moe_uncovered == "all-tokens":
        used = [slice(None)] * len(rows)
    hessian = inputs.hessian(number, used, solver.device, down=down)
    if not covered and solver.policy.moe_uncovered != "all-tokens":
        hessian.add_identity()  # the expert is then rounded to nearest
    return hessian


def report_coverage(name: str, tokens: Sequence[int], solver: LayerSolver) -> None:
    """Report how many tokens each expert of the layer `name` was sent.

    Raises GateError E_NUM_EXPERT if an expert was sent none and the policy is "error".
    """
    uncovered = tuple(number for number, seen in enumerate(tokens) if not seen)
    solver.run.report(ExpertsCovered(name, tuple(tokens), min(tokens), median(tokens), uncovered))
    if not uncovered or solver.policy.moe_uncovered != "error":
        return
    listed = ", ".join(map(str, uncovered[:LISTED]))
    if len(uncovered) > LISTED:
        listed += ", ..."
    count = f"{len(uncovered)} of {len(tokens)} experts of `{name}`"
    raise GateError(
        "E_NUM_EXPERT",
        f"{count} were sent no calibration token: {listed}",
        hint="use more or other text (--nsamples, --dataset), or --moe-uncovered rtn or all-tokens",
    )


def _taken(batch: Sequence[Routed], rows: Tensor | slice) -> list[Tensor]:
    """Return the same rows in each model.

    If the unquantized model sends no such token, the token of the quantized model stands in.
    """
    first, *others = (routed.hidden[rows] for routed in batch)
    if batch[0].experts is None:  # the other model's absent tokens are rows of zeros
        others = [torch.where(other.any(-1, keepdim=True), other, first) for other in others]
    return [first, *others]
