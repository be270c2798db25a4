"""Weights that follow the unquantized model, against ridge regression on the inputs themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import factor as factor_module
from gptq_cli.solver import hessian as hessian_module
from gptq_cli.solver import numerics
from gptq_cli.solver.factor import follow_original, follow_together, prepare
from gptq_cli.solver.hessian import HessianAccumulator, HessianOfBatches, total
from tests.reference import damping_of, follow
from tests.simulated_gpu import simulated_gpu
from tests.solver.samples import ORDERS, correlated_inputs, layer_config

ROWS, COLUMNS, TOKENS = 6, 48, 300


def disturbed(inputs: Tensor, seed: int = 3) -> Tensor:
    """Inputs as quantized layers would change them: a linear slip and some noise."""
    random = torch.Generator().manual_seed(seed)
    slip = torch.eye(COLUMNS, dtype=torch.float64) + 0.05 * torch.randn(
        COLUMNS, COLUMNS, generator=random, dtype=torch.float64
    )
    return inputs @ slip + 0.1 * torch.randn(inputs.shape, generator=random, dtype=torch.float64)


def weight() -> Tensor:
    return 0.05 * torch.randn(
        ROWS, COLUMNS, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )


def gathered(inputs: Tensor, originals: Tensor) -> HessianAccumulator:
    accumulator = HessianAccumulator(COLUMNS, "cpu")
    for batch, before in zip(inputs.split(70), originals.split(70), strict=True):
        accumulator.add(batch, before)
    return accumulator


def residuals(inputs: Tensor, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """What outputs of these inputs are added to, here and in the unquantized model."""
    random = torch.Generator().manual_seed(8)
    wanted = torch.randn(len(inputs), ROWS, generator=random, dtype=torch.float64)
    slip = 0.02 * torch.randn(COLUMNS, ROWS, generator=random, dtype=torch.float64)
    changed = noise * torch.randn(len(inputs), ROWS, generator=random, dtype=torch.float64)
    return wanted + inputs @ slip + changed, wanted


def ours(inputs: Tensor, originals: Tensor, config: LayerConfig) -> Tensor:
    return followed(gathered(inputs, originals), config)[0]


def followed(seen: HessianAccumulator, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Return W* and the strengths of the rows."""
    factor = prepare(seen.hessian, config, seen.tokens)
    strength = config.asymmetric_calibration
    return follow_original(weight(), seen.shifts, factor, strength, seen.drifts)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fields", [{}, {"damp_mode": "diagonal"}, {"damp_percent": 0.3}], ids=str)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_weight_equals_ridge_regression_in_every_order(
    order: str, fields: dict[str, object], strength: float
) -> None:
    config = layer_config(order, group_size=16, asymmetric_calibration=strength, **fields)
    originals = correlated_inputs(TOKENS, COLUMNS)
    inputs = disturbed(originals)
    expected = follow(weight(), inputs, originals, config)
    assert (expected - weight()).abs().max() > 1e-3
    torch.testing.assert_close(ours(inputs, originals, config), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_weight_makes_up_for_the_drift_of_its_residual(order: str, strength: float) -> None:
    config = layer_config(order, group_size=16, asymmetric_calibration=strength)
    originals = correlated_inputs(TOKENS, COLUMNS)
    inputs = disturbed(originals)
    found, wanted = residuals(inputs)
    seen = HessianAccumulator(COLUMNS, "cpu")
    for part in torch.arange(TOKENS).split(70):
        seen.add(inputs[part], originals[part], residuals=(found[part], wanted[part]))
    expected = follow(weight(), inputs, originals, config, drift=wanted - found)
    assert (expected - follow(weight(), inputs, originals, config)).abs().max() > 1e-3
    torch.testing.assert_close(followed(seen, config)[0], expected, rtol=1e-8, atol=1e-11)


def test_sums_with_the_residual_approach_the_original_ones() -> None:
    config = layer_config("natural", group_size=16, asymmetric_calibration="auto")
    originals = correlated_inputs(8 * TOKENS, COLUMNS)
    inputs = disturbed(originals)
    found, wanted = residuals(inputs)
    old, new = slice(0, 4 * TOKENS), slice(4 * TOKENS, None)
    errors = []
    for drifting in (False, True):
        batches = HessianOfBatches(COLUMNS, "cpu")
        for number, part in enumerate(torch.arange(len(inputs))[old].chunk(8)):
            given = (found[part], wanted[part]) if drifting else ()
            batches.add(number, inputs[part], originals[part], *given)
        seen = total(batches.nodes(), HessianAccumulator.absorb)
        outputs = inputs[new] @ followed(seen, config)[0].T + found[new]
        target = originals[new] @ weight().T + wanted[new]
        errors.append((outputs - target).square().mean().item())
    assert errors[1] < 0.6 * errors[0]


def test_massive_tokens_of_the_residual_are_limited_alone() -> None:
    inputs = correlated_inputs(40, COLUMNS)
    found, wanted = residuals(inputs)
    lengths = wanted.norm(dim=1)
    wanted[3] *= 100 * lengths.median() / lengths[3]
    wanted[17] *= 9 * lengths.median() / lengths[17]
    seen = HessianAccumulator(COLUMNS, "cpu", limited=True)
    seen.add(inputs, inputs, residuals=(found, wanted))
    factors = torch.ones(40, 1).double()
    factors[3], factors[17] = 1 / 32, 1 / 4  # 100 / 32 <= 4 and 9 / 4 <= 4
    expected = ((wanted - found) * factors).T @ inputs
    torch.testing.assert_close(sum(seen.drifts), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen.hessian, inputs.T @ inputs, rtol=1e-10, atol=1e-10)


def test_massive_inputs_count_less_in_the_drift_too() -> None:
    inputs = correlated_inputs(40, COLUMNS)
    found, wanted = residuals(inputs)
    inputs[5] *= 100 * inputs.norm(dim=1).median() / inputs[5].norm()
    seen = HessianAccumulator(COLUMNS, "cpu", limited=True)
    seen.add(inputs, inputs, residuals=(found, wanted))
    factors = torch.ones(40, 1).double()
    factors[5] = 1 / 32
    expected = ((wanted - found) * factors).T @ (inputs * factors)
    torch.testing.assert_close(sum(seen.drifts), expected, rtol=1e-10, atol=1e-10)


def test_outputs_on_unseen_tokens_approach_the_original_ones() -> None:
    config = layer_config("natural", group_size=16, asymmetric_calibration=1.0)
    originals = correlated_inputs(4 * TOKENS, COLUMNS)
    inputs = disturbed(originals)
    found = ours(inputs[:TOKENS], originals[:TOKENS], config)
    before = ((originals - inputs)[TOKENS:] @ weight().T).square().sum()
    after = (originals[TOKENS:] @ weight().T - inputs[TOKENS:] @ found.T).square().sum()
    assert after < 0.5 * before


@pytest.mark.parametrize("mode", ["mean", "diagonal"])
def test_column_without_input_keeps_its_weight(mode: str) -> None:
    config = layer_config(
        "static group aware", group_size=16, asymmetric_calibration=1.0, damp_mode=mode
    )
    originals = correlated_inputs(TOKENS, COLUMNS)
    inputs = disturbed(originals)
    inputs[:, [7, 40]] = 0
    found = ours(inputs, originals, config)
    torch.testing.assert_close(found[:, [7, 40]], weight()[:, [7, 40]], rtol=0, atol=1e-12)
    assert not torch.allclose(found[:, 8], weight()[:, 8])


def test_unchanged_inputs_leave_the_weight_unchanged() -> None:
    config = layer_config("natural", group_size=16, asymmetric_calibration=1.0)
    originals = correlated_inputs(TOKENS, COLUMNS)
    assert torch.equal(ours(originals, originals.clone(), config), weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shift_is_a_float32_sum_over_chunks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "TOKENS_PER_CHUNK", {"cpu": 32})
    originals = (correlated_inputs(TOKENS, COLUMNS) / 10).to(dtype)
    inputs = (disturbed(correlated_inputs(TOKENS, COLUMNS)) / 10).to(dtype)
    kept = inputs.clone(), originals.clone()
    seen = gathered(inputs.reshape(3, -1, COLUMNS).flatten(0, 1), originals)
    exact = (originals.double() - inputs.double()).T @ inputs.double()
    shift = seen.shifts[0] + seen.shifts[1]
    assert shift.dtype == torch.float32
    torch.testing.assert_close(
        shift.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item()
    )
    assert torch.equal(inputs, kept[0])
    assert torch.equal(originals, kept[1])
    assert gathered(inputs, originals).tokens == TOKENS


simulated = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)
LOUD = 100.0  # times as loud as the others is every tenth channel


