"""Damping and factorisation of the Hessian, done once for all layers that see the same input.

`prepare` computes H + λI = R D Rᵀ with R unit upper triangular and D diagonal, which `solve` needs
to round columns. A Cholesky factor is lower triangular. If rows and columns are reversed before and
after, it becomes upper triangular, and no inverse is needed:
R = flip(cholesky(flip(H + λI))), each column divided by its diagonal entry, in the memory of one
matrix.

Damping by the mean, λ = ρ mean(diag H) for every column, follows the loudest channels and may
exceed the whole energy of a quiet one. Diagonal damping, λ_j = ρ H_jj, shrinks every correlation by
1 + ρ, whatever the units of its channels.

`cholesky_` computes the factor of a large matrix in its own memory, with most of the work in
products. It takes a panel of columns at a time: first its diagonal block A_kk = L_kk L_kkᵀ, then
the rows below it, L_ik = A_ik L_kk⁻ᵀ, then the lower half of the rest of the matrix,
A_ij -= L_ik L_jkᵀ. On CUDA the last products run on tensor cores. Each factor is split into two
bfloat16 numbers, which keep 16 of the 24 bits of float32; sums are float32.

`follow_original` uses the same factors to correct weights for the error of earlier quantized
layers. After them a layer sees inputs x instead of the inputs x₀ of the unquantized model, but its
output should be W x₀. The weight to quantize is therefore the one whose output on x is nearest to
W x₀, by least squares with the damped Hessian:

W* = W + α W C (H + λI)⁻¹,    H = Σ x xᵀ,    C = Σ (x₀ - x) xᵀ

Σ ‖W x₀ - Q x‖² is Σ ‖(W* - Q) x‖² plus a constant, so W* is quantized as any other weight. A
strength α below 1 avoids an overfit to the calibration text. Source: QEP (Arai and Ichikawa 2025,
arXiv 2504.09629).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.numerics import row_chunks


@dataclass(frozen=True, slots=True)
class ColumnOrder:
    """The columns in processing order, and the group of each.

    If `static_grid` is false, groups are runs of consecutive positions in that order, and the grid
    of a group is found when its first column is reached.
    """

    permutation: Tensor  # int64 [I]: position j of the order is column permutation[j]
    group_of_column: Tensor  # int32 [I], the g_idx of the checkpoint
    static_grid: bool  # grids are found from the original weights, before any column is rounded
    scattered: bool  # columns of a group need not be neighbours


def column_order(diagonal: Tensor, config: LayerConfig) -> ColumnOrder:
    """Return the order and the groups that `config` asks for, given diag(H) [I].

    Columns with equal entries keep their natural order. Raise ValueError if the group size does not
    divide I.
    """
    in_features = diagonal.numel()
    group_size = config.columns_per_group(in_features)
    if in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide in_features {in_features}")
    positions = torch.arange(in_features, device=diagonal.device)
    groups = (positions // group_size).int()
    # A group of the whole row gets its grid before any column is rounded: it is static anyway.
    static_grid = config.static_groups or group_size == in_features
    scattered = config.desc_act and not static_grid
    if config.desc_act or (config.act_group_aware and static_grid):
        permutation = diagonal.argsort(descending=True, stable=True)
        if scattered:
            groups = torch.empty_like(groups).index_copy_(0, permutation, groups)
    elif config.act_group_aware:
        permutation = _group_aware(diagonal.reshape(-1, group_size))
    else:
        permutation = positions
    return ColumnOrder(permutation, groups, static_grid, scattered)


def _group_aware(diagonal: Tensor) -> Tensor:
    """Return the order int64 [I] of columns for diag(H) as groups [G, n].

    Groups are sorted by their largest entry and columns inside a group by their own, largest first.
    """
    inside = diagonal.argsort(dim=1, descending=True, stable=True)
    groups = diagonal.amax(dim=1).argsort(descending=True, stable=True)
    first_column = torch.arange(0, diagonal.numel(), diagonal.shape[1], device=diagonal.device)
    return (inside + first_column[:, None])[groups].flatten()


DAMPING_STEP = 4.0
# Few tokens measure correlations badly: if there is one token per column, diagonal damping is 1/2.
COLUMNS_PER_TOKEN = 0.5
# Smaller matrices on CUDA are factorised as one panel, by its library and in full float32:
BLOCKED_FROM = 16384
# Share of the loudest channel's energy. Diagonal damping treats a quieter channel as this loud:
QUIETEST = 1e-10

PANEL = {"cpu": 512, "cuda": 4096}  # columns at a time of `cholesky_`


class NotPositiveDefiniteError(ArithmeticError):
    """The Hessian has no Cholesky factor, even with `damp_percent`, the last damping tried."""

    def __init__(self, damp_percent: float) -> None:
        super().__init__(
            f"the Hessian is not positive definite even with damp_percent {damp_percent:g}"
        )
        self.damp_percent = damp_percent


class NonFiniteHessianError(ArithmeticError):
    """The Hessian holds NaN or infinity: an input of the layer was not finite."""

    def __init__(self) -> None:
        super().__init__("the Hessian is not finite")


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """The factors of a damped Hessian, in processing order; shared by the linears of a stage."""

    order: ColumnOrder
    R: Tensor  # [I, I], unit upper triangular
    D: Tensor  # [I], positive
    dead: Tensor  # bool [I], columns whose input was always zero, in natural order
    dead_columns: int  # the number of dead columns
    damping: Tensor  # [I], added to diag H before the factorisation, in natural order
    damp_percent: float  # the damping in R and D: λ / mean(diag H), or λ_j / H_jj
    retries: int  # number of times that damping was raised before the factorisation succeeded


@torch.no_grad()
def prepare(hessian: Tensor, config: LayerConfig, tokens: int | None = None) -> HessianFactor:
    """Return the column order of `config` and the factors of the damped Hessian [I, I].

    With `damp_mode` mean, λ = damp_percent * mean(diag H). With diagonal, λ_j = ρ H_jj, where
    ρ = I / (2 tokens) within [damp_percent, 1]; `tokens` is the number of tokens that the Hessian
    sums. If the factorisation fails, ρ is multiplied by 4 as long as it stays below 1 (diagonal: up
    to 1); `retries` counts the multiplications and `damp_percent` holds the value used. The Hessian
    itself is not changed.

    Raise NonFiniteHessianError, NotPositiveDefiniteError, and ValueError if the group size does not
    divide I or `tokens` is missing with diagonal damping.
    Source: GPTQ (Frantar et al. 2022), section 3.3, in the LDL form of QuIP (Chee et al. 2023).
    """
    energy = hessian.diagonal().clone()
    dead = energy == 0
    # Both are asked for together, to wait for the device only once.
    finite, dead_columns = torch.stack([torch.isfinite(energy.mean()), dead.sum()]).tolist()
    if not finite:
        raise NonFiniteHessianError
    order = column_order(energy, config)
    undamped, unit = _diagonal(energy, dead, config)
    damp_percent, retries = _first_damping(config, energy.numel(), tokens), 0
    while True:
        damped = undamped + damp_percent * unit
        R = _upper_factor(hessian, damped, order.permutation)
        if R is not None:
            break
        damp_percent, retries = _next_damping(damp_percent, config), retries + 1
    root = R.diagonal().clone()
    factors = (R.div_(root), root.square())
    return HessianFactor(
        order, *factors, dead, dead_columns, damped - energy, damp_percent, retries
    )


def _upper_factor(hessian: Tensor, diagonal: Tensor, permutation: Tensor) -> Tensor | None:
    """Return the upper Cholesky factor of the Hessian with `diagonal` [I], in the order given.

    Return None if there is none.
    """
    backwards = permutation.flip(0)
    matrix = hessian[backwards[:, None], backwards]
    matrix.diagonal().copy_(diagonal[backwards])
    panel = None
    if matrix.is_cuda and len(matrix) < BLOCKED_FROM:
        panel = len(matrix)
    if cholesky_(matrix, panel):
        return None
    reverse_(matrix)
    return matrix


def _diagonal(energy: Tensor, dead: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Return the undamped diagonal [I], nowhere zero, and the addition [I] of a damping of 1."""
    if config.damp_mode == "mean":
        return energy.masked_fill(dead, 1), energy.mean().expand_as(energy)
    # A dead column becomes 1, not QUIETEST: if all columns are dead, that share is zero too.
    diagonal = energy.clamp(min=QUIETEST * energy.max()).masked_fill(dead, 1)
    return diagonal, diagonal


