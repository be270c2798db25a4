"""Safetensors headers as data, checked before anything trusts them, and the numbers behind them.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data, whose numbers are little-endian. Source: the format section of the safetensors
README. Needs no torch. The functions that read numbers import numpy themselves, because commands
that read headers only, such as `gptq plan`, start faster without it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gptq_cli.errors import InputError, Problem
from gptq_cli.files import ByteCount, file_errors
from gptq_cli.storage.manifest import CHUNK_BYTES, TICK, in_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]

LFS_POINTER = b"version "
NAN_POWER = 0xFF
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_SIZE = 2**63 - 1  # of one dimension
MAX_DIMENSIONS = 64
DAMAGED = (
    "compare the file's hash with the original's: download it again if they differ, "
    "or use another revision"
)


class StoredDtype(NamedTuple):
    """A dtype of safetensors files.

    `numpy` is the type in which `read_array` reads it, None if it does not. `infinity` are the bits
    of infinity without the sign: a number whose bits are as large or larger is not finite.
    """

    bits: int
    numpy: str | None = None
    infinity: int | None = None


DTYPES = {
    "BOOL": StoredDtype(8),
    "U8": StoredDtype(8, "u1"),
    "I8": StoredDtype(8, "i1"),
    "I16": StoredDtype(16, "<i2"),
    "U16": StoredDtype(16),
    "I32": StoredDtype(32, "<i4"),
    "U32": StoredDtype(32, "<u4"),
    "I64": StoredDtype(64, "<i8"),
    "U64": StoredDtype(64),
    "F4": StoredDtype(4),
    "F8_E8M0": StoredDtype(8),
    "F8_E5M2": StoredDtype(8, None, 0x7C),
    "F8_E4M3": StoredDtype(8, None, 0x7F),  # has no infinity: these are the bits of NaN
    "F16": StoredDtype(16, "<f2", 0x7C00),
    "BF16": StoredDtype(16, "<u2", 0x7F80),  # numpy has no bfloat16
    "F32": StoredDtype(32, "<f4", 0x7F800000),
    "F64": StoredDtype(64, "<f8", 0x7FF << 52),
    "C64": StoredDtype(64),
}
DTYPES_OF_CONFIG = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # in config.json
FEW_BITS = ("F8_", "F4")  # how the names of dtypes of 8 bits or fewer begin


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor on disk; `start` and `end` are byte offsets in `file`.

    With a `stack` it is item `place` of the tensor that has this name in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    stack: str | None = None
    place: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that dtype and shape take."""
        return DTYPES[self.dtype].bits * math.prod(self.shape) // 8


class PlainReader(Protocol):
    """What every reader of a model's plain tensors does, one at a time."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""

    def read(self, name: str) -> Tensor:
        """Return one tensor."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Prepare to read these tensors."""

    def check_unchanged(self) -> None:
        """Raise InputError E_SOURCE_CHANGED if a file changed since the checkpoint was opened."""

    def release(self) -> None:
        """Close the files, and free what was read."""


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file by name.

    InputError E_CKPT_CORRUPT if the file is torn or its header contradicts itself.
    """
    raw, size = _read_raw(file)
    return parse_header(file, raw, size)


def read_headers(
    names: Sequence[str], read: Callable[[str], dict[str, TensorInfo]]
) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each shard; one InputError for all shards that are torn."""
    shards: dict[str, dict[str, TensorInfo]] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            shards[name] = read(name)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError.of(problems)
    return shards


def parse_header(file: Path, raw: bytes, size: int) -> dict[str, TensorInfo]:
    """Return the tensors of a file of `size` bytes, of which `raw` is the JSON of the header.

    Raises the errors of `read_header`.
    """
    try:
        entries = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"unreadable header: {error}") from None
    if not isinstance(entries, dict):
        raise _corrupt(file, "the header is not an object")
    metadata = entries.pop("__metadata__", None)
    # The safetensors library accepts null, too.
    if metadata is not None and not _maps_to_texts(metadata):
        raise _corrupt(file, "its metadata is not a mapping of texts")
    data_start = 8 + len(raw)
    tensors = {}
    for name, entry in entries.items():
        tensors[name] = tensor_info(file, name, entry, data_start)
    _check_cover(file, tensors, data_start, size)
    return tensors


def _read_raw(file: Path) -> tuple[bytes, int]:
    """Return the JSON of the header, and the size of the file in bytes."""
    with file_errors(file, writing=False):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _corrupt(file, "not a regular file")
        size = status.st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            if first == LFS_POINTER:
                message = f"`{file}` is a pointer of Git LFS, not the weights"
                raise InputError("E_CKPT_CORRUPT", message, hint="fetch them: git lfs pull")
            length = header_length(file, first, size)
            raw = stream.read(length)
    if len(raw) < length:
        raise _corrupt(file, f"a header of {length} bytes, but only {len(raw)} can be read")
    return raw, size


