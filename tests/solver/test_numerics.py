from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.numerics import bfloat16_factors, feedback_precision

ONEDNN: Any = torch.backends.mkldnn


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
    ("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, None), (torch.float32, None)]
)
def test_only_bfloat16_inputs_are_multiplied_in_bfloat16(
    dtype: torch.dtype, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ONEDNN.matmul.fp32_precision
    used = []
    add_products = HessianAccumulator._add_products

    def note(self: HessianAccumulator, tokens: Tensor) -> None:
        used.append((ONEDNN.matmul.fp32_precision, tokens.dtype))
        add_products(self, tokens)

    monkeypatch.setattr(HessianAccumulator, "_add_products", note)
    HessianAccumulator(8, "cpu").add(torch.ones(3, 8, dtype=dtype))
    assert used == [(precision or before, torch.float32)]
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
