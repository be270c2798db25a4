"""Rounding with feedback from both sides, against sums over single entries and rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import two_sided
from gptq_cli.solver.factor import HessianFactor, prepare
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.refine import refine
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


def slow_loss(error: Tensor, hessian: Tensor, gradients: Tensor) -> float:
    """Σ G_ab E_ai H_ij E_bj, entry by entry of G."""
    total = 0.0
    for first in range(ROWS):
        for second in range(ROWS):
            total += float(gradients[first, second] * (error[first] @ hessian @ error[second]))
    return total


def slow_rounding(
    wanted: Tensor, factor: HessianFactor, grids: QuantizedLinear, rows: list[int]
) -> Tensor:
    """The codes of `rows`, column by column, with the scales and zeros of `grids`."""
    codes, errors = torch.zeros_like(wanted), torch.zeros_like(wanted)
    order = factor.order.permutation.tolist()
    for position, column in enumerate(order):
        value = wanted[:, column].clone()
        for earlier in range(position):
            value += errors[:, order[earlier]] * factor.R[earlier, position]
        group = int(grids.group_of_column[column])
        scales, zeros = grids.scales[rows, group].double(), grids.zeros[rows, group].double()
        codes[:, column] = torch.clamp(torch.round(value / scales) + zeros, 0, 2**grids.bits - 1)
        found = (codes[:, column] - zeros) * scales
        errors[:, column] = wanted[:, column] - found
    return codes.byte()


def row_blocks(sums: Tensor, row_block: int) -> list[list[int]]:
    order = sorted(range(ROWS), key=lambda row: -float(sums[row, row]))
    return [order[start : start + row_block] for start in range(0, ROWS, row_block)]


def slow_rounded(config: LayerConfig, sums: Tensor, row_block: int) -> QuantizedLinear:
    """Rows that are rounded for the best weights, by G itself without a factor."""
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    factor, wanted = prepare(hessian, config, TOKENS), weight.clone()
    found = solve(weight, hessian, factor, config).quantized
    errors, codes = torch.zeros_like(weight), found.codes.clone()
    done: list[int] = []
    for block in row_blocks(sums, row_block):
        left = [row for row in range(ROWS) if row not in done]
        if done:
            pulls = sums[left][:, done] @ errors[done]
            wanted[left] = weight[left] + torch.linalg.solve(sums[left][:, left], pulls)
        codes[block] = slow_rounding(wanted[block], factor, found, block)
        found = replace(found, codes=codes)
        errors = weight - found.dequantize(torch.float64)
        done += block
    return found


def slow_refined(
    config: LayerConfig, sums: Tensor, row_block: int, found: QuantizedLinear
) -> QuantizedLinear:
    """Rows that are refined twice for the best weights, given the errors of all others."""
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    factor = prepare(hessian, config, TOKENS)
    for block in 2 * row_blocks(sums, row_block):
        others = [row for row in range(ROWS) if row not in block]
        errors = weight - found.dequantize(torch.float64)
        pulls = sums[block][:, others] @ errors[others]
        wanted = weight[block] + torch.linalg.inv(sums[block][:, block]) @ pulls
        rows = found.rows(torch.tensor(block))
        new = refine(wanted, hessian, factor, rows, sweeps=1, signed=config.signed_scales)
        codes, scales = found.codes.clone(), found.scales.clone()
        codes[block], scales[block] = new.codes, new.scales
        found = replace(found, codes=codes, scales=scales)
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("row_block", [1, 8])
def test_codes_equal_those_for_the_best_later_rows(order: str, row_block: int) -> None:
    config = layer_config(order, bits=3, group_size=8)
    found = solved(config, gradient_sums(), row_block)
    assert found.loss_ratio is not None
    assert found.loss_ratio < 1
    expected = slow_rounded(config, damped(gradient_sums()), row_block)
    assert torch.equal(found.quantized.codes, expected.codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("signed", [False, True])
def test_refined_rows_see_the_errors_of_all_other_rows(order: str, signed: bool) -> None:
    config = layer_config(order, bits=3, group_size=8, refine_sweeps=2, signed_scales=signed)
    found, sums = solved(config, gradient_sums(), 4), damped(gradient_sums())
    expected = slow_refined(config, sums, 8, slow_rounded(config, sums, 4))
    assert torch.equal(found.quantized.codes, expected.codes)
    assert torch.equal(found.quantized.scales, expected.scales)


def test_refining_lowers_the_loss_of_rounded_rows() -> None:
    config = layer_config("static group aware", bits=3, group_size=8, refine_sweeps=4)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    sums, losses = damped(gradient_sums()), []
    for quantized in (
        solved(config, gradient_sums()).quantized,
        slow_rounded(config, sums, 8),
        solve(weight, hessian, prepare(hessian, config, TOKENS), config).quantized,
    ):
        losses.append(slow_loss(weight - quantized.dequantize(torch.float64), hessian, sums))
    assert losses == sorted(losses)


def test_the_ratio_is_that_of_losses_summed_entry_by_entry() -> None:
    config = layer_config("static group aware", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    found = solved(config, gradient_sums())
    plain = solve(weight, hessian, prepare(hessian, config, TOKENS), config)
    losses = []
    for solution in (found, plain):
        error = weight - solution.quantized.dequantize(torch.float64)
        losses.append(slow_loss(error, hessian, damped(gradient_sums())))
    assert found.loss_ratio == pytest.approx(losses[0] / losses[1], rel=1e-6)


def test_independent_rows_are_solved_as_without_gradients() -> None:
    config = layer_config("static group aware", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    plain = solve(weight, hessian, prepare(hessian, config, TOKENS), config)
    found = solved(config, gradient_sums().diagonal().diag())
    assert torch.equal(found.quantized.codes, plain.quantized.codes)
    assert found.loss_ratio == 1
    assert found.relative_error == plain.relative_error


def test_a_worse_solution_gives_way_to_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = layer_config("static group aware", bits=3, group_size=8)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    plain = solve(weight, hessian, prepare(hessian, config, TOKENS), config)

    def zeros(*_: object) -> object:
        return solve(0 * weight, hessian, prepare(hessian, config, TOKENS), config).quantized

    monkeypatch.setattr(two_sided, "_rounded", zeros)
    found = solved(config, gradient_sums())
    assert torch.equal(found.quantized.codes, plain.quantized.codes)
    assert found.loss_ratio == 1


def test_a_weight_of_zeros_loses_nothing() -> None:
    config = layer_config("natural", bits=3, group_size=8, refine_sweeps=1)
    weight, hessian = correlated_layer(ROWS, COLUMNS)
    factor = prepare(hessian, config, TOKENS)
    found = solve_in_row_blocks(0 * weight, hessian, factor, config, gradient_sums(), TOKENS)
    assert found.error == 0
    assert found.loss_ratio == 1


def test_a_decoded_weight_out_of_range_is_named_by_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = layer_config("natural", bits=3, group_size=8, refine_sweeps=1)
    order = row_blocks(damped(gradient_sums()), ROWS)[0]

    def too_large(_layer: object, rounded: QuantizedLinear, *_: object) -> QuantizedLinear:
        scales = rounded.scales.clone()
        scales[3] = 20000
        return replace(rounded, scales=scales)

    losses = iter([1.0, 2.0])
    monkeypatch.setattr(two_sided, "_refined", too_large)
    monkeypatch.setattr(two_sided, "_loss", lambda *_: next(losses))
    with pytest.raises(ScaleRangeError) as caught:
        solved(config, gradient_sums())
    assert caught.value.row == order[3]


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
