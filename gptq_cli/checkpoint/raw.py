"""Tensors as numpy arrays, straight from the bytes of a file; needs no torch. Numbers are little-endian on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.errors import InputError

Array = NDArray[Any]
CHUNK_BYTES = 2**24
FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
INTEGERS = {"I32": "<i4", "I64": "<i8", "U32": "<u4", "U8": "u1", "I8": "i1", "I16": "<i2"}


def read_array(tensor: TensorInfo) -> Array:
    """The whole tensor; bfloat16 as float32. InputError E_CKPT_CORRUPT if the file is shorter than its header says."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return _array(tensor, stream.read(tensor.nbytes)).reshape(tensor.shape)


def read_chunks(tensor: TensorInfo) -> Iterator[Array]:
    """The tensor's numbers in order, 1-D, CHUNK_BYTES at a time."""
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        for start in range(tensor.start, tensor.end, CHUNK_BYTES):
            yield _array(tensor, stream.read(min(CHUNK_BYTES, tensor.end - start)))


def unpack_words(words: Array, bits: int) -> Array:
    """The unsigned fields [R, C * 32 / bits] of `bits` bits in 32-bit `words` [R, C], one stream of bits a row."""
    bytes_of_rows = np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(words.shape[0], -1)
    stream = np.unpackbits(bytes_of_rows, axis=1, bitorder="little")
    fields = stream.reshape(words.shape[0], -1, bits)
    return np.packbits(fields, axis=2, bitorder="little")[:, :, 0]


def _array(tensor: TensorInfo, data: bytes) -> Array:
    dtype = np.dtype((FLOATS | INTEGERS)[tensor.dtype])
    if not data or len(data) % dtype.itemsize:
        raise InputError("E_CKPT_CORRUPT", f"`{tensor.file}` ends inside `{tensor.name}`")
    array = np.frombuffer(data, dtype)
    return (array.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else array
