"""Safetensors headers as data, checked before anything trusts them, and the tensors behind them as
numpy arrays. Needs no torch.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data, whose numbers are little-endian. Source: the format section of the safetensors
README.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptq_cli.errors import InputError
from gptq_cli.files import file_errors
from gptq_cli.storage.manifest import CHUNK_BYTES, in_threads

LFS_POINTER = b"version "
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_SIZE = 2**63 - 1  # of one dimension
MAX_DIMENSIONS = 64

BITS_OF_DTYPE = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

Array = NDArray[Any]
DAMAGED = "compare the file's hash with the original's: download it again if they differ, or use another revision"
FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# Bits of infinity without sign, as an unsigned number: whatever is as large or larger is no finite number.
INFINITY = {
    "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52),
    "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F),  # which has no infinity, but NaN there
}  # fmt: skip
INTEGERS = {"I32": "<i4", "I64": "<i8", "U32": "<u4", "U8": "u1", "I8": "i1", "I16": "<i2"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor on disk: `start` and `end` are byte offsets in `file`, `nbytes` what dtype and shape take."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return BITS_OF_DTYPE[self.dtype] * math.prod(self.shape) // 8


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name; InputError E_CKPT_CORRUPT if it is torn or lies about itself."""
    raw, size = _read_raw(file)
    try:
        entries = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"unreadable header: {error}") from None
    if not isinstance(entries, dict):
        raise _corrupt(file, "the header is not an object")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the safetensors library takes null, too
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise _corrupt(file, "its metadata is not a mapping of texts")
    tensors = {
        name: tensor_info(file, name, entry, 8 + len(raw)) for name, entry in entries.items()
    }
    _check_cover(file, tensors, 8 + len(raw), size)
    return tensors


def _read_raw(file: Path) -> tuple[bytes, int]:
    """The JSON of the header, and the size of the file."""
    with file_errors(file, writing=False):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _corrupt(file, "not a regular file")
        with file.open("rb") as stream:
            first = stream.read(8)
            if first == LFS_POINTER:
                message = f"`{file}` is a pointer of Git LFS, not the weights"
                raise InputError("E_CKPT_CORRUPT", message, hint="fetch them: git lfs pull")
            length = int.from_bytes(first, "little")
            if status.st_size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, status.st_size - 8):
                raise _corrupt(
                    file, f"a header of {length} bytes in a file of {status.st_size} bytes"
                )
            raw = stream.read(length)
    if len(raw) < length:
        raise _corrupt(file, f"a header of {length} bytes, {len(raw)} are there")
    return raw, status.st_size


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; ValueError if a key comes twice, where readers would take one of the two."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name!r}")
        found[name] = value
    return found


def tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of a header whose file has its data from byte `data_start` on; InputError E_CKPT_CORRUPT."""
    try:
        name.encode()
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits_per_element = BITS_OF_DTYPE[dtype]
    except (KeyError, TypeError, ValueError):
        raise _corrupt(file, f"tensor {name!r} has a malformed entry") from None
    if len(shape) > MAX_DIMENSIONS or not all(map(_is_size, (*shape, start, end))):
        raise _corrupt(file, f"tensor {name!r} has sizes or offsets that are no numbers of bytes")
    if (end - start) * 8 != bits_per_element * math.prod(shape):
        raise _corrupt(
            file, f"tensor {name!r}: {dtype} {list(shape)} does not fit bytes {start} to {end}"
        )
    return TensorInfo(name, dtype, shape, file, data_start + start, data_start + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _check_cover(file: Path, tensors: dict[str, TensorInfo], position: int, size: int) -> None:
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            raise _corrupt(
                file, f"tensor {tensor.name!r} starts at byte {tensor.start}, expected {position}"
            )
        position = tensor.end
    if position != size:
        raise _corrupt(file, f"expected {position} bytes, found {size}")


def _corrupt(file: Path, what: str) -> InputError:
    return InputError(
        "E_CKPT_CORRUPT",
        f"`{file}` is not a complete safetensors file: {what}",
        hint="download or copy the file again",
    )


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
    bytes_of_rows = (
        np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(words.shape[0], -1)
    )
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


def scan_weights(tensors: Iterable[TensorInfo], *, hashed: bool = True) -> dict[Path, str]:
    """The hash of each file of `tensors`, which are all that it holds; with `hashed` false none.

    InputError E_CKPT_NONFINITE names a tensor of floats that holds NaN or infinity.
    """
    files: dict[Path, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        files[tensor.file].append(tensor)

    def scan(content: list[TensorInfo], given_up: Event) -> str:
        return _scan(sorted(content, key=lambda tensor: tensor.start), given_up, hashed=hashed)

    found = dict(zip(files, in_threads(scan, files.values()), strict=True))
    return found if hashed else {}


def _scan(tensors: list[TensorInfo], given_up: Event, *, hashed: bool) -> str:
    """The hash of the file that consists of a header and `tensors`."""
    digest = sha256()
    with tensors[0].file.open("rb", buffering=0) as stream:
        if hashed:
            digest.update(os.pread(stream.fileno(), tensors[0].start, 0))
        for tensor in tensors:
            for chunk in _chunks(stream.fileno(), tensor):
                if (
                    given_up.is_set()
                ):  # whoever asked has been interrupted, and waits for this thread
                    return ""
                if hashed:
                    digest.update(chunk)
                if not is_finite(chunk, tensor.dtype):
                    raise not_finite(tensor)
    return digest.hexdigest()


def _chunks(descriptor: int, tensor: TensorInfo) -> Iterator[bytes]:
    for start in range(tensor.start, tensor.end, CHUNK_BYTES):
        yield os.pread(descriptor, min(CHUNK_BYTES, tensor.end - start), start)