def loud() -> tuple[Tensor, Tensor]:
    originals = correlated_inputs(TOKENS, COLUMNS) / 100
    inputs = disturbed(originals, seed=4)
    inputs[:, ::10], originals[:, ::10] = LOUD * inputs[:, ::10], LOUD * originals[:, ::10]
    return inputs, originals


def shift_on(device: str, inputs: Tensor, originals: Tensor) -> Tensor:
    accumulator = HessianAccumulator(COLUMNS, device)
    for batch, before in zip(inputs.split(70), originals.split(70), strict=True):
        accumulator.add(batch.to(device), before.to(device))
    first, second = accumulator.shifts
    return (first + second).cpu().double()


def exact_shift(inputs: Tensor, originals: Tensor) -> Tensor:
    return (originals.double() - inputs.double()).T @ inputs.double()


def shift_error(found: Tensor, exact: Tensor) -> float:
    """The error of a shift as a share of the exact one, both in the units of each channel."""
    loudness = loud()[0].square().sum(0).sqrt()
    units = loudness[:, None] * loudness
    return (((found - exact) / units).norm() / (exact / units).norm()).item()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "TOKENS_PER_CHUNK", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(hessian_module, "TOKENS_OF_A_SHIFT", 20)
    monkeypatch.setattr(hessian_module, "CUDA_PANEL", 20)


