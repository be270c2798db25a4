"""Damping and factorisation of the Hessian, done once for all layers that see the same input.

H + λI = R D Rᵀ with R unit upper triangular and D diagonal. A Cholesky factor is lower triangular; reversing rows and
columns before and after makes it upper, and no inverse is needed:
R = flip(cholesky(flip(H + λI))), each column divided by its diagonal entry, in the memory of one matrix.

Damping by the mean, λ = ρ mean(diag H) for every column, follows the loudest channels and may exceed all that a quiet
one carries. Diagonal damping, λ_j = ρ H_jj, shrinks every correlation by 1 + ρ, whatever the units of its channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.engine.cholesky import cholesky_, reverse_
from gptq_cli.engine.order import ColumnOrder, column_order

DAMPING_STEP = 4.0
# Correlations that few tokens measured are noise: diagonal damping is 1/2 where there is a token per column.
COLUMNS_PER_TOKEN = 0.5
BLOCKED_FROM = 16384  # on CUDA, whose library factorises smaller ones in one go and in full float32
QUIETEST = 1e-10  # of the loudest channel's energy: below it diagonal damping takes a channel to be as loud


class NotPositiveDefiniteError(ArithmeticError):
    """The Hessian has no Cholesky factor even with the damping that was tried last, `damp_percent`."""

    def __init__(self, damp_percent: float) -> None:
        super().__init__(f"the Hessian is not positive definite even with damp_percent {damp_percent:g}")
        self.damp_percent = damp_percent


class NonFiniteHessianError(ArithmeticError):
    """The Hessian holds NaN or infinity: an input of the layer was not finite."""

    def __init__(self) -> None:
        super().__init__("the Hessian is not finite")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the solver needs to know about an input, in processing order; shared by the linears of a stage."""

    order: ColumnOrder
    R: Tensor  # [I, I], unit upper triangular
    D: Tensor  # [I], positive
    dead: Tensor  # bool [I], columns of the layer whose input was always zero
    dead_columns: int  # how many
    energy: Tensor  # [I], diag H as it came, in the natural order of columns
    damping: Tensor  # [I], what R D Rᵀ has on its diagonal beyond that, in the same order
    damp_percent: float  # the damping in R and D: λ / mean(diag H), or λ_j / H_jj
    retries: int  # how often it was raised before the factorisation succeeded


@torch.no_grad()
def prepare(hessian: Tensor, config: LayerConfig, tokens: int | None = None) -> Prepared:
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
    finite, dead_columns = torch.stack([torch.isfinite(energy.mean()), dead.sum()]).tolist()  # waits once for both
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
    return Prepared(order, *factors, dead, dead_columns, energy, damped - energy, damp_percent, retries)


def _upper_factor(hessian: Tensor, diagonal: Tensor, permutation: Tensor) -> Tensor | None:
    backwards = permutation.flip(0)
    matrix = hessian[backwards[:, None], backwards]
    matrix.diagonal().copy_(diagonal[backwards])
    if cholesky_(matrix, panel=len(matrix) if matrix.is_cuda and len(matrix) < BLOCKED_FROM else None):
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
