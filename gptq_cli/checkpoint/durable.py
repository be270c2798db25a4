"""Bytes that survive: the only module that opens files for writing.

Whatever happens, a file or directory is absent, or complete under its final name. The rule is the one of databases:
write under a temporary name, fsync the file, rename it, fsync the directory that holds the name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptq_cli.errors import ExistsError, GptqError, ResourceError

COPY_BYTES = 16 * 2**20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ShardFile:
    """A file of known size whose parts may be written in any order; `close` makes it durable."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # the umask decides who may read
            os.truncate(self._fd, size)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """`data` at byte `offset`; ResourceError E_DISK when the disk refuses."""
        view = memoryview(data).cast("B")
        with disk_errors(self.path):
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written

    def close(self) -> None:
        """Flush to the disk; an error here is final, the kernel may have dropped the data."""
        with disk_errors(self.path):
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)

    def abandon(self) -> None:
        """Close without any promise, after a failure elsewhere."""
        os.close(self._fd)


def write_file(path: Path, content: bytes) -> None:
    """`content` under its final name, or nothing; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)


def copy_file(source: Path, target: Path) -> None:
    """A byte-for-byte copy of `source`, durable."""
    write_file(target, source.read_bytes())


def publish(work: Path, output: Path, *, overwrite: bool) -> None:
    """Give the finished directory `work` the name `output` in one step; what stood there is removed only after."""
    _sync_tree(work)
    with disk_errors(output):
        if output.is_dir() and any(output.iterdir()):
            if not overwrite:
                raise ExistsError(
                    "E_OUT_EXISTS", f"`{output}` appeared while this run was working", hint="choose another -o"
                )
            old = output.with_name(f".{output.name}.gptq-old")
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
            work.rename(output)
            _sync_directory(output.parent)
            shutil.rmtree(old)
        else:
            work.rename(output)
    _sync_directory(output.parent)


@contextmanager
def work_directory(output: Path) -> Iterator[Path]:
    """A fresh directory beside `output` to write into; removed when the body raises."""
    work = output.with_name(f".{output.name}.gptq-work")
    with disk_errors(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into ResourceError E_DISK with the path and the reason."""
    try:
        yield
    except GptqError:
        raise
    except OSError as error:
        hint = "free some space" if error.errno in _NO_SPACE else "choose an output you may write to"
        raise ResourceError(
            "E_DISK", f"cannot write `{path}`: {error.strerror}", hint=f"{hint}, then run again"
        ) from error


def _sync_tree(directory: Path) -> None:
    for folder, _, _ in os.walk(directory):
        _sync_directory(Path(folder))


def _sync_directory(directory: Path) -> None:
    with disk_errors(directory):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
