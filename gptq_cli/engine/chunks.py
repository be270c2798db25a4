"""Rows of a matrix a chunk at a time, where what is computed on the way takes several times as much memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

ELEMENTS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}


def row_chunks(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of `tensor`, one after the other, of so many elements each; at least a row."""
    elements = max(1, tensor.numel() // max(1, len(tensor)))
    rows = max(1, ELEMENTS_PER_CHUNK[tensor.device.type] // elements)
    for start in range(0, len(tensor), rows):
        yield slice(start, min(start + rows, len(tensor)))