def _first_damping(config: LayerConfig, in_features: int, tokens: int | None) -> float:
    """Return the damping ρ that is tried first."""
    if config.damp_mode == "mean":
        return config.damp_percent
    if tokens is None:
        raise ValueError("diagonal damping needs the number of tokens")
    return min(1.0, max(config.damp_percent, COLUMNS_PER_TOKEN * in_features / max(tokens, 1)))


def _next_damping(tried: float, config: LayerConfig) -> float:
    """Return the damping to try after `tried`; raise NotPositiveDefiniteError if there is none."""
    stronger = tried * DAMPING_STEP
    if config.damp_mode == "diagonal" and tried < 1:
        return min(1.0, stronger)
    if stronger >= 1:
        raise NotPositiveDefiniteError(tried)
    return stronger


@torch.no_grad()
def cholesky_(matrix: Tensor, panel: int | None = None) -> int:
    """Turn a symmetric positive definite matrix [n, n] into its lower Cholesky factor, in place.

    `panel` is the number of columns that are done at a time; the default depends on the device.
    Return 0 on success. Else return, as `torch.linalg.cholesky_ex` does, the order of the first
    leading minor that is not positive; the contents of the matrix are then undefined. Only the
    lower triangle is read. Waits for the device once per panel.
    """
    size = len(matrix)
    panel = panel or PANEL[matrix.device.type]
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        corner = matrix[start:stop, start:stop]
        factor, failed_at = torch.linalg.cholesky_ex(corner)
        if bool(failed_at):
            return start + int(failed_at)
        corner.copy_(factor)
        matrix[start:stop, stop:] = 0
        if stop < size:
            below = matrix[stop:, start:stop]
            below.copy_(torch.linalg.solve_triangular(factor.T, below, upper=True, left=False))
            _subtract_square_(matrix[stop:, stop:], below, panel)
    return 0


