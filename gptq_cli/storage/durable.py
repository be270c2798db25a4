"""Durable writes: no other module opens files for writing or changes a directory.

At any moment a file or directory is absent or complete under its final name. The rule is the one
of databases: write under a temporary name, fsync the file, rename it, fsync the directory that
holds the name. A failed fsync is final, because the kernel may have dropped the data
(https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock

from gptq_cli.errors import ExistsError, GptqError
from gptq_cli.files import MAX_NAME, file_error, file_errors, is_directory, is_mount, status_of

COPY_BYTES = 16 * 2**20
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h and linux/fs.h


class Disk:
    """All operations that change a disk, in one class so that tests can count or fail each one."""

    def open(self, path: Path, flags: int) -> int:
        # With mode 0666 the umask of the user decides who may read the file.
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap two names in one step; raise OSError ENOSYS or EINVAL if the system cannot."""
        swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if swap is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def mkdir(self, path: Path, mode: int) -> None:
        path.mkdir(mode)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def lock(self, path: Path) -> FileLock:
        """Return the lock of `path`, held until it is released or the process ends.

        Raise filelock.Timeout if another process holds it.
        """
        lock = FileLock(path, timeout=0, fallback_to_soft=False)
        lock.acquire()
        return lock


disk = Disk()


class OpenFile:
    """A file that is written in parts, in any order; the parts survive once `sync` has returned.

    `size` sets the length of the file; bytes that it already holds are kept. Threads may share the
    file. Raises ResourceError E_DISK if the disk refuses an operation.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._syncing = Lock()
        self._failed: OSError | None = None
        with disk_errors(path):
            self._descriptor = disk.open(path, os.O_RDWR | os.O_CREAT)
        try:
            with disk_errors(path):
                disk.truncate(self._descriptor, size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at byte `offset`."""
        view = memoryview(data).cast("B")
        with disk_errors(self.path):
            while view:
                written = disk.write(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def sync(self) -> None:
        """Flush the file to the disk; an error is final, and every later call raises it again.

        The kernel tells an error once for a descriptor, to whichever thread asks first.
        """
        with self._syncing, disk_errors(self.path):
            if self._failed is not None:
                raise self._failed
            try:
                disk.fsync(self._descriptor)
            except OSError as error:
                self._failed = error
                raise

    def close(self) -> None:
        """Close the file; only `sync` makes its bytes durable."""
        os.close(self._descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file, or nothing, and create missing parents; the file is durable on return."""
    make_directory(path.parent)
    temporary = _temporary(path)
    with OpenFile(temporary, len(content)) as file:
        file.write_at(0, content)
        file.sync()
    with disk_errors(path):
        disk.rename(temporary, path)
    sync_directory(path.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON; durable like `write_file`."""
    write_file(path, json_bytes(content, indent=2))


def json_bytes(content: Any, *, indent: int) -> bytes:
    """Return `content` as a JSON file in UTF-8.

    Letters that UTF-8 cannot encode (undecodable bytes of file names) become escapes.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    # Only strings can hold such a letter, and there JSON reads \udcff as the same letter.
    return text.encode("utf-8", "backslashreplace")


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Create a durable directory and its missing parents; an existing one is not changed."""
    if is_directory(path, writing=True):
        return
    make_directory(path.parent)
    with disk_errors(path):
        try:
            disk.mkdir(path, mode)
        except FileExistsError:
            # Another process may have created the directory just now: that is no error.
            if not is_directory(path, writing=True):
                raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    with disk_errors(path):
        descriptor = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            disk.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove the file or directory at `path`, if there is one.

    Raises ResourceError E_DISK for a mount point, which is never entered.
    """
    with disk_errors(path), suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            if is_mount(path):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            sweep(path, ())
            disk.rmdir(path)
        else:
            disk.unlink(path)


def sweep(directory: Path, keep: Collection[str]) -> None:
    """Remove everything in `directory` except the names in `keep`."""
    with disk_errors(directory):
        found = sorted(directory.iterdir())
    for path in found:
        if path.name not in keep:
            remove(path)


def publish(stage: Path, output: Path, aside: Path, *, overwrite: bool) -> None:
    """Rename the finished directory `stage`, whose files are durable, to `output` in one step.

    An old output is called `stage` afterwards. If the system cannot swap names, the old output is
    renamed to `aside` first and stays there; if the process ends in between, `repair` restores it.
    Raises ExistsError E_OUT_EXISTS if the output is occupied and `overwrite` is false.
    """
    with disk_errors(output):
        try:
            if overwrite and is_occupied(output):
                _swap(stage, output, aside)
            else:
                disk.rename(stage, output)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                message = f"`{output}` appeared while this run was working"
                raise ExistsError(
                    "E_OUT_EXISTS", message, hint="choose another -o, or add --overwrite"
                ) from None
            raise
    sync_directory(output.parent)
    sync_directory(stage.parent)


def repair(output: Path, aside: Path) -> None:
    """Restore the old output that an interrupted `publish` had renamed, if there is no new one."""
    if is_directory(aside) and status_of(output, writing=True) is None:
        with disk_errors(output):
            disk.rename(aside, output)
        sync_directory(output.parent)


def is_occupied(output: Path) -> bool:
    """Return whether a rename onto `output` would fail: it exists and is no empty directory."""
    if not is_directory(output, writing=True):
        return status_of(output, writing=True) is not None
    with file_errors(output, writing=True):
        return any(output.iterdir())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn OSError into ResourceError E_DISK with the path and the reason."""
    with file_errors(path, writing=True):
        yield


def disk_error(path: Path, error: OSError) -> GptqError:
    """Return ResourceError E_DISK with the path, the reason and a hint."""
    refused = file_error(error, path, writing=True)
    assert refused is not None
    return refused


def _temporary(path: Path) -> Path:
    """Return the hidden name of `path` until it is complete; very long names get a short one."""
    name = f".{path.name}.tmp"
    if len(os.fsencode(name)) > MAX_NAME:
        name = f".{sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp"
    return path.with_name(name)


def _swap(stage: Path, output: Path, aside: Path) -> None:
    try:
        disk.exchange(stage, output)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        disk.rename(output, aside)
        sync_directory(aside.parent)
        sync_directory(output.parent)
        disk.rename(stage, output)
