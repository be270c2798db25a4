"""Refinement against least squares for every scale and all codes tried for every weight."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.quantized_linear import QuantizedLinear, round_to_nearest
from gptq_cli.solver.refine import _halved, _Halves, _start, refine
from gptq_cli.solver.solve import solve
from tests import reference
from tests.simulated_gpu import simulated_gpu
from tests.solver.samples import ORDERS, correlated_layer, layer_config
from tests.solver.test_solve import assert_same, solved

KINDS = {"sym": {}, "signed": {"signed_scales": True}, "asym": {"sym": False}}
# more than one block of columns, blocks that end inside a group, one group per row
GROUPINGS = [(24, 144), (7, 147), (80, 160), (-1, 150)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group_size", "in_features"), GROUPINGS)
def test_refined_codes_and_scales_equal_the_reference(
    group_size: int, in_features: int, kind: str
) -> None:
    weight, hessian = correlated_layer(6, in_features, seed=group_size + 2)
    config = layer_config(
        "static group aware", bits=3, group_size=group_size, refine_sweeps=2, **KINDS[kind]
    )
    assert_same(solved(weight, hessian, config).quantized, reference.gptq(weight, hessian, config))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_refinement_equals_the_reference_in_every_order(bits: int, order: str) -> None:
    weight, hessian = correlated_layer(5, 144)
    hessian[[3, 77]] = 0
    hessian[:, [3, 77]] = 0
    config = layer_config(
        order, bits=bits, group_size=48, refine_sweeps=1, signed_scales=True, damp_mode="diagonal"
    )
    quantized = solve(weight, hessian, prepare(hessian, config, 200), config).quantized
    assert_same(quantized, reference.gptq(weight, hessian, config, 200))
    assert quantized.dequantize()[:, [3, 77]].abs().sum() == 0


def damped_loss(
    weight: Tensor, hessian: Tensor, damping: Tensor, quantized: QuantizedLinear
) -> float:
    error = weight - quantized.dequantize(torch.float64)
    return (error @ (hessian + damping.diag()) * error).sum().item()


@pytest.mark.parametrize("order", ["group aware", "desc_act", "static group aware"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_sweeps_never_raise_the_loss_and_the_first_lowers_it(
    start: str, kind: str, order: str
) -> None:
    weight, hessian = correlated_layer(30, 288)
    config = layer_config(order, bits=3, group_size=48, **KINDS[kind])
    prepared = prepare(hessian, config)
    quantized = solve(weight, hessian, prepared, config).quantized
    if start == "rtn":
        quantized = round_to_nearest(weight, config, prepared.order.group_of_column)
    losses = [damped_loss(weight, hessian, prepared.damping, quantized)]
    for _ in range(4):
        signed = config.signed_scales
        quantized = refine(weight, hessian, prepared, quantized, sweeps=1, signed=signed)
        losses.append(damped_loss(weight, hessian, prepared.damping, quantized))
    assert losses[1] < 0.99 * losses[0]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses)), losses


@pytest.mark.parametrize("kind", KINDS)
def test_zero_sweeps_fit_scales_and_each_sweep_lowers_the_loss(
    kind: str,
) -> None:
    weight, hessian = correlated_layer(12, 192)
    config = layer_config("desc_act", bits=2, group_size=48, **KINDS[kind])
    prepared = prepare(hessian, config)
    plain = solve(weight, hessian, prepared, config).quantized
    swept = [
        refine(weight, hessian, prepared, plain, sweeps=sweeps, signed=config.signed_scales)
        for sweeps in range(4)
    ]
    losses = [
        damped_loss(weight, hessian, prepared.damping, quantized) for quantized in (plain, *swept)
    ]
    assert torch.equal(swept[0].codes, plain.codes)
    assert not torch.equal(swept[0].scales, plain.scales)
    assert all(after < before for before, after in pairwise(losses)), losses


def test_reference_losses_never_rise() -> None:
    weight, hessian = correlated_layer(4, 48)
    config = layer_config("natural", bits=2, group_size=16)
    found = reference.gptq(weight, hessian, config)
    losses = reference.refine(weight, hessian, found, config, sweeps=2)
    assert len(losses) == 1 + 3 + 2 * (3 + 48)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_fitted_scales_are_positive_and_exact_in_both_formats() -> None:
    weight, hessian = correlated_layer(30, 192)
    config = layer_config("static group aware", bits=3, group_size=48)
    plain = solved(weight, hessian, config).quantized
    refined = solved(weight, hessian, replace(config, refine_sweeps=2)).quantized
    changed = refined.scales != plain.scales
    assert changed.double().mean() > 0.5
    assert torch.equal(refined.scales[changed].bfloat16().half(), refined.scales[changed])
    assert (refined.scales > 0).all()


def test_refine_leaves_its_arguments_unchanged() -> None:
    weight, hessian = correlated_layer(10, 96)
    config = LayerConfig(bits=3, group_size=32)
    prepared = prepare(hessian, config)
    quantized = solve(weight, hessian, prepared, config).quantized
    tensors = (
        weight,
        hessian,
        prepared.damping,
        quantized.codes,
        quantized.scales,
        quantized.zeros,
    )
    before = [tensor.clone() for tensor in tensors]
    refine(weight, hessian, prepared, quantized, sweeps=2, signed=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_only_signed_scales_turn_negative() -> None:
    weight, hessian = correlated_layer(10, 96)
    config = layer_config("natural", bits=3, group_size=32)
    prepared = prepare(hessian, config)
    mirrored = round_to_nearest(-weight, config)
    signed, unsigned = (
        refine(weight, hessian, prepared, mirrored, sweeps=1, signed=signed)
        for signed in (True, False)
    )
    assert (signed.scales < 0).double().mean() > 0.5
    assert (unsigned.scales > 0).all()
    losses = [
        damped_loss(weight, hessian, prepared.damping, found)
        for found in (signed, unsigned, mirrored)
    ]
    assert losses == sorted(losses)


simulated = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)


def loud_layer(loudness: float) -> tuple[Tensor, Tensor]:
    """Errors [I, O] and a Hessian [I, I], with channels up to `loudness` times as loud."""
    weight, hessian = correlated_layer(20, 96)
    units = loudness ** torch.linspace(0, 1, 96, dtype=torch.float64)[torch.randperm(96)]
    hessian = hessian * units * units[:, None] * loudness
    return weight.T.contiguous().float() / 7, hessian.float()


def slope_error(found: Tensor, errors: Tensor, hessian: Tensor) -> float:
    """The largest error of slopes, in units of the channel and of the loudest error."""
    loudness = hessian.double().diagonal().sqrt()[:, None]
    exact = hessian.double() @ errors.double()
    return ((found.double() - exact) / loudness).abs().max().item() / (
        (errors.double() * loudness).abs().max().item()
    )


def tf32(matrix: Tensor) -> Tensor:
    """The numbers with 11 significant bits, as tensor cores take them."""
    return (matrix.view(torch.int32) & -8192).view(torch.float32)


@simulated
@pytest.mark.parametrize("loudness", [1e-4, 1.0, 1e4])
def test_slopes_from_float16_factors_err_no_more_than_in_tf32(loudness: float) -> None:
    errors, hessian = loud_layer(loudness)
    usual = slope_error(tf32(hessian) @ tf32(errors), errors, hessian)
    with simulated_gpu():
        halves = _Halves.of(hessian.to("cuda:0"), errors.to("cuda:0"))
        found = torch.cat([halves.slopes(slice(0, 40)), halves.slopes(slice(40, 96))])
        found = found.cpu() / halves.scale.cpu()
    assert slope_error(found, errors, hessian) < usual < 5e-3


@simulated
def test_float16_factors_follow_errors_that_grow() -> None:
    errors, hessian = loud_layer(100.0)
    with simulated_gpu():
        halves = _Halves.of(hessian.to("cuda:0"), errors.to("cuda:0"))
        errors[:50] *= 1000
        halves.take(errors.to("cuda:0"), slice(0, 50))
        found = halves.slopes(slice(None)).cpu() / halves.scale.cpu()
        halves.take(errors.to("cuda:0") * 1e9, slice(0, 50))
        assert halves.slopes(slice(None)).cpu().isfinite().all()
    assert slope_error(found, errors, hessian) < 5e-3


@simulated
def test_scaled_hessian_is_restored_bit_by_bit() -> None:
    weight, hessian = correlated_layer(10, 96)
    config = LayerConfig(bits=3, group_size=32)
    quantized = solve(weight, hessian, prepare(hessian, config), config).quantized
    dead, columns = torch.zeros(1, 96, dtype=torch.bool), torch.arange(96)
    state = _start(weight.float(), hessian.float()[None], dead, quantized, columns, True)
    with simulated_gpu():
        on_device = {}
        for name in ("hessian", "errors", "levels", "scales", "zeros"):
            on_device[name] = getattr(state, name).to("cuda:0")
        with _halved(replace(state, **on_device)) as ready:
            assert ready.halves is not None
            ratio = (ready.hessian.cpu() / state.hessian).unique()
            assert torch.equal(ratio, ready.halves.scale.cpu()[None])
        assert torch.equal(ready.hessian.cpu(), state.hessian)
