"""Refinement of a solved layer: scales and codes in turns, each step the best for fixed others.

The loss is tr(E H Eᵀ) with E = W - Q and H the damped Hessian of the solver. With P = E H:

* scale of a group g with fixed levels b = codes - zero:  s += P_g bᵀ / (b H_gg bᵀ),
* code of a column j:  q_j moves to the point of its grid nearest to q_j + P_j / H_jj.

No step raises the loss: a new scale is used only if it lowers the loss after it was rounded to a
number that a checkpoint stores. The codes of a group are fitted right after its scale, so that one
product with H serves both. With kernels, one product serves all groups of a panel: P of a later
group is then corrected by what the earlier ones changed in E. So E is read once per panel, and
products are large enough for a GPU. Source: coordinate descent as in QuantEase (Behdin et al.
2023); scales as in stage 2 of arXiv 2602.02126.

Letters for shapes:  O out_features   I in_features   G groups   n columns of a block
Matrices are held transposed, [I, O]; columns are sorted by group. If kernels fit E experts of equal
shapes together, O counts the rows of all of them, those of the first one first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.solver.factor import HessianFactor
from gptq_cli.solver.float16 import LARGEST
from gptq_cli.solver.grid import round_scales
from gptq_cli.solver.numerics import (
    above,
    add_product_,
    by_expert,
    exact_product,
    feedback_precision,
    multiply_by_expert,
    permuted,
    splits,
    uses_kernels,
)
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.triton_launch import MOST_COLUMNS, fit_codes, fit_scales

COLUMN_BLOCK = 128
INNER_BLOCK = 32
PANEL = 512  # columns whose slopes are computed together, before kernels fit them
# The largest numbers of float16 factors: errors may grow 1000 times before they reach the limit.
LARGEST_ERROR, LARGEST_PRODUCT = 2.0**6, 2.0**14
SMALLEST_SHARE = 2.0**-40  # of the energy that errors are taken to have at least


@dataclass(frozen=True, slots=True)
class _Halves:
    """The factors of P = E H in float16, which has the 11 bits of TF32 at more than twice its rate.

    Row i of E is multiplied and column i of H is divided by a power of two, `units` [I, 1]. It is
    about √H_ii, so that both factors stay within a float16 number, however loud a channel is. P is
    that of H times `scale`, by which H itself must be multiplied meanwhile.
    """

    hessian: Tensor  # float16 [I, I]
    errors: Tensor  # float16 [I, O]
    units: Tensor
    scale: Tensor

    @classmethod
    def of(cls, hessian: Tensor, errors: Tensor) -> _Halves:
        """Return the factors for H [I, I] and E [I, O], float32."""
        loudness = hessian.diagonal().sqrt()
        largest = torch.linalg.vector_norm(errors, torch.inf, dim=1).mul_(loudness).amax()
        loudest = loudness.amax()
        share = above(LARGEST_ERROR / 2 / largest.clamp(min=SMALLEST_SHARE * loudest))
        units = above(loudness) / 2 * share
        scale = above(LARGEST_PRODUCT / 2 * share / loudest)
        factors = torch.empty_like(hessian, dtype=torch.float16)
        torch.mul(hessian, scale / units, out=factors)
        found = cls(factors, torch.empty_like(errors, dtype=torch.float16), units[:, None], scale)
        found.take(errors, slice(None))
        return found

    def take(self, errors: Tensor, columns: slice) -> None:
        """Take over the changed columns of E [I, O]."""
        target = self.errors[columns]
        torch.mul(errors[columns], self.units[columns], out=target)
        target.clamp_(-LARGEST, LARGEST)

    def slopes(self, columns: slice) -> Tensor:
        """Return P of the columns, [n, O]."""
        return exact_product(self.hessian[columns], self.errors)


@dataclass(frozen=True, slots=True)
class _State:
    """A layer during refinement; tensors are updated in place."""

    hessian: Tensor  # [E, I, I], symmetric, positive definite
    errors: Tensor  # [I, O], W - Q
    levels: Tensor  # [I, O], codes - zeros
    scales: Tensor  # [G, O]
    zeros: Tensor  # [G, O]
    bits: int
    signed: bool
    halves: _Halves | None = None  # for products on tensor cores

    @property
    def group_size(self) -> int:
        return len(self.errors) // len(self.scales)

    def columns_of(self, group: int) -> slice:
        return slice(group * self.group_size, (group + 1) * self.group_size)


@torch.no_grad()
def refine(
    weight: Tensor,
    hessian: Tensor,
    prepared: HessianFactor,
    quantized: QuantizedLinear,
    *,
    sweeps: int,
    signed: bool,
) -> QuantizedLinear:
    """Return `quantized` with scales and codes that lower its output error for the weight [O, I].

    First all scales are fitted, then in each of `sweeps` rounds the scale and the codes of each
    group. The Hessian [I, I] is damped by `prepared.damping`; dead columns stay zero. Zero points
    do not change. Changed scales are exact in float16 and bfloat16, and positive unless `signed`.
    Sums are in the dtype of the Hessian. It is copied only if groups are scattered, else its own
    diagonal is damped during the call. With kernels it may be that of E experts, [E, I, I].
    """
    columns = quantized.group_of_column.argsort(stable=True)
    in_features = len(columns)
    hessian = hessian.view(-1, in_features, in_features)
    damping, dead = prepared.damping.view(-1, in_features), prepared.dead.view(-1, in_features)
    if prepared.order.scattered:
        hessian, damping = permuted(hessian, columns[None]), damping[:, columns]
    state = _start(weight, hessian, dead[:, columns], quantized, columns, signed)
    sweep = _sweep
    if uses_kernels(state.errors):
        sweep = _sweep_with_kernels
    with _damped(hessian, damping), _halved(state) as ready:
        sweep(ready, codes=False)
        for _ in range(sweeps):
            sweep(ready, codes=True)
    codes = _by_group(state.levels, state.zeros).add_(state.zeros[:, None]).byte().flatten(0, 1)
    codes = codes[columns.argsort()].T.contiguous()
    return replace(quantized, codes=codes, scales=state.scales.T.contiguous().half())


@contextmanager
def _damped(hessian: Tensor, damping: Tensor) -> Iterator[None]:
    """Damp the diagonal of `hessian`; restore it at the end."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    undamped = diagonal.clone()
    diagonal += damping
    try:
        yield
    finally:
        diagonal.copy_(undamped)


