"""Codes and scales of a solved layer improved in turns, each step the best one while everything else stands still.

The loss is tr(E H Eᵀ) with E = W - Q and H the damped Hessian that the layer was solved with. With P = E H:

* scale of a group g, whose levels b = codes - zero stand still:  s += P_g bᵀ / (b H_gg bᵀ),
* code of a column j:  q_j moves to the point of its grid nearest to q_j + P_j / H_jj.

Neither can raise the loss: a scale is taken only if it lowers it after rounding to what a checkpoint stores.
Source: coordinate descent as in QuantEase (Behdin et al. 2023); scales as in stage 2 of arXiv 2602.02126.

Letters for shapes:  O out_features   I in_features   G groups   n columns of a block
Matrices are held transposed, [I, O]; columns are sorted by group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.engine.grid import round_scales, round_to_grid
from gptq_cli.engine.layer import QuantizedLinear
from gptq_cli.engine.precision import feedback_precision
from gptq_cli.engine.triton_solver import fit_codes, fit_scales, uses_kernels

COLUMN_BLOCK = 128
INNER_BLOCK = 16


@dataclass(frozen=True, slots=True)
class _State:
    """A layer while it is refined; tensors are updated in place."""

    hessian: Tensor  # [I, I], symmetric, positive definite
    errors: Tensor  # [I, O], W - Q
    levels: Tensor  # [I, O], codes - zeros
    scales: Tensor  # [G, O]
    zeros: Tensor  # [G, O]
    group_of: Tensor  # int32 [I]
    bits: int
    signed: bool

    @property
    def columns_per_group(self) -> int:
        return len(self.errors) // len(self.scales)


@torch.no_grad()
def refine(
    weight: Tensor, hessian: Tensor, damping: Tensor, quantized: QuantizedLinear, *, sweeps: int, signed: bool
) -> QuantizedLinear:
    """`quantized` after `sweeps` rounds of fitting all scales, then all codes, to the weight [O, I].

    The Hessian [I, I] is damped by `damping` [I] on its diagonal. Zeros stay; scales that change are exact in float16
    and bfloat16, and positive unless `signed`. Sums are in the dtype of the Hessian.
    """
    group_of_column = quantized.group_of_column.long()
    columns = group_of_column.argsort(stable=True)
    state = _start(weight, hessian, damping, quantized, columns, signed)
    for _ in range(sweeps):
        for group in range(len(state.scales)):
            _fit_scale(state, group)
        for start in range(0, len(columns), COLUMN_BLOCK):
            _fit_codes(state, start, min(start + COLUMN_BLOCK, len(columns)))
    codes = (state.levels + state.zeros[group_of_column[columns]])[columns.argsort()]
    return replace(quantized, codes=codes.T.contiguous().byte(), scales=state.scales.T.contiguous().half())


def _start(
    weight: Tensor, hessian: Tensor, damping: Tensor, quantized: QuantizedLinear, columns: Tensor, signed: bool
) -> _State:
    damped = hessian[columns[:, None], columns]
    damped.diagonal().add_(damping[columns])
    dtype, group = hessian.dtype, quantized.group_of_column.long()[columns]
    scales, zeros = (grid.to(dtype).T.contiguous() for grid in (quantized.scales, quantized.zeros))
    levels = quantized.codes.T.index_select(0, columns).to(dtype).sub_(zeros[group])
    errors = weight.T.index_select(0, columns).to(dtype) - levels * scales[group]
    return _State(damped, errors, levels, scales, zeros, group.int(), quantized.bits, signed)


def _slopes(state: _State, columns: slice) -> Tensor:
    """P = E H of the columns, [n, O]."""
    with feedback_precision(state.errors):
        return state.hessian[columns] @ state.errors


def _fit_scale(state: _State, group: int) -> None:
    columns = slice(group * state.columns_per_group, (group + 1) * state.columns_per_group)
    levels, scales = state.levels[columns], state.scales[group]
    slopes, bends = _slopes(state, columns), state.hessian[columns, columns] @ levels
    if uses_kernels(levels):
        fit_scales(slopes, bends, levels, state.errors[columns], scales, signed=state.signed)
        return
    slope, curvature = (levels * slopes).sum(0), (levels * bends).sum(0)
    best = scales + slope / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)
    step = round_scales(best if state.signed else best.clamp(min=0)) - scales
    lower = step * (curvature * step - 2 * slope) < 0  # the change of the loss, after rounding
    step = torch.where(lower, step, 0)
    scales += step
    state.errors[columns].addcmul_(levels, step, value=-1)


def _fit_codes(state: _State, start: int, stop: int) -> None:
    """One round of coordinate descent over columns start..stop, whose slopes P are kept up to date among themselves."""
    columns = slice(start, stop)
    slopes = _slopes(state, columns)
    if uses_kernels(slopes):
        near, grids = state.hessian[columns, columns], (state.scales, state.zeros, state.group_of[columns])
        fit_codes(slopes, state.errors[columns], state.levels[columns], near, *grids, state.bits)
        return
    for left in range(start, stop, INNER_BLOCK):
        right = min(left + INNER_BLOCK, stop)
        moves = [_fit_code(state, column, slopes[column - start : right - start]) for column in range(left, right)]
        slopes[right - start :].addmm_(state.hessian[right:stop, left:right], torch.stack(moves), alpha=-1)


def _fit_code(state: _State, column: int, slopes: Tensor) -> Tensor:
    """Move the codes of one column; `slopes` are those of this column and of the ones after it. Returns moves [O]."""
    group = column // state.columns_per_group
    scales, zeros, levels = state.scales[group], state.zeros[group], state.levels[column]
    target = torch.addcdiv(levels * scales, slopes[0], state.hessian[column, column])
    nearest = round_to_grid(target, scales, zeros, state.bits).sub_(zeros)
    move = (nearest - levels).mul_(scales)
    levels.copy_(nearest)
    state.errors[column].sub_(move)
    slopes[1:].addr_(state.hessian[column, column + 1 : column + len(slopes)], move, alpha=-1)
    return move
