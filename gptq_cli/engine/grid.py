"""Integer grids: w ≈ scale * (code - zero), one scale and one zero for the weights of a row that share a group.

Letters for shapes:  O out_features   I in_features   G groups   n columns of one group
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.engine.float16 import SMALLEST, SMALLEST_NORMAL


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


def round_to_grid(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, out: Tensor | None = None) -> Tensor:
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
