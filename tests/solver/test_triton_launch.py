"""The solver's kernels equal its torch operations, which other tests compare with the reference.

Triton decides at import whether it interprets, so one process of its own runs all cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gptq_cli.solver import numerics
from gptq_cli.solver import refine as refine_module
from gptq_cli.solver import solve as solve_module
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.solve import solve
from tests.solver.kernel_cases import CASES, EXPERTS, Case, solved, solved_experts
from tests.solver.samples import correlated_layer, layer_config

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("solve_in_interpreter.py")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    solutions = tmp_path_factory.mktemp("solve") / "solutions.npz"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(SCRIPT), str(solutions)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with np.load(solutions) as found:
        return dict(found)


@pytest.mark.parametrize("name", CASES)
def test_kernels_give_the_codes_and_grids_of_torch(
    name: str, interpreted: dict[str, np.ndarray]
) -> None:
    expected = solved(CASES[name])
    for part in ("zeros", "scales", "codes"):
        np.testing.assert_array_equal(
            interpreted[f"{name}/{part}"], getattr(expected, part).numpy(), err_msg=part
        )


def loss(case: Case, decoded: Tensor) -> float:
    weight, hessian = case.layer()
    error = decoded.double() - weight.double()
    damped = hessian.double() + prepare(hessian, case.config).damping.double().diag()
    return (error @ damped * error).sum().item()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("refined")])
def test_refinement_with_factors_of_16_bits_finds_as_low_a_loss(
    name: str, interpreted: dict[str, np.ndarray]
) -> None:
    case = CASES[name]
    found = loss(case, torch.from_numpy(interpreted[f"{name}/halves"]))
    assert found < 1.002 * loss(case, solved(case).dequantize())


@pytest.mark.parametrize("name", EXPERTS)
def test_kernels_give_several_experts_the_codes_of_each_alone(
    name: str, interpreted: dict[str, np.ndarray]
) -> None:
    alone = solved_experts(EXPERTS[name])
    assert len(alone) == 3 * 2
    for number, solution in enumerate(alone):
        for part in ("zeros", "scales", "codes"):
            found = interpreted[f"{name}/{number}/{part}"]
            expected = getattr(solution.quantized, part).numpy()
            np.testing.assert_array_equal(found, expected, err_msg=f"{part} {number}")
        errors = (solution.relative_error, solution.rtn_relative_error)
        np.testing.assert_allclose(interpreted[f"{name}/{number}/errors"], errors, rtol=1e-5)


def test_cases_cover_all_widths_and_both_signs() -> None:
    configs = [case.config for case in CASES.values()]
    assert {config.bits for config in configs} == {2, 3, 4, 8}
    assert {config.scale_search for config in configs} == {"none", "mse"}
    assert any((solved(case).scales < 0).any() for case in CASES.values())


def test_float64_and_other_devices_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not numerics.uses_kernels(torch.zeros(1))
    monkeypatch.setattr(numerics, "KERNEL_DEVICES", {"cpu"})
    assert numerics.uses_kernels(torch.zeros(1))
    assert not numerics.uses_kernels(torch.zeros(1, dtype=torch.float64))


def test_solver_imports_and_solves_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tests.solver.kernel_cases import CASES, solved\n"
        "print(solved(CASES['refined, signed']).codes.shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert "[13, 48]" in run.stdout


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_give_the_codes_and_grids_of_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (solve_module, refine_module):
        monkeypatch.setattr(module, "feedback_precision", nullcontext)
    fused = solved(CASES[name], "cuda")
    monkeypatch.setattr(numerics, "KERNEL_DEVICES", set())
    expected = solved(CASES[name], "cuda")
    for part in ("zeros", "scales", "codes"):
        same = getattr(fused, part) == getattr(expected, part)
        assert same.double().mean() > 0.998, part


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("order", ["static group aware", "group aware"])
@pytest.mark.parametrize("group_size", [128, 256])
def test_compiled_kernels_differ_in_one_of_ten_thousand_codes(
    group_size: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = (tensor.float().cuda() for tensor in correlated_layer(1000, 1024))
    config = layer_config(order, group_size=group_size, signed_scales=True, scale_search="mse")
    prepared = prepare(hessian, config)
    with_tf32 = solve(weight, hessian, prepared, config)
    monkeypatch.setattr(solve_module, "feedback_precision", nullcontext)
    fused = solve(weight, hessian, prepared, config)
    monkeypatch.setattr(numerics, "KERNEL_DEVICES", set())
    expected = solve(weight, hessian, prepared, config)
    assert (fused.quantized.codes != expected.quantized.codes).double().mean() <= 1e-4
    assert with_tf32.relative_error == pytest.approx(expected.relative_error, rel=2e-3)
