"""Damping and factorisation of the Hessian, done once for all layers that see the same input.

H + λI = R D Rᵀ with R unit upper triangular and D diagonal. A Cholesky factor is lower triangular; reversing rows and
columns before and after makes it upper, and no inverse is needed:
R = flip(cholesky(flip(H + λI))), each column divided by its diagonal entry, in the memory of one matrix.

Damping by the mean, λ = ρ mean(diag H) for every column, follows the loudest channels and may
exceed all that a quiet one carries. Diagonal damping, λ_j = ρ H_jj, shrinks every correlation by 1
+ ρ, whatever the units of its channels.

The Cholesky factor of a large matrix is computed in its own memory, most of the work in products. A
panel of columns at a time: its diagonal block A_kk = L_kk L_kkᵀ, the rows below it L_ik = A_ik
L_kk⁻ᵀ, and what is left of the matrix A_ij -= L_ik L_jkᵀ, the lower half only. On CUDA those
products run on tensor cores, each factor split into two bfloat16 numbers, which keeps 16 of the 24
bits of float32; sums are float32.

With the same factors weights can make up for what quantized layers before them have done to their
inputs. A layer behind quantized ones sees inputs x where the unquantized model has x₀. What it
should give is W x₀, so of all weights the one to quantize is that which comes nearest to it on x,
least squares with the damped Hessian:

W* = W + α W C (H + λI)⁻¹,    H = Σ x xᵀ,    C = Σ (x₀ - x) xᵀ

and Σ ‖W x₀ - Q x‖² is Σ ‖(W* - Q) x‖² plus what no Q can change: W* is then quantized as any other
weight. The strength α below 1 keeps it from fitting the calibration text too well. Source: QEP
(Arai and Ichikawa 2025, arXiv 2504.09629).
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

    Unless `static_grid`, groups are runs of consecutive positions, and a group's grid is found when its turn comes.
    """

    permutation: Tensor  # int64 [I]: position j of the order is column permutation[j]
    group_of_column: Tensor  # int32 [I], the g_idx of the checkpoint
    static_grid: bool  # scales come from the original weights
    scattered: bool  # columns of a group need not be neighbours


