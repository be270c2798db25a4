"""How the solver computes: with kernels or without, in which precision, in chunks that fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# The one switch: device types whose float32 tensors go through the kernels of `triton_launch`.
KERNEL_DEVICES = {"cuda"}
ELEMENTS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def uses_kernels(tensor: Tensor) -> bool:
    """Return whether steps on tensors like this one run as Triton kernels."""
    return tensor.device.type in KERNEL_DEVICES and tensor.dtype == torch.float32 and _has_triton()


@contextmanager
def feedback_precision(tensor: Tensor) -> Iterator[None]:
    """Let products of float32 matrices run in TF32 if `tensor` is on a CUDA device.

    The solver uses this for the products that pass the errors of columns on. TF32 keeps 11 bits of
    each factor, so a passed error changes by less than a thousandth of itself; the column that
    receives it is then rounded to few levels.
    """
    with _precision(torch.backends.cuda.matmul, "tf32", wanted=tensor.is_cuda):
        yield


@contextmanager
def bfloat16_factors(tensor: Tensor) -> Iterator[None]:
    """Let products of float32 copies of a bfloat16 `tensor` on the CPU take bfloat16 factors.

    The products are exact: two bfloat16 numbers multiply exactly in float32, in which products are
    summed. Processors with bfloat16 units run faster; on others the setting only selects another
    library, oneDNN. If `tensor` is on a device or has another dtype, nothing is changed.
    """
    library: Any = torch.backends.mkldnn
    wanted = tensor.is_cpu and tensor.dtype == torch.bfloat16
    with _precision(library.matmul, "bf16", wanted=wanted):
        yield


@contextmanager
def _precision(products: Any, precision: str, *, wanted: bool) -> Iterator[None]:
    """Set the precision of `products` if `wanted`, and restore it at the end.

    The setting belongs to the whole process: no other thread may multiply meanwhile.
    """
    if not wanted:
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = precision
    try:
        yield
    finally:
        products.fp32_precision = before


def add_product_(target: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1) -> None:
    """Add alpha left right to `target`: matrices [m, k] [k, n] to [m, n], or such of E experts."""
    if target.dim() == 3 and len(target) > 1:
        target.baddbmm_(left, right, alpha=alpha)
        return
    if target.dim() == 3:  # one expert, or a dense layer: a plain product, on any device
        target, left, right = target[0], left[0], right[0]
    target.addmm_(left, right, alpha=alpha)


def permuted(matrices: Tensor, orders: Tensor) -> Tensor:
    """Return [E, n, n] matrices with their rows and columns in the `orders` [E, n]."""
    if len(matrices) == 1:
        return matrices[0][orders[0][:, None], orders[0]][None]
    experts = torch.arange(len(matrices), device=matrices.device)[:, None, None]
    return matrices[experts, orders[:, :, None], orders[:, None, :]]


def row_chunks(tensor: Tensor) -> Iterator[slice]:
    """Yield consecutive slices of the rows of `tensor`, of ELEMENTS_PER_CHUNK elements at most.

    A slice has one row at least.
    """
    elements = max(1, tensor.numel() // max(1, len(tensor)))
    rows = max(1, ELEMENTS_PER_CHUNK[tensor.device.type] // elements)
    for start in range(0, len(tensor), rows):
        yield slice(start, min(start + rows, len(tensor)))
