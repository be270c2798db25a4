"""Identity of files and directories: equal directories under several names, mounts, changed files.

A directory is recognized by device and inode, so that links and other spellings of its name do not
matter. A file that is read for long has a stamp, by which a later check notices a change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gptq_cli.errors import InputError
from gptq_cli.files import status_of

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


def source_changed(path: Path, how: str) -> InputError:
    """Return InputError E_SOURCE_CHANGED; `how` completes a sentence about the file."""
    message = f"`{path}` has changed while it was read: it {how}"
    return InputError("E_SOURCE_CHANGED", message, hint=HINT)


def _difference(known: Stamp, found: Stamp | None) -> str:
    if found is None:
        return "is gone"
    if found.size != known.size:
        return f"had {known.size} bytes, but now has {found.size}"
    if (found.inode, found.device) != (known.inode, known.device):
        return "was replaced by another file"
    return "was written again"
