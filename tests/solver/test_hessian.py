from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from gptq_cli.solver import hessian as hessian_module
from gptq_cli.solver.hessian import HessianAccumulator, HessianOfBatches, factors_of_tokens
from tests.simulated_gpu import SimulatedGpu, simulated_gpu
from tests.solver.samples import correlated_inputs

WIDE = 300  # three panels of columns


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "TOKENS_PER_CHUNK", {"cpu": 16, "cuda": 16})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("in_features", [40, WIDE])
def test_hessian_of_several_batches_equals_the_dense_product(in_features: int) -> None:
    inputs = correlated_inputs(105, in_features)
    accumulator = HessianAccumulator(in_features, "cpu")
    for batch in (
        inputs[:60].reshape(3, 20, in_features),
        inputs[60:61],
        inputs[61:].reshape(2, 2, 11, in_features),
    ):
        accumulator.add(batch)
    assert accumulator.tokens == 105
    assert accumulator.hessian.dtype == torch.float64
    torch.testing.assert_close(accumulator.hessian, inputs.T @ inputs, rtol=1e-12, atol=1e-9)
    assert torch.equal(accumulator.hessian, accumulator.hessian.T)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_float32_for_inputs_of_any_dtype(dtype: torch.dtype) -> None:
    inputs = (correlated_inputs(90, WIDE) / 100).to(dtype)
    accumulator = HessianAccumulator(WIDE, "cpu")
    accumulator.add(inputs)
    exact = inputs.double().T @ inputs.double()
    assert accumulator.hessian.dtype == torch.float32
    torch.testing.assert_close(
        accumulator.hessian.double(), exact, rtol=1e-5, atol=1e-5 * exact.diagonal().max().item()
    )


def test_hessian_may_be_read_between_batches() -> None:
    inputs = correlated_inputs(64, WIDE)
    accumulator = HessianAccumulator(WIDE, "cpu")
    for batch in inputs.split(16):
        accumulator.add(batch)
        assert accumulator.hessian[0, -1] == accumulator.hessian[-1, 0]
    torch.testing.assert_close(accumulator.hessian, inputs.T @ inputs, rtol=1e-12, atol=1e-9)


def test_hessian_before_any_batch_is_zero() -> None:
    accumulator = HessianAccumulator(WIDE, "cpu")
    accumulator.add(torch.empty(2, 0, WIDE))
    assert accumulator.tokens == 0
    assert torch.equal(accumulator.hessian, torch.zeros(WIDE, WIDE))


