"""GPTQ for one linear layer, as successive rounding with linear feedback.

Minimise  tr((W - Q) H (W - Q)ᵀ)  over the Q that lie on the grid. With  H = R D Rᵀ,  R unit upper
triangular, the sum is  Σ_j D_j ‖v_j - q_j‖²  with  v_j = w_j + Σ_{i<j} e_i R_ij  and
e_i = w_i - q_i:  round each v_j to its grid, columns in processing order. This is GPTQ (Frantar et
al. 2022) in the form of LDLQ (QuIP, Chee et al. 2023): it gives the same codes without an inverse.

Columns are rounded in blocks. A block first receives the errors of all columns before it in one
product,  v_B = w_B + E_{<B} R_{<B,B}.  Inside the block, one kernel passes errors on (see
`triton_launch`) if the device has it; otherwise they pass through smaller blocks.

Letters for shapes:  O out_features   I in_features   G groups   n columns of a block
Matrices are held transposed, [I, O], so that a column of the layer is contiguous in memory. If the
layers of E experts of equal shapes are solved together, O counts the rows of all experts, those of
the first one first: only products with R and H, and the order of columns, are those of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import ColumnOrder, HessianFactor
from gptq_cli.solver.grid import (
    ScaleRangeError,
    check_scales,
    choose_grid,
    round_to_grid,
    split_groups,
)
from gptq_cli.solver.numerics import (
    add_product_,
    by_expert,
    feedback_precision,
    full_precision,
    reordered,
    splits,
    uses_kernels,
)
from gptq_cli.solver.quantized_linear import (
    QuantizedLinear,
    check_decoded,
    energies_by_expert,
    energies_of_rows,
    output_energies,
    round_to_nearest,
    small_scales,
    split_panels,
)
from gptq_cli.solver.refine import refine
from gptq_cli.solver.triton_launch import MOST_COLUMNS, find_grids, round_columns

COLUMN_BLOCK = 128
# Columns that pass errors on together inside a block, and columns that are rounded one by one
INNER_BLOCKS = (128, 32)
# With kernels one launch rounds all of the columns that pass errors on together
KERNEL_BLOCKS = (MOST_COLUMNS, MOST_COLUMNS)
# On CUDA the error of round to nearest is measured on at least this many rows of a layer
SAMPLED_ROWS = 512


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized layer and its output error, beside that of round to nearest with equal groups.

    `rtn_error` was measured on `rtn_rows` rows, and is an estimate if these are not all. Of the
    scales, `subnormal` are subnormal numbers of float16, and `smallest` its smallest number.
    `loss_ratio` is that of `two_sided.solve_in_row_blocks`, None without gradients.
    """

    quantized: QuantizedLinear
    energy: float  # tr(W H Wᵀ), H without damping
    error: float  # tr(E H Eᵀ)
    rtn_error: float
    rtn_rows: int
    subnormal: int
    smallest: int
    loss_ratio: float | None = None

    @property
    def relative_error(self) -> float:
        """The error as a share of the energy; 0 for a layer whose output is always zero."""
        return _share(self.error, self.energy)

    @property
    def rtn_relative_error(self) -> float:
        """The error of round to nearest as a share of the energy."""
        return _share(self.rtn_error, self.energy)

    @property
    def sampled_rows(self) -> int | None:
        """The number of rows that stand for all in the error of round to nearest; None if all."""
        if self.rtn_rows == len(self.quantized.codes):
            return None
        return self.rtn_rows

    @classmethod
    def of_rows(cls, parts: Sequence[Solution]) -> Solution:
        """Return the layer whose rows are those of `parts`, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            QuantizedLinear.of_rows([part.quantized for part in parts]),
            energy=sum(part.energy for part in parts),
            error=sum(part.error for part in parts),
            rtn_error=sum(part.rtn_error for part in parts),
            rtn_rows=sum(part.rtn_rows for part in parts),
            subnormal=sum(part.subnormal for part in parts),
            smallest=sum(part.smallest for part in parts),
        )


def _solution(quantized: QuantizedLinear, found: Sequence[float], rtn_rows: int) -> Solution:
    """Return a solution with the three energies and the numbers of small scales in `found`."""
    energy, error, rtn_error, subnormal, smallest = found
    return Solution(quantized, energy, error, rtn_error, rtn_rows, int(subnormal), int(smallest))


def _share(error: float, energy: float) -> float:
    if energy == 0:
        return 0.0
    return error / energy


@torch.no_grad()
def solve(
    weight: Tensor,
    hessian: Tensor,
    factor: HessianFactor,
    config: LayerConfig,
    *,
    column_block: int = COLUMN_BLOCK,
) -> Solution:
    """Return the weight [O, I] quantized by GPTQ, with its output error.

    The error is taken under the undamped Hessian [I, I]; `factor` holds the order of columns and
    the factors of the same Hessian. If `refine_sweeps` is set, codes and scales are then fitted
    further to the damped Hessian. Sums are float32, or float64 if weight and Hessian are. Dead
    columns get the code of zero. `column_block` moves work between products of matrices and
    products of vectors; it changes the result by no more than the rounding of sums.

    Raises ScaleRangeError with the row of a weight that is not finite or too large for float16.
    """
    return solve_together([weight], hessian, factor, config, column_block=column_block)[0]


@torch.no_grad()
@full_precision()
def solve_together(
    weights: Sequence[Tensor],
    hessian: Tensor,
    factor: HessianFactor,
    config: LayerConfig,
    *,
    column_block: int = COLUMN_BLOCK,
) -> list[Solution]:
    """Return `solve` of several weights [O, I] with the same input, solved as the rows of one.

    If the Hessian [E, I, I] and the factor are those of E experts, the weights are those of the
    first expert, then as many of the next one, and so on. Raises ScaleRangeError, whose row counts
    through all weights.
    """
    n_experts = hessian.shape[:-2].numel()
    if n_experts > 1 and not uses_kernels(hessian):
        return _one_by_one(weights, hessian, factor, config, column_block)
    rows = weights[0]
    if len(weights) > 1:
        rows = torch.cat(list(weights))
    quantized = quantize_rows(rows, hessian, factor, config, column_block=column_block)
    check_decoded(quantized)
    parts, start = [], 0
    for weight in weights:
        parts.append(quantized.rows(slice(start, start + len(weight))))
        start += len(weight)
    if n_experts > 1:
        return _measured_by_expert(parts, rows, hessian, quantized, config)
    return measured(parts, weights, rows, hessian.view(hessian.shape[-2:]), config)


def quantize_rows(
    rows: Tensor,
    hessian: Tensor,
    factor: HessianFactor,
    config: LayerConfig,
    *,
    column_block: int = COLUMN_BLOCK,
    grids: QuantizedLinear | None = None,
) -> QuantizedLinear:
    """Return what `solve` returns for the weight `rows` [O, I], without its errors.

    If `grids` are given, columns are rounded to those of this layer. The caller sets the precision
    of products and checks the decoded weights. Raises ScaleRangeError.
    """
    rounding = _Rounding.of(rows, factor, config, grids)
    for start, stop in rounding.blocks(column_block):
        rounding.codes[start:stop] = _round_block(rounding.block(start, stop), rounding.grid)
    quantized = rounding.result()
    if config.refine_sweeps:
        sweeps, signed = config.refine_sweeps, config.signed_scales
        quantized = refine(rows, hessian, factor, quantized, sweeps=sweeps, signed=signed)
    return quantized


def _one_by_one(
    weights: Sequence[Tensor],
    hessians: Tensor,
    factor: HessianFactor,
    config: LayerConfig,
    column_block: int,
) -> list[Solution]:
    """Return `solve_together` of several experts without kernels, which gain nothing together."""
    solutions: list[Solution] = []
    per_expert, rows_before = len(weights) // len(hessians), 0
    for expert, hessian in enumerate(hessians):
        own = weights[expert * per_expert : (expert + 1) * per_expert]
        try:
            solutions += solve_together(
                own, hessian, factor.of(expert), config, column_block=column_block
            )
        except ScaleRangeError as error:
            raise ScaleRangeError(rows_before + error.row) from error
        rows_before += sum(map(len, own))
    return solutions


def measured(
    parts: Sequence[QuantizedLinear],
    weights: Sequence[Tensor],
    rows: Tensor,
    hessian: Tensor,
    config: LayerConfig,
) -> list[Solution]:
    """Return the quantized `parts` of `rows`, one for each of `weights`, with their errors."""
    samples = _samples(weights)
    nearest = _nearest(rows, samples, config, parts[0].group_of_column)
    panels: list[Tensor] = []
    if splits(hessian):
        panels = split_panels(hessian)
    errors = []
    for part, weight, baseline in zip(parts, weights, nearest, strict=True):
        small = small_scales(part.scales).sum(-1)
        if panels:
            energies = _errors_from_panels(weight, panels, part, baseline)
        else:
            energies = _errors(weight, hessian, part, baseline)
        errors.append(torch.cat([energies, small]))
    solutions = []
    for part, sample, found in zip(parts, samples, torch.stack(errors).tolist(), strict=True):
        solutions.append(_solution(part, found, len(sample)))
    return solutions


def _measured_by_expert(
    parts: Sequence[QuantizedLinear],
    rows: Tensor,
    hessians: Tensor,
    quantized: QuantizedLinear,
    config: LayerConfig,
) -> list[Solution]:
    """Return the `parts` of `quantized`, which are as many of each expert, with their errors.

    The host waits for the device once, and no row is left out.
    """
    nearest = round_to_nearest(rows, config, quantized.group_of_column)
    energies = energies_by_expert(rows, hessians, (quantized, nearest))
    small = small_scales(quantized.scales).unflatten(1, (len(hessians), -1))
    of_rows = torch.cat([energies, small])  # [5, E, O]
    per_expert = len(parts) // len(hessians)
    sizes = [len(part.codes) for part in parts[:per_expert]]
    sums = torch.stack([layer.sum(-1) for layer in of_rows.split(sizes, dim=-1)], dim=-1)
    solutions = []
    for part, found in zip(parts, sums.permute(1, 2, 0).flatten(0, 1).tolist(), strict=True):
        solutions.append(_solution(part, found, len(part.codes)))
    return solutions


def sampling_step(weight: Tensor) -> int:
    """Return the distance of the rows on which round to nearest is measured; 1 takes all.

    It is odd, so that rows of two kinds in turn are sampled alike.
    """
    if weight.device.type == "cpu":
        return 1
    step = max(1, len(weight) // SAMPLED_ROWS)
    return step - (step + 1) % 2


def _samples(weights: Sequence[Tensor]) -> list[range]:
    """Return the rows of each weight on which round to nearest is measured.

    They count through all weights.
    """
    samples, start = [], 0
    for weight in weights:
        samples.append(range(start, start + len(weight), sampling_step(weight)))
        start += len(weight)
    return samples


def _nearest(
    rows: Tensor, samples: Sequence[range], config: LayerConfig, group_of_column: Tensor
) -> list[QuantizedLinear]:
    """Return the sampled rows of each weight, rounded to nearest; `rows` are those of all weights.

    Raises ScaleRangeError with the row.
    """
    if any(sample.step > 1 for sample in samples):
        rows = torch.cat([rows[sample.start : sample.stop : sample.step] for sample in samples])
    try:
        nearest = round_to_nearest(rows, config, group_of_column)
    except ScaleRangeError as error:
        raise ScaleRangeError(list(chain(*samples))[error.row]) from error
    parts, start = [], 0
    for sample in samples:
        parts.append(nearest.rows(slice(start, start + len(sample))))
        start += len(sample)
    return parts


def _errors(
    weight: Tensor, hessian: Tensor, quantized: QuantizedLinear, nearest: QuantizedLinear
) -> Tensor:
    """Return float64 [3]: energy of a weight, error, and error of round to nearest.

    `nearest` may hold a sample of the rows. Its share of their energy is then that of all rows.
    """
    step = sampling_step(weight)
    if step == 1:
        return output_energies(weight, hessian, [quantized, nearest])
    energies = output_energies(weight, hessian, [quantized])
    sampled, error = output_energies(weight[::step], hessian, [nearest])
    share = torch.where(sampled > 0, error / sampled, 0)
    return torch.cat([energies, (share * energies[0])[None]])


def _errors_from_panels(
    weight: Tensor, panels: Sequence[Tensor], quantized: QuantizedLinear, nearest: QuantizedLinear
) -> Tensor:
    """Return what `_errors` returns, from the panels of a split Hessian."""
    step = sampling_step(weight)
    of_rows = energies_of_rows(weight, panels)
    energy, sampled = of_rows.sum(), of_rows[::step].sum()
    error = energies_of_rows(weight, panels, quantized).sum()
    rtn_error = energies_of_rows(weight[::step], panels, nearest).sum()
    if step > 1:
        rtn_error = torch.where(sampled > 0, rtn_error / sampled, 0) * energy
    return torch.stack([energy, error, rtn_error])


@dataclass(frozen=True, slots=True)
class _Grid:
    """The grids of all groups; if they are not static, each is found when its group is reached."""

    scales: Tensor  # [G, O]
    zeros: Tensor  # [G, O]
    static: bool
    group_size: int
    config: LayerConfig

    @classmethod
    def of(cls, weight: Tensor, factor: HessianFactor, config: LayerConfig) -> _Grid:
        """Return all grids of the weight [O, I] if they are static, or empty ones."""
        order, group_size = factor.order, config.columns_per_group(weight.shape[1])
        if order.static_grid:
            groups = split_groups(weight, _shared_groups(order), group_size)
            scales, zeros = choose_grid(groups, config)
            scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
        else:
            scales = weight.new_empty(weight.shape[1] // group_size, weight.shape[0])
            zeros = torch.empty_like(scales)
        return cls(scales, zeros, order.static_grid, group_size, config)

    @classmethod
    def known(cls, grids: QuantizedLinear, dtype: torch.dtype, config: LayerConfig) -> _Grid:
        """Return the grids of a layer, which stay as they are."""
        scales, zeros = grids.scales.T.to(dtype), grids.zeros.T.to(dtype)
        group_size = config.columns_per_group(grids.codes.shape[1])
        return cls(scales.contiguous(), zeros.contiguous(), True, group_size, config)

    @property
    def found_by_kernel(self) -> bool:
        """Whether one launch finds the min/max grid of a group when the group is reached."""
        plain = self.config.scale_search == "none" and not self.config.signed_scales
        return plain and self.group_size <= MOST_COLUMNS and uses_kernels(self.scales)

    def find(self, block: _ColumnBlock, start: int, stop: int) -> None:
        """Fit the grid of the group with columns start..stop of `block` to its updated weights."""
        if block.inverses is not None:
            columns, group = slice(start, stop), block.group_of[:, start : start + 1]
            inverse = block.inverses[:, start // self.group_size]
            values, weights = block.values[columns], block.errors[columns]
            grids, config = (self.scales, self.zeros), self.config
            find_grids(values, weights, inverse, *grids, group, config.bits, sym=config.sym)
            return
        scales, zeros = choose_grid(block.updated_weights(start, stop).T, self.config)
        groups = block.group_of[:, start].long()
        index = groups[None, :, None].expand(1, -1, scales.numel() // len(groups))
        for known, found in ((self.scales, scales), (self.zeros, zeros)):
            known.unflatten(1, (len(groups), -1)).scatter_(0, index, found.view(index.shape))


@dataclass(frozen=True, slots=True)
class _ColumnBlock:
    """Columns that are rounded together. Indices count from the first column of the block.

    values[j] begins as w_j with the errors of earlier blocks. It becomes v_j as `pass_on` adds the
    errors of earlier columns of the block, and is then rounded to the codes of the column.
    errors[j] turns from w_j into e_j; it is a part of the `errors` of the whole weight.
    """

    values: Tensor  # [n, O]
    errors: Tensor  # [n, O]
    R: Tensor  # [E, n, n]
    group_of: Tensor  # int32 [E, n]
    inverses: Tensor | None  # [E, groups of the block, group_size, group_size], see `_inverses`

    def pass_on(self, start: int, stop: int, end: int) -> None:
        """Add the feedback of columns start..stop to columns stop..end."""
        if stop < end:
            target, done = self.values[stop:end], self.errors[start:stop]
            _add_feedback(target, self.R[:, start:stop, stop:end], done)

    def updated_weights(self, start: int, stop: int) -> Tensor:
        """Return columns start..stop as they would best be if no column were rounded any more.

        These weights [n, O],  u = w + (v - w) R⁻¹,  are those that GPTQ in its first form has
        updated so far, and from which it takes the scales of a group.
        """
        weights, R = self.errors[start:stop], self.R[:, start:stop, start:stop]
        feedback = by_expert(self.values[start:stop] - weights, len(R))
        change: Tensor = torch.linalg.solve_triangular(
            R.mT, feedback, upper=False, unitriangular=True
        )
        return change.transpose(0, 1).flatten(1).add_(weights)


@dataclass(frozen=True, slots=True)
class _Rounding:
    """The rounding of one weight, with its columns in processing order.

    Rounding turns columns of `errors` from w_j into e_j and fills columns of `codes`.
    """

    errors: Tensor  # [I, O], w_j until column j is rounded, then e_j
    codes: Tensor  # uint8 [I, O]
    R: Tensor  # [E, I, I]
    group_of: Tensor  # int32 [E, I]
    grid: _Grid
    order: ColumnOrder
    inverses: Tensor | None  # [E, G, n, n], those of `_inverses` if a kernel finds the grids

    @classmethod
    def of(
        cls,
        weight: Tensor,
        factor: HessianFactor,
        config: LayerConfig,
        grids: QuantizedLinear | None = None,
    ) -> _Rounding:
        """Return the rounding of the weight [O, I] before its first column.

        If `grids` are given, they are those of a layer of this shape.
        """
        dtype = torch.float32
        if weight.dtype == factor.R.dtype == torch.float64:
            dtype = torch.float64
        in_features = weight.shape[1]
        R = factor.R.to(dtype).view(-1, in_features, in_features)
        dead = factor.dead.view(len(R), 1, in_features)
        alive = weight.to(dtype).unflatten(0, (len(R), -1)).masked_fill(dead, 0).flatten(0, 1)
        if grids is None:
            grid = _Grid.of(alive, factor, config)
        else:
            grid = _Grid.known(grids, dtype, config)
        permutation = factor.order.permutation.view(len(R), in_features)
        errors = reordered(alive.T, permutation)
        codes = torch.empty_like(errors, dtype=torch.uint8)
        group_of = factor.order.group_of_column.view(len(R), in_features).gather(1, permutation)
        inverses = None
        if not grid.static and grid.found_by_kernel:
            inverses = _inverses(R, grid.group_size)
        return cls(errors, codes, R, group_of, grid, factor.order, inverses)

    def blocks(self, column_block: int) -> Iterator[tuple[int, int]]:
        """Yield the first column of each block and the one after its last."""
        width = column_block
        if not self.grid.static:  # a block holds whole groups
            width = self.grid.group_size * max(1, column_block // self.grid.group_size)
        for start in range(0, len(self.errors), width):
            yield start, min(start + width, len(self.errors))

    def block(self, start: int, stop: int) -> _ColumnBlock:
        """Return columns start..stop with the errors of all columns before them."""
        errors, R = self.errors[start:stop], self.R[:, :stop, start:stop]
        values = errors.clone()
        if start:
            _add_feedback(values, R[:, :start], self.errors[:start])
        inverses, group_size = self.inverses, self.grid.group_size
        if inverses is not None:
            inverses = inverses[:, start // group_size : stop // group_size]
        return _ColumnBlock(values, errors, R[:, start:], self.group_of[:, start:stop], inverses)

    def result(self) -> QuantizedLinear:
        """Return the quantized weight with its columns in natural order."""
        scales, zeros = self.grid.scales.T, self.grid.zeros.T
        check_scales(scales)
        permutation = self.order.permutation.view(self.group_of.shape)
        natural = reordered(self.codes, permutation.argsort()).T.contiguous()
        return QuantizedLinear(
            natural,
            scales.contiguous().half(),
            zeros.contiguous().byte(),
            _shared_groups(self.order),
            self.grid.config.bits,
        )


def _shared_groups(order: ColumnOrder) -> Tensor:
    """Return the group int32 [I] of each column; experts solved together have the same groups."""
    group_of = order.group_of_column
    n_experts = group_of.shape[:-1].numel()
    assert n_experts == 1 or not order.scattered
    return group_of.view(n_experts, -1)[0]


def _add_feedback(values: Tensor, R: Tensor, errors: Tensor) -> None:
    """Add R [E, k, n] transposed times the errors [k, O] of columns to later columns [n, O]."""
    with feedback_precision(errors):
        add_product_(by_expert(values, len(R)), R.mT, by_expert(errors, len(R)))


def _inverses(R: Tensor, group_size: int) -> Tensor:
    """Return the inverses [E, G, n, n] of the parts of R [E, I, I] inside each run of n columns."""
    groups = R.shape[-1] // group_size
    runs = R.unflatten(2, (groups, group_size)).unflatten(1, (groups, group_size))
    parts = runs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    unit = torch.eye(group_size, dtype=R.dtype, device=R.device)
    inverses: Tensor = torch.linalg.solve_triangular(
        parts, unit.expand_as(parts), upper=True, unitriangular=True
    )
    return inverses.contiguous()


def _round_block(block: _ColumnBlock, grid: _Grid) -> Tensor:
    """Return the codes [n, O] of a block that has the errors of all columns before it.

    The errors of its own columns replace their weights in `block.errors`.
    """
    end = block.group_of.shape[1]
    outer, inner = INNER_BLOCKS
    round_few = _round_one_by_one
    if uses_kernels(block.values):
        outer, inner = KERNEL_BLOCKS
        round_few = _round_at_once
    with_known_grids = end  # columns whose grids are found before the first of them is rounded
    if not grid.static:
        with_known_grids = grid.group_size
    for start in range(0, end, with_known_grids):
        stop = min(start + with_known_grids, end)
        if not grid.static:
            grid.find(block, start, stop)
        for left in range(start, stop, outer):
            right = min(left + outer, stop)
            for first in range(left, right, inner):
                last = min(first + inner, right)
                round_few(block, grid, first, last)
                block.pass_on(first, last, right)
            block.pass_on(left, right, stop)
        block.pass_on(start, stop, end)
    return block.values


def _round_at_once(block: _ColumnBlock, grid: _Grid, start: int, stop: int) -> None:
    """Round columns start..stop with one launch of the kernel."""
    columns = slice(start, stop)
    values, errors, R = block.values[columns], block.errors[columns], block.R[:, columns, columns]
    groups, bits = block.group_of[:, columns], grid.config.bits
    round_columns(values, errors, R, grid.scales, grid.zeros, groups, bits)


def _round_one_by_one(block: _ColumnBlock, grid: _Grid, start: int, stop: int) -> None:
    """Round columns start..stop: each receives the errors of those before it, then is rounded."""
    columns = slice(start, stop)
    values, errors, R = block.values[columns], block.errors[columns], block.R[0, columns, columns]
    for column, group in enumerate(block.group_of[0, columns].tolist()):
        value, error = values[column], errors[column]
        scales, zeros = grid.scales[group], grid.zeros[group]
        if column:
            value.addmv_(errors[:column].T, R[:column, column])
        round_to_grid(value, scales, zeros, grid.config.bits, out=value)  # value is now the codes
        error.addcmul_(value - zeros, scales, value=-1)
