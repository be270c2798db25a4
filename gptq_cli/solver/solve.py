"""GPTQ for one linear layer, as successive rounding with linear feedback.

Minimise  tr((W - Q) H (W - Q)ᵀ)  over the Q that lie on the grid. With  H = R D Rᵀ,  R unit upper triangular, that is
Σ_j D_j ‖v_j - q_j‖²  with  v_j = w_j + Σ_{i<j} e_i R_ij  and  e_i = w_i - q_i:  round each v_j to its grid, columns in
processing order. This is GPTQ (Frantar et al. 2022) in the form of LDLQ (QuIP, Chee et al. 2023): the same codes, and
no inverse.

Columns are taken in blocks. A block first receives the errors of all columns before it in one product,
v_B = w_B + E_{<B} R_{<B,B}; inside it errors are passed on at once: by one kernel on a device that has it, see
`triton_launch`, else through smaller and smaller blocks.

Letters for shapes:  O out_features   I in_features   G groups   n columns of a block
Matrices are held transposed, [I, O], so that a column of the layer is contiguous in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import HessianFactor
from gptq_cli.solver.grid import check_scales, choose_grid, round_to_grid, split_groups
from gptq_cli.solver.numerics import feedback_precision
from gptq_cli.solver.quantized_linear import (
    QuantizedLinear,
    check_decoded,
    output_energies,
    round_to_nearest,
)
from gptq_cli.solver.refine import refine
from gptq_cli.solver.triton_launch import MOST_COLUMNS, round_columns, uses_kernels

COLUMN_BLOCK = 128
INNER_BLOCKS = (128, 32)
KERNEL_BLOCKS = (MOST_COLUMNS,)


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized layer, and its output error beside that of round to nearest with the same groups."""

    quantized: QuantizedLinear
    energy: float  # tr(W H Wᵀ), H without damping
    error: float  # tr(E H Eᵀ)
    rtn_error: float

    @property
    def relative_error(self) -> float:
        """The error as a share of the energy; 0 for a layer whose output is always zero."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def rtn_relative_error(self) -> float:
        return self.rtn_error / self.energy if self.energy else 0.0

    @classmethod
    def of_rows(cls, parts: Sequence[Solution]) -> Solution:
        """The layer whose rows are those of `parts`, one after the other."""
        if len(parts) == 1:
            return parts[0]
        energies = (
            sum(energies)
            for energies in zip(*((p.energy, p.error, p.rtn_error) for p in parts), strict=True)
        )
        return cls(QuantizedLinear.of_rows([part.quantized for part in parts]), *energies)


@dataclass(frozen=True, slots=True)
class _Grid:
    """The grids of all groups, found as the groups are reached."""

    scales: Tensor  # [G, O]
    zeros: Tensor  # [G, O]
    config: LayerConfig

    def find(self, group: Tensor, weights: Tensor) -> None:
        """Fit the grid of a group [1] to weights [n, O]."""
        scales, zeros = choose_grid(weights.T, self.config)
        self.scales.index_copy_(0, group, scales[None])
        self.zeros.index_copy_(0, group, zeros[None])


@dataclass(frozen=True, slots=True)
class _Block:
    """Columns that are rounded together. All indices are local to the block: its first column is 0.

    Rounding column j turns values[j] from v_j into its codes, and errors[j] from w_j into e_j.
    """

    values: Tensor  # [n, O]
    errors: Tensor  # [n, O]
    R: Tensor  # [n, n]
    group_of: Tensor  # int32 [n]

    def feed(self, start: int, stop: int, end: int) -> None:
        """Pass the errors of columns start..stop on to columns stop..end."""
        if stop < end:
            with feedback_precision(self.errors):
                self.values[stop:end].addmm_(
                    self.R[start:stop, stop:end].T, self.errors[start:stop]
                )

    def updated_weights(self, start: int, stop: int) -> Tensor:
        """Columns start..stop as they would best be if nothing were rounded any more, u = w + (v - w) R⁻¹: the weights
        that GPTQ in its first form has updated so far, and from which it takes the scales of a group."""
        weights, R = self.errors[start:stop], self.R[start:stop, start:stop]
        feedback = self.values[start:stop] - weights
        change: Tensor = torch.linalg.solve_triangular(
            R.T, feedback, upper=False, unitriangular=True
        )
        return change.add_(weights)


@torch.no_grad()
def solve(
    weight: Tensor,
    hessian: Tensor,
    prepared: HessianFactor,
    config: LayerConfig,
    *,
    column_block: int = COLUMN_BLOCK,
) -> Solution:
    """The weight [O, I] quantized by GPTQ, with its output error under the undamped Hessian [I, I].

    With `refine_sweeps`, codes and scales are then fitted further to the damped Hessian.
    `prepared` holds the order and the factors of the same Hessian. Sums are float32, or float64 if weight and Hessian
    are. Dead columns get the code of zero. `column_block` moves work between products of matrices and of vectors; it
    changes the result by no more than the rounding of sums. Raises ScaleRangeError.
    """
    return solve_together([weight], hessian, prepared, config, column_block=column_block)[0]


@torch.no_grad()
def solve_together(
    weights: Sequence[Tensor],
    hessian: Tensor,
    prepared: HessianFactor,
    config: LayerConfig,
    *,
    column_block: int = COLUMN_BLOCK,
) -> list[Solution]:
    """As `solve` for each of several weights [O, I] with the same input, solved as the rows of one.

    The row of a ScaleRangeError counts through all of them.
    """
    rows = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    quantized = _quantize(rows, prepared, config, column_block)
    if config.refine_sweeps:
        sweeps, signed = config.refine_sweeps, config.signed_scales
        quantized = refine(rows, hessian, prepared, quantized, sweeps=sweeps, signed=signed)
    check_decoded(quantized)
    baseline = round_to_nearest(rows, config, prepared.order.group_of_column)
    solutions, start = [], 0
    for weight in weights:
        own = slice(start, start := start + len(weight))
        candidates = (quantized.rows(own), baseline.rows(own))
        solutions.append(Solution(candidates[0], *output_energies(weight, hessian, candidates)))
    return solutions


def _quantize(
    weight: Tensor, prepared: HessianFactor, config: LayerConfig, column_block: int
) -> QuantizedLinear:
    order, in_features = prepared.order, weight.shape[1]
    dtype = torch.float64 if weight.dtype == prepared.R.dtype == torch.float64 else torch.float32
    R = prepared.R.to(dtype)
    alive = weight.to(dtype).masked_fill(prepared.dead, 0)
    grid = _initial_grid(alive, prepared, config)
    errors = alive.T.index_select(0, order.permutation)
    del alive
    codes = torch.empty_like(errors, dtype=torch.uint8)
    group_of = order.group_of_column[order.permutation]
    width, run = _widths(config.columns_per_group(in_features), order.static_grid, column_block)
    for start in range(0, in_features, width):
        stop = min(start + width, in_features)
        with feedback_precision(errors):
            values = torch.addmm(errors[start:stop], R[:start, start:stop].T, errors[:start])
        block = _Block(values, errors[start:stop], R[start:stop, start:stop], group_of[start:stop])
        _round_block(block, grid, order.static_grid, run)
        codes[start:stop] = values
    check_scales(grid.scales.T)
    natural = codes[order.permutation.argsort()].T.contiguous()
    scales, zeros = grid.scales.T.contiguous().half(), grid.zeros.T.contiguous().byte()
    return QuantizedLinear(natural, scales, zeros, order.group_of_column, config.bits)


def _initial_grid(weight: Tensor, prepared: HessianFactor, config: LayerConfig) -> _Grid:
    """All grids from the original weights [O, I] if they are static; else room for them."""
    order, group_size = prepared.order, config.columns_per_group(weight.shape[1])
    if order.static_grid:
        groups = split_groups(weight, order.group_of_column, group_size)
        scales, zeros = choose_grid(groups, config)
        return _Grid(scales.T.contiguous(), zeros.T.contiguous(), config)
    out_features, in_features = weight.shape
    scales = weight.new_empty(in_features // group_size, out_features)
    return _Grid(scales, torch.empty_like(scales), config)


def _widths(group_size: int, static_grid: bool, column_block: int) -> tuple[int, int]:
    """Columns per block, and per run of columns that need their grid when all columns before them are done."""
    if static_grid:
        return column_block, column_block
    return group_size * max(1, column_block // group_size), group_size


def _round_block(block: _Block, grid: _Grid, static_grid: bool, run: int) -> None:
    """Round a block that has received the errors of all columns before it, one run of columns after the other."""
    n_columns = len(block.group_of)
    widths = KERNEL_BLOCKS if uses_kernels(block.values) else INNER_BLOCKS
    for start in range(0, n_columns, run):
        stop = min(start + run, n_columns)
        if not static_grid:
            grid.find(block.group_of[start : start + 1].long(), block.updated_weights(start, stop))
        _round_columns(block, grid, start, stop, widths)
        block.feed(start, stop, n_columns)


def _round_columns(
    block: _Block, grid: _Grid, start: int, stop: int, widths: tuple[int, ...]
) -> None:
    """Round columns start..stop, which have received the errors of all columns before `start`."""
    if not widths:
        round_few = _round_at_once if uses_kernels(block.values) else _round_one_by_one
        round_few(block, grid, start, stop)
        return
    for left in range(start, stop, widths[0]):
        right = min(left + widths[0], stop)
        _round_columns(block, grid, left, right, widths[1:])
        block.feed(left, right, stop)


def _round_at_once(block: _Block, grid: _Grid, start: int, stop: int) -> None:
    columns = slice(start, stop)
    values, errors, R = block.values[columns], block.errors[columns], block.R[columns, columns]
    round_columns(
        values, errors, R, grid.scales, grid.zeros, block.group_of[columns], grid.config.bits
    )


def _round_one_by_one(block: _Block, grid: _Grid, start: int, stop: int) -> None:
    values, errors, R = (
        block.values[start:stop],
        block.errors[start:stop],
        block.R[start:stop, start:stop],
    )
    for column, group in enumerate(block.group_of[start:stop].tolist()):
        value, error = values[column], errors[column]
        scales, zeros = grid.scales[group], grid.zeros[group]
        if column:
            value.addmv_(errors[:column].T, R[:column, column])
        round_to_grid(value, scales, zeros, grid.config.bits, out=value)
        error.addcmul_(value - zeros, scales, value=-1)