def with_massive_tokens(dtype: torch.dtype) -> torch.Tensor:
    inputs = correlated_inputs(60, 40)
    inputs /= inputs.norm(dim=1, keepdim=True)
    lengths = torch.linspace(0.5, 2, 60, dtype=torch.float64)
    lengths[[3, 20, 33]] = torch.tensor([6.0, 9.0, 4000.0], dtype=torch.float64)
    return (inputs * lengths[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_limited_token_is_halved_until_it_is_short_enough(dtype: torch.dtype) -> None:
    inputs, originals = with_massive_tokens(dtype), correlated_inputs(60, 40).to(dtype)
    lengths = inputs.double().norm(dim=1)
    scaled, before = inputs.double(), originals.double()
    n_halved = 0
    for token, length in enumerate(lengths.tolist()):
        while length > 4 * lengths.median():
            length /= 2
            scaled[token] /= 2
            before[token] /= 2
            n_halved += 1
    assert n_halved == 1 + 1 + 10
    accumulator = HessianAccumulator(40, "cpu", limited=True)
    accumulator.add(inputs.view(3, 20, 40), originals.view(3, 20, 40))
    assert accumulator.tokens == 60
    hessian, shift = accumulator.hessian.double(), sum(accumulator.shifts).double()
    torch.testing.assert_close(hessian, scaled.T @ scaled, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(shift, (before - scaled).T @ scaled, rtol=1e-5, atol=1e-2)


def test_tokens_of_usual_lengths_keep_every_bit_if_limited() -> None:
    usual = correlated_inputs(60, 40).float()
    most_are_zero = usual.clone()
    most_are_zero[:40] = 0
    for inputs in (usual, most_are_zero):
        hessians = []
        for limited in (False, True):
            accumulator = HessianAccumulator(40, "cpu", limited=limited)
            accumulator.add(inputs)
            accumulator.add(inputs[:0])
            hessians.append(accumulator.hessian)
        assert torch.equal(*hessians)


def slow_exponent(energy: float, median: float) -> int:
    """The e with 2^e nearest to the fourth root of energy / median, from -2 to 2."""
    candidates = range(-2, 3)
    wanted = math.log2(energy / median) / 4
    return min(candidates, key=lambda exponent: abs(exponent - wanted))


def test_tokens_count_by_the_root_of_their_gradients_energy() -> None:
    random = torch.Generator().manual_seed(2)
    energies = torch.exp(3 * torch.randn(501, generator=random))
    median = sorted(energies.tolist())[250]
    expected = [2.0 ** slow_exponent(energy, median) for energy in energies.tolist()]
    assert factors_of_tokens(energies).tolist() == expected
    assert set(expected) == {0.25, 0.5, 1, 2, 4}


def test_energies_of_zero_have_factors_too() -> None:
    assert factors_of_tokens(torch.tensor([0.0, 1, 1])).tolist() == [0.25, 1, 1]
    assert factors_of_tokens(torch.tensor([0.0, 0, 1])).tolist() == [1, 1, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_token_of_a_batch_has_its_factor(dtype: torch.dtype) -> None:
    inputs, originals, found, wanted = (
        correlated_inputs(60, size, seed=size).to(dtype) for size in (40, 40, 5, 5)
    )
    random = torch.Generator().manual_seed(5)
    factors = 2.0 ** torch.randint(-2, 3, (60,), generator=random)
    sums = HessianOfBatches(40, "cpu", factors=factors.split(20))
    hessian, shift, drift = torch.zeros(40, 40), torch.zeros(40, 40), torch.zeros(5, 40)
    for token, factor in enumerate(factors.tolist()):
        x, x0, r, r0 = (part[token].float() for part in (inputs, originals, found, wanted))
        hessian += factor**2 * torch.outer(x, x)
        shift += factor**2 * torch.outer(x0 - x, x)
        drift += factor**2 * torch.outer(r0 - r, x)
    for batch in range(3):
        rows = slice(20 * batch, 20 * batch + 20)
        given = [part[rows].view(2, 10, -1) for part in (inputs, originals, found, wanted)]
        sums.add(batch, *given)
    first, *others = [node.value for node in sums.nodes()]
    for other in others:
        first.absorb(other)
    expected = [(first.hessian, hessian), (sum(first.shifts), shift), (sum(first.drifts), drift)]
    for of_sums, by_token in expected:
        torch.testing.assert_close(of_sums.float(), by_token, rtol=1e-4, atol=1e-2)


def test_tokens_are_limited_before_they_get_factors() -> None:
    inputs = with_massive_tokens(torch.float64)
    factors = torch.ones(60)
    factors[::2] = 4
    limited = HessianAccumulator(40, "cpu", limited=True)
    weighed = HessianAccumulator(40, "cpu", limited=True, factors=factors)
    of_even = HessianAccumulator(40, "cpu")
    limited.add(inputs)
    weighed.add(inputs)
    short = inputs.clone()
    for token, length in enumerate(inputs.norm(dim=1).tolist()):
        while length > 4 * float(inputs.norm(dim=1).median()):
            length /= 2
            short[token] /= 2
    of_even.add(short[::2])
    expected = limited.hessian + 15 * of_even.hessian
    torch.testing.assert_close(weighed.hessian, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_are_limited_as_if_each_came_alone(dtype: torch.dtype) -> None:
    massive, few = with_massive_tokens(dtype), with_massive_tokens(dtype)[30:35]
    most_are_zero = massive.flip(0)
    most_are_zero[5:] = 0
    alone = massive[20:21] * 1000
    parts = [massive, massive[:0], most_are_zero, few, alone, massive[:0]]
    counts = torch.tensor([len(part) for part in parts])
    tokens, originals = torch.cat(parts), torch.cat(parts).flip(1)
    given = tokens.clone()
    hessian_module.limit_parts_(tokens, originals, counts)
    assert ((tokens != given).any(1)).sum() == 3 + 1
    for part, mine, original in zip(
        parts, tokens.split(counts.tolist()), originals.split(counts.tolist()), strict=True
    ):
        if len(part):
            expected, expected_original = hessian_module._scaled(
                [part, part.flip(1)], hessian_module._limits(part)
            )
            assert torch.equal(mine, expected)
            assert torch.equal(original, expected_original)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_fault_in_a_part_is_not_hidden_and_leaves_other_parts_alone(bad: float) -> None:
    tokens = torch.ones(8, 40)
    tokens[2, 7], tokens[6] = bad, 10
    hessian_module.limit_parts_(tokens, None, torch.tensor([4, 4]))
    assert str(tokens[2, 7].item()) == str(torch.tensor(bad).item())
    assert tokens[6, 0] == 10 / 4
    assert tokens[[0, 1, 3, 4, 5, 7]].eq(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_limited_tokens_do_not_hide_a_fault(bad: float) -> None:
    inputs = torch.ones(4, 40)
    inputs[2, 7] = bad
    accumulator = HessianAccumulator(40, "cpu", limited=True)
    accumulator.add(inputs)
    assert accumulator.first_not_finite() == (0, 1)


def test_inputs_stay_unchanged() -> None:
    inputs = correlated_inputs(20, 40).float().requires_grad_()
    before = inputs.detach().clone()
    accumulator = HessianAccumulator(40, "cpu")
    accumulator.add(inputs)
    assert torch.equal(inputs, before)
    assert not accumulator.hessian.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_first_non_finite_input_is_found(bad: float) -> None:
    accumulator = HessianAccumulator(WIDE, "cpu")
    accumulator.add(torch.ones(4, WIDE))
    assert accumulator.first_not_finite() is None
    inputs = torch.ones(2, 3, WIDE)
    inputs[1, 2, 170] = bad
    accumulator.add(inputs)
    accumulator.add(torch.ones(4, WIDE))
    assert accumulator.first_not_finite() == (1, 3)


simulated = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)


@simulated
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_panels_on_a_device_equal_the_dense_product(
    dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "CUDA_PANEL", 128)
    inputs = (correlated_inputs(90, WIDE) / 100).to(dtype)
    exact = inputs.double().T @ inputs.double()
    with simulated_gpu() as gpu:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        calls = noted_operations(gpu, monkeypatch)
        accumulator = HessianAccumulator(WIDE, "cuda:0")
        for batch in inputs.to("cuda:0").split(50):
            accumulator.add(batch)
        found = accumulator.hessian.cpu()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * exact.max().item())
    # Only a device with tensor cores for bfloat16 takes 16-bit factors.
    takes_halves = dtype != torch.float32 and capability >= (8, 0)
    assert (calls["aten::mm.dtype"] > 0) == takes_halves


@simulated
def test_first_products_on_a_device_are_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu() as gpu:
        inputs = correlated_inputs(20, WIDE).bfloat16().to("cuda:0")
        calls = noted_operations(gpu, monkeypatch)
        accumulator = HessianAccumulator(WIDE, "cuda:0")
        accumulator.add(inputs, inputs)
        written = dict(calls)
        accumulator.add(inputs, inputs)
    assert not {"aten::zeros", "aten::zero_", "aten::add_.Tensor", "aten::fill_"} & set(written)
    assert calls["aten::add_.Tensor"] == 3  # the one panel, and the shift of each half


@simulated
def test_hessian_on_a_device_without_batches_is_zero() -> None:
    with simulated_gpu():
        accumulator = HessianAccumulator(WIDE, "cuda:0")
        assert torch.equal(accumulator.hessian.cpu(), torch.zeros(WIDE, WIDE))
        accumulator = HessianAccumulator(WIDE, "cuda:0")
        accumulator.add_identity()
        assert torch.equal(accumulator.hessian.cpu(), torch.eye(WIDE))


def noted_operations(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the operations of the device by name from now on."""
    calls: Counter[str] = Counter()
    usual = gpu.run

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        calls[func.name()] += 1
        return usual(func, args, kwargs)

    monkeypatch.setattr(gpu, "run", run)
    return calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_are_exact_on_cuda(dtype: torch.dtype) -> None:
    inputs = (correlated_inputs(500, WIDE) / 100).to(dtype)
    accumulator = HessianAccumulator(WIDE, "cuda")
    accumulator.add(inputs.cuda())
    exact = inputs.double().T @ inputs.double()
    torch.testing.assert_close(
        accumulator.hessian.cpu().double(),
        exact,
        rtol=1e-5,
        atol=1e-5 * exact.diagonal().max().item(),
    )
