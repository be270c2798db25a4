"""Integer grids: w ≈ scale * (code - zero), with one scale and one zero per row and group.

The grid of a group may be searched (`scale_search`): of many grids, the one that rounds the weights
of the group with the least error is taken. A scale that is too small for the largest weight clips a
few weights, but rounds all others more finely. The candidates have p times the scale of the whole
range, with p from 1 down. If scales may be negative, both signs are tried; if the grid is
asymmetric, also the zero points beside the usual one. The error of a candidate is Σ |e|^2.4, as in
GPTQ's code (`mse`).

Letters for shapes:  O out_features   I in_features   G groups   n columns of one group
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.float16 import SMALLEST, SMALLEST_NORMAL
from gptq_cli.solver.numerics import row_chunks, uses_kernels
from gptq_cli.solver.triton_launch import best_candidates

NORM = 2.4
SHRINKS = tuple(1 - step / 40 for step in range(25))


class ScaleRangeError(ArithmeticError):
    """A scale or a decoded weight of `row` is not a finite float16 number.

    The weights of the row are too large, or not finite themselves.
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is not finite in float16")
        self.row = row


def find_grid(weights: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Return the min/max grid of each group: scales and zeros [...] for weights [..., n].

    Both are in the dtype of the weights. Scales are exact in float16, so weights are rounded with
    the scales that a checkpoint stores; if float16 overflows, they are infinite (`check_scales`).
    Zeros are whole numbers in [1, 2**bits - 1], since readers of the first GPTQ format disagree
    about a zero of 0. Source: GPTQ (Frantar et al. 2022), section 4, and AutoGPTQ.
    """
    maxq = 2**bits - 1
    if sym:
        scales = _stored(weights.abs().amax(-1) * 2 / maxq)
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    low = weights.amin(-1).clamp_(max=0)
    high = weights.amax(-1).clamp_(min=0)
    scales = _stored((high - low) / maxq)
    zeros = (-low / scales).round_()
    # If a zero is raised from 0 to 1, the largest weight has one step less.
    return torch.where(zeros < 1, _stored(high / (maxq - 1)), scales), zeros.clamp_(min=1)


def find_signed_grid(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the symmetric grid of each group [..., n] that ends at its largest weight.

    That weight gets level -2**(bits-1); if it is positive, the scale is negative. Thus the larger
    end gets the extra level, and no level is unused. Scales and zeros are [...]; scales are exact
    in float16 and bfloat16.
    Source: full-range symmetric quantization, as in AutoRound.
    """
    half = 2 ** (bits - 1)
    low, high = weights.amin(-1), weights.amax(-1)
    scales = round_scales(torch.where(high > -low, high, low) / -half)
    return scales, torch.full_like(scales, half)


def split_groups(columns: Tensor, group_of_column: Tensor, group_size: int) -> Tensor:
    """Return values of columns [..., I] by group, [..., G, n].

    `group_of_column` [I] tells the groups. The result may share the memory of `columns`.
    """
    if not are_runs(group_of_column, group_size):
        columns = columns[..., group_of_column.argsort(stable=True)]
    return columns.reshape(*columns.shape[:-1], -1, group_size)


def join_groups(groups: Tensor, group_of_column: Tensor) -> Tensor:
    """Return the columns [..., I] of `groups` [..., G, n], the inverse of `split_groups`."""
    columns = groups.flatten(-2)
    if are_runs(group_of_column, groups.shape[-1]):
        return columns
    return columns[..., group_of_column.argsort(stable=True).argsort()]


def are_runs(group_of_column: Tensor, group_size: int) -> bool:
    """Return whether groups are known to be runs of `group_size` consecutive columns, in order.

    For a tensor on a device the answer is False, since the host would have to wait for it.
    """
    if not group_of_column.is_cpu:
        return False
    return torch.equal(group_of_column.long(), torch.arange(len(group_of_column)) // group_size)


def round_to_grid(
    weights: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, out: Tensor | None = None
) -> Tensor:
    """Return the codes nearest to the weights, as floats in [0, 2**bits - 1].

    Ties go to the even multiple of the scale. Scales and zeros broadcast against the weights; `out`
    may be the weights themselves.
    """
    return torch.div(weights, scales, out=out).round_().add_(zeros).clamp_(0, 2**bits - 1)


def check_scales(scales: Tensor) -> None:
    """Raise ScaleRangeError for the first row of scales [O, G] that is not finite.

    Waits for the device once.
    """
    finite = torch.isfinite(scales).all(1)
    if not bool(finite.all()):
        raise ScaleRangeError(int(finite.logical_not().nonzero()[0]))


def round_scales(scales: Tensor) -> Tensor:
    """Return the scales, rounded to numbers that are exact in both float16 and bfloat16.

    Thus a reader in either dtype sees the same scales. A scale of 0, which a group of zeros has,
    becomes the smallest normal number.
    """
    stored = _in_range(scales.abs()).bfloat16().half().to(scales.dtype)
    return stored.copysign(scales)


def _stored(scales: Tensor) -> Tensor:
    return _in_range(scales.clamp(min=0)).half().to(scales.dtype)


def _in_range(scales: Tensor) -> Tensor:
    """Return the scales with subnormal ones rounded up to numbers that float16 holds.

    float16 has few digits for them, and a smaller scale would clip weights. Zero becomes
    SMALLEST_NORMAL.
    """
    subnormal = (scales / SMALLEST).ceil().mul_(SMALLEST).masked_fill_(scales == 0, SMALLEST_NORMAL)
    return torch.where(scales < SMALLEST_NORMAL, subnormal, scales)


def choose_grid(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Return the grid that `config` asks for: scales and zeros [O, ...] for weights [O, ..., n].

    Zeros are as in `find_grid`. Searched and signed scales are exact in float16 and bfloat16; if
    float16 overflows, they are infinite.
    """
    if config.scale_search == "none":
        return _whole_range(weights, config)
    if uses_kernels(weights):
        return _search_fused(weights, config)
    found = [_search(weights[rows], config) for rows in row_chunks(weights)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _whole_range(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    if config.signed_scales:
        return find_signed_grid(weights, config.bits)
    return find_grid(weights, config.bits, config.sym)


def _search(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    whole, ends = _whole_range(weights, config), torch.stack(weights.aminmax(dim=-1), dim=-1)
    scales, zeros = whole
    least, buffer = torch.full_like(scales, torch.inf), torch.empty_like(weights)
    for steps in _steps(config):
        candidates = [_candidate(whole, *step, config) for step in steps]
        # The test is for the CPU: on a device the host would have to wait for its answer.
        if weights.is_cpu and _none_can_win(ends, candidates, least, config.bits):
            break  # a smaller scale cannot win either
        for new_scales, new_zeros in candidates:
            error = _error(weights, new_scales, new_zeros, config.bits, buffer)
            better = error < least
            scales = torch.where(better, new_scales, scales)
            zeros = torch.where(better, new_zeros, zeros)
            least = torch.where(better, error, least)
    return scales, zeros


def _none_can_win(
    ends: Tensor, candidates: Sequence[tuple[Tensor, Tensor]], least: Tensor, bits: int
) -> bool:
    """Return whether no candidate can have a smaller error than `least` [...] in any group.

    This is known if an end of each group, `ends` [..., 2], is so far outside the grid of every
    candidate that its error alone reaches `least`.
    """
    bounds = []
    for scales, zeros in candidates:
        edges = torch.stack([-zeros, 2**bits - 1 - zeros], dim=-1) * scales.unsqueeze(-1)
        clipped = ends.clamp(edges.amin(-1, keepdim=True), edges.amax(-1, keepdim=True))
        bounds.append(_loss(ends - clipped))
    return not bool((torch.stack(bounds).amin(0) < least).any())


def _search_fused(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Search as `_search` does, with one kernel for all candidates."""
    grid = _whole_range(weights, config)
    steps = list(chain.from_iterable(_steps(config)))
    factors, offsets = weights.new_tensor(steps).T.contiguous()
    best = best_candidates(weights, grid, (factors, offsets), config.bits, NORM)
    return _candidate(grid, factors[best], offsets[best], config)


def _steps(config: LayerConfig) -> list[list[tuple[float, float]]]:
    """Return the candidates as (scale factor, zero offset), grouped by decreasing scale."""
    signs, offsets = [1], [0]
    if config.signed_scales:
        signs = [1, -1]
    if not config.sym:
        offsets = [0, -1, 1]
    steps: list[list[tuple[float, float]]] = []
    for shrink in SHRINKS:
        steps.append([(sign * shrink, offset) for sign in signs for offset in offsets])
    return steps


def _candidate(
    grid: tuple[Tensor, Tensor], factor: float | Tensor, offset: float | Tensor, config: LayerConfig
) -> tuple[Tensor, Tensor]:
    """Return the candidate grid of a step (`_steps`) from the grid of the whole range."""
    scales, zeros = grid
    return round_scales(scales * factor), (zeros + offset).clamp_(1, 2**config.bits - 1)


def _error(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int, buffer: Tensor) -> Tensor:
    """Return the error of a candidate in each group [...]; `buffer` [..., n] is overwritten."""
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    codes = round_to_grid(weights, scales, zeros, bits, out=buffer)
    return _loss(codes.sub_(zeros).mul_(scales).sub_(weights))


def _loss(errors: Tensor) -> Tensor:
    """Return Σ |e|^2.4 over the last dimension; overwrites the errors."""
    return errors.abs_().log2_().mul_(NORM).exp2_().sum(-1)  # half the time of `pow`
