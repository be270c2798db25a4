"""Which directories are the same one, whatever their names are, and which of them are mount points."""

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
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def identity(path: Path) -> Identity | None:
    """Device and inode of what `path` leads to; None if that is nothing, or cannot be asked."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def at_and_above(path: Path) -> set[Identity]:
    """The identities of `path` and of the directories above it, as far as they exist."""
    whole = Path(os.path.realpath(path))
    found = {identity(place) for place in (whole, *whole.parents)}
    return {place for place in found if place is not None}


def is_inside(path: Path, directory: Path) -> bool:
    """True if `path`, which need not exist, is `directory` or below it, by device and inode."""
    return identity(directory) in at_and_above(path)


def mounts_below(directory: Path) -> list[Path]:
    """The mount points at and below `directory`, on the same file system too; only those that Linux lists."""
    whole = Path(os.path.realpath(directory))
    return [place for place in _mount_points() if place.is_relative_to(whole)]


def is_mount(directory: Path) -> bool:
    """True for a mount point, on the same file system too. A link to one is none."""
    return os.path.ismount(directory) or Path(os.path.realpath(directory)) in _mount_points()


def _mount_points() -> list[Path]:
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return []  # not Linux: st_dev alone tells
    fields = [line.split(b" ") for line in lines]
    names = [
        _ESCAPED.sub(_letter, line[4]) for line in fields if len(line) > 4
    ]  # proc(5): the fifth field
    return [Path(os.fsdecode(name)) for name in names]


def _letter(escaped: re.Match[bytes]) -> bytes:
    return bytes([int(escaped[1], 8)])


HINT = "let nothing write to the model while it is read, then run the same command again"


class Stamp(NamedTuple):
    """A file as its directory entry describes it; `changed` is the time that no program can set back."""

    size: int
    modified: int
    changed: int
    inode: int
    device: int


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file, or of what a link leads to, None if nothing is there; a GptqError if that cannot be told."""
    found = status_of(path)
    return (
        None
        if found is None
        else Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    )


def check_stamps(stamps: Mapping[Path, Stamp]) -> None:
    """InputError E_SOURCE_CHANGED if a file is not what its stamp says."""
    for path, known in stamps.items():
        found = stamp_of(path)
        if found != known:
            raise source_changed(path, _difference(known, found))


def source_changed(path: Path, how: str) -> InputError:
    """InputError E_SOURCE_CHANGED: `how` completes a sentence about the file."""
    return InputError(
        "E_SOURCE_CHANGED", f"`{path}` has changed while it was read: it {how}", hint=HINT
    )


def _difference(known: Stamp, found: Stamp | None) -> str:
    if found is None:
        return "is gone"
    if found.size != known.size:
        return f"had {known.size} bytes, and has {found.size}"
    if (found.inode, found.device) != (known.inode, known.device):
        return "was replaced by another file"
    return "was written again"
