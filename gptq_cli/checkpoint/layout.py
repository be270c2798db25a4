"""Where every byte of the output goes, decided before the first weight is read. Needs no torch.

Shard headers are written first; tensors may then arrive in any order and go straight to their place.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from gptq_cli.checkpoint.headers import BITS_OF_DTYPE


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return BITS_OF_DTYPE[self.dtype] * math.prod(self.shape) // 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its complete header (length prefix included) and the absolute offset of each tensor."""

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


def packed_specs(
    weight: str, out_features: int, in_features: int, groups: int, bits: int
) -> tuple[TensorSpec, ...]:
    """The four tensors that replace `weight` (a name ending in ".weight"); shapes as in AutoGPTQ's QuantLinear."""
    module = weight.removesuffix(".weight")
    return (
        TensorSpec(f"{module}.qweight", "I32", (in_features * bits // 32, out_features)),
        TensorSpec(f"{module}.qzeros", "I32", (groups, out_features * bits // 32)),
        TensorSpec(f"{module}.scales", "F16", (groups, out_features)),
        TensorSpec(f"{module}.g_idx", "I32", (in_features,)),
    )


def plan_layout(units: list[tuple[TensorSpec, ...]], max_shard_bytes: int) -> Layout:
    """Tensors laid out in files of at most `max_shard_bytes`, never splitting a unit (the tensors of one linear).

    A unit larger than the limit gets a file of its own. File names follow the Hugging Face convention.
    """
    bins: list[list[TensorSpec]] = [[]]
    filled = 0
    for unit in units:
        size = sum(spec.nbytes for spec in unit)
        if bins[-1] and filled + size > max_shard_bytes:
            bins.append([])
            filled = 0
        bins[-1].extend(unit)
        filled += size
    single = len(bins) == 1
    names = (
        ["model.safetensors"]
        if single
        else [f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors" for i in range(len(bins))]
    )
    specs = {spec.name: spec for unit in units for spec in unit}
    return Layout(
        shards=tuple(_shard(name, content) for name, content in zip(names, bins, strict=True)),
        specs=specs,
        index=None if single else _index(names, bins),
    )


def _shard(file: str, specs: list[TensorSpec]) -> Shard:
    # Wide types first, as the safetensors library does, so that every tensor is aligned to its own size.
    ordered = sorted(specs, key=lambda spec: (-BITS_OF_DTYPE[spec.dtype], spec.name))
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


def _index(names: list[str], bins: list[list[TensorSpec]]) -> str:
    weight_map = {
        spec.name: file for file, specs in zip(names, bins, strict=True) for spec in specs
    }
    total = sum(spec.nbytes for specs in bins for spec in specs)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