@simulated
@pytest.mark.usefixtures("small_parts")
def test_float16_shift_on_tensor_cores_is_as_exact_as_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, originals = [part.half() for part in loud()]
    exact = exact_shift(inputs, originals)
    usual = shift_error(shift_on("cpu", inputs, originals), exact)
    with simulated_gpu():
        found = shift_error(shift_on("cuda:0", inputs, originals), exact)
        monkeypatch.setattr(hessian_module, "split", lambda part, kind: (part.to(kind),) * 1)
        monkeypatch.setattr(torch, "cat", lambda parts: parts[0])
        high_alone = shift_error(shift_on("cuda:0", inputs, originals), exact)
    assert found < 1.5 * usual < 1e-6
    assert high_alone > 20 * found


@simulated
@pytest.mark.usefixtures("small_parts")
def test_bfloat16_shift_errs_less_than_its_inputs_are_rounded() -> None:
    inputs, originals = loud()
    rounded, before = inputs.bfloat16(), originals.bfloat16()
    exact = exact_shift(rounded, before)
    rounding = shift_error(exact, exact_shift(inputs, originals))
    with simulated_gpu():
        found = shift_error(shift_on("cuda:0", rounded, before), exact)
    assert 0 < found < rounding


@simulated
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("dtype", "of_residual", "most"),
    [
        (torch.bfloat16, torch.bfloat16, 4e-3),
        (torch.bfloat16, torch.float32, 2e-5),
        (torch.float16, torch.float16, 2e-6),
        (torch.float32, torch.float32, 2e-6),
    ],
)
def test_drift_on_tensor_cores_is_nearly_exact(
    dtype: torch.dtype, of_residual: torch.dtype, most: float
) -> None:
    inputs = (correlated_inputs(TOKENS, COLUMNS) / 10).to(dtype)
    found, wanted = [part.to(of_residual) for part in residuals(inputs.double())]
    exact = (wanted.double() - found.double()).T @ inputs.double()
    with simulated_gpu():
        on_device = [part.to("cuda:0") for part in (inputs, inputs, found, wanted)]
        accumulator = HessianAccumulator(COLUMNS, "cuda:0")
        accumulator.add(on_device[0], on_device[1], residuals=on_device[2:])
        drift = sum(part.cpu().double() for part in accumulator.drifts)
    assert drift.shape == (ROWS, COLUMNS)
    assert (drift - exact).norm() < most * exact.norm()


