"""The hidden directory beside an output where one run at a time works and keeps finished blocks.

.OUT.gptq-work/   0700
    lock          held as long as the run lives; the kernel frees it when the process is killed
    holder.json   process and host of the run that holds the lock, or held it last
    run.json      identity of the run, and the call that `gptq resume` repeats
    journal.jsonl the finished blocks
    hidden-0, -1  hidden states after the last two finished blocks
    gradients/    the pass for gradients of loss-aware layers: its journal, their sums, and hidden
                  states until it ends
    harms/        the same for the measurement before an allocation of bits
    gptq_allocation.json
                  the result of that measurement
    allocation.jsonl, allocation-0, -1
                  its finished blocks and hidden states, if the model allows no gradients
    out/          becomes OUT
    download/     blocks of a model that is downloaded while it is read
    replaced-0    an output that was replaced, until it is removed, or as much as cannot be removed
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

from gptq_cli.errors import ExistsError, GptqError, ResourceError, shell_word
from gptq_cli.events import Report, Warned
from gptq_cli.files import Identity, identity, resolved, status_of
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
from gptq_cli.storage.manifest import ALLOCATION, MANIFEST, read_sealed, sealed

LOCK = "lock"
HOLDER = "holder.json"
RUN = "run.json"
JOURNAL = "journal.jsonl"
STAGE = "out"
DOWNLOAD = "download"
GRADIENTS, HARMS = "gradients", "harms"
ASIDE = "old"
HIDDEN = ("hidden-0", "hidden-1")
ALLOCATION_JOURNAL = "allocation.jsonl"
ALLOCATION_STATES = ("allocation-0", "allocation-1")
OF_ALLOCATION = (HARMS, ALLOCATION, ALLOCATION_JOURNAL, *ALLOCATION_STATES)
REPLACED = "replaced-"
SUFFIX = ".gptq-work"
# Numbers of statfs(2) for file systems that other machines write too, or that promise no durable
# rename.
NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS", 0x517B: "SMB", 0xFE534D42: "SMB", 0xFF534D42: "CIFS", 0x0BD00BD0: "Lustre",
    0x65735546: "FUSE", 0x00C36400: "Ceph", 0x01021997: "9P", 0x5346414F: "AFS",
    0x47504653: "GPFS", 0x19830326: "BeeGFS",
}  # fmt: skip


class WorkDirectory:
    """Paths in the work directory of `output`.

    `not_removed` lists the files of replaced outputs that could not be removed, with the reasons.
    """

    def __init__(self, output: Path) -> None:
        self.output = resolved(output, writing=True)
        self.path = self.output.with_name(f".{self.output.name}{SUFFIX}")
        self.stage = self.path / STAGE
        self.download = self.path / DOWNLOAD
        self.gradients = self.path / GRADIENTS
        self.harms = self.path / HARMS
        self.aside = self.path / ASIDE
        self.lock = self.path / LOCK
        self.journal = self.path / JOURNAL
        self.allocation = self.path / ALLOCATION
        self.allocation_journal = self.path / ALLOCATION_JOURNAL
        self.not_removed: list[str] = []
        self._held: Identity | None = None

    def hold(self) -> None:
        """Remember which lock was taken: the name of a directory may lead to another one later."""
        self._held = identity(self.lock)

    def is_held(self) -> bool:
        """Return whether the directory is still the one whose lock was taken."""
        return identity(self.lock) == self._held

    def may_be_removed(self, *, keep: bool) -> bool:
        """Return whether to remove the directory: if another one has its place, it is not ours."""
        return not keep and self.is_held()

    def refuse_gone(self) -> None:
        """Raise ResourceError E_WORK_GONE if the directory was removed or replaced by another."""
        if not self.is_held():
            message = f"`{self.path}` was removed while this run was working in it"
            hint = "let nothing remove it, then run the same command again"
            raise ResourceError("E_WORK_GONE", message, hint=hint)

    def hidden(self, save: int) -> Path:
        """Return the file of the hidden states that belong to line `save` of the journal.

        The file is written again two lines later.
        """
        return self.path / HIDDEN[save % 2]

    def allocation_state(self, save: int) -> Path:
        """Return the file of the state that belongs to line `save` of `allocation_journal`."""
        return self.path / ALLOCATION_STATES[save % 2]

    def holds_work(self) -> bool:
        """Return whether a later run can use something in the directory; an empty file is none."""
        passes = (self.gradients / JOURNAL, self.harms / JOURNAL)
        kept = (self.journal, *passes, self.allocation, self.allocation_journal)
        return any(file.exists() and file.stat().st_size for file in kept)

    def publish(self, model: Path, *, overwrite: bool) -> None:
        """Rename the finished `stage`, made from `model`, to the output.

        With `overwrite` the old output is checked once more, because it may have changed.
        """
        self.refuse_gone()
        if overwrite:
            replacing.check_replaceable(self.output, model)
        durable.publish(self.stage, self.output, self.aside, overwrite=overwrite)
        self._rename_replaced(self.stage)
        self._rename_replaced(self.aside)

    def drop(self) -> None:
        """Discard the finished work in the directory."""
        remove(self.journal)
        remove(self.gradients)
        self._rename_replaced_stage()

    def repair(self) -> None:
        """Undo or complete a replacement that an earlier run has begun."""
        durable.repair(self.output, self.aside)
        self._rename_replaced(self.aside)
        if not self.journal.exists():
            self._rename_replaced_stage()

    def remove(self) -> None:
        """Remove the directory, the lock last.

        Files of a replaced output that cannot be removed are kept and listed in `not_removed`.
        """
        # An earlier run may have ended after it renamed the output and before it synced the name.
        sync_directory(self.output.parent)
        # First of all: without a journal nothing in the directory counts as finished work.
        self.drop()
        self.not_removed = []
        for old in self.replaced():
            self.not_removed += replacing.remove_replaced(old)
        sweep(self.path, (LOCK, *self.replaced_names()))
        remove(self.lock)
        # A run that waited for the lock may have put its own files into the directory meanwhile.
        with disk_errors(self.path):
            try:
                durable.disk.rmdir(self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise

    def replaced(self) -> list[Path]:
        """Return the outputs that were replaced and are not removed yet."""
        return sorted(self.path.glob(f"{REPLACED}*"))

    def replaced_names(self) -> list[str]:
        return [old.name for old in self.replaced()]

    def _rename_replaced_stage(self) -> None:
        """Rename `stage` if it is an old output: a run was killed after it had swapped the two."""
        if (self.stage / MANIFEST).exists():  # a new output gets its manifest just before the swap
            self._rename_replaced(self.stage)

    def _rename_replaced(self, old: Path) -> None:
        """Rename an old output, if it exists, to a free name where it may stay for long."""
        if not old.exists():
            return
        taken = self.replaced_names()
        number = 0
        while f"{REPLACED}{number}" in taken:
            number += 1
        with disk_errors(old):
            durable.disk.rename(old, self.path / f"{REPLACED}{number}")


def work_of(path: Path) -> Path:
    """Return the work directory that `path` names: itself, or the one beside it if it is an output.

    `path` has no links. It need not exist.
    """
    is_work = path.name.startswith(".") and path.name.endswith(SUFFIX)
    if is_work or not path.name:  # the root directory has no name
        return path
    return WorkDirectory(path).path


def output_of(work: Path) -> Path | None:
    """Return the output of the work directory `work`, or None if it is no work directory."""
    name = work.name.removeprefix(".").removesuffix(SUFFIX)
    if name in ("", ".", "..") or work.name != f".{name}{SUFFIX}":
        return None
    output = work.with_name(name)
    if WorkDirectory(output).path != work:  # the output is a link, its work directory is elsewhere
        return None
    return output


def refuse_foreign(work: Path) -> None:
    """Raise ExistsError E_WORK_UNSAFE if another user owns or may use `work` or its run.json."""
    _check_private(work)
    if (work / RUN).lstat().st_uid != os.geteuid():
        raise _unsafe(work)


@contextmanager
def locked(
    output: Path, *, allow_network_fs: bool = False, keep: bool = False
) -> Iterator[WorkDirectory]:
    """Hold the work directory of `output` for this run alone.

    The directory is kept if the body raises after it has finished a block, else it is removed; with
    `keep` it is kept for a run that follows.
    Raises ExistsError E_LOCKED with process and host of the other run, E_WORK_UNSAFE if the
    directory is not private; ResourceError E_DISK if its parent cannot be written, E_FS_UNSAFE on a
    network file system, E_WORK_GONE if the directory is removed meanwhile.
    """
    work = WorkDirectory(output)
    make_directory(work.output.parent)
    if not allow_network_fs:
        refuse_network_fs(work.output.parent)
    lock = _acquire(work)
    work.hold()
    removing = False
    try:
        # Once more: if another run is just removing the directory, taking the lock creates it anew.
        _check_private(work.path)
        _prepare(work)
        yield work
        removing = work.may_be_removed(keep=keep)
        if removing:
            work.remove()
    except BaseException as error:
        if not removing:
            _refuse_gone_after(error, work)
        if removing or work.is_held():
            _remove_unfinished(work)
        raise
    finally:
        lock.release()


def _refuse_gone_after(error: BaseException, work: WorkDirectory) -> None:
    """Raise E_WORK_GONE in place of an error that is its consequence."""
    if isinstance(error, Exception):
        work.refuse_gone()


def _remove_unfinished(work: WorkDirectory) -> None:
    """Remove a work directory without a finished block; the error that ended the run is kept."""
    if not work.holds_work():
        with suppress(GptqError, OSError):
            work.remove()


def refuse_locked(output: Path) -> None:
    """Raise ExistsError E_LOCKED if a run is working on `output`, E_WORK_UNSAFE if not private."""
    work = WorkDirectory(output)
    if status_of(work.lock, writing=True) is not None:
        _check_private(work.path)
        _lock(work).release()


def refuse_network_fs(directory: Path) -> None:
    """Raise ResourceError E_FS_UNSAFE if `directory` is on a network file system."""
    kind = NETWORK_FILE_SYSTEMS.get(_file_system(directory))
    if kind is not None:
        raise ResourceError(
            "E_FS_UNSAFE",
            f"`{directory}` is on a network file system ({kind}), where locks may not hold",
            hint="write to a local disk, or add --allow-network-fs and make sure that only one run "
            "writes there",
        )


def _acquire(work: WorkDirectory) -> FileLock:
    make_directory(work.path, 0o700)
    _check_private(work.path)
    return _lock(work)


def _lock(work: WorkDirectory) -> FileLock:
    try:
        with disk_errors(work.lock):
            return durable.disk.lock(work.lock)
    except Timeout:
        message = f"{_holder(work)} is writing `{work.output}`"
        hint = "wait for it, or choose another -o"
        raise ExistsError("E_LOCKED", message, hint=hint) from None


def _prepare(work: WorkDirectory) -> None:
    """Repair the directory, remove files that do not belong there, and record the holder."""
    # A run that was killed may have created the directory without syncing its name.
    sync_directory(work.path.parent)
    work.repair()
    own = (LOCK, RUN, JOURNAL, STAGE, GRADIENTS, *HIDDEN, *OF_ALLOCATION)
    sweep(work.path, (*own, *work.replaced_names()))
    holder = {"pid": os.getpid(), "host": socket.gethostname()}
    write_file(work.path / HOLDER, json.dumps(holder).encode())


def _holder(work: WorkDirectory) -> str:
    try:
        holder = json.loads((work.path / HOLDER).read_bytes())
        return f"another run (process {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another run"


def _check_private(path: Path) -> None:
    with disk_errors(path):
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise _unsafe(path)


def _unsafe(path: Path) -> ExistsError:
    message = f"`{path}` is not a directory that you alone own, read and write"
    return ExistsError("E_WORK_UNSAFE", message, hint="check its content, then remove it")


def _file_system(directory: Path) -> int:
    """Return the number that Linux gives to the kind of file system; 0 on other systems."""
    if sys.platform != "linux":
        return 0
    answer = ctypes.create_string_buffer(512)  # struct statfs, which begins with f_type
    ctypes.CDLL(None).statfs(os.fsencode(directory), answer)
    return ctypes.c_ulong.from_buffer(answer).value & 0xFFFFFFFF


def write_run(work: Path, identity: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Write the identity of the run and the call that repeats it into the work directory."""
    write_json(work / RUN, sealed({"identity": identity, "request": request}))


