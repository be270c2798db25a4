"""Weights read once, from the first byte to the last: their SHA-256, and whether all numbers are finite."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from threading import Event

from gptq_cli.checkpoint.headers import TensorInfo, is_finite, not_finite
from gptq_cli.storage.manifest import CHUNK_BYTES, in_threads


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
