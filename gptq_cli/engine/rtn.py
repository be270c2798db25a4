"""Round to nearest: every weight to the nearest point of its group's grid, the baseline of every report."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.engine.chunks import row_chunks
from gptq_cli.engine.grid import check_scales, find_grid, join_groups, round_to_grid, split_groups
from gptq_cli.engine.layer import QuantizedLinear


@torch.no_grad()
def round_to_nearest(weight: Tensor, config: LayerConfig, group_of_column: Tensor | None = None) -> QuantizedLinear:
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
    nearest = QuantizedLinear.of_rows([_round(weight[rows], config, group_of_column) for rows in row_chunks(weight)])
    check_scales(nearest.scales)
    return nearest


def _round(weight: Tensor, config: LayerConfig, group_of_column: Tensor) -> QuantizedLinear:
    weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    groups = split_groups(weight, group_of_column, config.columns_per_group(weight.shape[1]))
    scales, zeros = find_grid(groups, config.bits, config.sym)
    codes = round_to_grid(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), config.bits).byte()
    return QuantizedLinear(
        join_groups(codes, group_of_column), scales.half(), zeros.byte(), group_of_column, config.bits
    )
