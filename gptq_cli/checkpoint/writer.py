"""Writer of the output checkpoint: packed tensors when they are solved, all others unchanged.

Two threads work while blocks are quantized: one writes solved tensors, the other copies those that
are not quantized, reads back what is written, and hashes the files for the manifest.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event
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
from gptq_cli.storage.manifest import (
    INDEX_NAME,
    QUANTIZE_CONFIG,
    RUN_FILES,
    GrowingHash,
    Span,
    span_hash,
    span_hashes,
)

if TYPE_CHECKING:
    from gptq_cli.checkpoint.device_copies import DeviceCopies

MOST_WAITING = 4  # tensors that may wait for the disk: those of one linear
SYNC_BYTES = 256 * 2**20  # of copied tensors that are made durable together


class CheckpointWriter:
    """Writes shards of a planned layout into `directory`.

    Each tensor must be written, or marked as written, before `finish`. A thread takes tensors from
    their device, hashes and writes them one after the other, while the caller continues; a second
    one copies the tensors of `copy_beside` and reads back those of `read_back_beside`. A later
    `write`, `copy` or `sync` raises the errors of both. A tensor that is written again replaces the
    first one. Shards that an earlier run began are completed in place; all other files in the
    directory are removed.

    `file_hashes` has the hash of the first bytes of each shard, as far as they were read back.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory, self._layout = directory, layout
        self._shards = {directory / shard.file: shard for shard in layout.shards}
        self._positions: dict[str, tuple[OpenFile, int]] = {}
        self._files: list[OpenFile] = []
        self._dirty: set[OpenFile] = set()
        self._hashes: dict[str, str] = {}
        self._new: dict[str, str] = {}  # the hashes since the last `sync`
        self._thread = ThreadPoolExecutor(1, "writer")
        self._waiting: deque[Future[None]] = deque()
        self._from_device: DeviceCopies | None = None  # made for the first tensor of a device
        self._beside = ThreadPoolExecutor(1, "beside")
        self._begun: dict[str, Future[int]] = {}  # copies, by tensor
        self._tasks: deque[Future[int]] = deque()  # of the thread `beside`
        self._copied: list[str] = []  # by this thread, which has not read them back yet
        self._written: list[str] = []  # by the thread `writer`, which has not handed them over yet
        self._handed_over: set[str] = set()
        self._read: set[str] = set()
        self._read_bytes = 0
        self.file_hashes: dict[Path, GrowingHash] = {}
        self._given_up = Event()
        make_directory(directory)
        sweep(directory, [shard.file for shard in layout.shards])

    def __enter__(self) -> CheckpointWriter:
        try:
            for path, shard in self._shards.items():
                file = OpenFile(path, shard.size)
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

        If `copy_beside` copies it, wait for that. InputError E_CKPT_NONFINITE if the tensor holds
        NaN or infinity.
        """
        begun = self._begun.pop(tensor.name, None)
        if begun is not None:
            begun.result()
            count.passed(tensor.nbytes)
            return
        self._dirty.add(self._positions[tensor.name][0])
        found = self._copy(tensor, count)
        self._hashes[tensor.name] = self._new[tensor.name] = found

    def copy_beside(self, tensors: Iterable[TensorInfo]) -> None:
        """Begin to copy tensors of the source in a thread, while the caller continues.

        `sync` does not return their hashes: a run that resumes copies them again.
        """
        for tensor in tensors:
            self._begun[tensor.name] = self._begin(self._copy_beside, tensor)
        self._begin(self._read_back_copies)

    def read_back_beside(self) -> None:
        """Begin to read back what was written, in a thread, once it is durable.

        GateError E_VERIFY as `finish` raises it.
        """
        self._waiting.append(self._thread.submit(self._hand_over))

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
        self.sync()
        report(PhaseStarted("verify", f"reading back {size(self._layout.nbytes)}"))
        count = ByteCount(report, self.nbytes(self._positions))
        count.passed(self._read_bytes)
        while self._tasks:
            count.passed(self._tasks.popleft().result())
        missing = self._positions.keys() - self._hashes.keys()
        if missing:
            raise ValueError(f"never written: {', '.join(sorted(missing)[:5])}")
        self.close()
        if self._layout.index is not None:
            write_file(self._directory / INDEX_NAME, self._layout.index.encode())
        self._read_back([name for name in self._positions if name not in self._read], count)

    def close(self) -> None:
        """Close the files. Only `sync` makes their content durable."""
        self._given_up.set()
        self._thread.shutdown(cancel_futures=True)
        self._beside.shutdown(cancel_futures=True)
        while self._files:
            self._files.pop().close()

    def _wait_until(self, most: int) -> None:
        """Wait until `most` tensors at most are waiting; after an error none is."""
        self._raise_of_beside()
        try:
            while len(self._waiting) > most:
                self._waiting.popleft().result()
        except BaseException:
            while self._waiting:
                self._waiting.popleft().cancel()
            raise

    def _begin(self, work: Callable[..., int], *arguments: Any) -> Future[int]:
        """Queue `work`, which returns the number of bytes read back, for the thread `beside`."""
        task = self._beside.submit(work, *arguments)
        self._tasks.append(task)
        return task

    def _raise_of_beside(self) -> None:
        """Raise the first error of the thread `beside`."""
        while self._tasks and self._tasks[0].done():
            self._read_bytes += self._tasks.popleft().result()

    def _copy_beside(self, tensor: TensorInfo) -> int:
        found = self._copy(tensor, ByteCount())
        if self._given_up.is_set():
            return 0
        self._hashes[tensor.name] = found
        self._copied.append(tensor.name)
        if self.nbytes(self._copied) < SYNC_BYTES:
            return 0
        return self._read_back_copies()

    def _read_back_copies(self) -> int:
        """Read back copied tensors, often enough that a signal need not wait long for the disk."""
        names, self._copied = self._copied, []
        return self._flush_and_read(names)

    def _hand_over(self) -> None:
        names, self._written = list(dict.fromkeys(self._written)), []
        self._handed_over.update(names)
        self._begin(self._flush_and_read, names)

    def _flush_and_read(self, names: Sequence[str]) -> int:
        """Make tensors durable, read them back, and hash the files as far as that is done."""
        files = dict.fromkeys(self._positions[name][0] for name in names)
        for file in files:
            file.sync()
            _forget_cached(file.path)
        for name in names:
            found = span_hash(self._span(name), self._given_up, ByteCount())
            if self._given_up.is_set():
                return 0
            self._refuse_other(name, found)
            self._read.add(name)
        for file in files:
            growing = self.file_hashes.setdefault(file.path, GrowingHash(file.path))
            growing.grow(self._end_of_read(file.path), self._given_up, ByteCount())
        return self.nbytes(names)

    def _end_of_read(self, path: Path) -> int:
        """Return where the first tensor of a shard starts that was not read back."""
        shard = self._shards[path]
        for name, offset in shard.offsets.items():  # which are in the order of the file
            if name not in self._read:
                return offset
        return shard.size

    def _read_again(self) -> None:
        """Forget what was read back, because some of it is replaced: `finish` reads all of it."""
        self._beside.submit(int).result()  # whose tasks before this one are done then
        self._handed_over.clear()
        self._read.clear()
        self.file_hashes.clear()

    def _copy(self, tensor: TensorInfo, count: ByteCount) -> str:
        """Copy the bytes of one source tensor, tell their number, and return their hash."""
        file, offset = self._positions[tensor.name]
        digest = sha256()
        with file_errors(tensor.file, writing=False), tensor.file.open("rb", buffering=0) as source:
            for start in range(tensor.start, tensor.end, COPY_BYTES):
                if self._given_up.is_set():
                    break
                chunk = os.pread(source.fileno(), min(COPY_BYTES, tensor.end - start), start)
                if not is_finite(chunk, tensor.dtype):
                    raise not_finite(tensor)
                file.write_at(offset + start - tensor.start, chunk)
                digest.update(chunk)
                count.passed(len(chunk))
        return digest.hexdigest()

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
        if name in self._handed_over:
            self._read_again()
        file, offset = self._positions[name]
        data = tensor_bytes(tensor)
        self._write_at(file, offset, data)
        self._hashes[name] = self._new[name] = sha256(data).hexdigest()
        self._written.append(name)

    def _write_at(self, file: OpenFile, offset: int, data: bytes | memoryview) -> None:
        self._dirty.add(file)
        file.write_at(offset, data)

    def _span(self, name: str) -> Span:
        file, offset = self._positions[name]
        return Span(file.path, offset, self._layout.specs[name].nbytes)

    def _read_back(self, names: Sequence[str], count: ByteCount) -> None:
        for file in dict.fromkeys(self._positions[name][0] for name in names):
            _forget_cached(file.path)
        for name, found in zip(names, span_hashes(map(self._span, names), count), strict=True):
            self._refuse_other(name, found)

    def _refuse_other(self, name: str, found: str) -> None:
        """Raise GateError E_VERIFY if a tensor has another hash than was written."""
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
