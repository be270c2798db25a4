"""The output checkpoint: packed tensors as they are solved, everything else byte for byte as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gptq_cli.checkpoint.durable import COPY_BYTES, ShardFile, copy_file, write_file
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import Layout
from gptq_cli.checkpoint.reader import SAFETENSORS_DTYPE, tensor_bytes
from gptq_cli.checkpoint.source import INDEX_NAME, Checkpoint


class CheckpointWriter:
    """Shards of a planned layout in `directory`; each tensor must be written exactly once before `finish`."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory, self._layout = directory, layout
        self._place: dict[str, tuple[ShardFile, int]] = {}
        self._files: list[ShardFile] = []
        for shard in layout.shards:
            file = ShardFile(directory / shard.file, shard.size)
            self._files.append(file)
            file.write_at(0, shard.header)
            self._place |= {name: (file, offset) for name, offset in shard.offsets.items()}

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.abandon()
        self._files = []

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor at its planned place; ValueError if it is not the tensor that was planned."""
        spec = self._layout.specs[name]
        if (SAFETENSORS_DTYPE[tensor.dtype], tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name}: planned {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        file, offset = self._place.pop(name)
        file.write_at(offset, tensor_bytes(tensor))

    def copy(self, tensor: TensorInfo) -> None:
        """The bytes of one source tensor, unchanged, a few MB at a time."""
        file, offset = self._place.pop(tensor.name)
        with tensor.file.open("rb", buffering=0) as source:
            for start in range(tensor.start, tensor.end, COPY_BYTES):
                chunk = os.pread(source.fileno(), min(COPY_BYTES, tensor.end - start), start)
                file.write_at(offset + start - tensor.start, chunk)

    def finish(self) -> None:
        """All shards durable and the index written; ValueError if a planned tensor never came."""
        if self._place:
            raise ValueError(f"never written: {', '.join(sorted(self._place)[:5])}")
        while self._files:
            self._files.pop().close()
        if self._layout.index is not None:
            write_file(self._directory / INDEX_NAME, self._layout.index.encode())


def write_side_files(
    source: Checkpoint, directory: Path, quantization: dict[str, Any], meta: dict[str, Any], *, untie: bool
) -> None:
    """config.json, quantize_config.json and every other file of the source, the latter byte for byte.

    config.json is the source's JSON plus `quantization_config`: re-serialising it through a library would rename keys
    that older readers need. `meta` goes into quantize_config.json only, because some readers refuse it in config.json.
    """
    for file in source.other_files():
        copy_file(source.directory / file, directory / file)
    config = dict(source.config) | {"quantization_config": quantization}
    if untie:
        config["tie_word_embeddings"] = False
    write_file(directory / "config.json", _json(config))
    write_file(directory / "quantize_config.json", _json(quantization | {"meta": meta}))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