@simulated
@pytest.mark.parametrize("order", ORDERS)
def test_weight_on_tensor_cores_is_nearly_that_of_float64(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor_module, "SOLVED_COLUMNS", 20)
    config = layer_config(order, group_size=16, asymmetric_calibration=1.0)
    originals = correlated_inputs(TOKENS, COLUMNS)
    inputs = disturbed(originals)
    expected = follow(weight(), inputs, originals, config) - weight()
    with simulated_gpu():
        accumulator = HessianAccumulator(COLUMNS, "cuda:0")
        accumulator.add(inputs.float().to("cuda:0"), originals.float().to("cuda:0"))
        factor = prepare(accumulator.hessian, config, accumulator.tokens)
        found, _ = follow_original(weight().to("cuda:0"), accumulator.shifts, factor, 1.0)
        change = found.cpu().double() - weight()
    assert (change - expected).norm() < 5e-4 * expected.norm()


@pytest.mark.parametrize("strength", [1.0, "auto"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=simulated)])
@pytest.mark.parametrize("order", ["natural", "group aware"])
def test_experts_that_follow_together_are_those_followed_alone(
    order: str, device: str, strength: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor_module, "SOLVED_COLUMNS", 20)
    two_experts = 2 * COLUMNS**2 // factor_module.EXPERTS_TO_FOLLOW
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": two_experts, "cuda": two_experts})
    dtype, most = torch.float64, 1e-9
    if device != "cpu":
        dtype, most = torch.float32, 5e-4
    config = layer_config(order, group_size=16, asymmetric_calibration=strength)
    with simulated_gpu():
        seen, weights, expected = [], [], []
        for number in range(5):
            originals = correlated_inputs(TOKENS, COLUMNS).roll(7 * number, 1) * (1 + number)
            inputs = disturbed(originals, seed=number)
            accumulator = HessianAccumulator(COLUMNS, device)
            accumulator.add(inputs.to(device, dtype), originals.to(device, dtype))
            seen.append(accumulator)
            weights.append(weight().roll(number).to(device, dtype))
            if strength == 1.0:
                expected.append(follow(weight().roll(number), inputs, originals, config))
        hessians = torch.stack([expert.hessian for expert in seen])
        factor = prepare(hessians, config, [expert.tokens for expert in seen])
        shifts = [expert.shifts for expert in seen]
        together, of_rows = follow_together(torch.stack(weights), shifts, factor, strength)
        for number, W in enumerate(weights):
            alone, strengths = follow_original(W, shifts[number], factor.of(number), strength)
            torch.testing.assert_close(of_rows[number], strengths, rtol=100 * most, atol=most)
            torch.testing.assert_close(together[number], alone, rtol=most, atol=most)
            if strength == 1.0:
                change = together[number].cpu().double() - W.cpu().double()
                wanted = expected[number] - W.cpu().double()
                assert (change - wanted).norm() < most * wanted.norm()


@simulated
def test_weight_of_bfloat16_inputs_errs_less_than_they_are_rounded() -> None:
    config = layer_config("natural", group_size=16, asymmetric_calibration=1.0)
    originals = correlated_inputs(10 * TOKENS, COLUMNS)
    inputs = disturbed(originals)
    rounded, before = inputs.bfloat16(), originals.bfloat16()
    of_rounded = follow(weight(), rounded.double(), before.double(), config)
    rounding = (of_rounded - follow(weight(), inputs, originals, config)).norm()
    with simulated_gpu():
        accumulator = HessianAccumulator(COLUMNS, "cuda:0")
        accumulator.add(rounded.to("cuda:0"), before.to("cuda:0"))
        factor = prepare(accumulator.hessian, config, accumulator.tokens)
        found, _ = follow_original(weight().to("cuda:0"), accumulator.shifts, factor, 1.0)
        error = (found.cpu().double() - of_rounded).norm()
    assert 0 < error < rounding / 4


