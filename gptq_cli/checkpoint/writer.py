"""Writer of the output checkpoint: packed tensors when they are solved, all others unchanged."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptq_cli.checkpoint.headers import TensorInfo, is_finite, not_finite
from gptq_cli.checkpoint.layout import Layout
from gptq_cli.checkpoint.quantization_config import with_quantization
from gptq_cli.checkpoint.reader import SAFETENSORS_DTYPE, tensor_bytes
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import GateError, size
from gptq_cli.events import PhaseStarted, Report, ignore
from gptq_cli.files import ByteCount, file_errors, source_changed
from gptq_cli.storage.durable import (
    COPY_BYTES,
    OpenFile,
    make_directory,
    sweep,
    sync_directory,
    write_file,
    write_json,
)
from gptq_cli.storage.manifest import INDEX_NAME, QUANTIZE_CONFIG, RUN_FILES, Span, span_hashes

if TYPE_CHECKING:
    from gptq_cli.checkpoint.device_copies import DeviceCopies

MOST_WAITING = 4  # tensors that may wait for the disk: those of one linear


class CheckpointWriter:
    """Writes shards of a planned layout into `directory`.

    Each tensor must be written, or marked as written, before `finish`. A thread takes tensors from
    their device, hashes and writes them one after the other, while the caller continues. A later
    `write`, or `sync`, raises the errors of that thread. A tensor that is written again replaces
    the first one. Shards that an earlier run began are completed in place; all other files in the
    directory are removed.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory, self._layout = directory, layout
        self._positions: dict[str, tuple[OpenFile, int]] = {}
        self._files: list[OpenFile] = []
        self._dirty: set[OpenFile] = set()
        self._hashes: dict[str, str] = {}
        self._new: dict[str, str] = {}  # the hashes since the last `sync`
        self._thread = ThreadPoolExecutor(1, "writer")
        self._waiting: deque[Future[None]] = deque()
        self._from_device: DeviceCopies | None = None  # made for the first tensor of a device
        make_directory(directory)
        sweep(directory, [shard.file for shard in layout.shards])

    def __enter__(self) -> CheckpointWriter:
        try:
            for shard in self._layout.shards:
                file = OpenFile(self._directory / shard.file, shard.size)
                self._files.append(file)
                self._write_at(file, 0, shard.header)
                for name, offset in shard.offsets.items():
                    self._positions[name] = (file, offset)
            sync_directory(self._directory)
            sync_directory(self._directory.parent)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor for its planned position; it must not change any more.

        ValueError if its dtype or shape differs from the plan.
        """
        spec = self._layout.specs[name]
        if (SAFETENSORS_DTYPE[tensor.dtype], tuple(tensor.shape)) != (spec.dtype, spec.shape):
            planned, got = f"{spec.dtype} {spec.shape}", f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: planned {planned}, got {got}")
        self._wait_until(MOST_WAITING - 1)
        write = self._write
        if tensor.is_cuda:
            write = partial(self._write_from_device, finished=self._copies(tensor).finished(tensor))
        self._waiting.append(self._thread.submit(write, name, tensor))

    def copy(self, tensor: TensorInfo, count: ByteCount) -> None:
        """Copy the bytes of one source tensor, a few MB at a time, and tell them to `count`.

        InputError E_CKPT_NONFINITE if it holds NaN or infinity.
        """
        file, offset = self._positions[tensor.name]
        digest = sha256()
        with file_errors(tensor.file, writing=False), tensor.file.open("rb", buffering=0) as source:
            for start in range(tensor.start, tensor.end, COPY_BYTES):
                chunk = os.pread(source.fileno(), min(COPY_BYTES, tensor.end - start), start)
                if not is_finite(chunk, tensor.dtype):
                    raise not_finite(tensor)
                self._write_at(file, offset + start - tensor.start, chunk)
                digest.update(chunk)
                count.passed(len(chunk))
        self._hashes[tensor.name] = self._new[tensor.name] = digest.hexdigest()

    def is_written(self, name: str) -> bool:
        """Return whether a tensor was written, or marked as written, and no error followed."""
        return name in self._hashes

    def sync(self) -> dict[str, str]:
        """Make all written tensors durable; return the hashes of those since the last call."""
        self._wait_until(0)
        for file in list(self._dirty):
            file.sync()
        self._dirty.clear()
        new, self._new = self._new, {}
        return new

    def nbytes(self, names: Iterable[str]) -> int:
        """Return the planned size of the tensors of these names; those of no place have none."""
        return sum(self._span(name).size for name in names if name in self._positions)

    def holds(self, hashes: Mapping[str, str], count: ByteCount | None = None) -> bool:
        """Return whether tensors of an earlier run are stored where they are planned now.

        `hashes` are the SHA-256 of their bytes by name; `count` gets the bytes read.
        """
        if not hashes.keys() <= self._positions.keys():
            return False
        for found, expected in zip(
            span_hashes(map(self._span, hashes), count), hashes.values(), strict=True
        ):
            if found != expected:
                return False
        return True

    def mark_written(self, hashes: Mapping[str, str]) -> None:
        """Count tensors of an earlier run as written."""
        self._hashes |= hashes

    def finish(self, report: Report = ignore) -> None:
        """Make all shards and the index durable, and read them back.

        ValueError if a planned tensor was never written, GateError E_VERIFY if a tensor reads back
        with other bytes.
        """
        self._wait_until(0)
        missing = self._positions.keys() - self._hashes.keys()
        if missing:
            raise ValueError(f"never written: {', '.join(sorted(missing)[:5])}")
        self.sync()
        self.close()
        if self._layout.index is not None:
            write_file(self._directory / INDEX_NAME, self._layout.index.encode())
        report(PhaseStarted("verify", f"reading back {size(self._layout.nbytes)}"))
        self._read_back(ByteCount(report, self.nbytes(self._positions)))

    def close(self) -> None:
        """Close the files. Only `sync` makes their content durable."""
        self._thread.shutdown(cancel_futures=True)
        while self._files:
            self._files.pop().close()

    def _wait_until(self, most: int) -> None:
        """Wait until `most` tensors at most are waiting; after an error none is."""
        try:
            while len(self._waiting) > most:
                self._waiting.popleft().result()
        except BaseException:
            while self._waiting:
                self._waiting.popleft().cancel()
            raise

    def _copies(self, tensor: Tensor) -> DeviceCopies:
        """Return what copies tensors of this device."""
        if self._from_device is None:
            from gptq_cli.checkpoint.device_copies import DeviceCopies

            self._from_device = DeviceCopies(tensor.device)
        return self._from_device

    def _write_from_device(self, name: str, tensor: Tensor, finished: torch.cuda.Event) -> None:
        self._write(name, self._copies(tensor).to_host(tensor, finished))

    @torch.inference_mode()
    def _write(self, name: str, tensor: Tensor) -> None:
        file, offset = self._positions[name]
        data = tensor_bytes(tensor)
        self._write_at(file, offset, data)
        self._hashes[name] = self._new[name] = sha256(data).hexdigest()

    def _write_at(self, file: OpenFile, offset: int, data: bytes | memoryview) -> None:
        self._dirty.add(file)
        file.write_at(offset, data)

    def _span(self, name: str) -> Span:
        file, offset = self._positions[name]
        return Span(file.path, offset, self._layout.specs[name].nbytes)

    def _read_back(self, count: ByteCount) -> None:
        for shard in self._layout.shards:
            _forget_cached(self._directory / shard.file)
        for name, found in zip(
            self._positions, span_hashes(map(self._span, self._positions), count), strict=True
        ):
            if found != self._hashes[name]:
                file = self._span(name).path.name
                message = f"`{name}` in {file} reads back with other bytes than were written"
                hint = "the disk or its driver is at fault: write to another one"
                raise GateError("E_VERIFY", message, hint=hint)


def write_side_files(
    source: Checkpoint,
    directory: Path,
    described: dict[str, Any],
    quantize_config: dict[str, Any] | None,
    *,
    untie: bool,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and quantize_config.json, and copy every other file of the source.

    Files of an earlier run of this tool are not copied. config.json is the source's JSON plus the
    entries of `described`, because a library that writes it again would rename keys that older
    readers need. Formats other than GPTQ have no `quantize_config`. `hashes` and errors are those
    of `copy_side_files`.
    """
    copy_side_files(source, directory, without=RUN_FILES, hashes=hashes)
    config = with_quantization(source.config, described)
    if untie:
        config["tie_word_embeddings"] = False
    write_json(directory / "config.json", config)
    if quantize_config is not None:
        write_json(directory / QUANTIZE_CONFIG, quantize_config)


def copy_side_files(
    source: Checkpoint,
    directory: Path,
    *,
    without: Collection[str],
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Copy the files of the source beside its weights and settings, except those of these names.

    InputError E_SOURCE_CHANGED if `hashes` has a SHA-256 of a file and its bytes differ from it.
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
    """Make the next read come from the disk, if the system supports that."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
