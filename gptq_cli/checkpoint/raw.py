"""Tensors as numpy arrays, straight from the bytes of a file; needs no torch. Numbers are little-endian on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.errors import InputError
from gptq_cli.files import file_errors

Array = NDArray[Any]
CHUNK_BYTES = 2**24
DAMAGED = "compare the file's hash with the original's: download it again if they differ, or use another revision"
FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# Bits of infinity without sign, as an unsigned number: whatever is as large or larger is no finite number.
INFINITY = {
    "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52),
    "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F),  # which has no infinity, but NaN there
}  # fmt: skip
INTEGERS = {"I32": "<i4", "I64": "<i8", "U32": "<u4", "U8": "u1", "I8": "i1", "I16": "<i2"}


def read_array(tensor: TensorInfo) -> Array:
    """The whole tensor; bfloat16 as float32. InputError E_CKPT_CORRUPT if the file is shorter than its header says."""
    with file_errors(tensor.file, writing=False), tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return _array(tensor, stream.read(tensor.nbytes)).reshape(tensor.shape)


def read_chunks(tensor: TensorInfo, dtype: str) -> Iterator[Array]:
    """The tensor's bytes in order as numbers of numpy's `dtype`, 1-D, CHUNK_BYTES at a time."""
    with file_errors(tensor.file, writing=False), tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        for start in range(tensor.start, tensor.end, CHUNK_BYTES):
            yield _numbers(tensor, stream.read(min(CHUNK_BYTES, tensor.end - start)), dtype)


def count_not_finite(tensor: TensorInfo) -> int:
    """How many numbers of a tensor of floats are NaN or infinite; 0 for other types. One chunk is in memory."""
    if tensor.dtype not in INFINITY:
        return 0
    dtype, infinity = INFINITY[tensor.dtype]
    count = 0
    for bits in read_chunks(tensor, dtype):
        magnitude = bits & (np.iinfo(bits.dtype).max >> 1)
        if magnitude.max() >= infinity:
            count += int((magnitude >= infinity).sum())
    return count


def is_finite(data: bytes, dtype: str) -> bool:
    """Whether none of the numbers of a `dtype` is NaN or infinite; true for what are no floats.

    Positive ones that are not finite would be the largest of all as signed integers, negative ones as unsigned.
    """
    if dtype not in INFINITY:
        return True
    unsigned, infinity = INFINITY[dtype]
    bits = np.frombuffer(data, unsigned, len(data) // np.dtype(unsigned).itemsize)
    if not bits.size:
        return True
    negative = infinity | 1 << 8 * bits.itemsize - 1
    return bool(bits.max() < negative and bits.view(unsigned.replace("u", "i")).max() < infinity)


def not_finite(tensor: TensorInfo) -> InputError:
    """InputError E_CKPT_NONFINITE for a tensor that holds numbers that are not finite."""
    message = f"`{tensor.name}` in {tensor.file.name} holds NaN or infinity, {count_not_finite(tensor)} times"
    return InputError("E_CKPT_NONFINITE", message, hint=DAMAGED)


def unpack_words(words: Array, bits: int) -> Array:
    """The unsigned fields [R, C * 32 / bits] of `bits` bits in 32-bit `words` [R, C], one stream of bits a row."""
    bytes_of_rows = np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(words.shape[0], -1)
    stream = np.unpackbits(bytes_of_rows, axis=1, bitorder="little")
    fields = stream.reshape(words.shape[0], -1, bits)
    return np.packbits(fields, axis=2, bitorder="little")[:, :, 0]


def _array(tensor: TensorInfo, data: bytes) -> Array:
    array = _numbers(tensor, data, (FLOATS | INTEGERS)[tensor.dtype])
    return (array.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else array


def _numbers(tensor: TensorInfo, data: bytes, dtype: str) -> Array:
    if not data or len(data) % np.dtype(dtype).itemsize:
        raise InputError("E_CKPT_CORRUPT", f"`{tensor.file}` ends inside `{tensor.name}`")
    return np.frombuffer(data, dtype)
