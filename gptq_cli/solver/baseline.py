"""Round to nearest, the baseline of every report, and the error that a report holds.

Round to nearest takes every weight to the nearest point of its group's grid. The error is how much
of a layer's output quantization changes: tr(E H Eᵀ) / tr(W H Wᵀ) with E = Q - W and H = Σ x xᵀ.
That is Σ ‖E x‖² / Σ ‖W x‖² over the calibration tokens, without looking at a token again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.grid import check_scales, find_grid, join_groups, round_to_grid, split_groups
from gptq_cli.solver.numerics import row_chunks
from gptq_cli.solver.quantized_linear import QuantizedLinear

COLUMNS_PER_PANEL = 256


@torch.no_grad()
def round_to_nearest(
    weight: Tensor, config: LayerConfig, group_of_column: Tensor | None = None
) -> QuantizedLinear:
    """The weight [O, I] rounded to the min/max grid of its groups.

    Groups are those of `group_of_column` [I] where it is given, else runs of `group_size` columns.
    Raises ScaleRangeError, and ValueError if the group size does not divide I.
    """
    in_features = weight.shape[1]
    group_size = config.columns_per_group(in_features)
    if in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide in_features {in_features}")
    if group_of_column is None:
        group_of_column = (torch.arange(in_features, device=weight.device) // group_size).int()
    nearest = QuantizedLinear.of_rows(
        [_round(weight[rows], config, group_of_column) for rows in row_chunks(weight)]
    )
    check_scales(nearest.scales)
    return nearest


def _round(weight: Tensor, config: LayerConfig, group_of_column: Tensor) -> QuantizedLinear:
    weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    groups = split_groups(weight, group_of_column, config.columns_per_group(weight.shape[1]))
    scales, zeros = find_grid(groups, config.bits, config.sym)
    codes = round_to_grid(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), config.bits).byte()
    return QuantizedLinear(
        join_groups(codes, group_of_column),
        scales.half(),
        zeros.byte(),
        group_of_column,
        config.bits,
    )


@torch.no_grad()
def output_energies(
    weight: Tensor, hessian: Tensor, candidates: Sequence[QuantizedLinear]
) -> list[float]:
    """tr(W H Wᵀ) of the weight [O, I] under the undamped Hessian [I, I], then tr(E H Eᵀ) of each candidate for it.

    Rows are taken a chunk at a time, so no float copy of a large weight is needed.
    """
    energies = torch.zeros(1 + len(candidates), dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight):
        original = weight[rows].to(hessian.dtype)
        errors = (
            candidate.rows(rows).dequantize(hessian.dtype).sub_(original)
            for candidate in candidates
        )
        energies += torch.stack(
            [_energy(original, hessian), *(_energy(error, hessian) for error in errors)]
        )
    found: list[float] = energies.tolist()
    return found


def _energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """tr(M H Mᵀ) for M [n, I]; H is symmetric, so the part left of each diagonal block counts twice."""
    energy = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[1], COLUMNS_PER_PANEL):
        panel = slice(start, start + COLUMNS_PER_PANEL)
        product = torch.addmm(
            matrix[:, :start] @ hessian[:start, panel],
            matrix[:, panel],
            hessian[panel, panel],
            beta=2,
        )
        energy += product.mul_(matrix[:, panel]).sum(dtype=torch.float64)
    return energy
