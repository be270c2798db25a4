from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import numerics, quantized_linear
from gptq_cli.solver import solve as solve_module
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.quantized_linear import (
    energies_of_rows,
    output_energies,
    round_to_nearest,
    split_panels,
)
from gptq_cli.solver.solve import Solution, sampling_step, solve, solve_together
from tests.simulated_gpu import simulated_gpu
from tests.solver.samples import correlated_inputs, correlated_layer


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": 1000})
    monkeypatch.setattr(quantized_linear, "COLUMNS_PER_PANEL", {"cpu": 40})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_errors_equal_those_of_the_outputs(dtype: torch.dtype) -> None:
    inputs = correlated_inputs(200, 96)
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(5))
    candidates = [
        round_to_nearest(weight, LayerConfig(bits=bits, group_size=32)) for bits in (2, 8)
    ]
    energies = output_energies(weight, (inputs.T @ inputs).to(dtype), candidates)
    energy, *errors = energies.tolist()
    outputs = inputs @ weight.double().T
    for error, candidate in zip(errors, candidates, strict=True):
        change = inputs @ candidate.dequantize().double().T - outputs
        assert error / energy == pytest.approx(
            (change.square().sum() / outputs.square().sum()).item(), rel=1e-4
        )


def test_layer_without_output_has_no_error() -> None:
    quantized = round_to_nearest(torch.zeros(4, 64), LayerConfig(group_size=32))
    assert output_energies(torch.zeros(4, 64), torch.eye(64), [quantized]).tolist() == [0.0, 0.0]


def test_weight_and_hessian_stay_unchanged() -> None:
    weight, hessian = torch.randn(4, 64), torch.eye(64)
    before = weight.clone()
    quantized = round_to_nearest(weight, LayerConfig(bits=2, group_size=32))
    codes = replace(quantized, codes=quantized.codes.clone())
    assert output_energies(weight, hessian, [quantized])[1] > 0
    assert torch.equal(weight, before)
    assert torch.equal(hessian, torch.eye(64))
    assert torch.equal(quantized.codes, codes.codes)


simulated = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)
LAYER = LayerConfig(bits=3, group_size=32)
COLUMNS = 96


@simulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_energies_from_tensor_cores_are_nearly_exact(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": 10**6, "cuda": 250})
    monkeypatch.setattr(quantized_linear, "COLUMNS_PER_PANEL", {"cpu": 256, "cuda": 40})
    inputs = correlated_inputs(200, COLUMNS)
    inputs[:, 7] *= 1000  # a massive channel
    weight = torch.randn(37, COLUMNS, generator=torch.Generator().manual_seed(5)).to(dtype)
    hessian = inputs.T @ inputs
    solved = solve(weight, hessian.float(), prepare(hessian.float(), LAYER, 200), LAYER).quantized
    exact = []
    for matrix in (weight.double(), solved.dequantize().double() - weight.double()):
        exact.append((inputs @ matrix.T).square().sum(0))
    with simulated_gpu():
        on_device = replace(
            solved,
            codes=solved.codes.to("cuda:0"),
            scales=solved.scales.to("cuda:0"),
            zeros=solved.zeros.to("cuda:0"),
            group_of_column=solved.group_of_column.to("cuda:0"),
        )
        panels, on_gpu = split_panels(hessian.float().to("cuda:0")), weight.to("cuda:0")
        found = [energies_of_rows(on_gpu, panels).cpu()]
        found.append(energies_of_rows(on_gpu, panels, on_device).cpu())
    torch.testing.assert_close(torch.stack(found), torch.stack(exact), rtol=1e-4, atol=0)


def sampled(rows: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Solution, Solution]:
    """The solutions of a layer on the CPU and on a device that samples `rows`."""
    monkeypatch.setattr(solve_module, "uses_kernels", lambda _tensor: False)
    monkeypatch.setattr(solve_module, "SAMPLED_ROWS", rows)
    weight, hessian = correlated_layer(120, COLUMNS)
    weight, hessian = weight.float(), hessian.float()
    weight[::2] *= 3  # rows of two kinds in turn
    on_cpu = solve(weight, hessian, prepare(hessian, LAYER, 400), LAYER)
    with simulated_gpu():
        hessian = hessian.to("cuda:0")
        on_device = solve(weight.to("cuda:0"), hessian, prepare(hessian, LAYER, 400), LAYER)
    return on_cpu, on_device


@simulated
@pytest.mark.parametrize(("rows", "taken"), [(30, 40), (60, 120), (500, 120)])
def test_a_device_measures_round_to_nearest_on_a_sample_of_rows(
    rows: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu, on_device = sampled(rows, monkeypatch)
    assert (on_cpu.rtn_rows, on_device.rtn_rows) == (120, taken)
    assert on_cpu.sampled_rows is None
    assert on_device.sampled_rows == (taken if taken < 120 else None)
    exact = 1e-4
    assert on_device.relative_error == pytest.approx(on_cpu.relative_error, rel=exact)
    accuracy = exact if taken == 120 else 0.1
    assert on_device.rtn_relative_error == pytest.approx(on_cpu.rtn_relative_error, rel=accuracy)


@simulated
def test_a_sample_takes_rows_of_two_kinds_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "SAMPLED_ROWS", 10)
    with simulated_gpu():
        steps = [sampling_step(torch.zeros(n, 1, device="cuda:0")) for n in range(1, 200)]
    assert all(step % 2 for step in steps)
    assert all(-(-n // step) >= min(n, 10) for n, step in enumerate(steps, 1))
    assert sampling_step(torch.zeros(1000, 1)) == 1


@simulated
def test_an_error_names_the_row_that_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def round_badly(*_: object) -> None:
        raise ScaleRangeError(4)

    monkeypatch.setattr(solve_module, "uses_kernels", lambda _tensor: False)
    monkeypatch.setattr(solve_module, "SAMPLED_ROWS", 2)
    monkeypatch.setattr(solve_module, "round_to_nearest", round_badly)
    weight, hessian = correlated_layer(20, COLUMNS)
    with simulated_gpu():
        halves = list(weight.float().to("cuda:0").split([7, 13]))
        hessian = hessian.float().to("cuda:0")
        with pytest.raises(ScaleRangeError, match="row 12"):  # of 0, 3, 6, 7, 12, 17
            solve_together(halves, hessian, prepare(hessian, LAYER, 400), LAYER)
