"""Where tensor cores may round: products that pass the errors of columns on, on CUDA, and nothing else.

TF32 keeps 11 bits of each factor. What reaches a column that way changes by less than a thousandth of itself, and is
then rounded to 16 levels or fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def feedback_precision(tensor: Tensor) -> Iterator[None]:
    """Let products of float32 matrices on a CUDA device run in TF32 while the context lasts.

    The setting belongs to the whole process: nothing else may multiply meanwhile.
    """
    if not tensor.is_cuda:
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