def column_order(diagonal: Tensor, config: LayerConfig) -> ColumnOrder:
    """The order and the groups that `config` asks for, given diag(H) [I]; equal entries keep their natural order.

    Raises ValueError if the group size does not divide I.
    """
    in_features = diagonal.numel()
    group_size = config.columns_per_group(in_features)
    if in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide in_features {in_features}")
    positions = torch.arange(in_features, device=diagonal.device)
    groups = (positions // group_size).int()
    # One group for a whole row is found before any column is rounded, so its grid is static in every order.
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
    """Groups [G, n] by their largest entry, the columns of a group by theirs, largest first."""
    inside = diagonal.argsort(dim=1, descending=True, stable=True)
    groups = diagonal.amax(dim=1).argsort(descending=True, stable=True)
    first_column = torch.arange(0, diagonal.numel(), diagonal.shape[1], device=diagonal.device)
    return (inside + first_column[:, None])[groups].flatten()


DAMPING_STEP = 4.0
# Correlations that few tokens measured are noise: diagonal damping is 1/2 where there is a token per column.
COLUMNS_PER_TOKEN = 0.5
BLOCKED_FROM = 16384  # on CUDA, whose library factorises smaller ones in one go and in full float32
QUIETEST = 1e-10  # of the loudest channel's energy: below it diagonal damping takes a channel to be as loud

PANEL = {"cpu": 512, "cuda": 4096}


class NotPositiveDefiniteError(ArithmeticError):
    """The Hessian has no Cholesky factor even with the damping that was tried last, `damp_percent`."""

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
    """What the solver needs to know about an input, in processing order; shared by the linears of a stage."""

    order: ColumnOrder
    R: Tensor  # [I, I], unit upper triangular
    D: Tensor  # [I], positive
    dead: Tensor  # bool [I], columns of the layer whose input was always zero
    dead_columns: int  # how many
    damping: Tensor  # [I], added to diag H before factorizing, in the natural order of columns
    damp_percent: float  # the damping in R and D: λ / mean(diag H), or λ_j / H_jj
    retries: int  # how often it was raised before the factorisation succeeded


@torch.no_grad()
def prepare(hessian: Tensor, config: LayerConfig, tokens: int | None = None) -> HessianFactor:
    """The column order of `config` and the factors of the damped Hessian [I, I] in that order.

    With `damp_mode` mean, λ = damp_percent * mean(diag H). With diagonal, λ_j = ρ H_jj, where ρ = I / (2 tokens) within
    [damp_percent, 1], and `tokens` is how many the Hessian sums. If the factorisation fails, ρ is multiplied by 4 as
    long as it stays below 1 (diagonal: up to 1); `retries` counts that and `damp_percent` holds the value used. The
    Hessian itself is left as it was.
    Raises NonFiniteHessianError, NotPositiveDefiniteError, and ValueError if the group size does not divide I or
    diagonal damping is not told the tokens.
    Source: GPTQ (Frantar et al. 2022), section 3.3, in the LDL form of QuIP (Chee et al. 2023).
    """
    energy = hessian.diagonal().clone()
    dead = energy == 0
    finite, dead_columns = torch.stack(
        [torch.isfinite(energy.mean()), dead.sum()]
    ).tolist()  # waits once for both
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
    backwards = permutation.flip(0)
    matrix = hessian[backwards[:, None], backwards]
    matrix.diagonal().copy_(diagonal[backwards])
    if cholesky_(
        matrix, panel=len(matrix) if matrix.is_cuda and len(matrix) < BLOCKED_FROM else None
    ):
        return None
    reverse_(matrix)
    return matrix


def _diagonal(energy: Tensor, dead: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """The diagonal [I] without damping, nowhere zero, and what damping of 1 adds to it."""
    if config.damp_mode == "mean":
        return energy.masked_fill(dead, 1), energy.mean().expand_as(energy)
    # Dead columns first: any share of nothing is nothing.
    diagonal = energy.clamp(min=QUIETEST * energy.max()).masked_fill(dead, 1)
    return diagonal, diagonal


def _first_damping(config: LayerConfig, in_features: int, tokens: int | None) -> float:
    if config.damp_mode == "mean":
        return config.damp_percent
    if tokens is None:
        raise ValueError("diagonal damping needs the number of tokens")
    return min(1.0, max(config.damp_percent, COLUMNS_PER_TOKEN * in_features / max(tokens, 1)))


def _next_damping(tried: float, config: LayerConfig) -> float:
    stronger = tried * DAMPING_STEP
    if config.damp_mode == "diagonal" and tried < 1:
        return min(1.0, stronger)
    if stronger >= 1:
        raise NotPositiveDefiniteError(tried)
    return stronger


@torch.no_grad()
def cholesky_(matrix: Tensor, panel: int | None = None) -> int:
    """Turn a symmetric positive definite matrix [n, n] into its lower Cholesky factor, in place.

    A panel of so many columns is done at a time; the default is what suits the device.
    Returns 0, or as `torch.linalg.cholesky_ex` the order of the first leading minor that is not positive; the matrix is
    then neither one nor the other. Reads the lower triangle only; waits for the device once a panel.
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
    """matrix -= factor factorᵀ on and below the diagonal, and some more beside it."""
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
    """W* [O, I] for the weight W [O, I], the shift C [I, I] and the factors of the damped Hessian.

    `strength` is α. Computed in the dtype of the factors.
    """
    R, D, order = prepared.R, prepared.D, prepared.order.permutation
    weight = weight.to(R.dtype)
    pull = (weight @ shift.to(R.dtype))[:, order]
    # X R D Rᵀ = pull, from the right: first against Rᵀ, then against R.
    scaled: Tensor = torch.linalg.solve_triangular(
        R.T, pull, upper=False, left=False, unitriangular=True
    )
    change: Tensor = torch.linalg.solve_triangular(
        R, scaled / D, upper=True, left=False, unitriangular=True
    )
    return weight + strength * change[:, order.argsort()]
