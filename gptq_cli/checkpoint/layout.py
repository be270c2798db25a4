"""The place of every byte of the output, decided before the first weight is read. Needs no torch.

Shard headers are written first. Tensors may then arrive in any order and go straight to their
place.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from gptq_cli.checkpoint.headers import DTYPES

SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].bits * math.prod(self.shape) // 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its complete header, and the offset of each tensor from the file's start.

    The header includes the 8 bytes of its length.
    """

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All shards of a checkpoint and the index that names them (None for a single file)."""

    shards: tuple[Shard, ...]
    specs: dict[str, TensorSpec]
    index: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of the shard files, headers included."""
        return sum(shard.size for shard in self.shards)


def plan_layout(units: list[tuple[TensorSpec, ...]], max_shard_bytes: int) -> Layout:
    """Return files of at most `max_shard_bytes` that hold all tensors of `units`.

    A unit, such as the tensors of one linear, is never split. If it is larger than the limit, it
    gets a file of its own. File names follow the Hugging Face convention.
    """
    files = _fill_files(units, max_shard_bytes)
    if len(files) == 1:
        names, index = [SINGLE_FILE], None
    else:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        index = _index(names, files)
    specs = {}
    for unit in units:
        for spec in unit:
            specs[spec.name] = spec
    return Layout(tuple(map(_shard, names, files)), specs, index)


def _fill_files(
    units: list[tuple[TensorSpec, ...]], max_shard_bytes: int
) -> list[list[TensorSpec]]:
    """Return the tensors of each file."""
    files: list[list[TensorSpec]] = [[]]
    filled = 0
    for unit in units:
        size = sum(spec.nbytes for spec in unit)
        if files[-1] and filled + size > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].extend(unit)
        filled += size
    return files


def _shard(file: str, specs: list[TensorSpec]) -> Shard:
    # Wide types come first, as in the safetensors library, so that every tensor is aligned to its
    # own size.
    ordered = sorted(specs, key=lambda spec: (-DTYPES[spec.dtype].bits, spec.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for spec in ordered:
        relative[spec.name] = position
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + offset for name, offset in relative.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, offsets, start + position)


def _index(names: list[str], files: list[list[TensorSpec]]) -> str:
    weight_map = {}
    total = 0
    for name, specs in zip(names, files, strict=True):
        for spec in specs:
            weight_map[spec.name] = name
            total += spec.nbytes
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
