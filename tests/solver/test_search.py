"""Signed and searched grids against every candidate tried row by row in plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import grid, numerics
from gptq_cli.solver.float16 import SMALLEST
from gptq_cli.solver.grid import (
    ScaleRangeError,
    choose_grid,
    find_signed_grid,
    round_scales,
    round_to_grid,
)
from tests import reference
from tests.solver.samples import ORDERS, correlated_layer, layer_config
from tests.solver.test_solve import assert_same, solved

KINDS = {"sym": {}, "signed": {"signed_scales": True}, "asym": {"sym": False}}


def groups_with_outliers(seed: int = 0) -> Tensor:
    """Weights [O, G, n] whose tails make clipping worth it."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(9, 3, 20, generator=random, dtype=torch.float64)
    return 0.02 * weights * weights.abs()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_search", ["none", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_chosen_grid_is_the_best_candidate(bits: int, scale_search: str, kind: str) -> None:
    weights = groups_with_outliers(bits)
    config = LayerConfig(bits=bits, scale_search=scale_search, **KINDS[kind])
    scales, zeros = choose_grid(weights, config)
    assert scales.shape == zeros.shape == (9, 3)
    for group in range(3):
        expected_scales, expected_zeros = reference.fit_any(weights[:, group], config)
        assert torch.equal(scales[:, group], expected_scales)
        assert torch.equal(zeros[:, group], expected_zeros)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale_search", ["none", "mse"])
def test_codes_equal_the_reference_for_static_and_dynamic_groups(
    scale_search: str, order: str, kind: str
) -> None:
    weight, hessian = correlated_layer(7, 144)
    config = layer_config(order, bits=3, group_size=24, scale_search=scale_search, **KINDS[kind])
    assert_same(solved(weight, hessian, config).quantized, reference.gptq(weight, hessian, config))


def test_signed_grid_ends_at_the_largest_weight_of_either_sign() -> None:
    weights = torch.tensor([[[-0.5, 0.25], [0.5, 0.25], [0.5, -0.5], [0.25, 0.125]]])
    scales, zeros = find_signed_grid(weights, bits=4)
    assert scales.tolist() == [[0.0625, -0.0625, 0.0625, -0.03125]]
    assert zeros.tolist() == [[8, 8, 8, 8]]
    codes = round_to_grid(weights, scales[..., None], zeros[..., None], 4)
    assert codes.tolist() == [[[0, 12], [0, 4], [15, 0], [0, 4]]]


@pytest.mark.parametrize("scale_search", ["none", "mse"])
def test_signed_scales_of_both_signs_are_exact_in_both_formats(
    scale_search: str,
) -> None:
    weights = groups_with_outliers()
    scales, _ = choose_grid(
        weights, LayerConfig(bits=4, signed_scales=True, scale_search=scale_search)
    )
    assert (scales > 0).any()
    assert (scales < 0).any()
    assert torch.equal(scales.half().double(), scales)
    assert torch.equal(scales.bfloat16().double(), scales)


@pytest.mark.parametrize("sym", [True, False])
def test_searched_scales_are_positive_and_exact_in_both_formats(sym: bool) -> None:
    weights = groups_with_outliers()
    scales, zeros = choose_grid(weights, LayerConfig(bits=3, sym=sym, scale_search="mse"))
    assert (scales > 0).all()
    assert torch.equal(scales.half().bfloat16().double(), scales)
    assert zeros.min() >= 1
    assert zeros.max() <= 7


def test_rounded_scales_keep_their_sign_and_stay_in_float16() -> None:
    scales = round_scales(torch.tensor([-1e-9, 1e-9, -0.3, 0.3, 1e6], dtype=torch.float64))
    assert scales[:2].tolist() == [-SMALLEST, SMALLEST]
    assert scales[2] == -scales[3] == -0.30078125
    assert scales[4].isinf()


def test_subnormal_scales_are_rounded_up_and_zero_is_normal() -> None:
    wanted = {
        2.0**-24 * 1.01: 2.0**-23,
        2.0**-20: 2.0**-20,
        -(2.0**-20) * 1.001: -(2.0**-20) * 1.0625,
        0.0: 2.0**-14,
    }
    assert round_scales(torch.tensor(list(wanted), dtype=torch.float64)).tolist() == list(
        wanted.values()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_search", ["none", "mse"])
@pytest.mark.parametrize("shrink", [2.0**-10, 2.0**-17])
def test_subnormal_grid_is_the_best_candidate(shrink: float, scale_search: str, kind: str) -> None:
    weights = groups_with_outliers(3)
    config = LayerConfig(bits=4, scale_search=scale_search, **KINDS[kind])
    scales, zeros = choose_grid(shrink * weights, config)
    assert scales.abs().max() < 2.0**-14
    for group in range(3):
        expected_scales, expected_zeros = reference.fit_any(shrink * weights[:, group], config)
        assert torch.equal(scales[:, group], expected_scales)
        assert torch.equal(zeros[:, group], expected_zeros)


def test_chunks_of_rows_give_the_same_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = groups_with_outliers()
    config = LayerConfig(bits=3, signed_scales=True, scale_search="mse")
    whole = choose_grid(weights, config)
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": 2 * 3 * 20})
    chunked = choose_grid(weights, config)
    assert all(torch.equal(left, right) for left, right in zip(whole, chunked, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_search", ["none", "mse"])
def test_group_of_zeros_decodes_to_zero(scale_search: str, kind: str) -> None:
    config = layer_config(
        "static group aware", scale_search=scale_search, group_size=48, **KINDS[kind]
    )
    weight, hessian = correlated_layer(5, 96)
    weight[:, :48] = 0
    assert (
        solved(weight, hessian.diagonal().diag(), config).quantized.dequantize()[:, :48].abs().sum()
        == 0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "fewest"), [(2, 25), (4, 1), (8, 1)])
def test_search_skips_scales_that_cannot_win(
    bits: int, fewest: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    error = grid._error
    monkeypatch.setattr(
        grid, "_error", lambda *arguments: tried.append(arguments[1]) or error(*arguments)
    )
    weights = torch.randn(50, 4, 128, generator=torch.Generator().manual_seed(bits))
    choose_grid(weights, LayerConfig(bits=bits, scale_search="mse", **KINDS[kind]))
    each = {"sym": 1, "signed": 2, "asym": 3}[kind]
    assert fewest * each <= len(tried) <= (25 if bits == 2 else 15) * each


def test_search_clips_weights_with_tails() -> None:
    weights = groups_with_outliers()
    scales, _ = choose_grid(weights, LayerConfig(bits=2, scale_search="mse"))
    widest, _ = choose_grid(weights, LayerConfig(bits=2))
    assert (scales < 0.8 * widest).double().mean() > 0.5


@pytest.mark.parametrize("order", ["group aware", "static group aware"])
@pytest.mark.parametrize(
    "extra", [{"signed_scales": True}, {"scale_search": "mse"}, {"refine_sweeps": 1}], ids=str
)
@pytest.mark.parametrize("bad", [1e7, float("nan")])
def test_weight_beyond_float16_scales_raises_error(
    bad: float, extra: dict[str, object], order: str
) -> None:
    weight, hessian = correlated_layer(20, 192)
    weight[3, 100] = bad
    with pytest.raises(ScaleRangeError):
        solved(weight, hessian, layer_config(order, group_size=48, **extra))
