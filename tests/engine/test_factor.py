from __future__ import annotations

import pytest
import torch

from gptq_cli.engine.factor import NonFiniteHessianError, NotPositiveDefiniteError, prepare
from tests.engine.samples import ORDERS, correlated_layer, layer_config


def hessian_with_eigenvalue(eigenvalue: float, size: int = 24) -> torch.Tensor:
    """A symmetric matrix whose diagonal has mean 1 and whose lowest eigenvalue is the one given."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(3)).double())
    others = (size - eigenvalue) / (size - 1)
    spectrum = torch.full((size,), others, dtype=torch.float64)
    spectrum[0] = eigenvalue
    return (basis * spectrum) @ basis.T


@pytest.mark.parametrize("order", ORDERS)
def test_factors_multiply_to_the_damped_hessian_in_processing_order(order: str) -> None:
    _, hessian = correlated_layer(1, 48)
    prepared = prepare(hessian, layer_config(order, group_size=16, damp_percent=0.05))
    permutation = prepared.order.permutation
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close((prepared.R * prepared.D) @ prepared.R.T, damped[permutation][:, permutation])
    assert torch.equal(prepared.R, prepared.R.triu())
    assert torch.equal(prepared.R.diagonal(), torch.ones(48, dtype=torch.float64))
    assert (prepared.D > 0).all()
    assert (prepared.damp_percent, prepared.retries, prepared.dead_columns) == (0.05, 0, 0)


def test_dead_columns_are_recorded_and_touch_no_other_column() -> None:
    _, hessian = correlated_layer(1, 48)
    hessian[[5, 30]] = 0
    hessian[:, [5, 30]] = 0
    prepared = prepare(hessian, layer_config("group aware", group_size=16))
    assert prepared.dead.nonzero().flatten().tolist() == [5, 30]
    assert prepared.dead_columns == 2
    for position in (prepared.order.permutation == 5).nonzero().flatten():
        assert prepared.R[position, position + 1 :].abs().sum() == 0
        assert prepared.R[:position, position].abs().sum() == 0


@pytest.mark.parametrize(
    ("eigenvalue", "damp_percent", "used", "retries"),
    [(0.5, 0.1, 0.1, 0), (-0.2, 0.1, 0.4, 1), (-0.5, 0.01, 0.64, 3), (-0.9, 0.95, 0.95, 0)],
)
def test_damping_is_raised_until_the_factorisation_succeeds(
    eigenvalue: float, damp_percent: float, used: float, retries: int
) -> None:
    hessian = hessian_with_eigenvalue(eigenvalue)
    prepared = prepare(hessian, layer_config("natural", group_size=8, damp_percent=damp_percent))
    assert prepared.damp_percent == pytest.approx(used)
    assert prepared.retries == retries
    damped = hessian + used * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close((prepared.R * prepared.D) @ prepared.R.T, damped)


@pytest.mark.parametrize(("damp_percent", "last"), [(0.1, 0.4), (0.01, 0.64), (0.25, 0.25)])
def test_hessian_that_stays_indefinite_is_an_error_with_the_damping_tried_last(
    damp_percent: float, last: float
) -> None:
    with pytest.raises(
        NotPositiveDefiniteError, match=f"not positive definite even with damp_percent {last:g}"
    ) as error:
        prepare(hessian_with_eigenvalue(-2.0), layer_config("natural", group_size=8, damp_percent=damp_percent))
    assert error.value.damp_percent == pytest.approx(last)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite_is_told_apart_from_an_indefinite_one(bad: float) -> None:
    hessian = hessian_with_eigenvalue(0.5)
    hessian[7, 7] = bad
    with pytest.raises(NonFiniteHessianError, match="the Hessian is not finite"):
        prepare(hessian, layer_config("natural", group_size=8))


@pytest.mark.parametrize("order", ORDERS)
def test_hessian_is_left_as_it_was_even_when_damping_is_raised(order: str) -> None:
    hessian = hessian_with_eigenvalue(-0.2)
    before = hessian.clone()
    assert prepare(hessian, layer_config(order, group_size=8, damp_percent=0.1)).retries == 1
    assert torch.equal(hessian, before)
