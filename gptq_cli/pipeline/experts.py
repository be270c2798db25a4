"""Mixtures of experts: each expert calibrated on the tokens that it is sent, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gptq_cli.engine.hessian import HessianAccumulator
from gptq_cli.errors import GateError
from gptq_cli.models.experts import Experts, Routed
from gptq_cli.pipeline.events import ExpertsCovered
from gptq_cli.pipeline.plan import LayerPlan
from gptq_cli.pipeline.solver import LayerSolver

LISTED = 8  # experts that an error names


@dataclass(frozen=True, slots=True)
class ExpertStage:
    """The experts of one block with what they were given, batch by batch, in each passage through the block.

    What is kept are the inputs and who is sent where; there is a Hessian for one expert at a time only.
    """

    name: str
    experts: Sequence[Experts]  # of each passage, the quantized one first
    layers: Mapping[str, LayerPlan]
    sequential: bool  # down_proj sees what the quantized gate and up give it
    inputs: list[tuple[Routed, ...]] = field(default_factory=list)

    def add(self, *inputs: Routed) -> None:
        """Note what all passages were given in one batch. Who is sent where is what the first of them says."""
        self.inputs.append(inputs)

    def solve(self, solver: LayerSolver, linears: Mapping[str, nn.Module]) -> None:
        """Quantize the planned layers expert by expert; GateError E_NUM_EXPERT where an expert saw no token."""
        quantized = self.experts[0]
        rows = list(zip(*(quantized.rows(routed) for routed, *_ in self.inputs), strict=True))
        tokens = [sum(len(mine) for mine in batches) for batches in rows]
        solver.report(ExpertsCovered(self.name, tuple(tokens)))
        missed = [number for number, seen in enumerate(tokens) if not seen and self._planned(number, linears)]
        if missed and solver.moe_uncovered == "error":
            raise _no_tokens(self.name, missed)
        for number, batches in enumerate(rows):
            planned = self._planned(number, linears)
            down = [layer for layer in planned if linears[layer.name] is quantized[number].down_proj]
            parts = [part for part in ([layer for layer in planned if layer not in down], down) if part]
            hessians = (self._hessian(number, batches, part is down, solver) for part in parts)
            for part, hessian in zip(parts, hessians if self.sequential else list(hessians), strict=True):
                solver.solve(part, linears, hessian)

    def _planned(self, number: int, linears: Mapping[str, nn.Module]) -> list[LayerPlan]:
        inside = set(self.experts[0][number].children())
        return [self.layers[name] for name, linear in linears.items() if linear in inside and name in self.layers]

    def _hessian(self, number: int, rows: Sequence[Tensor], down: bool, solver: LayerSolver) -> HessianAccumulator:
        """Of what expert `number` gives its down_proj, or else of what it is given, over its tokens in all batches."""
        expert = self.experts[0][number]
        hessian = HessianAccumulator((expert.down_proj if down else expert.up_proj).in_features, solver.device)
        covered = any(len(mine) for mine in rows)
        if covered or solver.moe_uncovered == "all-tokens":
            for routed, mine in zip(self.inputs, rows, strict=True):
                inputs = _taken(routed, mine if covered else slice(None))
                if down:
                    inputs = [way.intermediate(number, x) for way, x in zip(self.experts, inputs, strict=True)]
                hessian.add(*inputs)
        else:
            hessian.add_nothing_known()
        return hessian


def _taken(routed: Sequence[Routed], rows: Tensor | slice) -> list[Tensor]:
    """The same rows of each passage; where another passage sends no such token, the first one's stands in."""
    first, *others = (each.hidden[rows] for each in routed)
    if routed[0].experts is None:
        others = [torch.where(other.any(-1, keepdim=True), other, first) for other in others]
    return [first, *others]


def _no_tokens(name: str, missed: Sequence[int]) -> GateError:
    listed = ", ".join(map(str, missed[:LISTED])) + (", ..." if len(missed) > LISTED else "")
    return GateError(
        "E_NUM_EXPERT",
        f"{len(missed)} experts of `{name}` were sent no calibration token: {listed}",
        hint="use more or other text (--nsamples, --dataset), or say --moe-uncovered rtn or all-tokens",
    )
