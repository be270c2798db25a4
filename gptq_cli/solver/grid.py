"""Integer grids: w ≈ scale * (code - zero), one scale and one zero for the weights of a row that
share a group.

The grid of a group may be searched: of many shrunken ones the one that rounds the group's weights
with the least error. A scale below the largest weight's clips a few weights and rounds all others
more finely. Candidates are p times the scale of the whole range, p from 1 down; with both signs
where scales may be negative, and with the zero points beside the usual one where the grid is
asymmetric. The error of a candidate is Σ |e|^2.4 (`mse`), as in GPTQ's code.

Letters for shapes:  O out_features   I in_features   G groups   n columns of one group
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.float16 import SMALLEST, SMALLEST_NORMAL
from gptq_cli.solver.numerics import row_chunks
from gptq_cli.solver.triton_launch import best_candidates, uses_kernels

NORM = 2.4
SHRINKS = tuple(1 - step / 40 for step in range(25))


class ScaleRangeError(ArithmeticError):
    """A scale of `row`, or a weight that its codes stand for, is not a finite float16 number.

    The weights are too large, or not finite themselves.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is not finite in float16")
        self.row = row


def find_grid(weights: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """The min/max grid of each group: scales and zeros [...] for weights [..., n], in the dtype of the weights.

    Scales are values that float16 holds exactly, so rounding to the grid already sees what a checkpoint stores; where
    float16 overflows they are infinite, see `check_scales`. Zeros are whole numbers in [1, 2**bits - 1]: readers of the
    first GPTQ format disagree about a zero of 0. Source: GPTQ (Frantar et al. 2022), section 4, and AutoGPTQ.
    """
    maxq = 2**bits - 1
    if sym:
        scales = _stored(weights.abs().amax(-1) * 2 / maxq)
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    low = weights.amin(-1).clamp_(max=0)
    high = weights.amax(-1).clamp_(min=0)
    scales = _stored((high - low) / maxq)
    zeros = (-low / scales).round_()
    # A zero raised from 0 to 1 leaves one step less for the largest weight.
    return torch.where(zeros < 1, _stored(high / (maxq - 1)), scales), zeros.clamp_(min=1)


def find_signed_grid(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The symmetric grid whose end -2**(bits-1) lies on the largest weight of each group [..., n], whatever its sign.

    A positive one gets a negative scale, so the larger end has a level more than the other and no step is left unused.
    Scales are exact in float16 and bfloat16. Source: full-range symmetric quantization, as in AutoRound.
    """
    half = 2 ** (bits - 1)
    low, high = weights.amin(-1), weights.amax(-1)
    scales = round_scales(torch.where(high > -low, high, low) / -half)
    return scales, torch.full_like(scales, half)


def split_groups(columns: Tensor, group_of_column: Tensor, group_size: int) -> Tensor:
    """What belongs to columns [..., I] as [..., G, n], for the groups of n columns that `group_of_column` [I] names.

    May be the same memory.
    """
    if not are_runs(group_of_column, group_size):
        columns = columns[..., group_of_column.argsort(stable=True)]
    return columns.reshape(*columns.shape[:-1], -1, group_size)


def join_groups(groups: Tensor, group_of_column: Tensor) -> Tensor:
    """The columns [..., I] of which `split_groups` makes `groups` [..., G, n]."""
    columns = groups.flatten(-2)
    if are_runs(group_of_column, groups.shape[-1]):
        return columns
    return columns[..., group_of_column.argsort(stable=True).argsort()]


def are_runs(group_of_column: Tensor, group_size: int) -> bool:
    """Whether each group is known to have `group_size` columns one after the other, the groups in their order.

    An accelerator is not asked: its host would wait for the answer.
    """
    if not group_of_column.is_cpu:
        return False
    return torch.equal(group_of_column.long(), torch.arange(len(group_of_column)) // group_size)


def round_to_grid(
    weights: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, out: Tensor | None = None
) -> Tensor:
    """The codes nearest to the weights, as floats in [0, 2**bits - 1]; ties go to the even multiple of the scale.

    Scales and zeros broadcast against the weights; `out` may be the weights themselves.
    """
    return torch.div(weights, scales, out=out).round_().add_(zeros).clamp_(0, 2**bits - 1)


def check_scales(scales: Tensor) -> None:
    """Raise `ScaleRangeError` for the first row of scales [O, G] that is not finite; waits for the device once."""
    finite = torch.isfinite(scales).all(1)
    if not bool(finite.all()):
        raise ScaleRangeError(int(finite.logical_not().nonzero()[0]))


def round_scales(scales: Tensor) -> Tensor:
    """The scales, rounded to numbers that float16 and bfloat16 both hold exactly, so that no reader's dtype moves them.

    A scale of 0, as groups of zeros have, becomes the smallest normal number.
    """
    stored = _in_range(scales.abs()).bfloat16().half().to(scales.dtype)
    return stored.copysign(scales)


def _stored(scales: Tensor) -> Tensor:
    return _in_range(scales.clamp(min=0)).half().to(scales.dtype)


def _in_range(scales: Tensor) -> Tensor:
    """Subnormal scales are rounded up: float16 holds few digits of them, and a smaller scale would clip weights."""
    subnormal = (scales / SMALLEST).ceil().mul_(SMALLEST).masked_fill_(scales == 0, SMALLEST_NORMAL)
    return torch.where(scales < SMALLEST_NORMAL, subnormal, scales)


def choose_grid(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """The grid that `config` asks for: scales and zeros [O, ...] for the weights [O, ..., n] of groups.

    Zeros are as in `find_grid`. Searched and signed scales are exact in float16 and bfloat16; where
    float16 overflows they are infinite.
    """
    if config.scale_search == "none":
        return _whole_range(weights, config)
    if uses_kernels(weights):
        return _search_fused(weights, config)
    found = [_search(weights[rows], config) for rows in row_chunks(weights)]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _whole_range(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    if config.signed_scales:
        return find_signed_grid(weights, config.bits)
    return find_grid(weights, config.bits, config.sym)


def _search(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    whole, ends = _whole_range(weights, config), torch.stack(weights.aminmax(dim=-1), dim=-1)
    scales, zeros = whole
    least, room = torch.full_like(scales, torch.inf), torch.empty_like(weights)
    for steps in _steps(config):
        candidates = [_candidate(whole, *step, config) for step in steps]
        # On an accelerator the host would wait for the answer.
        if weights.is_cpu and _none_can_win(ends, candidates, least, config.bits):
            break  # nor can one with a smaller scale
        for candidate in candidates:
            error = _error(weights, *candidate, config.bits, room)
            better = error < least
            scales, zeros = (
                torch.where(better, *pair) for pair in zip(candidate, (scales, zeros), strict=True)
            )
            least = torch.where(better, error, least)
    return scales, zeros


def _none_can_win(
    ends: Tensor, candidates: Sequence[tuple[Tensor, Tensor]], least: Tensor, bits: int
) -> bool:
    """Whether each group has an end, [..., 2], so far beyond every candidate's grid that its error alone is `least`."""
    bounds = []
    for scales, zeros in candidates:
        edges = torch.stack([-zeros, 2**bits - 1 - zeros], dim=-1) * scales.unsqueeze(-1)
        clipped = ends.clamp(edges.amin(-1, keepdim=True), edges.amax(-1, keepdim=True))
        bounds.append(_loss(ends - clipped))
    return not bool((torch.stack(bounds).amin(0) < least).any())


def _search_fused(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    grid = _whole_range(weights, config)
    factors, offsets = weights.new_tensor(
        [step for steps in _steps(config) for step in steps]
    ).T.contiguous()
    best = best_candidates(weights, grid, (factors, offsets), config.bits, NORM)
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


def _error(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int, room: Tensor) -> Tensor:
    """What a candidate loses in each group; `room` is overwritten."""
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    codes = round_to_grid(weights, scales, zeros, bits, out=room)
    return _loss(codes.sub_(zeros).mul_(scales).sub_(weights))


def _loss(errors: Tensor) -> Tensor:
    """Return Σ |e|^2.4 over the last dimension; overwrites the errors."""
    return errors.abs_().log2_().mul_(NORM).exp2_().sum(-1)  # half the time of `pow`
