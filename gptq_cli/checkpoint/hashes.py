"""`gptq_manifest.json`: size and SHA-256 of every file of a published checkpoint, {"files": {name: {...}}}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from gptq_cli.checkpoint.defect import Defect
from gptq_cli.checkpoint.hashing import file_hash
from gptq_cli.checkpoint.manifest import MANIFEST, REPORT_DATA, REPORT_PAGE, is_intact
from gptq_cli.checkpoint.source import is_safe_file, read_json
from gptq_cli.errors import InputError
from gptq_cli.files import UNREADABLE, is_file

PAGES = {".md", ".html", ".png", ".log"}  # what people read


def check_manifest(directory: Path, *, full: bool) -> tuple[int, list[Defect]]:
    """How many files were hashed, and which differ from what the manifest, if there is one, says of them.

    Without `full` only names and sizes are compared. A file that the manifest does not list is a defect unless no
    reader of models would take notice of it.
    """
    if not is_file(directory / MANIFEST):
        return 0, []
    try:
        content = read_json(directory / MANIFEST)
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        return 0, [Defect("E_CKPT_HASH", str(error), MANIFEST)]
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return 0, [Defect("E_CKPT_HASH", "has no mapping `files`", MANIFEST)]
    defects = [] if is_intact(content) else [Defect("E_CKPT_HASH", "is not as it was written", MANIFEST)]
    defects += [defect for name, entry in files.items() for defect in _check_file(directory, name, entry, full=full)]
    hint = "move it out of the directory, unless you know why it is there"
    unlisted = [name for name in _files_of(directory) if name not in files and not _is_beside(name)]
    defects += [Defect("E_CKPT_HASH", "is not in the manifest", name, None, hint, "readers") for name in unlisted]
    return len(files) if full else 0, defects


def _files_of(directory: Path) -> list[str]:
    """Names of all files in `directory` and below, relative to it."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _is_beside(name: str) -> bool:
    """Whether a file may come to a finished checkpoint: about the run, a page or picture, or hidden, as git's are."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    about_the_run = name in (MANIFEST, REPORT_DATA, REPORT_PAGE)
    return hidden or about_the_run or path.suffix.lower() in PAGES or path.name.startswith("LICENSE")


def _check_file(directory: Path, name: str, entry: dict[str, Any], *, full: bool) -> Iterator[Defect]:
    file = directory / name
    if not is_safe_file(directory, name):
        yield Defect("E_UNSAFE_PATH", f"names a file outside the directory: {name!r}", MANIFEST)
    elif not is_file(file):
        yield Defect("E_CKPT_MISSING", "is in the manifest and not here", name)
    elif file.stat().st_size != entry.get("size"):
        yield Defect("E_CKPT_HASH", f"has {file.stat().st_size} bytes, the manifest says {entry.get('size')}", name)
    elif full and (found := file_hash(file)) != entry.get("sha256"):
        said = str(entry.get("sha256"))[:12]
        yield Defect("E_CKPT_HASH", f"has SHA-256 {found[:12]}..., the manifest says {said}...", name)
