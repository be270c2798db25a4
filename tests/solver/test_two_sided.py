"""Rounding with feedback from both sides, against sums over single entries and rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import two_sided
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.solve import Solution, solve
from gptq_cli.solver.two_sided import solve_in_row_blocks
from tests.solver.samples import ORDERS, correlated_inputs, correlated_layer, layer_config

ROWS, COLUMNS, TOKENS = 24, 32, 400


def gradient_sums() -> Tensor:
    """Sums over gradients that have a few directions in common, as those of a model have."""
    random = torch.Generator().manual_seed(3)
    few = torch.randn(4, ROWS, generator=random, dtype=torch.float64)
    found = correlated_inputs(TOKENS, 4, seed=7) @ few
    noise = torch.randn(TOKENS, ROWS, generator=random, dtype=torch.float64)
    found += 0.3 * noise
    return found.T @ found


def solved(config: LayerConfig, gradients: Tensor, row_block: int = 8) -> Solution:
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    factor = prepare(hessian, config, TOKENS)
    return solve_in_row_blocks(
        weight, hessian, factor, config, gradients, TOKENS, row_block=row_block
    )


def damped(gradients: Tensor) -> Tensor:
    result = gradients.clone()
    for row in range(ROWS):
        result[row, row] *= 1 + two_sided.OF_ROWS.damp_percent
    return result


def slow_losses(error: Tensor, hessian: Tensor, gradients: Tensor) -> Tensor:
    """G_ab E_ai H_ij E_bj summed over i and j, for each entry of G."""
    found = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    for first in range(ROWS):
        for second in range(ROWS):
            product = error[first] @ hessian @ error[second]
            found[first, second] = gradients[first, second] * product
    return found


def slow_codes(config: LayerConfig, gradients: Tensor, row_block: int) -> Tensor:
    """The codes of rows that are solved for the best weights, by G itself without a factor."""
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    factor, wanted = prepare(hessian, config, TOKENS), weight.clone()
    errors, codes = torch.zeros_like(weight), torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    sums = damped(gradients)
    left = sorted(range(ROWS), key=lambda row: -float(sums[row, row]))
    done: list[int] = []
    while left:
        if done:
            pulls = sums[left][:, done] @ errors[done]
            wanted[left] = weight[left] + torch.linalg.solve(sums[left][:, left], pulls)
        block, left = left[:row_block], left[row_block:]
        rows = solve(wanted[block], hessian, factor, config).quantized
        errors[block] = weight[block] - rows.dequantize(torch.float64)
        codes[block] = rows.codes
        done += block
    return codes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("row_block", [1, 8])
def test_codes_equal_those_for_the_best_later_rows(order: str, row_block: int) -> None:
    config = layer_config(order, bits=3, group_size=8)
    found = solved(config, gradient_sums(), row_block)
    assert found.loss_ratio is not None
    assert found.loss_ratio < 1
    assert torch.equal(found.quantized.codes, slow_codes(config, gradient_sums(), row_block))


def test_the_ratio_is_what_remains_of_losses_of_single_rows() -> None:
    config = layer_config("static group aware", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    found = solved(config, gradient_sums())
    error = weight - found.quantized.dequantize(torch.float64)
    losses = slow_losses(error, hessian, damped(gradient_sums()))
    expected = float(losses.sum() / losses.diagonal().sum())
    assert found.loss_ratio == pytest.approx(expected, rel=1e-6)


def test_independent_rows_are_solved_as_without_gradients() -> None:
    config = layer_config("static group aware", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    plain = solve(weight, hessian, prepare(hessian, config, TOKENS), config)
    found = solved(config, gradient_sums().diagonal().diag())
    assert torch.equal(found.quantized.codes, plain.quantized.codes)
    assert found.loss_ratio == pytest.approx(1)
    assert found.relative_error == plain.relative_error


def test_a_weight_of_zeros_loses_nothing() -> None:
    config = layer_config("natural", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    factor = prepare(hessian, config, TOKENS)
    found = solve_in_row_blocks(0 * weight, hessian, factor, config, gradient_sums(), TOKENS)
    assert found.error == 0
    assert found.loss_ratio == 0


def test_errors_are_those_of_the_weight_itself() -> None:
    config = layer_config("natural", bits=2, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    found = solved(config, gradient_sums())
    error = weight - found.quantized.dequantize(torch.float64)
    expected = torch.trace(error @ hessian @ error.T) / torch.trace(weight @ hessian @ weight.T)
    assert found.relative_error == pytest.approx(float(expected), rel=1e-6)


def test_a_row_without_gradients_changes_nothing_else() -> None:
    gradients = gradient_sums()
    gradients[5], gradients[:, 5] = 0, 0
    config = layer_config("natural", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    plain = solve(weight, hessian, prepare(hessian, config, TOKENS), config)
    found = solved(config, gradients)
    assert torch.equal(found.quantized.codes[5], plain.quantized.codes[5])
    assert not torch.equal(found.quantized.codes[8:], plain.quantized.codes[8:])


def test_a_weight_out_of_range_is_named_by_its_row() -> None:
    config = layer_config("natural", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    weight[13, 4] = float("nan")
    factor = prepare(hessian, config, TOKENS)
    with pytest.raises(ScaleRangeError) as caught:
        solve_in_row_blocks(weight, hessian, factor, config, gradient_sums(), TOKENS)
    assert caught.value.row == 13
