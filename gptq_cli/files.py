"""The one place that turns what a file system refuses into errors with the path, the reason and what to do.

What cannot be read is InputError E_FILE, what cannot be written ResourceError E_DISK, as is a disk or a network file
system that fails. Nothing here calls a file damaged because it may not be read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptq_cli.errors import GptqError, InputError, ResourceError
from gptq_cli.shell import shell_word

StrPath = str | os.PathLike[str]

UNREADABLE = "E_FILE"
NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOST = {
    errno.ESTALE,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.ETIMEDOUT,
}  # of network file systems and FUSE
_NO_RIGHT = {errno.EACCES, errno.EPERM}
_OF_WRITING = {*_NO_SPACE, errno.EROFS, errno.EEXIST, errno.ENOTEMPTY}
_OF_THE_DISK = {*_NO_SPACE, *_LOST, errno.EIO}
_PLAIN = {
    *_NO_SPACE,
    errno.EIO,
    errno.ESTALE,
}  # of a disk even without a name; the others are of sockets, too
_NO_TEMPORARY = "No usable temporary directory"  # what Python's tempfile says, without a name
MAX_NAME, MAX_PATH = 255, 4096  # bytes, where the file system does not tell


@contextmanager
def file_errors(path: StrPath | None = None, *, writing: bool | None = None) -> Iterator[None]:
    """Turn an OSError about `path`, or about the file that it names itself, into the GptqError of `file_error`."""
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
    """What `error` means to a user; None if it names no file and says nothing of a disk: then it may be a mistake here.

    `path` stands in for the name that the error lacks. `writing` is None where only the error knows what was tried.
    E_FILE for what cannot be read, E_DISK for what cannot be written and for a disk that fails, E_OPEN_FILES, E_OOM.
    """
    if error.errno is None:  # a library's own, with no more than words
        return None
    named = _named(error) if path is None else os.fspath(path)
    reason = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "close other programs, or let this one open more: ulimit -n 4096"
        return ResourceError(
            "E_OPEN_FILES", f"no more files can be opened{_about(named)}: {reason}", hint=hint
        )
    if error.errno == errno.ENOMEM:
        hint = "end other programs, or give this one more memory"
        return ResourceError(
            "E_OOM", f"there is not enough memory{_about(named)}: {reason}", hint=hint
        )
    if named is None:
        return _without_name(error, reason)
    if writing is None:
        writing = _was_writing(error, named)
    if writing:
        hint = f"{_advice_to_write(error, named)}, then run again"
        return ResourceError("E_DISK", f"cannot write `{named}`: {reason}", hint=hint)
    kind = ResourceError if error.errno in _OF_THE_DISK else InputError
    code = "E_DISK" if kind is ResourceError else UNREADABLE
    return kind(code, f"cannot read `{named}`: {reason}", hint=advice(error, named))


def file_cause(error: BaseException) -> GptqError | None:
    """What the file system has refused, if that caused `error`: libraries tell it in words of their own."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and (refused := file_error(link)):
            return refused
        link = link.__cause__ or link.__context__
    return None


def status_of(path: StrPath, *, writing: bool = False) -> os.stat_result | None:
    """The status of what `path` leads to, None if nothing is there; a GptqError if that cannot be told.

    A link that leads to nothing is refused, unless something is to be written there.
    """
    try:
        return Path(path).stat()
    except ValueError:  # a NUL in it
        return None
    except OSError as error:
        if error.errno in NOTHING_THERE and (writing or not Path(path).is_symlink()):
            return None
        refused = file_error(error, path, writing=writing)
        if refused is None:
            raise
        raise refused from error


