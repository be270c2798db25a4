"""Chunks of rows: every row once, and the same results whatever their size."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import numerics
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.numerics import row_chunks
from gptq_cli.solver.quantized_linear import round_to_nearest

RUNS = torch.arange(64).int() // 16
SCATTERED = torch.randperm(64, generator=torch.Generator().manual_seed(3)).int() % 4


@pytest.mark.parametrize("shape", [(7, 10), (7, 2, 5), (1, 100), (8, 1), (0, 10), (3, 0)], ids=str)
@pytest.mark.parametrize("elements", [1, 20, 29, 1000])
def test_chunks_hold_every_row_once_in_order(
    elements: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": elements})
    rows = torch.zeros(shape)
    numbers = torch.arange(shape[0])
    parts = [numbers[part] for part in row_chunks(rows)]
    assert torch.equal(torch.cat([*parts, numbers[:0]]), numbers)
    most = max(1, elements // max(1, rows[:1].numel()))
    assert all(0 < len(part) <= most for part in parts)


@pytest.mark.parametrize(
    "groups", [SCATTERED, RUNS, RUNS.flip(0)], ids=["scattered", "runs", "runs backwards"]
)
@pytest.mark.parametrize("sym", [True, False])
def test_rounded_and_dequantized_rows_do_not_depend_on_chunks(
    sym: bool, groups: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    config = LayerConfig(bits=3, group_size=16, sym=sym)
    whole = round_to_nearest(weight, config, groups)
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": 2 * 64})
    parts = round_to_nearest(weight, config, groups)
    for part in ("codes", "scales", "zeros", "group_of_column"):
        assert torch.equal(getattr(parts, part), getattr(whole, part)), part
    group = groups.long()
    expected = (whole.codes.double() - whole.zeros[:, group]) * whole.scales.double()[:, group]
    assert torch.equal(parts.dequantize(torch.float64), expected)


def test_error_names_the_row_of_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": 2 * 32})
    weight = torch.ones(9, 32)
    weight[7, 3] = 1e9
    with pytest.raises(ScaleRangeError, match="row 7"):
        round_to_nearest(weight, LayerConfig(group_size=16))
