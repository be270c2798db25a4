"""Errors of the file system as errors of this program, and the identity of files and directories.

A file that cannot be read is InputError E_FILE, one that cannot be written is ResourceError E_DISK,
and so is a failure of a disk or a network file system. No message calls a file damaged because it
may not be read.

A directory is recognized by device and inode, so that links and other spellings of its name do not
matter. A file that is read for long has a stamp, by which a later check notices a change, and a
count of the bytes that have passed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from gptq_cli.errors import GptqError, InputError, ResourceError, causes, shell_word

StrPath = str | os.PathLike[str]

UNREADABLE = "E_FILE"
NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# network file systems and FUSE
_LOST = {errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT}
_NO_RIGHT = {errno.EACCES, errno.EPERM}
_OF_WRITING = {*_NO_SPACE, errno.EROFS, errno.EEXIST, errno.ENOTEMPTY}
_OF_THE_DISK = {*_NO_SPACE, *_LOST, errno.EIO}
# of a disk even if the error names no file; the other numbers occur for sockets too
_DISK_WITHOUT_NAME = {*_NO_SPACE, errno.EIO, errno.ESTALE}
_NO_TEMPORARY = "No usable temporary directory"  # from Python's tempfile, which names no file
MAX_NAME, MAX_PATH = 255, 4096  # bytes, if the file system does not tell


@contextmanager
def file_errors(path: StrPath | None = None, *, writing: bool | None = None) -> Iterator[None]:
    """Raise an OSError of the body again as the GptqError of `file_error`."""
    try:
        yield
    except OSError as error:
        refused = file_error(error, path, writing=writing)
        if refused is None:
            raise
        raise refused from error


def file_error(
    error: OSError, path: StrPath | None = None, *, writing: bool | None = None
) -> GptqError | None:
    """Return the error of this program for `error`, or None if it is about no file and no disk.

    `path` replaces the name in `error`. If `writing` is None, the error tells whether the file was
    to be read or written. Codes: E_FILE for a file that cannot be read, E_DISK for a file that
    cannot be written or a disk that fails, E_OPEN_FILES, E_OOM.
    """
    if error.errno is None:  # an OSError that a library made, with a text only
        return None
    named = _named(error, path)
    reason = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return _used_up(error.errno, named, reason)
    if named is None:
        return _without_name(error, reason)
    if writing is None:
        writing = _was_writing(error, named)
    if writing:
        hint = f"{_advice_to_write(error, named)}, then run again"
        return ResourceError("E_DISK", f"cannot write `{named}`: {reason}", hint=hint)
    message = f"cannot read `{named}`: {reason}"
    if error.errno in _OF_THE_DISK:
        return ResourceError("E_DISK", message, hint=advice(error, named))
    return InputError(UNREADABLE, message, hint=advice(error, named))


def file_cause(error: BaseException) -> GptqError | None:
    """Return the error of the file system that caused `error`, or None; libraries reword it."""
    for link in causes(error, hidden=True):
        if isinstance(link, OSError):
            refused = file_error(link)
            if refused is not None:
                return refused
    return None


def status_of(path: StrPath, *, writing: bool = False) -> os.stat_result | None:
    """Return the status of the target of `path`, or None if there is none.

    Raise a GptqError if the system does not tell, or if `path` is a link to nothing, except for
    `writing`.
    """
    try:
        return Path(path).stat()
    except ValueError:  # a NUL in the path
        return None
    except OSError as error:
        if error.errno in NOTHING_THERE and (writing or not Path(path).is_symlink()):
            return None
        refused = file_error(error, path, writing=writing)
        if refused is None:
            raise
        raise refused from error


def is_directory(path: StrPath, *, writing: bool = False) -> bool:
    """Return whether `path` leads to a directory; raise a GptqError if that is not known."""
    found = status_of(path, writing=writing)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: StrPath) -> bool:
    """Return whether `path` leads to a regular file; raise a GptqError if that is not known."""
    found = status_of(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def resolved(path: StrPath, *, writing: bool = False) -> Path:
    """Return `path` without links; raise a GptqError for a loop of links or a closed directory."""
    status_of(path, writing=writing)
    with file_errors(writing=writing):
        return Path(os.path.realpath(path))


def refuse_other_than_utf8(path: Path) -> None:
    """Raise InputError E_FILE for a path that is not UTF-8, which libraries cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        hint = f"rename it, or use a link to it: ln -s {shell_word(str(path))} model"
        reason = "its name is not UTF-8, but the libraries that read models need UTF-8"
        raise InputError(UNREADABLE, f"cannot read `{path}`: {reason}", hint=hint) from None


