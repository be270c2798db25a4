"""How much there is to compute, in multiplications with an addition: what shares of work are balanced by."""

from __future__ import annotations

from collections.abc import Sequence

from gptq_cli.pipeline.plan import LayerPlan

HESSIAN_SHARE = 9 / 16  # of a full product, as the Hessian is symmetric


def hessian_cost(in_features: int, tokens: int) -> float:
    """Of Σ x xᵀ over so many tokens."""
    return HESSIAN_SHARE * tokens * in_features**2


def factor_cost(in_features: int) -> float:
    """Of one Cholesky factor."""
    return in_features**3 / 6


def solve_cost(layer: LayerPlan) -> float:
    """Of passing on the errors of all columns, of refining, and of the error that is reported."""
    assert layer.config is not None
    products = 0.5 + layer.config.refine_sweeps + 1 + bool(layer.config.asymmetric_calibration)
    return products * layer.out_features * layer.in_features**2


def expert_cost(layers: Sequence[LayerPlan], tokens: int) -> float:
    """Of all that quantizing one expert takes, if it was sent so many tokens."""
    inputs = {layer.in_features for layer in layers}
    forward = sum(layer.out_features * layer.in_features for layer in layers) * tokens
    return forward + sum(hessian_cost(n, tokens) + factor_cost(n) for n in inputs) + sum(map(solve_cost, layers))
