"""Safetensors headers as data, read without torch and checked before anything trusts them.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

BITS_OF_DTYPE = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor on disk: `start` and `end` are byte offsets in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name; InputError E_CKPT_CORRUPT if it is torn or lies about itself."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _corrupt(file, f"a header of {length} bytes in a file of {size} bytes")
        raw = stream.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except ValueError as error:
        raise _corrupt(file, f"unreadable header: {error}") from None
    if not isinstance(entries, dict):
        raise _corrupt(file, "the header is not an object")
    tensors = {
        name: tensor_info(file, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"
    }
    _check_cover(file, tensors, 8 + length, size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return dict(pairs)


def tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of a header whose file has its data from byte `data_start` on; InputError E_CKPT_CORRUPT."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = BITS_OF_DTYPE[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError):
        raise _corrupt(file, f"tensor {name!r} has a malformed entry") from None
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, start, end)) or (end - start) * 8 != bits:
        raise _corrupt(file, f"tensor {name!r}: {dtype} {list(shape)} does not fit bytes {start} to {end}")
    return TensorInfo(name, dtype, shape, file, data_start + start, data_start + end)


def _check_cover(file: Path, tensors: dict[str, TensorInfo], position: int, size: int) -> None:
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            raise _corrupt(file, f"tensor {tensor.name!r} starts at byte {tensor.start}, expected {position}")
        position = tensor.end
    if position != size:
        raise _corrupt(file, f"expected {position} bytes, found {size}")


def _corrupt(file: Path, what: str) -> InputError:
    return InputError(
        "E_CKPT_CORRUPT", f"`{file}` is not a complete safetensors file: {what}", hint="download or copy the file again"
    )
