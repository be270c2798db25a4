"""The Cholesky factor of a large matrix in its own memory, most of the work in products.

A panel of columns at a time: its diagonal block A_kk = L_kk L_kkᵀ, the rows below it L_ik = A_ik L_kk⁻ᵀ, and what is
left of the matrix A_ij -= L_ik L_jkᵀ, the lower half only. On CUDA those products run on tensor cores, each factor
split into two bfloat16 numbers, which keeps 16 of the 24 bits of float32; sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.engine.chunks import row_chunks

PANEL = {"cpu": 512, "cuda": 4096}


@torch.no_grad()
def cholesky_(matrix: Tensor, panel: int | None = None) -> int:
    """Turn a symmetric positive definite matrix [n, n] into its lower Cholesky factor, in place.

    A panel of so many columns is done at a time; the default is what suits the device.
    Returns 0, or as `torch.linalg.cholesky_ex` the order of the first leading minor that is not positive; the matrix is
    then neither one nor the other. Reads the lower triangle only; waits for the device once a panel.
    """
    size = len(matrix)
    panel = panel or PANEL[matrix.device.type]
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        corner = matrix[start:stop, start:stop]
        factor, failed_at = torch.linalg.cholesky_ex(corner)
        if bool(failed_at):
            return start + int(failed_at)
        corner.copy_(factor)
        matrix[start:stop, stop:] = 0
        if stop < size:
            below = matrix[stop:, start:stop]
            below.copy_(torch.linalg.solve_triangular(factor.T, below, upper=True, left=False))
            _subtract_square_(matrix[stop:, stop:], below, panel)
    return 0


def reverse_(matrix: Tensor) -> None:
    """Reverse the rows and the columns of a contiguous matrix in place."""
    numbers = matrix.view(-1)
    size = len(numbers)
    for part in row_chunks(numbers[: size // 2]):
        front, back = numbers[part], numbers[size - part.stop : size - part.start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _subtract_square_(matrix: Tensor, factor: Tensor, panel: int) -> None:
    """matrix -= factor factorᵀ on and below the diagonal, and some more beside it."""
    on_tensor_cores = factor.is_cuda and factor.dtype == torch.float32
    if on_tensor_cores:
        high = factor.bfloat16()
        low = (factor - high).bfloat16()
    for start in range(0, len(matrix), panel):
        stop = min(start + panel, len(matrix))
        target = matrix[start:, start:stop]
        if not on_tensor_cores:
            target.addmm_(factor[start:], factor[start:stop].T, alpha=-1)
            continue
        for left, right in ((high, high), (high, low), (low, high)):
            target -= torch.mm(left[start:], right[start:stop].T, out_dtype=torch.float32)
