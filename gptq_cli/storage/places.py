"""Which directories are the same one, whatever their names are, and which of them are mount points."""

from __future__ import annotations

import os
import re
from pathlib import Path

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
