"""The factorisation by panels against LAPACK's, over sizes that panels divide and do not."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.solver import factor as factor_module
from gptq_cli.solver import numerics
from gptq_cli.solver.factor import NotPositiveDefiniteError, cholesky_, prepare, reverse_
from tests.simulated_gpu import simulated_gpu
from tests.solver.samples import ORDERS, correlated_layer, layer_config


def positive_definite(size: int) -> torch.Tensor:
    _, hessian = correlated_layer(1, size)
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize(("size", "panel"), [(48, 16), (50, 16), (33, 32), (20, 64), (7, 1)])
def test_factor_by_panels_equals_the_factor_of_lapack(size: int, panel: int) -> None:
    matrix = positive_definite(size)
    expected = torch.linalg.cholesky(matrix)
    matrix += torch.full_like(matrix, 1e6).triu(1)  # never read
    assert cholesky_(matrix, panel) == 0
    torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-12)


def test_float32_factor_is_as_exact_as_that_of_lapack() -> None:
    exact = torch.linalg.cholesky(positive_definite(300))
    matrix = positive_definite(300).float()
    usual = torch.linalg.cholesky(matrix)
    assert cholesky_(matrix, 64) == 0
    assert (matrix - exact).norm() <= 1.5 * (usual - exact).norm()


@pytest.mark.parametrize("at", [0, 5, 16, 31, 47])
def test_first_non_positive_minor_has_the_index_of_lapack(at: int) -> None:
    matrix = positive_definite(48)
    matrix[at, at] = -1.0
    _, expected = torch.linalg.cholesky_ex(matrix)
    assert cholesky_(matrix.clone(), 16) == expected.item() == at + 1


@pytest.mark.parametrize(("rows", "chunk"), [(6, 5), (7, 4), (1, 2), (5, 1000)])
def test_rows_and_columns_are_reversed_in_place(
    rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "ELEMENTS_PER_CHUNK", {"cpu": chunk})
    matrix = torch.arange(float(rows * rows)).reshape(rows, rows)
    expected = matrix.flip(0, 1)
    reverse_(matrix)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_blocked_factors_and_retries_equal_those_of_lapack(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hessian = correlated_layer(1, 96)
    hessian -= 0.3 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    before = hessian.clone()
    config = layer_config(order, group_size=32, damp_percent=0.16)
    usual = prepare(hessian, config)
    monkeypatch.setitem(factor_module.PANEL, "cpu", 40)
    blocked = prepare(hessian, config)
    assert usual.retries == blocked.retries == [1]
    assert usual.damp_percent == blocked.damp_percent
    torch.testing.assert_close(blocked.R, usual.R, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(blocked.D, usual.D)
    assert torch.equal(hessian, before)
    with pytest.raises(NotPositiveDefiniteError):
        prepare(
            hessian - 5 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64), config
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_factor_on_tensor_cores_multiplies_to_the_matrix() -> None:
    matrix = positive_definite(1000).float().cuda()
    factored = matrix.clone()
    assert cholesky_(factored, 256) == 0
    found = factored.double() @ factored.double().T
    assert (found - matrix).norm() < 2e-5 * matrix.norm()
    matrix[700, 700] = -1.0
    assert cholesky_(matrix, 256) == 701


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a device of its own")
def test_factor_on_tensor_cores_is_nearly_as_exact_as_that_of_lapack() -> None:
    loudness = torch.logspace(-6, 6, 300, dtype=torch.float64)[torch.randperm(300)]
    matrix = positive_definite(300) * loudness * loudness[:, None]
    lengths = matrix.diagonal().sqrt()[:, None]  # of the rows of the factor
    exact = torch.linalg.cholesky(matrix) / lengths
    usual = torch.linalg.cholesky(matrix.float()) / lengths
    with simulated_gpu():
        on_device = matrix.float().to("cuda:0")
        assert cholesky_(on_device, 64).item() == 0
        found = on_device.cpu() / lengths
    assert (found - exact).norm() < 3 * (usual - exact).norm()
    assert (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a device of its own")
@pytest.mark.parametrize("at", [5, 47])
def test_tensor_cores_find_the_first_non_positive_minor(at: int) -> None:
    matrix = positive_definite(48).float()
    matrix[at, at] = -1.0
    with simulated_gpu():
        assert cholesky_(matrix.to("cuda:0"), 16).item() == at + 1


def test_matrices_factorised_together_equal_each_alone_by_panels() -> None:
    matrices = torch.stack(
        [positive_definite(50), 3 * positive_definite(50), torch.eye(50).double()]
    )
    matrices[1, 5, 5] = -1.0
    factors = matrices.clone()
    assert cholesky_(factors, 16).tolist() == [0, 6, 0]
    reversed_factors = factors.clone()
    reverse_(reversed_factors)
    for number in (0, 2):
        expected = torch.linalg.cholesky(matrices[number])
        torch.testing.assert_close(factors[number], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(reversed_factors[number], factors[number].flip(0, 1))
