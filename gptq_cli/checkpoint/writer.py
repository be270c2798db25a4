"""The output checkpoint: packed tensors as they are solved, everything else byte for byte as it was."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_cli.checkpoint.headers import TensorInfo, is_finite, not_finite
from gptq_cli.checkpoint.layout import Layout
from gptq_cli.checkpoint.quantization_config import with_quantization
from gptq_cli.checkpoint.reader import SAFETENSORS_DTYPE, tensor_bytes
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import GateError
from gptq_cli.files import file_errors
from gptq_cli.storage.durable import (
    COPY_BYTES,
    OpenFile,
    make_directory,
    sweep,
    sync_directory,
    write_file,
    write_json,
)
from gptq_cli.storage.file_identity import source_changed
from gptq_cli.storage.manifest import INDEX_NAME, QUANTIZE_CONFIG, RUN_FILES, Span, span_hashes

MOST_WAITING = 4  # tensors that may wait for the disk: what stands for one linear


class CheckpointWriter:
    """Shards of a planned layout in `directory`; each tensor must be written or known before `finish`.

    A thread takes tensors from their device, hashes and writes them, one after the other, while the caller goes on;
    what goes wrong there is raised by a later `write`, or by `sync`. What is written again takes the place of what was.
    Whatever else is in the directory is removed; shards that an earlier run began are gone on with, in place.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory, self._layout = directory, layout
        self._place: dict[str, tuple[OpenFile, int]] = {}
        self._files: list[OpenFile] = []
        self._dirty: set[OpenFile] = set()
        self._hashes: dict[str, str] = {}
        self._new: dict[str, str] = {}  # of these, what came since the last `sync`
        self._hand = ThreadPoolExecutor(1, "writer")
        self._waiting: deque[Future[None]] = deque()
        make_directory(directory)
        sweep(directory, [shard.file for shard in layout.shards])

    def __enter__(self) -> CheckpointWriter:
        try:
            for shard in self._layout.shards:
                file = OpenFile(self._directory / shard.file, shard.size)
                self._files.append(file)
                self._write_at(file, 0, shard.header)
                self._place |= {name: (file, offset) for name, offset in shard.offsets.items()}
            sync_directory(self._directory)
            sync_directory(self._directory.parent)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Have one tensor written at its planned place; it must not change any more.

        ValueError if it is not the tensor that was planned.
        """
        spec = self._layout.specs[name]
        if (SAFETENSORS_DTYPE[tensor.dtype], tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(
                f"{name}: planned {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        self._wait_until(MOST_WAITING - 1)
        self._waiting.append(self._hand.submit(self._write, name, tensor))

    def copy(self, tensor: TensorInfo) -> None:
        """The bytes of one source tensor, unchanged, a few MB at a time; InputError E_CKPT_NONFINITE as of a scan."""
        file, offset = self._place[tensor.name]
        digest = sha256()
        with file_errors(tensor.file, writing=False), tensor.file.open("rb", buffering=0) as source:
            for start in range(tensor.start, tensor.end, COPY_BYTES):
                chunk = os.pread(source.fileno(), min(COPY_BYTES, tensor.end - start), start)
                if not is_finite(chunk, tensor.dtype):
                    raise not_finite(tensor)
                self._write_at(file, offset + start - tensor.start, chunk)
                digest.update(chunk)
        self._hashes[tensor.name] = digest.hexdigest()

    def sync(self) -> dict[str, str]:
        """What was written so far survives; the hashes of the tensors that were since the last time."""
        self._wait_until(0)
        for file in list(self._dirty):
            file.sync()
        self._dirty.clear()
        new, self._new = self._new, {}
        return new

    def holds(self, hashes: Mapping[str, str]) -> bool:
        """Whether the tensors that an earlier run wrote are there, planned as then and with these hashes."""
        if not hashes.keys() <= self._place.keys():
            return False
        stored = span_hashes(map(self._span, hashes))
        return all(
            found == expected for found, expected in zip(stored, hashes.values(), strict=True)
        )

    def mark_written(self, hashes: Mapping[str, str]) -> None:
        """Take tensors that an earlier run wrote for written."""
        self._hashes |= hashes

    def finish(self) -> None:
        """All shards and the index durable, and read back; ValueError if a planned tensor never came.

        GateError E_VERIFY for a tensor whose bytes are not those that were written.
        """
        self._wait_until(0)
        if missing := self._place.keys() - self._hashes.keys():
            raise ValueError(f"never written: {', '.join(sorted(missing)[:5])}")
        self.sync()
        self.close()
        if self._layout.index is not None:
            write_file(self._directory / INDEX_NAME, self._layout.index.encode())
        self._read_back()

    def close(self) -> None:
        """Give the files back; promises nothing that `sync` has not."""
        self._hand.shutdown(cancel_futures=True)
        while self._files:
            self._files.pop().close()

    def _wait_until(self, most: int) -> None:
        """Wait until `most` tensors at most are yet to be written; after an error none is."""
        try:
            while len(self._waiting) > most:
                self._waiting.popleft().result()
        except BaseException:
            while self._waiting:
                self._waiting.popleft().cancel()
            raise

    @torch.inference_mode()
    def _write(self, name: str, tensor: Tensor) -> None:
        file, offset = self._place[name]
        data = tensor_bytes(tensor)
        self._write_at(file, offset, data)
        self._hashes[name] = self._new[name] = sha256(data).hexdigest()

    def _write_at(self, file: OpenFile, offset: int, data: bytes | memoryview) -> None:
        self._dirty.add(file)
        file.write_at(offset, data)

    def _span(self, name: str) -> Span:
        file, offset = self._place[name]
        return Span(file.path, offset, self._layout.specs[name].nbytes)

    def _read_back(self) -> None:
        for shard in self._layout.shards:
            _forget_cached(self._directory / shard.file)
        for name, found in zip(self._place, span_hashes(map(self._span, self._place)), strict=True):
            if found != self._hashes[name]:
                file = self._span(name).path.name
                raise GateError(
                    "E_VERIFY", f"`{name}` in {file} reads back with other bytes than were written",
                    hint="the disk or its driver is at fault: write to another one",
                )  # fmt: skip


def write_side_files(
    source: Checkpoint,
    directory: Path,
    quantization: dict[str, Any],
    meta: dict[str, Any],
    *,
    untie: bool,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """config.json, quantize_config.json and every other file of the source, the latter byte for byte.

    Files that an earlier run of this tool has left about itself are left out.

    config.json is the source's JSON plus `quantization_config`: re-serialising it through a library would rename keys
    that older readers need. `meta` goes into quantize_config.json only, because some readers refuse it in config.json.
    `hashes` and errors as in `copy_side_files`.
    """
    copy_side_files(source, directory, without=RUN_FILES, hashes=hashes)
    config = with_quantization(source.config, quantization)
    if untie:
        config["tie_word_embeddings"] = False
    write_json(directory / "config.json", config)
    write_json(directory / QUANTIZE_CONFIG, quantization | {"meta": meta})


def copy_side_files(
    source: Checkpoint,
    directory: Path,
    *,
    without: Collection[str],
    hashes: Mapping[str, str] | None = None,
) -> None:
    """The files of the source beside its weights and settings, byte for byte, but those of these names.

    InputError E_SOURCE_CHANGED if the bytes of a file are not those of its SHA-256 in `hashes`, as far as it is there.
    """
    for file in source.other_files():
        if str(file) in without:
            continue
        content = (source.directory / file).read_bytes()
        known = (hashes or {}).get(file.as_posix())
        if known is not None and sha256(content).hexdigest() != known:
            raise source_changed(source.directory / file, "holds other bytes")
        write_file(directory / file, content)


def _forget_cached(path: Path) -> None:
    """Let the next read come from the disk, where the system knows how."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