def files_below(directory: Path, enters: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """Return the files in `directory` and in the folders below it that `enters` accepts, sorted.

    Links to folders are not followed. Raise a GptqError if a folder cannot be read, because its
    files would be missing without notice.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    with file_errors(writing=False):
        for folder, subfolders, names in os.walk(directory, onerror=refuse):
            # os.walk enters the subfolders that stay in this list
            subfolders[:] = [name for name in subfolders if enters(Path(folder, name))]
            found += [Path(folder, name) for name in names]
    return sorted(found)


def advice(error: OSError, path: StrPath) -> str:
    """Return a next step for `path`, which could not be read."""
    advise = _ADVICE.get(error.errno or 0)
    if advise is None:
        return "look at that file, then run again"
    return advise(os.fspath(path))


def _named(error: OSError, path: StrPath | None) -> str | None:
    """Return `path` or else the file name in `error`, which may be None or a descriptor instead."""
    if path is not None:
        return os.fspath(path)
    name = error.filename
    if isinstance(name, str | bytes | os.PathLike):
        return os.fsdecode(name)
    return None


def _used_up(number: int, named: str | None, reason: str) -> ResourceError:
    """Return the error for open files (E_OPEN_FILES) or memory (E_OOM) that the system refused."""
    about = "" if named is None else f" to read or write `{named}`"
    if number == errno.ENOMEM:
        message = f"there is not enough memory{about}: {reason}"
        hint = "end other programs, or give this one more memory"
        return ResourceError("E_OOM", message, hint=hint)
    message = f"no more files can be opened{about}: {reason}"
    hint = "close other programs, or raise the limit of this one: ulimit -n 4096"
    return ResourceError("E_OPEN_FILES", message, hint=hint)


def _without_name(error: OSError, reason: str) -> GptqError | None:
    """Return the error for an OSError without a file name, or None if it is about no file."""
    if error.errno in _DISK_WITHOUT_NAME:
        hint = "look at `dmesg` and the mounted file systems, then run again"
        if error.errno in _NO_SPACE:
            hint = "free some space, then run again"
        return ResourceError("E_DISK", f"a disk has failed: {reason}", hint=hint)
    if _NO_TEMPORARY in reason:
        hint = "set TMPDIR to a directory that you may write to"
        return ResourceError("E_DISK", reason, hint=hint)
    if error.errno == errno.ENOENT and _current_directory_is_gone():
        message = "the current directory has been removed"
        return InputError("E_FILE", message, hint="change to another one: cd")
    return None


def _current_directory_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _was_writing(error: OSError, named: str) -> bool:
    """Return whether `error` came from an attempt to write.

    A file that exists and may be read was not refused to a reader.
    """
    if error.errno in _OF_WRITING:
        return True
    if error.errno not in _NO_RIGHT:
        return False
    try:
        status = Path(named).stat()
    except OSError as other:
        return other.errno in NOTHING_THERE
    wanted = os.R_OK
    if stat.S_ISDIR(status.st_mode):
        wanted |= os.X_OK
    return os.access(named, wanted)


def _advice_to_write(error: OSError, named: str) -> str:
    advise = _ADVICE_TO_WRITE.get(error.errno or 0)
    if advise is None:
        return "choose an output you may write to"
    return advise(named)


def _advice_about_rights(named: str) -> str:
    """Return the command that gives the right to read, or the file whose owner can give it."""
    path = Path(named).absolute()
    right, letters = "read", "r"
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            path = folder
            break
    if path.is_dir():
        right, letters = "read and enter", "rx"
    with suppress(OSError):
        if path.lstat().st_uid == os.geteuid():
            return f"you own `{path}`: chmod u+{letters} {shell_word(str(path))}"
    return f"ask the owner of `{path}` for the right to {right} it"


def _advice_about_length(named: str) -> str:
    longest = max(len(os.fsencode(part)) for part in Path(named).parts)
    limit = _longest_name(Path(named))
    if longest > limit:
        excess = longest - limit
        return f"choose a name that is {excess} bytes shorter: the file system takes {limit}"
    n_bytes = len(os.fsencode(named))
    return f"choose a shorter path: it has {n_bytes} bytes, {MAX_PATH - 1} are allowed"


def _longest_name(path: Path) -> int:
    """Return the number of bytes that the file system of `path` allows for a name."""
    for folder in path.absolute().parents:
        with suppress(OSError, ValueError):
            return os.pathconf(folder, "PC_NAME_MAX")
    return MAX_NAME


def _first_file(named: str) -> str:
    """Return the first part of the path `named` that exists but is not a directory."""
    path = Path(named)
    for part in [*reversed(path.parents), path]:
        with suppress(OSError):
            if not stat.S_ISDIR(part.stat().st_mode):
                return str(part)
    return named


def expanded(path: StrPath) -> Path:
    """Return `path` with a home directory in place of `~`, or unchanged if there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  pathlib raises if there is no home


def _advice_about_absence(named: str) -> str:
    if Path(named).is_symlink():
        target = Path(named).readlink()
        return f"it is a link to `{target}`, which does not exist: remove or correct the link"
    return "check the path: was the file moved or removed?"


def _advice_about_path(named: str) -> str:
    return f"`{_first_file(named)}` is not a directory: check the path"


def _advice_about_output(named: str) -> str:
    return f"choose another output: `{_first_file(named)}` is not a directory"


def _always(advice: str) -> Callable[[str], str]:
    return lambda _: advice


_ADVICE: dict[int, Callable[[str], str]] = {
    **dict.fromkeys(_NO_RIGHT, _advice_about_rights),
    **dict.fromkeys(
        _LOST, _always("the file system is not reachable: mount it again, then run again")
    ),
    errno.ENAMETOOLONG: _advice_about_length,
    errno.ENOENT: _advice_about_absence,
    errno.ENOTDIR: _advice_about_path,
    errno.EISDIR: _always("it is a directory: name a file in it"),
    errno.ELOOP: _always("a link in this path leads back to itself: remove or correct the link"),
    errno.EIO: _always(
        "the disk or its driver is at fault: look at `dmesg`, then copy the file from elsewhere"
    ),
}
_ADVICE_TO_WRITE: dict[int, Callable[[str], str]] = {
    **dict.fromkeys(_NO_SPACE, _always("free some space")),
    **dict.fromkeys(
        {*_LOST, errno.EIO}, _always("choose an output on another disk, or look at `dmesg`")
    ),
    **dict.fromkeys({errno.ENOTDIR, errno.EEXIST}, _advice_about_output),
    errno.ENAMETOOLONG: _advice_about_length,
    errno.ELOOP: _always("remove the link that is there, or choose another output"),
    errno.ENOENT: _always("find out whether somebody removes directories there during the run"),
    errno.EROFS: _always("choose an output on a file system that is not read-only"),
}


Identity = tuple[int, int]
MOUNTS = Path("/proc/self/mountinfo")
MOUNT_POINT = 4  # field of a line of mountinfo, proc(5)
HINT = "let nothing write to the model while it is read, then run the same command again"
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def identity(path: Path) -> Identity | None:
    """Return device and inode of the file that `path` leads to; None if it cannot be determined."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def at_and_above(path: Path) -> set[Identity]:
    """Return the identities of `path` and of the directories above it, as far as they exist."""
    whole = Path(os.path.realpath(path))
    found = {identity(directory) for directory in (whole, *whole.parents)}
    return {known for known in found if known is not None}


def is_inside(path: Path, directory: Path) -> bool:
    """Return whether `path`, which need not exist, is `directory` or below it."""
    return identity(directory) in at_and_above(path)


def mounts_below(directory: Path) -> list[Path]:
    """Return the mount points at and below `directory` that Linux lists, bind mounts included."""
    whole = Path(os.path.realpath(directory))
    return [mount for mount in _mount_points() if mount.is_relative_to(whole)]


def is_mount(directory: Path) -> bool:
    """Return whether `directory` is a mount point (bind mounts included); a link to one is not."""
    return os.path.ismount(directory) or Path(os.path.realpath(directory)) in _mount_points()


def _mount_points() -> list[Path]:
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return []  # not Linux: only `os.path.ismount` finds mounts, by their device
    mounts = []
    for line in lines:
        fields = line.split(b" ")
        if len(fields) > MOUNT_POINT:
            name = _ESCAPED.sub(_letter, fields[MOUNT_POINT])
            mounts.append(Path(os.fsdecode(name)))
    return mounts


def _letter(escaped: re.Match[bytes]) -> bytes:
    return bytes([int(escaped[1], 8)])


class Stamp(NamedTuple):
    """State of a file in its directory entry; no program can set the time `changed` back."""

    size: int
    modified: int
    changed: int
    inode: int
    device: int


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of the file that `path` leads to, or None if there is no file.

    Raises GptqError if the file cannot be examined.
    """
    found = status_of(path)
    if found is None:
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def check_stamps(stamps: Mapping[Path, Stamp]) -> None:
    """Raise InputError E_SOURCE_CHANGED if a file no longer has its stamp."""
    for path, known in stamps.items():
        found = stamp_of(path)
        if found != known:
            raise source_changed(path, _difference(known, found))


def source_changed(path: Path, how: str, hint: str = HINT) -> InputError:
    """Return InputError E_SOURCE_CHANGED; `how` completes a sentence about the file."""
    message = f"`{path}` has changed while it was read: it {how}"
    return InputError("E_SOURCE_CHANGED", message, hint=hint)


def _difference(known: Stamp, found: Stamp | None) -> str:
    if found is None:
        return "is gone"
    if found.size != known.size:
        return f"had {known.size} bytes, but now has {found.size}"
    if (found.inode, found.device) != (known.inode, known.device):
        return "was replaced by another file"
    return "was written again"


def hint_at_near(path: Path, *, folders: bool = False) -> str | None:
    """Return the hint that names what exists in place of `path` with nearly the same name, if any.

    One part of the path may be wrong, the last or one before it. Only folders are named if the path
    should lead to one of these.
    """
    with suppress(OSError, ValueError):  # ValueError is about a NUL in the path
        wrong = _first_missing(path)
        for near in _near_names(wrong):
            meant = wrong.parent / near / path.relative_to(wrong)
            if meant.is_dir() or (meant.exists() and not folders):
                return f"did you mean {shell_word(str(meant))}?"
    return None


def _first_missing(path: Path) -> Path:
    """Return the first part of `path`, which does not exist, that is missing."""
    missing = path
    for above in path.parents:
        if above.exists():
            break
        missing = above
    return missing


def _near_names(path: Path) -> list[str]:
    """Return names beside `path` that are nearly its own, the nearest first; no hidden ones."""
    names: dict[str, list[str]] = {}  # by their small letters
    for item in path.parent.iterdir():
        is_hidden = item.name.startswith(".") and not path.name.startswith(".")
        if item.name != path.name and not is_hidden:  # the same name is a link to nothing
            names.setdefault(item.name.lower(), []).append(item.name)
    found = []
    for near in get_close_matches(path.name.lower(), names, cutoff=0.7):
        found += sorted(names[near])
    return found


@dataclass(frozen=True, slots=True)
class BytesDone:
    """`done` of the `total` bytes of the present phase are read, copied, compared or sent."""

    done: int
    total: int


TOLD = 200  # reports about the bytes of one phase, at most


class ByteCount:
    """Counts the bytes of a phase, and reports each half percent of `total` as BytesDone.

    Threads may `add` bytes, but only the thread of the caller reports them.
    """

    def __init__(self, report: Callable[[BytesDone], None] | None = None, total: int = 0) -> None:
        self._report, self._total = report, total
        self._done = self._told = 0
        self._lock = Lock()

    def add(self, n_bytes: int) -> None:
        """Count bytes, from any thread; nothing is reported."""
        with self._lock:
            self._done += n_bytes

    @property
    def done(self) -> int:
        """The bytes that were counted."""
        return self._done

    def tell(self) -> None:
        """Report the bytes that were counted, if they are half a percent more than reported."""
        if self._report is None or not self._total:
            return
        share = TOLD * self._done // self._total
        if share > self._told:
            self._told = share
            self._report(BytesDone(min(self._done, self._total), self._total))

    def passed(self, n_bytes: int) -> None:
        """Count bytes and report them."""
        self.add(n_bytes)
        self.tell()
