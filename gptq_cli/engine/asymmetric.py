"""Weights that make up for what quantized layers before them have done to their inputs.

A layer behind quantized ones sees inputs x where the unquantized model has x₀. What it should give is W x₀, so of all
weights the one to quantize is that which comes nearest to it on x, least squares with the damped Hessian:

W* = W + α W C (H + λI)⁻¹,    H = Σ x xᵀ,    C = Σ (x₀ - x) xᵀ

and Σ ‖W x₀ - Q x‖² is Σ ‖(W* - Q) x‖² plus what no Q can change: W* is then quantized as any other weight. The strength
α below 1 keeps it from fitting the calibration text too well.
Source: QEP (Arai and Ichikawa 2025, arXiv 2504.09629).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.engine.factor import Prepared


@torch.no_grad()
def follow_original(weight: Tensor, shift: Tensor, prepared: Prepared, strength: float) -> Tensor:
    """W* [O, I] for the weight W [O, I], the shift C [I, I] and the factors of the damped Hessian.

    `strength` is α. Computed in the dtype of the factors.
    """
    R, D, order = prepared.R, prepared.D, prepared.order.permutation
    weight = weight.to(R.dtype)
    pull = (weight @ shift.to(R.dtype))[:, order]
    # X R D Rᵀ = pull, from the right: first against Rᵀ, then against R.
    scaled: Tensor = torch.linalg.solve_triangular(R.T, pull, upper=False, left=False, unitriangular=True)
    change: Tensor = torch.linalg.solve_triangular(R, scaled / D, upper=True, left=False, unitriangular=True)
    return weight + strength * change[:, order.argsort()]