def is_directory(path: StrPath, *, writing: bool = False) -> bool:
    """Whether `path` leads to a directory; a GptqError if that cannot be told."""
    found = status_of(path, writing=writing)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: StrPath) -> bool:
    """Whether `path` leads to a regular file; a GptqError if that cannot be told."""
    found = status_of(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def resolved(path: StrPath, *, writing: bool = False) -> Path:
    """`path` without links; a GptqError if it leads through a loop of links, or where nobody may look."""
    status_of(path, writing=writing)
    with file_errors(writing=writing):
        return Path(os.path.realpath(path))


def refuse_other_than_utf8(path: Path) -> None:
    """InputError E_FILE for a path that libraries cannot open, since they take it for a text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        hint = f"rename it, or give a link to it: ln -s {shell_word(str(path))} model"
        reason = "its name is not UTF-8, and the libraries that read models open no other"
        raise InputError(UNREADABLE, f"cannot read `{path}`: {reason}", hint=hint) from None


def files_below(directory: Path, enters: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """What is in `directory`, and in folders below it that it `enters`, and no folder, sorted; links are not followed.

    A GptqError if a folder cannot be read: what lies in it would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    with file_errors(writing=False):
        for place, folders, names in os.walk(directory, onerror=refuse):
            folders[:] = [name for name in folders if enters(Path(place, name))]
            found += [Path(place, name) for name in names]
    return sorted(found)


def advice(error: OSError, path: StrPath) -> str:
    """What to do about `path`, which could not be read."""
    say = _ADVICE.get(error.errno or 0)
    return say(os.fspath(path)) if say else "see what is there, then run again"


def _named(error: OSError) -> str | None:
    """The file that `error` names."""
    name = error.filename
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None


def _about(named: str | None) -> str:
    return "" if named is None else f" to read or write `{named}`"


def _without_name(error: OSError, reason: str) -> GptqError | None:
    if error.errno in _PLAIN:
        hint = (
            "free some space"
            if error.errno in _NO_SPACE
            else "look at `dmesg` and at what is mounted"
        )
        return ResourceError(
            "E_DISK", f"a disk has failed: {reason}", hint=f"{hint}, then run again"
        )
    if _NO_TEMPORARY in reason:
        return ResourceError(
            "E_DISK", reason, hint="set TMPDIR to a directory that you may write to"
        )
    if error.errno == errno.ENOENT and _current_directory_is_gone():
        return InputError(
            "E_FILE", "the current directory has been removed", hint="change to another one: cd"
        )
    return None


def _current_directory_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _was_writing(error: OSError, named: str) -> bool:
    """Whether `error` came from an attempt to write: what exists and may be read was not refused to a reader."""
    if error.errno in _OF_WRITING:
        return True
    if error.errno not in _NO_RIGHT:
        return False
    try:
        status = Path(named).stat()
    except OSError as other:
        return other.errno in NOTHING_THERE
    wanted = os.R_OK | os.X_OK if stat.S_ISDIR(status.st_mode) else os.R_OK
    return os.access(named, wanted)


def _advice_to_write(error: OSError, named: str) -> str:
    say = _ADVICE_TO_WRITE.get(error.errno or 0)
    return say(named) if say else "choose an output you may write to"


def _advice_about_rights(named: str) -> str:
    """The command that gives the right, or whom to ask for it."""
    path = Path(named).absolute()
    closed = next(
        (folder for folder in reversed(path.parents) if not os.access(folder, os.X_OK)), None
    )
    place = closed or path
    right = "read and enter" if closed or path.is_dir() else "read"
    with suppress(OSError):
        if place.lstat().st_uid == os.geteuid():
            return f"you own `{place}`: chmod u+{'rx' if right != 'read' else 'r'} {shell_word(str(place))}"
    return f"ask the owner of `{place}` for the right to {right} it"


def _advice_about_length(named: str) -> str:
    parts = [os.fsencode(part) for part in Path(named).parts]
    longest = max(map(len, parts), default=0)
    limit = _longest_name(Path(named))
    if longest > limit:
        return (
            f"choose a name that is {longest - limit} bytes shorter: the file system takes {limit}"
        )
    return (
        f"choose a shorter path: it has {len(os.fsencode(named))} bytes, {MAX_PATH - 1} are allowed"
    )


def _longest_name(path: Path) -> int:
    """How many bytes a name may have where `path` lies."""
    for folder in path.absolute().parents:
        with suppress(OSError, ValueError):
            return os.pathconf(folder, "PC_NAME_MAX")
    return MAX_NAME


def _first_file(named: str) -> str:
    """The part of a path that should be a directory and is none."""
    path = Path(named)
    for part in [*reversed(path.parents), path]:
        with suppress(OSError):
            if not stat.S_ISDIR(part.stat().st_mode):
                return str(part)
    return named


def expanded(path: StrPath) -> Path:
    """`path` with a home directory for its `~`; as it is where there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  pathlib raises where there is none


def _advice_about_absence(named: str) -> str:
    if Path(named).is_symlink():
        target = Path(named).readlink()
        return (
            f"it is a link to `{target}`, which does not exist: remove it, or let it lead somewhere"
        )
    return "check the path: was it moved or removed meanwhile?"


_ADVICE: dict[int, Callable[[str], str]] = {
    **dict.fromkeys(_NO_RIGHT, _advice_about_rights),
    **dict.fromkeys(_LOST, lambda _: "the file system has lost it: mount it again, then run again"),
    errno.ENAMETOOLONG: _advice_about_length,
    errno.ENOENT: _advice_about_absence,
    errno.ENOTDIR: lambda named: f"`{_first_file(named)}` is not a directory: check the path",
    errno.EISDIR: lambda _: "it is a directory: name a file in it",
    errno.ELOOP: lambda _: (
        "a link in this path leads back to itself: remove it, or let it lead somewhere"
    ),
    errno.EIO: lambda _: (
        "the disk or its driver is at fault: look at `dmesg`, then copy the file from elsewhere"
    ),
}
_ADVICE_TO_WRITE: dict[int, Callable[[str], str]] = {
    **dict.fromkeys(_NO_SPACE, lambda _: "free some space"),
    **dict.fromkeys(
        {*_LOST, errno.EIO}, lambda _: "choose an output on another disk, or look at `dmesg`"
    ),
    **dict.fromkeys(
        {errno.ENOTDIR, errno.EEXIST},
        lambda named: f"choose another output: `{_first_file(named)}` is not a directory",
    ),
    errno.ENAMETOOLONG: _advice_about_length,
    errno.ELOOP: lambda _: "remove the link that is there, or choose another output",
    errno.ENOENT: lambda _: "see whether somebody removes directories there while a run is going",
    errno.EROFS: lambda _: "choose an output on a file system that is not read-only",
}
