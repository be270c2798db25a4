"""What tells that a file is still the one that was opened: compared again before anything is made of what was read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gptq_cli.errors import InputError
from gptq_cli.files import status_of

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
