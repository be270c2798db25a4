"""The hidden directory beside an output where a run works: one run at a time, and what is finished stays.

.OUT.gptq-work/   0700
    lock          held as long as the run lives; the kernel frees it when the process is killed
    holder.json   process and host of the run that holds the lock, or held it last
    run.json      what the run is: its identity, and the call that `gptq resume` repeats
    journal.jsonl what is finished
    hidden-0, -1  hidden states after the last two finished blocks
    out/          becomes OUT
    replaced-0    an output that was replaced, while it is removed; what cannot be removed of it stays
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptq_cli.errors import ExistsError, GptqError, ResourceError
from gptq_cli.events import Report, Warned
from gptq_cli.files import resolved, status_of
from gptq_cli.shell import shell_word
from gptq_cli.storage import durable, replacing
from gptq_cli.storage.durable import (
    disk_errors,
    make_directory,
    remove,
    sweep,
    sync_directory,
    write_file,
    write_json,
)
from gptq_cli.storage.manifest import MANIFEST, read_sealed, sealed
from gptq_cli.storage.places import Identity, identity

LOCK, HOLDER, RUN, JOURNAL, STAGE, ASIDE = (
    "lock",
    "holder.json",
    "run.json",
    "journal.jsonl",
    "out",
    "old",
)
HIDDEN = ("hidden-0", "hidden-1")
REPLACED = "replaced-"
SUFFIX = ".gptq-work"
# statfs(2) of file systems that other machines write too, or that promise no durable rename
NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS", 0x517B: "SMB", 0xFE534D42: "SMB", 0xFF534D42: "CIFS", 0x0BD00BD0: "Lustre", 0x65735546: "FUSE",
    0x00C36400: "Ceph", 0x01021997: "9P", 0x5346414F: "AFS", 0x47504653: "GPFS", 0x19830326: "BeeGFS",
}  # fmt: skip


class WorkDirectory:
    """Names in the work directory of `output`; `left` tells what could not be removed of outputs replaced."""

    def __init__(self, output: Path) -> None:
        self.output = resolved(output, writing=True)
        self.path = self.output.with_name(f".{self.output.name}{SUFFIX}")
        self.stage, self.aside, self.lock = self.path / STAGE, self.path / ASIDE, self.path / LOCK
        self.journal = self.path / JOURNAL
        self.left: list[str] = []
        self._held: Identity | None = None

    def hold(self) -> None:
        """Remember which lock was taken: the name of a directory may lead to another one later."""
        self._held = identity(self.lock)

    def is_held(self) -> bool:
        """Whether the directory is still the one whose lock was taken."""
        return identity(self.lock) == self._held

    def refuse_gone(self) -> None:
        """ResourceError E_WORK_GONE if somebody has removed the directory, or replaced it by another."""
        if not self.is_held():
            raise ResourceError(
                "E_WORK_GONE", f"`{self.path}` was removed while this run was working in it",
                hint="let nothing remove it, then run the same command again",
            )  # fmt: skip

    def hidden(self, save: int) -> Path:
        """Where hidden states are kept that were saved with line `save` of the journal, for two lines."""
        return self.path / HIDDEN[save % 2]

    def publish(self, model: Path, *, overwrite: bool) -> None:
        """Give the finished `stage`, made from `model`, the name of the output; what it replaces is looked at anew."""
        self.refuse_gone()
        if overwrite:
            replacing.check_replaceable(self.output, model)
        durable.publish(self.stage, self.output, self.aside, overwrite=overwrite)
        self._part_with(self.stage)
        self._part_with(self.aside)

    def drop(self) -> None:
        """Whatever was finished here is no longer."""
        remove(self.journal)
        self._part_with_an_old_output()

    def repair(self) -> None:
        """Undo or finish what an earlier run has begun to replace."""
        durable.repair(self.output, self.aside)
        self._part_with(self.aside)
        if not self.journal.exists():
            self._part_with_an_old_output()

    def remove(self) -> None:
        """All of it, the lock last; somebody who waits for it may then have made it anew.

        What cannot be removed of an output that was replaced stays, and is told in `left`.
        """
        sync_directory(
            self.output.parent
        )  # the output's name, if an earlier run ended between giving and syncing it
        self.drop()  # first: without the journal nothing here is anybody's work
        self.left = []
        for old in self.replaced():
            self.left += replacing.remove_replaced(old)
        sweep(self.path, (LOCK, *(old.name for old in self.replaced())))
        remove(self.lock)
        with disk_errors(self.path):
            try:
                durable.disk.rmdir(self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise

    def replaced(self) -> list[Path]:
        """Outputs that were replaced and are not removed yet."""
        return sorted(self.path.glob(f"{REPLACED}*"))

    def _part_with_an_old_output(self) -> None:
        """Stage may be an old output, if a run was killed when it had swapped them; then it has a manifest."""
        if (self.stage / MANIFEST).exists():
            self._part_with(self.stage)

    def _part_with(self, old: Path) -> None:
        """Give an output that was replaced, if it is there, a name under which it can stay if it must."""
        if not old.exists():
            return
        taken = [path.name for path in self.replaced()]
        free = next(
            name for number in range(len(taken) + 1) if (name := f"{REPLACED}{number}") not in taken
        )
        with disk_errors(old):
            durable.disk.rename(old, self.path / free)


def output_of(work: Path) -> Path | None:
    """The output that a work directory of this place and name belongs to; None for any other path."""
    name = work.name.removeprefix(".").removesuffix(SUFFIX)
    if name in ("", ".", "..") or work.name != f".{name}{SUFFIX}":
        return None
    output = work.with_name(name)
    return (
        output if WorkDirectory(output).path == work else None
    )  # it may be a link to another place


def refuse_foreign(work: Path) -> None:
    """ExistsError E_WORK_UNSAFE if another user owns the work directory or its run.json, or may read or write it."""
    _check_private(work)
    if (work / RUN).lstat().st_uid != os.geteuid():
        raise _unsafe(work)


@contextmanager
def locked(output: Path, *, allow_network_fs: bool = False) -> Iterator[WorkDirectory]:
    """The work directory of `output`, for this run alone. It stays if the body raises and has finished a block.

    ExistsError E_LOCKED with the other run's process and host, E_WORK_UNSAFE if the directory is not private;
    ResourceError E_DISK if its parent cannot be written, E_FS_UNSAFE on a network file system, E_WORK_GONE if somebody
    removes it meanwhile.
    """
    work = WorkDirectory(output)
    make_directory(work.output.parent)
    if not allow_network_fs:
        refuse_network_fs(work.output.parent)
    lock = _acquire(work)
    work.hold()
    removing = False
    try:
        _check_private(
            work.path
        )  # once more: the lock makes the directory anew if another run is just removing it
        _prepare(work)
        yield work
        removing = work.is_held()  # otherwise what is there, if anything, is another run's
        if removing:
            work.remove()
    except BaseException as error:
        if not removing and isinstance(error, Exception):
            work.refuse_gone()  # what the run ended with is a consequence
        if (removing or work.is_held()) and not work.journal.exists():
            with suppress(GptqError, OSError):  # what ended the run is what to tell
                work.remove()
        raise
    finally:
        lock.release()


def refuse_locked(output: Path) -> None:
    """ExistsError E_LOCKED if a run is working on `output` now, E_WORK_UNSAFE if its directory is not private."""
    work = WorkDirectory(output)
    if status_of(work.lock, writing=True) is not None:
        _check_private(work.path)
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
        with disk_errors(work.lock):
            return durable.disk.lock(work.lock)
    except Timeout:
        hint = "wait for it, or choose another -o"
        raise ExistsError(
            "E_LOCKED", f"{_holder(work)} is writing `{work.output}`", hint=hint
        ) from None


def _prepare(work: WorkDirectory) -> None:
    sync_directory(
        work.path.parent
    )  # a run that was killed may have made the directory and not synced its name
    work.repair()
    sweep(work.path, (LOCK, RUN, JOURNAL, STAGE, *HIDDEN, *(old.name for old in work.replaced())))
    write_file(
        work.path / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    )


def _holder(work: WorkDirectory) -> str:
    try:
        holder = json.loads((work.path / HOLDER).read_bytes())
        return f"another run (process {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


def _check_private(path: Path) -> None:
    with disk_errors(path):
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise _unsafe(path)


def _unsafe(path: Path) -> ExistsError:
    return ExistsError(
        "E_WORK_UNSAFE", f"`{path}` is not a directory that you alone own, read and write",
        hint="look at what it holds, then remove it",
    )  # fmt: skip


def _file_system(directory: Path) -> int:
    """The kind of file system as Linux numbers them; 0 elsewhere."""
    if sys.platform != "linux":
        return 0
    answer = ctypes.create_string_buffer(512)  # struct statfs, which begins with f_type
    ctypes.CDLL(None).statfs(os.fsencode(directory), answer)
    return ctypes.c_ulong.from_buffer(answer).value & 0xFFFFFFFF


def write_run(work: Path, identity: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Note in the work directory what its run is, and the arguments of the call that repeats it."""
    write_json(work / RUN, sealed({"identity": identity, "request": request}))


