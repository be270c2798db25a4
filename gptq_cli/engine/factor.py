"""Damping and factorisation of the Hessian, done once for all layers that see the same input.

H + λI = R D Rᵀ with R unit upper triangular and D diagonal. A Cholesky factor is lower triangular; reversing rows and
columns before and after makes it upper, and no inverse is needed:
R = flip(cholesky(flip(H + λI))), each column divided by its diagonal entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.engine.order import ColumnOrder, column_order

DAMPING_STEP = 4.0


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
    damp_percent: float  # the damping in R and D: λ / mean(diag H)
    retries: int  # how often it was raised before the factorisation succeeded

    @property
    def dead_columns(self) -> int:
        return int(self.dead.sum())


@torch.no_grad()
def prepare(hessian: Tensor, config: LayerConfig) -> Prepared:
    """The column order of `config` and the factors of the damped Hessian [I, I] in that order.

    λ = damp_percent * mean(diag H). If the factorisation fails, damp_percent is multiplied by 4 as long as it stays
    below 1; `retries` counts that and `damp_percent` holds the value used. The Hessian itself is left as it was.
    Raises NonFiniteHessianError, NotPositiveDefiniteError, and ValueError if the group size does not divide I.
    Source: GPTQ (Frantar et al. 2022), section 3.3, in the LDL form of QuIP (Chee et al. 2023).
    """
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean()
    if not bool(torch.isfinite(mean)):
        raise NonFiniteHessianError
    order = column_order(diagonal, config)
    dead = diagonal == 0
    backwards = order.permutation.flip(0)
    damped = hessian[backwards[:, None], backwards]
    undamped_diagonal = diagonal.masked_fill(dead, 1)[backwards]
    damp_percent, retries = config.damp_percent, 0
    while True:
        damped.diagonal().copy_(undamped_diagonal + damp_percent * mean)
        lower, failed_at = torch.linalg.cholesky_ex(damped)
        if not bool(failed_at):
            break
        if damp_percent * DAMPING_STEP >= 1:
            raise NotPositiveDefiniteError(damp_percent)
        damp_percent, retries = damp_percent * DAMPING_STEP, retries + 1
    del damped
    R = lower.flip(0, 1)
    root = R.diagonal().clone()
    return Prepared(order, R.div_(root), root.square(), dead, damp_percent, retries)
