"""Products of float32 matrices in less precision where nothing is lost, and rows of a matrix a
chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ELEMENTS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}


@contextmanager
def feedback_precision(tensor: Tensor) -> Iterator[None]:
    """Let products of float32 matrices on a CUDA device run in TF32: those that pass the errors of columns on.

    TF32 keeps 11 bits of each factor. What reaches a column that way changes by less than a thousandth of itself, and
    is then rounded to 16 levels or fewer.
    """
    with _precision(torch.backends.cuda.matmul, "tf32", wanted=tensor.is_cuda):
        yield


@contextmanager
def bfloat16_factors(tensor: Tensor) -> Iterator[None]:
    """Let products of float32 copies of `tensor` on the CPU take their factors as bfloat16, if that is what it is.

    Nothing is lost: products of two such numbers are exact in float32, in which they are added up. Processors with
    units for them are faster by it, and others multiply float32 with another library, oneDNN.
    """
    library: Any = torch.backends.mkldnn
    with _precision(
        library.matmul, "bf16", wanted=tensor.is_cpu and tensor.dtype == torch.bfloat16
    ):
        yield


@contextmanager
def _precision(products: Any, precision: str, *, wanted: bool) -> Iterator[None]:
    """The setting belongs to the whole process: nothing else may multiply meanwhile."""
    if not wanted:
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = precision
    try:
        yield
    finally:
        products.fp32_precision = before


def row_chunks(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of `tensor`, one after the other, of so many elements each; at least a row."""
    elements = max(1, tensor.numel() // max(1, len(tensor)))
    rows = max(1, ELEMENTS_PER_CHUNK[tensor.device.type] // elements)
    for start in range(0, len(tensor), rows):
        yield slice(start, min(start + rows, len(tensor)))