def header_length(file: Path, first: bytes, size: int) -> int:
    """Return the length of the header of a file of `size` bytes, given its `first` 8 bytes.

    InputError E_CKPT_CORRUPT if there cannot be such a header.
    """
    length = int.from_bytes(first, "little")
    if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise _corrupt(file, f"a header of {length} bytes in a file of {size} bytes")
    return length


def header_identity(size: int, header: bytes) -> str:
    """Return what a file of a commit is known by: its size, and the hash of its whole header."""
    return f"{size} bytes, header {sha256(header).hexdigest()}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object made of its pairs; ValueError if a key occurs twice.

    Readers differ in which of two values they take.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name!r}")
        found[name] = value
    return found


def _maps_to_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Return one entry of the header of `file`, whose data starts at byte `data_start`.

    InputError E_CKPT_CORRUPT if the entry is malformed, or its shape does not fit its bytes.
    """
    try:
        name.encode()
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits_per_element = DTYPES[dtype].bits
    except (KeyError, TypeError, ValueError):
        raise _corrupt(file, f"tensor {name!r} has a malformed entry") from None
    if len(shape) > MAX_DIMENSIONS or not all(map(_is_size, (*shape, start, end))):
        raise _corrupt(file, f"tensor {name!r} has sizes or offsets that are not valid numbers")
    if (end - start) * 8 != bits_per_element * math.prod(shape):
        claim = f"{dtype} {list(shape)} does not fit bytes {start} to {end}"
        raise _corrupt(file, f"tensor {name!r}: {claim}")
    return TensorInfo(name, dtype, shape, file, data_start + start, data_start + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _check_cover(file: Path, tensors: dict[str, TensorInfo], position: int, size: int) -> None:
    """Check that the tensors cover the file from byte `position` to its end without gaps."""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            claim = f"starts at byte {tensor.start}, expected {position}"
            raise _corrupt(file, f"tensor {tensor.name!r} {claim}")
        position = tensor.end
    if position != size:
        raise _corrupt(file, f"expected {position} bytes, found {size}")


def _corrupt(file: Path, reason: str) -> InputError:
    message = f"`{file}` is not a complete safetensors file: {reason}"
    return InputError("E_CKPT_CORRUPT", message, hint="download or copy the file again")


def read_array(tensor: TensorInfo) -> Array:
    """Return the whole tensor; bfloat16 as float32.

    InputError E_CKPT_CORRUPT if the file is shorter than its header states.
    """
    import numpy as np

    dtype = DTYPES[tensor.dtype].numpy
    assert dtype is not None
    with file_errors(tensor.file, writing=False), tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        array = _numbers(tensor, stream.read(tensor.nbytes), dtype)
    if tensor.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(tensor.shape)


def read_chunks(tensor: TensorInfo, dtype: str) -> Iterator[Array]:
    """Yield the tensor's bytes in order as 1-D arrays of numpy's `dtype`, CHUNK_BYTES at a time."""
    with file_errors(tensor.file, writing=False), tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        for start in range(tensor.start, tensor.end, CHUNK_BYTES):
            yield _numbers(tensor, stream.read(min(CHUNK_BYTES, tensor.end - start)), dtype)


def _numbers(tensor: TensorInfo, data: bytes, dtype: str) -> Array:
    import numpy as np

    if not data or len(data) % np.dtype(dtype).itemsize:
        raise InputError("E_CKPT_CORRUPT", f"`{tensor.file}` ends inside `{tensor.name}`")
    return np.frombuffer(data, dtype)


def is_zero(tensor: TensorInfo) -> bool:
    """Return whether all bytes of the tensor are zero. Holds one chunk in memory."""
    return not any(chunk.any() for chunk in read_chunks(tensor, "u1"))


def count_not_finite(tensor: TensorInfo) -> int:
    """Return how many numbers are NaN or infinite; 0 for types without them.

    Holds one chunk in memory.
    """
    import numpy as np

    bits_per_element, _, infinity = DTYPES[tensor.dtype]
    if infinity is None:
        return 0
    count = 0
    for bits in read_chunks(tensor, f"<u{bits_per_element // 8}"):
        magnitude = bits & (np.iinfo(bits.dtype).max >> 1)
        if magnitude.max() >= infinity:
            count += int((magnitude >= infinity).sum())
    return count


def count_nan_powers(tensor: TensorInfo) -> int:
    """Return how many of the exponents of two in bytes are NaN, whose bits are all ones.

    Holds one chunk in memory.
    """
    return sum(int((chunk == NAN_POWER).sum()) for chunk in read_chunks(tensor, "u1"))


def is_finite(data: bytes, dtype: str) -> bool:
    """Return whether no number of a stored `dtype` in `data` is NaN or infinite.

    This is true for types without such numbers. As signed integers, positive numbers that are not
    finite would be the largest of all; as unsigned integers, negative ones would be.
    """
    import numpy as np

    bits_per_element, _, infinity = DTYPES[dtype]
    if infinity is None:
        return True
    width = bits_per_element // 8
    bits = np.frombuffer(data, f"<u{width}", len(data) // width)
    if not bits.size:
        return True
    negative_infinity = infinity | 1 << bits_per_element - 1
    return bool(bits.max() < negative_infinity and bits.view(f"<i{width}").max() < infinity)


def not_finite(tensor: TensorInfo) -> InputError:
    """Return InputError E_CKPT_NONFINITE for a tensor that holds numbers that are not finite."""
    count = count_not_finite(tensor)
    message = f"`{tensor.name}` in {tensor.file.name} holds NaN or infinity, {count} times"
    return InputError("E_CKPT_NONFINITE", message, hint=DAMAGED)


def unpack_words(words: Array, bits: int) -> Array:
    """Return the fields [R, C * 32 / bits], unsigned integers of `bits` bits, of `words` [R, C].

    Each row of 32-bit words is one stream of bits.
    """
    import numpy as np

    rows = words.shape[0]
    row_bytes = np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(rows, -1)
    stream = np.unpackbits(row_bytes, axis=1, bitorder="little")
    fields = stream.reshape(rows, -1, bits)
    return np.packbits(fields, axis=2, bitorder="little")[:, :, 0]


class WeightScan:
    """What `scan_weights` does with all files of weights, in a thread that begins at once."""

    def __init__(self, tensors: Iterable[TensorInfo], *, hashed: bool) -> None:
        self._read, self._given_up = ByteCount(), Event()
        self._thread = ThreadPoolExecutor(1, "scan")
        self._scanned = self._thread.submit(
            scan_weights, tensors, hashed=hashed, count=self._read, given_up=self._given_up
        )

    def __enter__(self) -> WeightScan:
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        self._thread.shutdown()

    def result(self, count: ByteCount) -> dict[Path, str]:
        """Wait for the scan, tell its bytes to `count`, and return or raise as `scan_weights`."""
        told, waits = 0, True
        while waits:
            waits = bool(wait([self._scanned], TICK).not_done)
            read = self._read.done
            count.passed(read - told)
            told = read
        return self._scanned.result()


def scan_weights(
    tensors: Iterable[TensorInfo],
    *,
    hashed: bool = True,
    count: ByteCount | None = None,
    given_up: Event | None = None,
) -> dict[Path, str]:
    """Return the SHA-256 of each file that `tensors` fill; nothing if `hashed` is false.

    `count` gets the bytes read. InputError E_CKPT_NONFINITE names a tensor of floats that holds NaN
    or infinity. The hashes are wrong once `given_up` is set.
    """
    counted = count or ByteCount()
    files: dict[Path, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        files[tensor.file].append(tensor)

    def scan(content: list[TensorInfo], cancelled: Event) -> str:
        in_order = sorted(content, key=lambda tensor: tensor.start)
        return _scan(in_order, cancelled, counted, hashed=hashed)

    hashes = list(in_threads(scan, files.values(), counted, given_up))
    if not hashed:
        return {}
    return dict(zip(files, hashes, strict=True))


def _scan(tensors: list[TensorInfo], cancelled: Event, count: ByteCount, *, hashed: bool) -> str:
    """Return the hash of the file that consists of a header and `tensors`."""
    digest = sha256()
    with tensors[0].file.open("rb", buffering=0) as stream:
        if hashed:
            digest.update(os.pread(stream.fileno(), tensors[0].start, 0))
        for tensor in tensors:
            for chunk in _chunks(stream.fileno(), tensor):
                # If the caller was interrupted, it waits for this thread.
                if cancelled.is_set():
                    return ""
                if hashed:
                    digest.update(chunk)
                count.add(len(chunk))
                if not is_finite(chunk, tensor.dtype):
                    raise not_finite(tensor)
    return digest.hexdigest()


def _chunks(descriptor: int, tensor: TensorInfo) -> Iterator[bytes]:
    for start in range(tensor.start, tensor.end, CHUNK_BYTES):
        yield os.pread(descriptor, min(CHUNK_BYTES, tensor.end - start), start)