def mark_failed(work: Path, code: str) -> None:
    """Note that the run has ended with `code`, and would end so again."""
    run = read_run(work)
    if run is not None:
        write_json(work / RUN, sealed({**run, "failed": code}))


def read_run(work: Path) -> dict[str, Any] | None:
    """The `identity` and the `request` of `write_run`, and `failed` if the run was marked; None if they are not there
    as they were written. The checksum is no signature: what is in the request may still be anything.
    """
    run = read_sealed(work / RUN)
    if (
        run is None
        or not isinstance(run.get("identity"), dict)
        or not isinstance(run.get("request"), dict)
    ):
        return None
    return run


def resume_command(work: Path) -> str:
    """The command that goes on with the run of a work directory."""
    run = read_run(work) or {"request": {}}
    config = run["request"].get("config")
    trusts = isinstance(config, dict) and config.get("trust_remote_code")
    return f"gptq resume {shell_word(str(work))}" + (" --trust-remote-code" if trusts else "")


def drop_failed(work: WorkDirectory, report: Report) -> bool:
    """Whether what is finished in `work` was of a run that has failed and would fail again: then it is gone."""
    run = read_run(work.path)
    failed = run.get("failed") if run else None
    if failed is None:
        return False
    text = f"the finished blocks in `{work.path}` are dropped: their run ended with {failed}, and would end so again"
    report(Warned("W_RESUME_DROPPED", text))
    work.drop()
    return True


@contextmanager
def working_on(
    output: Path, report: Report, *, allow_network_fs: bool = False
) -> Iterator[WorkDirectory]:
    """The work directory of `output` as `locked` gives it; a warning if an output that was replaced is not all gone."""
    with locked(output, allow_network_fs=allow_network_fs) as work:
        yield work
    if work.left:
        more = f", and {len(work.left) - 1} more" if len(work.left) > 1 else ""
        told = f"`{work.path}` holds what could not be removed of the old `{output}`: {work.left[0]}{more}"
        report(Warned("W_OUT_LEFT", told))
