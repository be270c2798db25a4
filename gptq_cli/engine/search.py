"""The grid of a group by search: of many shrunken ones the one that rounds the group's weights with the least error.

A scale below the largest weight's clips a few weights and rounds all others more finely. Candidates are p times the
scale of the whole range, p from 1 down; with both signs where scales may be negative, and with the zero points beside
the usual one where the grid is asymmetric. The error of a candidate is Σ |e|^2.4 (`mse`, as GPTQ's code has it) or
Σ H_jj e_j² (`activation`: the layer's output error, if columns were independent).

Letters for shapes:  O out_features   G groups   n columns of one group
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.engine.grid import find_grid, find_signed_grid, round_scales, round_to_grid
from gptq_cli.engine.triton_solver import best_candidates, uses_kernels

NORM = 2.4
SHRINKS = tuple(1 - step / 40 for step in range(25))
WEIGHTS_PER_CHUNK = 2**22  # bounds the temporary copies


def choose_grid(weights: Tensor, energy: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """The grid that `config` asks for: scales and zeros [O, ...] for the weights [O, ..., n] of groups.

    `energy` [..., n] is diag H of their columns, for the `activation` search. Zeros are as in `find_grid`. Searched and
    signed scales are exact in float16 and bfloat16; where float16 overflows they are infinite.
    """
    if config.scale_search == "none":
        return _whole_range(weights, config)
    if uses_kernels(weights):
        return _search_fused(weights, energy, config)
    rows = max(1, WEIGHTS_PER_CHUNK * len(weights) // max(1, weights.numel()))
    found = [_search(chunk, energy, config) for chunk in weights.split(rows)]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _whole_range(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    if config.signed_scales:
        return find_signed_grid(weights, config.bits)
    return find_grid(weights, config.bits, config.sym)


def _search(weights: Tensor, energy: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    candidates = _candidates(weights, config)
    scales, zeros = next(candidates)
    least = _error(weights, scales, zeros, energy, config)
    for other_scales, other_zeros in candidates:
        error = _error(weights, other_scales, other_zeros, energy, config)
        better = error < least
        scales, zeros = torch.where(better, other_scales, scales), torch.where(better, other_zeros, zeros)
        least = torch.where(better, error, least)
    return scales, zeros


def _search_fused(weights: Tensor, energy: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    grid = _whole_range(weights, config)
    factors, offsets = weights.new_tensor(_steps(config)).T.contiguous()
    loudness = energy if config.scale_search == "activation" else None
    best = best_candidates(weights, loudness, grid, (factors, offsets), config.bits, NORM)
    return _candidate(grid, factors[best], offsets[best], config)


def _steps(config: LayerConfig) -> list[tuple[float, float]]:
    """Of each candidate what its scale is multiplied by and what is added to its zero; the whole range first."""
    signs = (1, -1) if config.signed_scales else (1,)
    offsets = (0,) if config.sym else (0, -1, 1)
    return [(sign * shrink, offset) for shrink in SHRINKS for sign in signs for offset in offsets]


def _candidate(
    grid: tuple[Tensor, Tensor], factor: float | Tensor, offset: float | Tensor, config: LayerConfig
) -> tuple[Tensor, Tensor]:
    scales, zeros = grid
    return round_scales(scales * factor), (zeros + offset).clamp_(1, 2**config.bits - 1)


def _candidates(weights: Tensor, config: LayerConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Grids of all groups, the whole range first."""
    grid = _whole_range(weights, config)
    for factor, offset in _steps(config):
        yield _candidate(grid, factor, offset, config)


def _error(weights: Tensor, scales: Tensor, zeros: Tensor, energy: Tensor, config: LayerConfig) -> Tensor:
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    errors = round_to_grid(weights, scales, zeros, config.bits).sub_(zeros).mul_(scales).sub_(weights)
    if config.scale_search == "mse":
        return errors.abs_().pow_(NORM).sum(-1)
    return errors.square_().mul_(energy).sum(-1)