def reverse_(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a contiguous matrix in place."""
    numbers = matrix.view(-1)
    size = len(numbers)
    for part in row_chunks(numbers[: size // 2]):
        front, back = numbers[part], numbers[size - part.stop : size - part.start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _subtract_square_(matrix: Tensor, factor: Tensor, panel: int) -> None:
    """Subtract factor factorᵀ from the matrix on and below the diagonal.

    Entries above the diagonal change too if they are in a diagonal block of `panel` columns.
    """
    on_tensor_cores = factor.is_cuda and factor.dtype == torch.float32
    if on_tensor_cores:
        high = factor.bfloat16()
        low = (factor - high).bfloat16()
    for start in range(0, len(matrix), panel):
        stop = min(start + panel, len(matrix))
        target = matrix[start:, start:stop]
        if not on_tensor_cores:
            target.addmm_(factor[start:], factor[start:stop].T, alpha=-1)
            continue
        for left, right in ((high, high), (high, low), (low, high)):
            target -= torch.mm(left[start:], right[start:stop].T, out_dtype=torch.float32)


@torch.no_grad()
def follow_original(
    weight: Tensor, shift: Tensor, prepared: HessianFactor, strength: float
) -> Tensor:
    """Return W* [O, I], which makes up for the changed inputs of a layer (see the module).

    `weight` is W [O, I], `shift` is C [I, I], and `strength` is α. W* has the dtype of the factors.
    Source: QEP (Arai and Ichikawa 2025, arXiv 2504.09629).
    """
    R, D, order = prepared.R, prepared.D, prepared.order.permutation
    weight = weight.to(R.dtype)
    pull = (weight @ shift.to(R.dtype))[:, order]
    # Solve X R D Rᵀ = pull from the right: first with Rᵀ, then with R.
    scaled: Tensor = torch.linalg.solve_triangular(
        R.T, pull, upper=False, left=False, unitriangular=True
    )
    change: Tensor = torch.linalg.solve_triangular(
        R, scaled / D, upper=True, left=False, unitriangular=True
    )
    return weight + strength * change[:, order.argsort()]
