"""The grid of a group by search: of many shrunken ones the one that rounds the group's weights with the least error.

A scale below the largest weight's clips a few weights and rounds all others more finely. Candidates are p times the
scale of the whole range, p from 1 down; with both signs where scales may be negative, and with the zero points beside
the usual one where the grid is asymmetric. The error of a candidate is Σ |e|^2.4 (`mse`, as GPTQ's code has it) or
Σ H_jj e_j² (`activation`: the layer's output error, if columns were independent).

Letters for shapes:  O out_features   G groups   n columns of one group
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.engine.chunks import row_chunks
from gptq_cli.engine.grid import find_grid, find_signed_grid, round_scales, round_to_grid
from gptq_cli.engine.triton_solver import best_candidates, uses_kernels

NORM = 2.4
SHRINKS = tuple(1 - step / 40 for step in range(25))


def choose_grid(weights: Tensor, energy: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """The grid that `config` asks for: scales and zeros [O, ...] for the weights [O, ..., n] of groups.

    `energy` [..., n] is diag H of their columns, for the `activation` search. Zeros are as in `find_grid`. Searched and
    signed scales are exact in float16 and bfloat16; where float16 overflows they are infinite.
    """
    if config.scale_search == "none":
        return _whole_range(weights, config)
    loudness = energy if config.scale_search == "activation" else None
    if uses_kernels(weights):
        return _search_fused(weights, loudness, config)
    found = [_search(weights[rows], loudness, config) for rows in row_chunks(weights)]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _whole_range(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    if config.signed_scales:
        return find_signed_grid(weights, config.bits)
    return find_grid(weights, config.bits, config.sym)


def _search(weights: Tensor, energy: Tensor | None, config: LayerConfig) -> tuple[Tensor, Tensor]:
    whole, ends = _whole_range(weights, config), torch.stack(weights.aminmax(dim=-1), dim=-1)
    scales, zeros = whole
    least, room = torch.full_like(scales, torch.inf), torch.empty_like(weights)
    for steps in _steps(config):
        candidates = [_candidate(whole, *step, config) for step in steps]
        # On an accelerator the host would wait for the answer.
        if weights.is_cpu and energy is None and _none_can_win(ends, candidates, least, config.bits):
            break  # nor can one with a smaller scale
        for candidate in candidates:
            error = _error(weights, *candidate, energy, config.bits, room)
            better = error < least
            scales, zeros = (torch.where(better, *pair) for pair in zip(candidate, (scales, zeros), strict=True))
            least = torch.where(better, error, least)
    return scales, zeros


def _none_can_win(ends: Tensor, candidates: Sequence[tuple[Tensor, Tensor]], least: Tensor, bits: int) -> bool:
    """Whether each group has an end, [..., 2], so far beyond every candidate's grid that its error alone is `least`."""
    bounds = []
    for scales, zeros in candidates:
        edges = torch.stack([-zeros, 2**bits - 1 - zeros], dim=-1) * scales.unsqueeze(-1)
        clipped = ends.clamp(edges.amin(-1, keepdim=True), edges.amax(-1, keepdim=True))
        bounds.append(_loss(ends - clipped, None))
    return not bool((torch.stack(bounds).amin(0) < least).any())


def _search_fused(weights: Tensor, energy: Tensor | None, config: LayerConfig) -> tuple[Tensor, Tensor]:
    grid = _whole_range(weights, config)
    factors, offsets = weights.new_tensor([step for steps in _steps(config) for step in steps]).T.contiguous()
    best = best_candidates(weights, energy, grid, (factors, offsets), config.bits, NORM)
    return _candidate(grid, factors[best], offsets[best], config)


def _steps(config: LayerConfig) -> list[list[tuple[float, float]]]:
    """By size of their scale, the largest first: of each candidate what the scale of the whole range is multiplied by
    and what is added to the zero."""
    signs = (1, -1) if config.signed_scales else (1,)
    offsets = (0,) if config.sym else (0, -1, 1)
    return [[(sign * shrink, offset) for sign in signs for offset in offsets] for shrink in SHRINKS]


def _candidate(
    grid: tuple[Tensor, Tensor], factor: float | Tensor, offset: float | Tensor, config: LayerConfig
) -> tuple[Tensor, Tensor]:
    scales, zeros = grid
    return round_scales(scales * factor), (zeros + offset).clamp_(1, 2**config.bits - 1)


def _error(weights: Tensor, scales: Tensor, zeros: Tensor, energy: Tensor | None, bits: int, room: Tensor) -> Tensor:
    """What a candidate loses in each group; `room` is overwritten."""
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    codes = round_to_grid(weights, scales, zeros, bits, out=room)
    return _loss(codes.sub_(zeros).mul_(scales).sub_(weights), energy)


def _loss(errors: Tensor, energy: Tensor | None) -> Tensor:
    """Σ |e|^2.4, or Σ energy e², over the last dimension; overwrites the errors."""
    if energy is None:
        return errors.abs_().log2_().mul_(NORM).exp2_().sum(-1)  # half the time of `pow`
    return errors.square_().mul_(energy).sum(-1)
