from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import follow_original, prepare
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.numerics import (
    bfloat16_factors,
    feedback_precision,
    multiply_split,
    split,
)
from gptq_cli.solver.quantized_linear import output_energies, round_to_nearest
from gptq_cli.solver.solve import solve
from tests.simulated_gpu import simulated_gpu
from tests.solver.samples import correlated_inputs, correlated_layer

ONEDNN: Any = torch.backends.mkldnn
PRODUCTS = ("mm", "addmm", "addmv", "bmm", "linalg_solve_triangular", "linalg_cholesky_ex")
LAYER = LayerConfig(bits=3, group_size=16, refine_sweeps=1)
WEIGHT, HESSIAN = correlated_layer(8, 64)
INPUTS = correlated_inputs(30, 64).float()


def test_products_on_the_cpu_change_no_setting_of_the_process() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with feedback_precision(torch.zeros(1)):
        assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_ends_with_its_product_also_on_failure() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with feedback_precision(torch.zeros(1, device="cuda")):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with pytest.raises(ArithmeticError), feedback_precision(torch.zeros(1, device="cuda")):
        raise ArithmeticError
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "bf16"), (torch.float16, "ieee"), (torch.float32, "ieee")],
)
def test_only_bfloat16_inputs_are_multiplied_in_bfloat16(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ONEDNN.matmul.fp32_precision
    used = []
    add_products = HessianAccumulator._add_products

    def note(self: HessianAccumulator, tokens: Tensor) -> None:
        used.append((ONEDNN.matmul.fp32_precision, tokens.dtype))
        add_products(self, tokens)

    monkeypatch.setattr(HessianAccumulator, "_add_products", note)
    HessianAccumulator(8, "cpu").add(torch.ones(3, 8, dtype=dtype))
    assert used == [(precision, torch.float32)]
    assert before != "bf16"
    assert ONEDNN.matmul.fp32_precision == before


def test_products_of_bfloat16_inputs_are_exact() -> None:
    inputs = torch.randn(700, 300, generator=torch.manual_seed(0)).mul_(64).round_().bfloat16()
    accumulator = HessianAccumulator(300, "cpu")
    accumulator.add(inputs)
    assert torch.equal(accumulator.hessian.double(), inputs.double().T @ inputs.double())


def test_failure_restores_the_precision() -> None:
    before = ONEDNN.matmul.fp32_precision
    with pytest.raises(ArithmeticError), bfloat16_factors(torch.zeros(1, dtype=torch.bfloat16)):
        raise ArithmeticError
    assert ONEDNN.matmul.fp32_precision == before


class Precisions(TorchDispatchMode):
    """Note the precision of both libraries at each product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().removeprefix("aten::").partition(".")[0].rstrip("_") in PRODUCTS:
            matmul = torch.backends.cuda.matmul
            self.seen.add((matmul.fp32_precision, ONEDNN.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def told_otherwise() -> Iterator[None]:
    """A process that was told to multiply in TF32 and bfloat16."""
    before = torch.backends.cuda.matmul.fp32_precision, ONEDNN.matmul.fp32_precision
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, ONEDNN.matmul.fp32_precision = before


def add_both() -> None:
    HessianAccumulator(64, "cpu").add(INPUTS, INPUTS + 1)


def follow() -> None:
    shifts = [HESSIAN.float(), HESSIAN.float().T / 2]
    follow_original(WEIGHT.float(), shifts, prepare(HESSIAN.float(), LAYER, 200), "auto")


def report() -> None:
    output_energies(WEIGHT.float(), HESSIAN.float(), [round_to_nearest(WEIGHT, LAYER)])


def round_columns() -> None:
    solve(WEIGHT.float(), HESSIAN.float(), prepare(HESSIAN.float(), LAYER, 200), LAYER)


@pytest.mark.usefixtures("told_otherwise")
@pytest.mark.parametrize("work", [add_both, follow, report, round_columns])
def test_exact_products_ignore_what_the_process_was_told(work: Callable[[], None]) -> None:
    before = torch.backends.cuda.matmul.fp32_precision, ONEDNN.matmul.fp32_precision
    assert "ieee" not in before
    with Precisions() as precisions:
        work()
    assert precisions.seen == {("ieee", "ieee")}
    assert (torch.backends.cuda.matmul.fp32_precision, ONEDNN.matmul.fp32_precision) == before


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a device of its own")
def test_a_product_of_split_factors_is_nearly_float32() -> None:
    left, right = correlated_inputs(40, 96).float(), correlated_inputs(96, 50).float()
    exact = left.double() @ right.double()
    with simulated_gpu():
        parts = split(left.to("cuda:0")), split(right.to("cuda:0"))
        found = multiply_split(*parts).cpu()
        only_high = torch.mm(parts[0][0], parts[1][0], out_dtype=torch.float32).cpu()
    assert (found - exact).norm() < 1e-5 * exact.norm()
    assert (only_high - exact).norm() > 1e-3 * exact.norm()


def test_a_float16_split_holds_what_one_number_cannot() -> None:
    matrix = torch.tensor([100_000.0, 0.1 + 65_000, -131_000.0, 1 / 3, float("inf")])
    high, low = split(matrix, torch.float16)
    assert high.dtype == low.dtype == torch.float16
    found = high.double() + low.double()
    torch.testing.assert_close(found[:4], matrix[:4].double(), rtol=1e-4, atol=0)
    assert abs(found[3] - 1 / 3) < 1e-7
    assert found[4] == float("inf")
