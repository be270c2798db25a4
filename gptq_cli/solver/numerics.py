"""How the solver computes: with kernels or without, in which precision, in chunks that fit.

Products in the precision of float32 run on the tensor cores of a CUDA device if each factor is
split into two bfloat16 numbers, which keep 16 of the 24 bits of float32. Products of 16-bit numbers
are exact there, and sums are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# The one switch: device types whose float32 tensors go through the kernels of `triton_launch`.
KERNEL_DEVICES = {"cuda"}
WITHOUT_KERNELS: set[str] = set()  # the ones of them where a first launch failed
ELEMENTS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}
# The first compute capability that multiplies bfloat16; what earlier ones make of it is not known.
TENSOR_CORES_FROM = (8, 0)

Parts = Sequence[Tensor]  # high and low part of a matrix, or the high one alone


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def uses_kernels(tensor: Tensor) -> bool:
    """Return whether steps on tensors like this one run as Triton kernels."""
    kind = tensor.device.type
    if kind not in KERNEL_DEVICES or kind in WITHOUT_KERNELS:
        return False
    return tensor.dtype == torch.float32 and has_triton()


def on_tensor_cores(tensor: Tensor) -> bool:
    """Return whether the tensor is on a CUDA device that multiplies bfloat16 numbers."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= TENSOR_CORES_FROM


def splits(tensor: Tensor) -> bool:
    """Return whether products of float32 matrices like this one are made of bfloat16 parts."""
    return tensor.dtype == torch.float32 and on_tensor_cores(tensor)


def split(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return two matrices of a 16-bit `dtype` whose sum is the float32 `matrix`, or nearly so."""
    within = matrix
    if dtype == torch.float16:  # whose largest number is small: the sum reaches twice as far
        largest = torch.finfo(dtype).max
        within = matrix.clamp(-largest, largest)
    high = within.to(dtype)
    return high, (matrix - high).to(dtype)


def parts_of(matrix: Tensor) -> Parts:
    """Return the parts of a matrix for products on tensor cores; one of bfloat16 is its own."""
    if matrix.dtype == torch.bfloat16:
        return (matrix,)
    return split(matrix.float())


def above(numbers: Tensor) -> Tensor:
    """Return for each positive float the least power of two above it, twice the float at most.

    A product with such a power is exact.
    """
    return numbers / torch.frexp(numbers).mantissa


def multiply_split(left: Parts, right: Parts) -> Tensor:
    """Return the float32 product of matrices [..., m, k] in parts, on tensor cores.

    The product of the two low parts is left out: it is below the rounding of the others.
    """
    product = exact_product(left[0], right[0])
    for low in right[1:]:
        product += exact_product(left[0], low)
    for low in left[1:]:
        product += exact_product(low, right[0])
    return product


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the float32 product of 16-bit matrices, or of those of several experts."""
    multiply_exactly = torch.mm
    if left.dim() == 3:
        multiply_exactly = torch.bmm
    product: Tensor = multiply_exactly(left, right, out_dtype=torch.float32)
    return product


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in the precision of float32, or of float64 if both are float64.

    On tensor cores one of them may be bfloat16.
    """
    if splits(left) or splits(right):
        return multiply_split(parts_of(left), parts_of(right))
    return left @ right


@contextmanager
def full_precision() -> Iterator[None]:
    """Let products of float32 matrices run in float32, whatever the process was told before.

    The environment or a model's own code may have allowed TF32 or bfloat16. Hessians, factors,
    reported errors and corrected weights are not computed with them.
    """
    library: Any = torch.backends.mkldnn
    with _precision(torch.backends.cuda.matmul, "ieee"), _precision(library.matmul, "ieee"):
        yield


@contextmanager
def feedback_precision(tensor: Tensor) -> Iterator[None]:
    """Let products of float32 matrices run in TF32 if `tensor` is on a CUDA device.

    The solver uses this for the products that pass the errors of columns on. TF32 keeps 11 bits of
    each factor, so a passed error changes by less than a thousandth of itself; the column that
    receives it is then rounded to few levels.
    """
    if not tensor.is_cuda:
        yield
        return
    with _precision(torch.backends.cuda.matmul, "tf32"):
        yield


@contextmanager
def bfloat16_factors(tensor: Tensor) -> Iterator[None]:
    """Let products of float32 copies of a bfloat16 `tensor` on the CPU take bfloat16 factors.

    The products are exact: two bfloat16 numbers multiply exactly in float32, in which products are
    summed. Processors with bfloat16 units run faster; on others the setting only selects another
    library, oneDNN. If `tensor` is on a device or has another dtype, nothing is changed.
    """
    library: Any = torch.backends.mkldnn
    if not (tensor.is_cpu and tensor.dtype == torch.bfloat16):
        yield
        return
    with _precision(library.matmul, "bf16"):
        yield


@contextmanager
def _precision(products: Any, precision: str) -> Iterator[None]:
    """Set the precision of `products`, and restore it at the end.

    The setting belongs to the whole process: no other thread may multiply meanwhile.
    """
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


def by_expert(matrix: Tensor, n_experts: int) -> Tensor:
    """Return [E, k, O] as a view of a matrix [k, E O] with the columns of one expert together."""
    parts: Tensor = matrix.unflatten(1, (n_experts, -1))
    return parts.transpose(0, 1)


def multiply_by_expert(factors: Tensor, matrix: Tensor) -> Tensor:
    """Return [m, E O], the products of factors [E, m, k] and the parts of a matrix [k, E O]."""
    if len(factors) == 1:
        return factors[0] @ matrix
    product = matrix.new_empty(factors.shape[1], matrix.shape[1])
    parts = by_expert(matrix, len(factors))
    by_expert(product, len(factors)).baddbmm_(factors, parts, beta=0)
    return product


def reordered(matrix: Tensor, orders: Tensor) -> Tensor:
    """Return a matrix [k, E O] with the rows of each expert's part in its order of `orders` [E, k].

    The result is contiguous.
    """
    if len(orders) == 1:
        return matrix.index_select(0, orders[0])
    parts: Tensor = matrix.unflatten(1, (len(orders), -1))
    index = orders.T.unsqueeze(-1).expand(parts.shape)
    return parts.gather(0, index).flatten(1)


def permuted(matrices: Tensor, orders: Tensor) -> Tensor:
    """Return [E, n, n] matrices with their rows and columns in the `orders` [E, n]."""
    if len(matrices) == 1:
        return matrices[0][orders[0][:, None], orders[0]][None]
    experts = torch.arange(len(matrices), device=matrices.device)[:, None, None]
    return matrices[experts, orders[:, :, None], orders[:, None, :]]


def row_chunks(tensor: Tensor, times: int = 1) -> Iterator[slice]:
    """Yield consecutive slices of the rows of `tensor`, of ELEMENTS_PER_CHUNK elements at most.

    Slices may be `times` as large. A slice has one row at least.
    """
    elements = max(1, tensor.numel() // max(1, len(tensor)))
    rows = max(1, times * ELEMENTS_PER_CHUNK[tensor.device.type] // elements)
    for start in range(0, len(tensor), rows):
        yield slice(start, min(start + rows, len(tensor)))
