from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import NonFiniteHessianError, NotPositiveDefiniteError, prepare
from tests.solver.samples import ORDERS, correlated_layer, layer_config


def hessian_with_eigenvalue(eigenvalue: float, size: int = 24) -> torch.Tensor:
    """A symmetric matrix whose diagonal has mean 1 and whose lowest eigenvalue is the one given."""
    basis, _ = torch.linalg.qr(
        torch.randn(size, size, generator=torch.Generator().manual_seed(3)).double()
    )
    others = (size - eigenvalue) / (size - 1)
    spectrum = torch.full((size,), others, dtype=torch.float64)
    spectrum[0] = eigenvalue
    return (basis * spectrum) @ basis.T


def unit_diagonal_with_eigenvalue(eigenvalue: float) -> torch.Tensor:
    """Return a matrix [24, 24] with unit diagonal, of 2 x 2 blocks, one with this eigenvalue."""
    hessian = torch.eye(24, dtype=torch.float64)
    for start, correlation in ((0, 0.5), (6, 1 - eigenvalue), (20, -0.3)):
        hessian[start, start + 1] = hessian[start + 1, start] = correlation
    return hessian


@pytest.mark.parametrize("order", ORDERS)
def test_factors_multiply_to_the_permuted_damped_hessian(order: str) -> None:
    _, hessian = correlated_layer(1, 48)
    prepared = prepare(hessian, layer_config(order, group_size=16, damp_percent=0.05))
    permutation = prepared.order.permutation
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close(
        (prepared.R * prepared.D) @ prepared.R.T, damped[permutation][:, permutation]
    )
    assert torch.equal(prepared.R, prepared.R.triu())
    assert torch.equal(prepared.R.diagonal(), torch.ones(48, dtype=torch.float64))
    assert (prepared.D > 0).all()
    assert (prepared.damp_percent, prepared.retries, prepared.dead_columns) == ([0.05], [0], [0])


def test_dead_columns_are_recorded_and_touch_no_other_column() -> None:
    _, hessian = correlated_layer(1, 48)
    hessian[[5, 30]] = 0
    hessian[:, [5, 30]] = 0
    prepared = prepare(hessian, layer_config("group aware", group_size=16))
    assert prepared.dead.nonzero().flatten().tolist() == [5, 30]
    assert prepared.dead_columns == [2]
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
    assert prepared.damp_percent == [pytest.approx(used)]
    assert prepared.retries == [retries]
    damped = hessian + used * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close((prepared.R * prepared.D) @ prepared.R.T, damped)


@pytest.mark.parametrize(("damp_percent", "last"), [(0.1, 0.4), (0.01, 0.64), (0.25, 0.25)])
def test_indefinite_hessian_raises_error_with_the_last_damping(
    damp_percent: float, last: float
) -> None:
    with pytest.raises(
        NotPositiveDefiniteError, match=f"not positive definite even with damp_percent {last:g}"
    ) as error:
        prepare(
            hessian_with_eigenvalue(-2.0),
            layer_config("natural", group_size=8, damp_percent=damp_percent),
        )
    assert error.value.damp_percent == pytest.approx(last)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_hessian_raises_its_own_error(bad: float) -> None:
    hessian = hessian_with_eigenvalue(0.5)
    hessian[7, 7] = bad
    with pytest.raises(NonFiniteHessianError, match="the Hessian is not finite"):
        prepare(hessian, layer_config("natural", group_size=8))


@pytest.mark.parametrize("order", ORDERS)
def test_hessian_stays_unchanged_if_damping_is_raised(order: str) -> None:
    hessian = hessian_with_eigenvalue(-0.2)
    before = hessian.clone()
    assert prepare(hessian, layer_config(order, group_size=8, damp_percent=0.1)).retries == [1]
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("tokens", "damp_percent", "share"),
    [(480, 0.01, 0.4), (480, 0.5, 0.5), (240, 0.01, 0.8), (40, 0.01, 1), (0, 0.5, 1)],
)
def test_diagonal_damping_share_grows_with_fewer_tokens(
    tokens: int, damp_percent: float, share: float, order: str
) -> None:
    _, hessian = correlated_layer(1, 48)
    config = layer_config(order, group_size=16, damp_percent=damp_percent, damp_mode="diagonal")
    prepared = prepare(hessian, config, tokens)
    permutation = prepared.order.permutation
    damped = hessian + share * hessian.diagonal().diag()
    torch.testing.assert_close(
        (prepared.R * prepared.D) @ prepared.R.T, damped[permutation][:, permutation]
    )
    torch.testing.assert_close(prepared.damping, share * hessian.diagonal())
    assert (prepared.damp_percent, prepared.retries) == ([pytest.approx(share)], [0])


def test_diagonal_damping_ignores_the_units_of_a_channel() -> None:
    _, hessian = correlated_layer(1, 48)
    units = torch.logspace(-2, 2, 48, dtype=torch.float64)
    config = layer_config("natural", group_size=16, damp_mode="diagonal")
    plain = prepare(hessian, config, 96)
    scaled = prepare(hessian * units * units[:, None], config, 96)
    torch.testing.assert_close(scaled.R, plain.R * units[:, None] / units)