@contextmanager
def _halved(state: _State) -> Iterator[_State]:
    """Yield the state with factors for tensor cores, if it has one Hessian and they multiply it.

    The Hessian is scaled meanwhile, by a power of two, which changes no bit of its numbers.
    """
    if not (uses_kernels(state.errors) and splits(state.errors) and len(state.hessian) == 1):
        yield state
        return
    halves = _Halves.of(state.hessian[0], state.errors)
    state.hessian.mul_(halves.scale)
    try:
        yield replace(state, halves=halves)
    finally:
        state.hessian.div_(halves.scale)


def _start(
    weight: Tensor,
    hessian: Tensor,
    dead: Tensor,
    quantized: QuantizedLinear,
    columns: Tensor,
    signed: bool,
) -> _State:
    """Return the state of the layer `quantized`, with `columns` sorted by group."""
    dtype = hessian.dtype
    scales = quantized.scales.to(dtype).T.contiguous()
    zeros = quantized.zeros.to(dtype).T.contiguous()
    levels = quantized.codes.T.index_select(0, columns).to(dtype)
    errors = weight.T.index_select(0, columns).to(dtype)
    errors.unflatten(1, (len(dead), -1)).masked_fill_(dead.T.unsqueeze(-1), 0)
    _by_group(levels, zeros).sub_(zeros[:, None])
    _by_group(errors, zeros).addcmul_(_by_group(levels, zeros), scales[:, None], value=-1)
    return _State(hessian, errors, levels, scales, zeros, quantized.bits, signed)


def _by_group(matrix: Tensor, grids: Tensor) -> Tensor:
    """Return the columns [I, O] of groups with grids [G, O], as [G, n, O]."""
    return matrix.view(len(grids), -1, matrix.shape[1])


def _slopes(state: _State, columns: slice) -> Tensor:
    """Return P = E H of the columns, [n, O]."""
    if state.halves is not None:
        return state.halves.slopes(columns)
    with feedback_precision(state.errors):
        return multiply_by_expert(state.hessian[:, columns], state.errors)


def _sweep(state: _State, *, codes: bool) -> None:
    """Fit the scale of each group and, if `codes` is set, directly afterwards its codes."""
    for group in range(len(state.scales)):
        slopes = _fit_scale(state, group)
        if codes:
            _fit_codes(state, group, slopes)


def _fit_scale(state: _State, group: int) -> Tensor:
    """Fit the scale of a group; return the slopes P [n, O] of its columns with the new scale."""
    columns = state.columns_of(group)
    levels, slopes = state.levels[columns], _slopes(state, columns)
    curvatures = state.hessian[0, columns, columns] @ levels
    step = _take_step(state, group, (levels * slopes).sum(0), (levels * curvatures).sum(0))
    return slopes.addcmul_(curvatures, step, value=-1)


def _take_step(state: _State, group: int, slope: Tensor, curvature: Tensor) -> Tensor:
    """Change the scale of a group and its errors; return the step [O].

    `slope` [O] is P_g bᵀ and `curvature` [O] is b H_gg bᵀ.
    """
    columns, scales = state.columns_of(group), state.scales[group]
    best = scales + slope / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)
    if not state.signed:
        best = best.clamp(min=0)
    step = round_scales(best) - scales
    lower = step * (curvature * step - 2 * slope) < 0  # the change of the loss, after rounding
    step = torch.where(lower, step, 0)
    scales += step
    state.errors[columns].addcmul_(state.levels[columns], step, value=-1)
    return step


