from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import numerics, quantized_linear
from gptq_cli.solver.quantized_linear import output_energies, round_to_nearest
from tests.solver.samples import correlated_inputs


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": 1000})
    monkeypatch.setattr(quantized_linear, "COLUMNS_PER_PANEL", 40)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_errors_equal_those_of_the_outputs(dtype: torch.dtype) -> None:
    inputs = correlated_inputs(200, 96)
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(5))
    candidates = [
        round_to_nearest(weight, LayerConfig(bits=bits, group_size=32)) for bits in (2, 8)
    ]
    energy, *errors = output_energies(weight, (inputs.T @ inputs).to(dtype), candidates)
    outputs = inputs @ weight.double().T
    for error, candidate in zip(errors, candidates, strict=True):
        change = inputs @ candidate.dequantize().double().T - outputs
        assert error / energy == pytest.approx(
            (change.square().sum() / outputs.square().sum()).item(), rel=1e-4
        )


def test_layer_without_output_has_no_error() -> None:
    quantized = round_to_nearest(torch.zeros(4, 64), LayerConfig(group_size=32))
    assert output_energies(torch.zeros(4, 64), torch.eye(64), [quantized]) == [0.0, 0.0]


def test_weight_and_hessian_stay_unchanged() -> None:
    weight, hessian = torch.randn(4, 64), torch.eye(64)
    before = weight.clone()
    quantized = round_to_nearest(weight, LayerConfig(bits=2, group_size=32))
    codes = replace(quantized, codes=quantized.codes.clone())
    assert output_energies(weight, hessian, [quantized])[1] > 0
    assert torch.equal(weight, before)
    assert torch.equal(hessian, torch.eye(64))
    assert torch.equal(quantized.codes, codes.codes)