def test_dead_and_nearly_dead_columns_get_diagonal_damping_too() -> None:
    _, hessian = correlated_layer(1, 48)
    hessian[[5, 30]] = 0
    hessian[:, [5, 30]] = 0
    hessian[7] *= 1e-12
    hessian[:, 7] *= 1e-12
    prepared = prepare(
        hessian, layer_config("group aware", group_size=16, damp_mode="diagonal"), 384
    )
    assert prepared.dead.nonzero().flatten().tolist() == [5, 30]
    assert prepared.damping[[5, 30]].tolist() == [1.5, 1.5]
    floor = 1e-10 * hessian.diagonal().max()
    torch.testing.assert_close(prepared.damping[7], 1.5 * floor - hessian[7, 7])
    permutation = prepared.order.permutation
    damped = hessian + prepared.damping.diag()
    torch.testing.assert_close(
        (prepared.R * prepared.D) @ prepared.R.T, damped[permutation][:, permutation]
    )


def test_recorded_mean_damping_includes_that_of_dead_columns() -> None:
    _, hessian = correlated_layer(1, 48)
    hessian[[5, 30]] = 0
    hessian[:, [5, 30]] = 0
    mean = hessian.diagonal().mean().item()
    prepared = prepare(hessian, layer_config("desc_act", group_size=16, damp_percent=0.05))
    expected = torch.full((48,), 0.05 * mean, dtype=torch.float64)
    expected[[5, 30]] += 1
    torch.testing.assert_close(prepared.damping, expected)


@pytest.mark.parametrize(
    ("eigenvalue", "damp_percent", "used", "retries"),
    [(0.5, 0.1, 0.1, 0), (-0.2, 0.1, 0.4, 1), (-0.5, 0.05, 0.8, 2), (-0.9, 0.4, 1.0, 1)],
)
def test_diagonal_damping_is_raised_up_to_one(
    eigenvalue: float, damp_percent: float, used: float, retries: int
) -> None:
    hessian = unit_diagonal_with_eigenvalue(eigenvalue)
    config = layer_config("natural", group_size=8, damp_percent=damp_percent, damp_mode="diagonal")
    prepared = prepare(hessian, config, 10**6)
    assert (prepared.damp_percent, prepared.retries) == ([pytest.approx(used)], [retries])
    damped = hessian + used * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close((prepared.R * prepared.D) @ prepared.R.T, damped)


def test_indefinite_hessian_raises_error_at_diagonal_damping_one() -> None:
    config = layer_config("natural", group_size=8, damp_mode="diagonal")
    with pytest.raises(NotPositiveDefiniteError, match="even with damp_percent 1") as error:
        prepare(unit_diagonal_with_eigenvalue(-1.5), config, 10**6)
    assert error.value.damp_percent == 1


def test_diagonal_damping_needs_the_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="number of tokens"):
        prepare(torch.eye(24), layer_config("natural", group_size=8, damp_mode="diagonal"))


def experts_in_need(order: str) -> tuple[torch.Tensor, LayerConfig, list[int]]:
    """Return Hessians [5, 24, 24], of which two need more damping, one has dead columns, and one
    is zero, with a configuration and the tokens that each saw."""
    _, usual = correlated_layer(1, 24)
    with_dead = usual.clone()
    with_dead[[5, 9]] = 0
    with_dead[:, [5, 9]] = 0
    hessians = [hessian_with_eigenvalue(-0.2), usual, hessian_with_eigenvalue(-0.5), with_dead]
    hessians.append(torch.zeros_like(usual))
    return torch.stack(hessians), layer_config(order, group_size=8), [40, 480, 90, 5, 0]


@pytest.mark.parametrize("mode", ["mean", "diagonal"])
@pytest.mark.parametrize("order", ORDERS)
def test_experts_factorised_together_equal_each_alone(order: str, mode: str) -> None:
    hessians, config, tokens = experts_in_need(order)
    config = replace(config, damp_mode=mode)
    together = prepare(hessians, config, tokens)
    for expert, (hessian, seen) in enumerate(zip(hessians, tokens, strict=True)):
        alone = prepare(hessian, config, seen)
        for part in ("R", "D", "dead", "damping"):
            assert torch.equal(getattr(together, part)[expert], getattr(alone, part)), part
        for part in ("permutation", "group_of_column"):
            found, expected = getattr(together.order, part)[expert], getattr(alone.order, part)
            assert torch.equal(found, expected), part
        for part in ("damp_percent", "retries", "dead_columns"):
            assert getattr(together, part)[expert] == getattr(alone, part)[0], part
    assert together.dead_columns == [0, 0, 0, 2, 24]


def test_errors_of_experts_have_the_numbers_of_all_that_fail() -> None:
    config = layer_config("natural", group_size=8, damp_percent=0.1)
    usual, indefinite = hessian_with_eigenvalue(0.5), hessian_with_eigenvalue(-2.0)
    infinite = usual.clone()
    infinite[7, 7] = float("inf")
    with pytest.raises(NonFiniteHessianError) as of_inputs:
        prepare(torch.stack([indefinite, usual, infinite, infinite]), config)
    assert of_inputs.value.experts == [2, 3]
    with pytest.raises(NotPositiveDefiniteError) as of_hessians:
        prepare(torch.stack([indefinite, usual, hessian_with_eigenvalue(-0.2), indefinite]), config)
    assert of_hessians.value.experts == [0, 3]