def followed_on_device(
    inputs: Tensor, originals: Tensor, config: LayerConfig, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return W* and the strengths from bfloat16 inputs and from shifts of `weights`, if given."""
    if weights is not None:
        weights = weights.to("cuda:0")
    seen = HessianAccumulator(COLUMNS, "cuda:0", weight=weights)
    for number in range(6):
        mine = slice(number * len(inputs) // 6, (number + 1) * len(inputs) // 6)
        seen.add(inputs[mine].to("cuda:0"), originals[mine].to("cuda:0"), number % 2)
    factor = prepare(seen.hessian, config, seen.tokens)
    found, strengths = follow_original(
        weight().bfloat16().to("cuda:0"),
        seen.shifts,
        factor,
        config.asymmetric_calibration,
        of_rows=seen.shifts_of_rows,
    )
    return found.cpu().double(), strengths.cpu().double()


@simulated
def test_shifts_of_rows_err_less_than_inputs_are_rounded() -> None:
    config = layer_config("group aware", group_size=16, asymmetric_calibration=1.0)
    originals = correlated_inputs(10 * TOKENS, COLUMNS)
    inputs = disturbed(originals)
    rounded, before = inputs.bfloat16(), originals.bfloat16()
    W = weight().bfloat16()
    of_rounded = follow(W.double(), rounded.double(), before.double(), config)
    rounding = (of_rounded - follow(W.double(), inputs, originals, config)).norm()
    with simulated_gpu():
        found, _ = followed_on_device(rounded, before, config, W)
    assert 0 < (found - of_rounded).norm() < rounding / 2


@simulated
@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("loudness", [1.0, 1000.0])
def test_auto_strengths_on_tensor_cores_are_those_of_float64(
    loudness: float, of_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor_module, "SOLVED_COLUMNS", 20)
    config = layer_config("group aware", group_size=16, asymmetric_calibration="auto")
    config = replace(config, damp_mode="diagonal", damp_percent=0.05)
    originals = correlated_inputs(2 * TOKENS, COLUMNS)
    inputs = disturbed(originals) + 3 * disturbed(torch.zeros_like(originals), seed=9)
    for tokens in (inputs, originals):
        tokens[:, ::10] *= loudness
    rounded, before = inputs.bfloat16(), originals.bfloat16()
    W = weight().bfloat16()
    seen = HessianAccumulator(COLUMNS, "cpu")
    for number, some in enumerate(torch.arange(len(inputs)).chunk(6)):
        seen.add(rounded[some].double(), before[some].double(), number % 2)
    factor = prepare(seen.hessian, config, seen.tokens)
    _, expected = follow_original(W.double(), seen.shifts, factor, "auto")
    with simulated_gpu():
        weights = None
        if of_rows:
            weights = W
        _, found = followed_on_device(rounded, before, config, weights)
    assert (expected < 0.48).any()  # half of 1 without noise
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shifts_of_rows_are_the_shifts_times_the_weight(dtype: torch.dtype) -> None:
    originals = correlated_inputs(TOKENS, COLUMNS).to(dtype)
    inputs = disturbed(originals.double()).to(dtype)
    plain = HessianAccumulator(COLUMNS, "cpu")
    of_rows = HessianAccumulator(COLUMNS, "cpu", weight=weight())
    for some in torch.arange(TOKENS).chunk(3):
        plain.add(inputs[some], originals[some])
        of_rows.add(inputs[some], originals[some])
    for shift, of_weight in zip(plain.shifts, of_rows.shifts, strict=True):
        assert of_weight.shape == (ROWS, COLUMNS)
        torch.testing.assert_close(of_weight.double(), weight() @ shift.double(), rtol=1e-4, atol=1)


def test_shifts_of_rows_hold_the_drift() -> None:
    originals = correlated_inputs(TOKENS, COLUMNS)
    inputs = disturbed(originals)
    found, wanted = inputs[:, :ROWS].flip(0), 2 * originals[:, :ROWS]
    plain = HessianAccumulator(COLUMNS, "cpu", limited=True)
    of_rows = HessianAccumulator(COLUMNS, "cpu", limited=True, weight=weight())
    for seen in (plain, of_rows):
        for some in torch.arange(TOKENS).chunk(3):
            seen.add(inputs[some], originals[some], 0, [found[some], wanted[some]])
    assert of_rows.drifts == []
    for shift, drift, of_weight in zip(plain.shifts, plain.drifts, of_rows.shifts, strict=True):
        torch.testing.assert_close(of_weight, weight() @ shift + drift)


def in_batches(
    inputs: Tensor, originals: Tensor, n_batches: int, *others: Tensor
) -> HessianAccumulator:
    """The sums over as many batches, half of which are one half of the text."""
    batches = HessianOfBatches(COLUMNS, "cpu")
    parts = zip(*(part.chunk(n_batches) for part in (inputs, originals, *others)), strict=True)
    for number, tensors in enumerate(parts):
        batches.add(number, *tensors)
    return total(batches.nodes(), HessianAccumulator.absorb)


@pytest.mark.parametrize("order", ORDERS)
def test_auto_strength_compares_two_halves_of_the_text(order: str) -> None:
    config = layer_config(order, group_size=16, asymmetric_calibration="auto")
    originals = correlated_inputs(TOKENS, COLUMNS)
    inputs = disturbed(originals)
    found, wanted = residuals(inputs, noise=2.0)
    change, strengths = followed(in_batches(inputs, originals, 6, found, wanted), config)
    pulls = []
    for rows in (0, 1):
        mine = torch.arange(TOKENS) // 25 % 2 == rows
        lacking = (originals - inputs) @ weight().T + wanted - found
        pulls.append(lacking[mine].T @ inputs[mine])
    hessian = inputs.T @ inputs
    hessian += damping_of(hessian.diagonal(), config, TOKENS).diag()
    lengths = []
    for pull in (pulls[0] + pulls[1], pulls[0] - pulls[1]):
        lengths.append((pull @ torch.linalg.inv(hessian) * pull).sum(1))
    supported = 1 - lengths[1] / lengths[0]
    torch.testing.assert_close(strengths, supported / 2, rtol=1e-8, atol=1e-10)
    whole = replace(config, asymmetric_calibration=1.0)
    full = follow(weight(), inputs, originals, whole, drift=wanted - found)
    expected = weight() + strengths[:, None] * (full - weight())
    torch.testing.assert_close(change, expected, rtol=1e-8, atol=1e-11)


def mean_loss(inputs: Tensor, originals: Tensor, found: Tensor) -> float:
    return (originals @ weight().T - inputs @ found.T).square().mean().item()


@pytest.mark.parametrize("noise", [0.3, 3.0])
@pytest.mark.parametrize("tokens", [120, 1200])
def test_twice_auto_is_nearly_the_best_strength_on_new_text(
    noise: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor_module, "USED_SHARE", 1.0)
    auto = layer_config("natural", group_size=16, asymmetric_calibration="auto")
    auto = replace(auto, damp_mode="diagonal", damp_percent=0.05)
    originals = correlated_inputs(8 * TOKENS + tokens, COLUMNS)
    inputs = disturbed(originals) + noise * disturbed(torch.zeros_like(originals), seed=9)
    old, new = slice(0, tokens), slice(tokens, None)
    seen = in_batches(inputs[old], originals[old], 8)
    losses = []
    for strength in torch.linspace(0, 1, 11).tolist():
        fixed = replace(auto, asymmetric_calibration=strength)
        losses.append(mean_loss(inputs[new], originals[new], followed(seen, fixed)[0]))
    found, strengths = followed(seen, auto)
    loss = mean_loss(inputs[new], originals[new], found)
    assert loss < losses[0]
    assert loss - min(losses) < 0.2 * (losses[0] - min(losses))
    assert ((strengths >= 0) & (strengths <= 1)).all()


def test_auto_leaves_the_weight_if_the_halves_do_not_agree() -> None:
    config = layer_config("natural", group_size=16, asymmetric_calibration="auto")
    originals = correlated_inputs(TOKENS, COLUMNS)
    one_window = HessianAccumulator(COLUMNS, "cpu")
    one_window.add(disturbed(originals)[None], originals[None])
    sides = 1 - 2 * (torch.arange(TOKENS) // 25 % 2)[:, None]
    opposed = originals + 0.2 * sides * originals.roll(1, dims=1)
    unchanged = originals.clone()
    for seen in (one_window, *[in_batches(x, originals, 6) for x in (opposed, unchanged)]):
        found, strengths = followed(seen, config)
        assert torch.equal(found, weight())
        assert not strengths.any()


def test_there_is_no_shift_or_drift_without_originals() -> None:
    accumulator = HessianAccumulator(COLUMNS, "cpu")
    accumulator.add(correlated_inputs(10, COLUMNS))
    assert accumulator.shifts == accumulator.drifts == []
    accumulator.add(correlated_inputs(10, COLUMNS), correlated_inputs(10, COLUMNS))
    assert len(accumulator.shifts) == 2
    assert accumulator.drifts == []
