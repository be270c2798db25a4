from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.float16 import SMALLEST
from gptq_cli.solver.grid import (
    ScaleRangeError,
    find_grid,
    join_groups,
    round_to_grid,
    split_groups,
)
from gptq_cli.solver.quantized_linear import round_to_nearest

BITS = (2, 3, 4, 8)
groups_of_weights = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40)


@given(weights=groups_of_weights, bits=st.sampled_from(BITS), sym=st.booleans())
def test_every_weight_lies_within_half_a_step_of_its_grid(
    weights: list[float], bits: int, sym: bool
) -> None:
    group = torch.tensor(weights, dtype=torch.float64)[None]
    scale, zero = find_grid(group, bits, sym)
    maxq = 2**bits - 1
    assert torch.equal(scale, scale.half().double())
    assert scale.item() >= SMALLEST
    assert zero.item() in range(1, maxq + 1)
    codes = round_to_grid(group, scale[:, None], zero[:, None], bits)
    assert codes.min() >= 0
    assert codes.max() <= maxq
    # A scale that was rounded down to float16 leaves the ends of the range a little further out.
    half_step = scale * (0.5 + maxq * 2.0**-11)
    assert ((scale * (codes - zero) - group).abs() <= half_step).all()


def test_symmetric_grid_spans_the_largest_weight_on_both_sides() -> None:
    scales, zeros = find_grid(torch.tensor([[-0.9375, 0.25], [0.1, 0.46875]]), bits=4, sym=True)
    assert scales.tolist() == [0.125, 0.0625]
    assert zeros.tolist() == [8, 8]


def test_asymmetric_grid_spans_the_range_and_zero() -> None:
    scales, zeros = find_grid(torch.tensor([[-0.25, 0.5], [-0.75, -0.25]]), bits=2, sym=False)
    assert scales.tolist() == [0.25, 0.25]
    assert zeros.tolist() == [1, 3]


def test_positive_group_gets_zero_one_and_reaches_its_maximum() -> None:
    weights = torch.tensor([[0.5, 1.0, 1.5]])
    scales, zeros = find_grid(weights, bits=2, sym=False)
    assert zeros.tolist() == [1]
    assert scales.tolist() == [0.75]
    assert round_to_grid(weights, scales[:, None], zeros[:, None], 2).tolist() == [[2, 2, 3]]


def test_raised_zero_keeps_the_minimum_of_its_group() -> None:
    scales, zeros = find_grid(torch.tensor([[-0.0625, 15.0]]), bits=4, sym=False)
    assert zeros.tolist() == [1]
    assert scales.item() == pytest.approx(15 / 14, rel=2**-11)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_group_of_zeros_has_a_valid_scale_and_decodes_to_zero(bits: int, sym: bool) -> None:
    quantized = round_to_nearest(torch.zeros(3, 64), LayerConfig(bits=bits, sym=sym, group_size=32))
    assert (quantized.scales == 2.0**-14).all()  # a normal number: its weights are not too small
    assert torch.equal(quantized.dequantize(), torch.zeros(3, 64))
    assert torch.equal(quantized.codes, quantized.zeros.repeat_interleave(32, dim=1))


@pytest.mark.parametrize("zero", [8, 7])
def test_ties_go_to_the_even_multiple_of_the_scale(zero: int) -> None:
    weights = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    codes = round_to_grid(weights, torch.tensor(1.0), torch.tensor(float(zero)), bits=4)
    assert (codes - zero).tolist() == [0, 2, 2, 0, -2]


def test_weights_outside_the_grid_are_clamped() -> None:
    codes = round_to_grid(
        torch.tensor([-100.0, 100.0]), torch.tensor(1.0), torch.tensor(3.0), bits=3
    )
    assert codes.tolist() == [0, 7]


def test_scattered_groups_get_the_grids_of_their_own_columns() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    group_of_column = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2], dtype=torch.int32)
    scales, zeros = find_grid(split_groups(weight, group_of_column, 4), bits=4, sym=False)
    for group in range(3):
        expected_scales, expected_zeros = find_grid(
            weight[:, group_of_column == group], bits=4, sym=False
        )
        assert torch.equal(scales[:, group], expected_scales)
        assert torch.equal(zeros[:, group], expected_zeros)


@pytest.mark.parametrize(
    "group_of_column", [[0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], [1, 0, 2, 2, 0, 1]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_join_groups_restores_the_columns_of_split_groups(
    group_of_column: list[int], dtype: torch.dtype
) -> None:
    columns, groups = torch.arange(2 * 6).view(2, 6), torch.tensor(group_of_column, dtype=dtype)
    split = split_groups(columns, groups, 2)
    assert split.shape == (2, 3, 2)
    for group in range(3):
        assert torch.equal(split[:, group], columns[:, groups == group])
    assert torch.equal(join_groups(split, groups), columns)


@pytest.mark.parametrize("bad", [1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("sym", [True, False])
def test_weight_beyond_float16_scales_raises_error(bad: float, sym: bool) -> None:
    weight = torch.ones(4, 64)
    weight[2, 40] = bad
    with pytest.raises(ScaleRangeError, match="not finite in float16"):
        round_to_nearest(weight, LayerConfig(group_size=32, sym=sym))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("shrink", "costs"), [(2.0**-7, 0.02), (2.0**-9, 0.07), (2.0**-11, 0.2)])
def test_accuracy_does_not_depend_on_the_size_of_weights(
    shrink: float, costs: float, sym: bool
) -> None:
    weight = 0.05 * torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    config = LayerConfig(bits=8, sym=sym, group_size=32)

    def error(size: float) -> float:
        quantized = round_to_nearest(size * weight, config)
        assert size == 1 or quantized.scales.max() < 2.0**-14
        return float((quantized.dequantize() / size - weight).square().mean())

    assert 0.9 < error(shrink) / error(1) < 1 + costs


@pytest.mark.parametrize("sym", [True, False])
def test_subnormal_scale_clips_no_weight(sym: bool) -> None:
    weight = 2.0**-17 * torch.randn(
        32, 4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    scales, zeros = find_grid(weight, 8, sym)
    assert torch.equal(scales, scales.half().double())
    assert torch.equal(scales, scales.bfloat16().double())
    assert (scales < 2.0**-20).all()
    steps = weight / scales[..., None] + zeros[..., None]
    assert steps.min() >= -0.5
    assert steps.max() <= 255.5
