"""The solver equals `tests.reference` for every order, group size and ragged shape in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.quantized_linear import QuantizedLinear, round_to_nearest
from gptq_cli.solver.solve import Solution, solve
from tests import reference
from tests.solver.samples import ORDERS, correlated_layer, layer_config

# group size and in_features: smaller and larger than a column block of 128, aligned with it and
# not, all with two groups and two blocks or more; and one group per row.
GROUPINGS = [
    (7, 203),
    (16, 144),
    (32, 160),
    (48, 240),
    (96, 288),
    (128, 384),
    (200, 400),
    (256, 512),
    (-1, 200),
]


def solved(
    weight: Tensor, hessian: Tensor, config: LayerConfig, column_block: int = 128
) -> Solution:
    return solve(weight, hessian, prepare(hessian, config), config, column_block=column_block)


def assert_same(quantized: QuantizedLinear, expected: reference.Reference) -> None:
    assert quantized.group_of_column.tolist() == expected.g_idx
    assert torch.equal(quantized.scales.double(), expected.scales)
    assert torch.equal(quantized.zeros.double(), expected.zeros)
    assert torch.equal(quantized.codes.double(), expected.codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_the_reference_for_every_width_and_order(
    bits: int, sym: bool, order: str
) -> None:
    weight, hessian = correlated_layer(37, 160)
    config = layer_config(order, bits=bits, sym=sym, group_size=32)
    assert_same(solved(weight, hessian, config).quantized, reference.gptq(weight, hessian, config))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("group_size", "in_features"), GROUPINGS)
def test_codes_equal_the_reference_for_every_grouping_and_order(
    group_size: int, in_features: int, sym: bool, order: str
) -> None:
    weight, hessian = correlated_layer(13, in_features, seed=group_size + 1)
    config = layer_config(order, bits=3, sym=sym, group_size=group_size)
    assert_same(solved(weight, hessian, config).quantized, reference.gptq(weight, hessian, config))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_float32_codes_differ_from_the_reference_only_near_ties(bits: int, order: str) -> None:
    weight, hessian = correlated_layer(100, 288)
    config = layer_config(order, bits=bits, group_size=32)
    weight, hessian = weight.float(), hessian.float()
    solution, expected = solved(weight, hessian, config), reference.gptq(weight, hessian, config)
    same = solution.quantized.codes.double() == expected.codes
    # One code or float16 scale near a tie changes the later columns of its own row.
    assert same.all(dim=1).double().mean() >= 0.98
    assert same.double().mean() > 0.995


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("column_block", [8, 40, 96, 1000])
def test_column_block_does_not_change_the_result(column_block: int, order: str) -> None:
    weight, hessian = correlated_layer(20, 288)
    config = layer_config(order, bits=3, sym=False, group_size=24)
    usual, other = solved(weight, hessian, config), solved(weight, hessian, config, column_block)
    assert torch.equal(usual.quantized.codes, other.quantized.codes)
    assert torch.equal(usual.quantized.scales, other.quantized.scales)
    assert usual.relative_error == other.relative_error


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_diagonal_hessian_gives_round_to_nearest(group_size: int, sym: bool, order: str) -> None:
    weight, _ = correlated_layer(30, 192)
    weight = weight.float()
    energies = torch.rand(192, generator=torch.Generator().manual_seed(2)) + 0.1
    config = layer_config(order, sym=sym, group_size=group_size)
    solution = solved(weight, energies.diag(), config)
    nearest = round_to_nearest(weight, config, solution.quantized.group_of_column)
    assert torch.equal(solution.quantized.codes, nearest.codes)
    assert torch.equal(solution.quantized.scales, nearest.scales)
    assert torch.equal(solution.quantized.zeros, nearest.zeros)
    assert solution.relative_error == solution.rtn_relative_error


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_round_to_nearest_on_correlated_inputs(bits: int, order: str) -> None:
    weight, hessian = correlated_layer(40, 256)
    config = layer_config(order, bits=bits, group_size=64, damp_percent=0.1)
    solution = solved(weight.float(), hessian.float(), config)
    assert 0 < solution.relative_error < 0.8 * solution.rtn_relative_error


def test_reported_errors_use_the_undamped_hessian() -> None:
    weight, hessian = correlated_layer(23, 160)
    config = layer_config("group aware", bits=3, group_size=32, damp_percent=0.5)
    solution = solved(weight, hessian, config)
    nearest = round_to_nearest(weight, config)
    for quantized, error in (
        (solution.quantized, solution.relative_error),
        (nearest, solution.rtn_relative_error),
    ):
        change = quantized.dequantize(torch.float64) - weight
        expected = (change @ hessian @ change.T).trace() / (weight @ hessian @ weight.T).trace()
        assert error == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_dead_columns_become_zero_and_others_equal_the_reference(sym: bool, order: str) -> None:
    weight, hessian = correlated_layer(21, 192)
    dead = [0, 40, 41, 127, 191]
    weight[:, dead] = 10.0  # would stretch every grid it took part in
    hessian[dead] = 0
    hessian[:, dead] = 0
    config = layer_config(order, sym=sym, group_size=48)
    quantized = solved(weight, hessian, config).quantized
    assert quantized.dequantize()[:, dead].abs().sum() == 0
    assert_same(quantized, reference.gptq(weight, hessian, config))


def test_codes_use_the_raised_damping() -> None:
    weight, hessian = correlated_layer(17, 96)
    hessian -= 0.3 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    low, high = (
        layer_config("natural", group_size=32, damp_percent=damp)
        for damp in (0.01 * 4**2, 0.01 * 4**3)
    )
    prepared = prepare(hessian, low)
    assert prepared.retries == [1]
    assert_same(
        solve(weight, hessian, prepared, low).quantized, reference.gptq(weight, hessian, high)
    )


def test_result_has_the_types_and_shapes_of_a_quantized_linear() -> None:
    weight, hessian = correlated_layer(30, 192)
    for order in ORDERS:
        quantized = solved(
            weight.bfloat16(), hessian.float(), layer_config(order, sym=False, group_size=48)
        ).quantized
        assert (quantized.codes.dtype, quantized.codes.shape) == (torch.uint8, (30, 192))
        assert (quantized.scales.dtype, quantized.scales.shape) == (torch.float16, (30, 4))
        assert (quantized.zeros.dtype, quantized.zeros.shape) == (torch.uint8, (30, 4))
        assert (quantized.group_of_column.dtype, quantized.group_of_column.shape) == (
            torch.int32,
            (192,),
        )
        tensors = (quantized.codes, quantized.scales, quantized.zeros, quantized.group_of_column)
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert quantized.bits == 4
        assert quantized.zeros.min() >= 1


def test_16_bit_weight_gives_the_codes_of_its_float32_copy() -> None:
    weight, hessian = correlated_layer(30, 192)
    weight, hessian, config = (
        weight.bfloat16(),
        hessian.float(),
        layer_config("group aware", group_size=48),
    )
    half, full = solved(weight, hessian, config), solved(weight.float(), hessian, config)
    assert torch.equal(half.quantized.codes, full.quantized.codes)
    assert half.relative_error == full.relative_error


def test_weight_hessian_and_factors_stay_unchanged() -> None:
    weight, hessian = correlated_layer(20, 192)
    for order in ORDERS:
        config = layer_config(order, group_size=48)
        prepared = prepare(hessian, config)
        tensors = (
            weight,
            hessian,
            prepared.R,
            prepared.D,
            prepared.order.permutation,
            prepared.order.group_of_column,
        )
        before = [tensor.clone() for tensor in tensors]
        solve(weight, hessian, prepared, config)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_layers_of_one_input_share_its_factors() -> None:
    (first, hessian), (second, _) = correlated_layer(20, 192), correlated_layer(11, 192, seed=9)
    config = layer_config("desc_act", group_size=48)
    prepared = prepare(hessian, config)
    for weight in (first, second):
        assert_same(
            solve(weight, hessian, prepared, config).quantized,
            reference.gptq(weight, hessian, config),
        )


@pytest.mark.parametrize("order", ["group aware", "static group aware"])
@pytest.mark.parametrize("bad", [1e7, float("nan")])
def test_weight_beyond_float16_scales_raises_error(bad: float, order: str) -> None:
    weight, hessian = correlated_layer(20, 192)
    weight[3, 100] = bad
    with pytest.raises(ScaleRangeError):
        solved(weight, hessian, layer_config(order, group_size=48))


def test_scale_that_overflows_by_error_feedback_raises_error() -> None:
    weight, hessian = correlated_layer(20, 192)
    config = layer_config("natural", bits=2, group_size=48)
    weight *= 65000 * 1.5 / weight.abs().max()
    assert round_to_nearest(weight, config).scales.isfinite().all()
    with pytest.raises(ScaleRangeError):
        solved(weight, hessian, config)


def test_layer_with_zero_input_decodes_to_zero() -> None:
    weight, _ = correlated_layer(20, 96)
    for order in ORDERS:
        solution = solved(
            weight, torch.zeros(96, 96), layer_config(order, sym=False, group_size=48)
        )
        assert solution.quantized.dequantize().abs().sum() == 0
        assert (solution.relative_error, solution.rtn_relative_error) == (0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
def test_cuda_gives_the_codes_of_the_reference(order: str) -> None:
    weight, hessian = correlated_layer(37, 240)
    config = layer_config(order, bits=3, sym=False, group_size=48)
    quantized = solved(weight.cuda(), hessian.cuda(), config).quantized
    assert (
        quantized.codes.cpu().double() == reference.gptq(weight, hessian, config).codes
    ).double().mean() > 0.999


@pytest.mark.parametrize(("largest", "fits"), [(65024.0, True), (65504.0, False)])
@pytest.mark.parametrize("row", [0, 5])
def test_weight_that_decodes_beyond_float16_raises_error(
    largest: float, fits: bool, row: int
) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[
        row, 40
    ] = -largest  # its scale, 8188, becomes 8192 in eight bits, and -8 * 8192 is -65536
    config = layer_config("natural", bits=4, group_size=32, signed_scales=True)
    if fits:
        assert solved(weight, torch.eye(64), config).quantized.dequantize()[row, 40] == -largest
        return
    with pytest.raises(ScaleRangeError) as caught:
        solved(weight, torch.eye(64), config)
    assert caught.value.row == row