def mark_failed(work: Path, code: str) -> None:
    """Record that the run failed with `code` and would fail the same way again."""
    run = read_run(work)
    if run is not None:
        write_json(work / RUN, sealed({**run, "failed": code}))


def read_run(work: Path) -> dict[str, Any] | None:
    """Return `identity` and `request` of `write_run`, and `failed` if the run was marked.

    Return None if the file is missing or damaged. The checksum is no signature: the request may
    still hold anything.
    """
    run = read_sealed(work / RUN)
    if run is None:
        return None
    if not isinstance(run.get("identity"), dict) or not isinstance(run.get("request"), dict):
        return None
    return run


def resume_command(work: Path) -> str:
    """Return the command that resumes the run of a work directory; it names the output."""
    run = read_run(work) or {"request": {}}
    config = run["request"].get("config")
    named = output_of(work)
    if named is None or work_of(named) != work:
        named = work
    command = f"gptq resume {shell_word(str(named))}"
    if isinstance(config, dict) and config.get("trust_remote_code"):
        command += " --trust-remote-code"
    return command


def drop_failed(work: WorkDirectory, report: Report) -> bool:
    """Discard the finished blocks of a run that would fail the same way again.

    Return whether there was such a run.
    """
    run = read_run(work.path)
    if run is None or run.get("failed") is None:
        return False
    text = (
        f"discarding the finished blocks in `{work.path}`: "
        f"their run failed with {run['failed']} and would fail again"
    )
    report(Warned("W_RESUME_DROPPED", text))
    work.drop()
    return True


@contextmanager
def working_on(
    output: Path, report: Report, *, allow_network_fs: bool = False, keep: bool = False
) -> Iterator[WorkDirectory]:
    """Hold the work directory of `output` as `locked` does.

    Report W_OUT_LEFT if files of a replaced output could not be removed.
    """
    with locked(output, allow_network_fs=allow_network_fs, keep=keep) as work:
        yield work
    if work.not_removed:
        first, *others = work.not_removed
        text = f"`{work.path}` holds files of the old `{output}` that could not be removed: {first}"
        if others:
            text += f", and {len(others)} more"
        report(Warned("W_OUT_LEFT", text))
