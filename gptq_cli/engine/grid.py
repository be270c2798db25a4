"""Integer grids: w ≈ scale * (code - zero), one scale and one zero for the weights of a row that share a group.

Letters for shapes:  O out_features   I in_features   G groups   n columns of one group
"""

from __future__ import annotations

import torch
from torch import Tensor

# Readers may flush subnormal float16 numbers to zero, so no scale is smaller than the smallest normal one.
SMALLEST_SCALE = 2.0**-14


class ScaleRangeError(ArithmeticError):
    """A scale is not a finite float16 number: the weights are too large for the format, or not finite themselves."""

    def __init__(self) -> None:
        super().__init__("a scale is not finite in float16")


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


def find_group_grids(weight: Tensor, group_of_column: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [O, G] of a weight [O, I], for the equal-sized groups that `group_of_column` [I] names."""
    columns = group_of_column.argsort(stable=True)
    n_groups = int(group_of_column.max()) + 1
    return find_grid(weight[:, columns].reshape(weight.shape[0], n_groups, -1), bits, sym)


def round_to_grid(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, out: Tensor | None = None) -> Tensor:
    """The codes nearest to the weights, as floats in [0, 2**bits - 1]; ties go to the even multiple of the scale.

    Scales and zeros broadcast against the weights; `out` may be the weights themselves.
    """
    return torch.div(weights, scales, out=out).round_().add_(zeros).clamp_(0, 2**bits - 1)


def check_scales(scales: Tensor) -> None:
    """Raise `ScaleRangeError` unless every scale is finite; waits for the device once."""
    if not bool(torch.isfinite(scales).all()):
        raise ScaleRangeError


def _stored(scales: Tensor) -> Tensor:
    return scales.clamp(min=SMALLEST_SCALE).half().to(scales.dtype)
