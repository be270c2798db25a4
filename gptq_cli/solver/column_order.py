"""In which order the columns of a layer are rounded, and which columns share a grid.

A column rounded early has all later columns to make up for its error, so columns that carry much energy, a large entry
of diag(H), should come early. `desc_act` sorts all columns and lets groups follow, at the price of a scattered g_idx;
`act_group_aware` (GAR, arXiv 2505.14638) sorts whole groups and the columns inside each, and g_idx stays trivial; with
`static_groups` both sort all columns under a trivial g_idx, as scales are fixed before the first column is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig


@dataclass(frozen=True, slots=True)
class ColumnOrder:
    """The columns in processing order, and the group of each.

    Unless `static_grid`, groups are runs of consecutive positions, and a group's grid is found when its turn comes.
    """

    permutation: Tensor  # int64 [I]: position j of the order is column permutation[j]
    group_of_column: Tensor  # int32 [I], the g_idx of the checkpoint
    static_grid: bool  # scales come from the original weights
    scattered: bool  # columns of a group need not be neighbours


def column_order(diagonal: Tensor, config: LayerConfig) -> ColumnOrder:
    """The order and the groups that `config` asks for, given diag(H) [I]; equal entries keep their natural order.

    Raises ValueError if the group size does not divide I.
    """
    in_features = diagonal.numel()
    group_size = config.columns_per_group(in_features)
    if in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide in_features {in_features}")
    positions = torch.arange(in_features, device=diagonal.device)
    groups = (positions // group_size).int()
    # One group for a whole row is found before any column is rounded, so its grid is static in every order.
    static_grid = config.static_groups or group_size == in_features
    scattered = config.desc_act and not static_grid
    if config.desc_act or (config.act_group_aware and static_grid):
        permutation = diagonal.argsort(descending=True, stable=True)
        if scattered:
            groups = torch.empty_like(groups).index_copy_(0, permutation, groups)
    elif config.act_group_aware:
        permutation = _group_aware(diagonal.reshape(-1, group_size))
    else:
        permutation = positions
    return ColumnOrder(permutation, groups, static_grid, scattered)


def _group_aware(diagonal: Tensor) -> Tensor:
    """Groups [G, n] by their largest entry, the columns of a group by theirs, largest first."""
    inside = diagonal.argsort(dim=1, descending=True, stable=True)
    groups = diagonal.amax(dim=1).argsort(descending=True, stable=True)
    first_column = torch.arange(0, diagonal.numel(), diagonal.shape[1], device=diagonal.device)
    return (inside + first_column[:, None])[groups].flatten()
