"""The hidden directory beside an output where a run works: one run at a time, and what is finished stays.

.OUT.gptq-work/   0700
    lock          held as long as the run lives; the kernel frees it when the process is killed
    holder.json   process and host of the run that holds the lock, or held it last
    run.json      what the run is: its identity, and the call that `gptq resume` repeats
    journal.jsonl what is finished
    hidden-0, -1  hidden states after the last two finished blocks
    out/          becomes OUT
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gptq_cli.checkpoint import durable
from gptq_cli.checkpoint.durable import (
    disk_error,
    disk_errors,
    make_directory,
    remove,
    repair,
    sweep,
    sync_directory,
    write_file,
)
from gptq_cli.errors import ExistsError, GptqError, ResourceError

LOCK, HOLDER, RUN, JOURNAL, STAGE, ASIDE = "lock", "holder.json", "run.json", "journal.jsonl", "out", "old"
HIDDEN = ("hidden-0", "hidden-1")
# statfs(2) of file systems that other machines write too, or that promise no durable rename
NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS", 0x517B: "SMB", 0xFE534D42: "SMB", 0xFF534D42: "CIFS", 0x0BD00BD0: "Lustre", 0x65735546: "FUSE",
    0x00C36400: "Ceph", 0x01021997: "9P", 0x5346414F: "AFS", 0x47504653: "GPFS", 0x19830326: "BeeGFS",
}  # fmt: skip


class WorkDirectory:
    """Names in the work directory of `output`."""

    def __init__(self, output: Path) -> None:
        self.output = output.resolve()
        self.path = self.output.with_name(f".{self.output.name}.gptq-work")
        self.stage, self.aside, self.lock = self.path / STAGE, self.path / ASIDE, self.path / LOCK
        self.journal = self.path / JOURNAL

    def hidden(self, save: int) -> Path:
        """Where hidden states are kept that were saved with line `save` of the journal, for two lines."""
        return self.path / HIDDEN[save % 2]

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished `stage` the name of the output."""
        durable.publish(self.stage, self.output, self.aside, overwrite=overwrite)

    def remove(self) -> None:
        """All of it, the lock last; somebody who waits for it may then have made it anew."""
        sync_directory(self.output.parent)  # the output's name, if an earlier run ended between giving and syncing it
        remove(self.journal)  # first: without it nothing here is anybody's work
        sweep(self.path, (LOCK,))
        remove(self.lock)
        with disk_errors(self.path):
            try:
                durable.disk.rmdir(self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise


@contextmanager
def locked(output: Path, *, allow_network_fs: bool = False) -> Iterator[WorkDirectory]:
    """The work directory of `output`, for this run alone. It stays if the body raises and has finished a block.

    ExistsError E_LOCKED with the other run's process and host, E_WORK_UNSAFE if the directory is not private;
    ResourceError E_DISK if its parent cannot be written, E_FS_UNSAFE on a network file system.
    """
    work = WorkDirectory(output)
    make_directory(work.output.parent)
    if not allow_network_fs:
        refuse_network_fs(work.output.parent)
    lock = _acquire(work)
    try:
        _check_private(work.path)  # once more: the lock makes the directory anew if another run is just removing it
        _prepare(work)
        yield work
        work.remove()
    except BaseException:
        if not work.journal.exists():
            with suppress(GptqError, OSError):  # what ended the run is what to tell
                work.remove()
        raise
    finally:
        lock.release()


def refuse_locked(output: Path) -> None:
    """ExistsError E_LOCKED if a run is working on `output` now."""
    work = WorkDirectory(output)
    if work.lock.exists():
        _lock(work).release()


def refuse_network_fs(directory: Path) -> None:
    """ResourceError E_FS_UNSAFE if `directory` is on a file system that does not promise locks and durable names."""
    kind = NETWORK_FILE_SYSTEMS.get(_file_system(directory))
    if kind is not None:
        raise ResourceError(
            "E_FS_UNSAFE", f"`{directory}` is on a network file system ({kind}), where locks may not hold",
            hint="write to a local disk, or add --allow-network-fs and see that only one run writes there",
        )  # fmt: skip


def _acquire(work: WorkDirectory) -> FileLock:
    make_directory(work.path, 0o700)
    _check_private(work.path)
    return _lock(work)


def _lock(work: WorkDirectory) -> FileLock:
    try:
        return durable.disk.lock(work.lock)
    except Timeout:
        hint = "wait for it, or choose another -o"
        raise ExistsError("E_LOCKED", f"{_holder(work)} is writing `{work.output}`", hint=hint) from None
    except OSError as error:
        raise disk_error(work.lock, error) from error


def _prepare(work: WorkDirectory) -> None:
    sync_directory(work.path.parent)  # a run that was killed may have made the directory and not synced its name
    repair(work.output, work.aside)
    sweep(work.path, (LOCK, RUN, JOURNAL, STAGE, *HIDDEN))
    write_file(work.path / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())


def _holder(work: WorkDirectory) -> str:
    try:
        holder = json.loads((work.path / HOLDER).read_bytes())
        return f"another run (process {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


def _check_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ExistsError(
            "E_WORK_UNSAFE", f"`{path}` is not a directory that you alone may read and write",
            hint="look at what it holds, then remove it",
        )  # fmt: skip


def _file_system(directory: Path) -> int:
    """The kind of file system as Linux numbers them; 0 elsewhere."""
    if sys.platform != "linux":
        return 0
    answer = ctypes.create_string_buffer(512)  # struct statfs, which begins with f_type
    ctypes.CDLL(None).statfs(os.fsencode(directory), answer)
    return ctypes.c_ulong.from_buffer(answer).value & 0xFFFFFFFF