def _fit_codes(state: _State, group: int, slopes: Tensor) -> None:
    """Run one round of coordinate descent over the columns of a group, whose slopes P are given."""
    group_columns = state.columns_of(group)
    for start in range(group_columns.start, group_columns.stop, COLUMN_BLOCK):
        columns = slice(start, min(start + COLUMN_BLOCK, group_columns.stop))
        if start > group_columns.start:
            slopes = _slopes(state, columns)
        _fit_block(state, group, columns, slopes[:COLUMN_BLOCK])


def _fit_block(state: _State, group: int, columns: slice, slopes: Tensor) -> None:
    """Run coordinate descent over some columns of the group.

    Targets are the best positions of the codes in levels; a column that is done moves the targets
    of the columns after it.
    """
    hessian, errors = state.hessian[0, columns, columns], state.errors[columns]
    levels = state.levels[columns]
    scales, zeros = state.scales[group], state.zeros[group]
    curvatures, ends = hessian.diagonal()[:, None], (-zeros, 2**state.bits - 1 - zeros)
    targets, couplings = slopes.div_(curvatures).div_(scales).add_(levels), hessian / curvatures
    for start in range(0, len(targets), INNER_BLOCK):
        few, rest = slice(start, start + INNER_BLOCK), slice(start + INNER_BLOCK, None)
        _fit_few(targets[few], levels[few], couplings[few, few], ends)
        targets[rest].addmm_(couplings[rest, few], levels[few])
    errors.addcmul_(levels, scales)
    levels.copy_(targets)


def _fit_few(
    targets: Tensor, levels: Tensor, couplings: Tensor, ends: tuple[Tensor, Tensor]
) -> None:
    """Round the targets of columns one after the other.

    Each level is replaced with the distance by which it has moved down.
    """
    for column, (target, level) in enumerate(zip(targets, levels, strict=True)):
        if column:
            target.addmv_(levels[:column].T, couplings[column, :column])
        target.round_().clamp_(*ends)
        level.sub_(target)


# ---------------------------------------------------------------- with kernels


def _sweep_with_kernels(state: _State, *, codes: bool) -> None:
    """Do what `_sweep` does, a panel at a time; a group longer than a launch has its own panels."""
    size, end = state.group_size, len(state.errors)
    if size <= MOST_COLUMNS:
        for panel in _cut(0, end, PANEL // size * size):
            _fit_panel(state, panel, size, scales=True, codes=codes)
        return
    for group in range(len(state.scales)):
        columns = state.columns_of(group)
        panels = _cut(columns.start, columns.stop, PANEL)
        _fit_long_scale(state, group, panels)
        if not codes:
            continue
        for panel in panels:
            _fit_panel(state, panel, MOST_COLUMNS, scales=False, codes=True)


def _cut(start: int, stop: int, most: int) -> list[slice]:
    """Return start..stop in slices of `most`; the last one may be shorter."""
    return [slice(first, min(first + most, stop)) for first in range(start, stop, most)]


def _fit_panel(state: _State, panel: slice, width: int, *, scales: bool, codes: bool) -> None:
    """Fit scales, codes or both of some columns, `width` columns of one group at a time.

    The slopes of the whole panel are those at the start. Before columns are fitted, theirs are
    corrected by the changes of the errors [n, O] of the columns before them in the panel.
    """
    slopes, n_experts = _slopes(state, panel), len(state.hessian)
    changes = torch.empty_like(slopes)  # which fitting a scale fills
    if not scales:
        changes.zero_()
    for columns in _cut(panel.start, panel.stop, width):
        before, group = slice(panel.start, columns.start), columns.start // state.group_size
        mine = slice(columns.start - panel.start, columns.stop - panel.start)
        if mine.start:
            with feedback_precision(slopes):
                target, done = by_expert(slopes[mine], n_experts), changes[: mine.start]
                mixed = state.hessian[:, columns, before]
                add_product_(target, mixed, by_expert(done, n_experts))
        moving = (slopes[mine], changes[mine], state.levels[columns])
        own, scale = state.hessian[:, columns, columns], state.scales[group]
        if scales:
            fit_scales(*moving, own, scale, signed=state.signed)
        if codes:
            fit_codes(*moving, own, scale, state.zeros[group], state.bits)
    state.errors[panel].add_(changes)
    if state.halves is not None:
        state.halves.take(state.errors, panel)


def _fit_long_scale(state: _State, group: int, panels: list[slice]) -> None:
    """Fit the scale of a group of many columns, whose slopes are summed panel by panel."""
    levels = state.levels[state.columns_of(group)]
    slope, curvature = torch.zeros_like(levels[0]), torch.zeros_like(levels[0])
    for panel in panels:
        bends = multiply_by_expert(state.hessian[:, panel, state.columns_of(group)], levels)
        slope += (state.levels[panel] * _slopes(state, panel)).sum(0)
        curvature += (state.levels[panel] * bends).sum(0)
    _take_step(state, group, slope, curvature)
    if state.halves is not None:
        state.halves.take(state.errors, state.columns_of(group))
