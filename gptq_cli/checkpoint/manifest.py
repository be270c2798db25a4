"""`gptq_manifest.json`: what a finished output is, and size and SHA-256 of each of its files, and a checksum
over itself. No times, no hosts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.durable import write_json
from gptq_cli.checkpoint.hashing import file_hashes
from gptq_cli.checkpoint.journal import digest
from gptq_cli.files import file_errors, files_below, is_file

MANIFEST = "gptq_manifest.json"
CONFIG_FILE = "gptq_config.yaml"  # the resolved configuration
REPORT_DATA, REPORT_PAGE = "gptq_report.json", "gptq_report.html"  # the report of the run
OF_THE_RUN = {CONFIG_FILE, MANIFEST, REPORT_DATA, REPORT_PAGE}  # what is about a run, not of the model
SCHEMA = 1


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """`content` and the hashes of all files in `directory`, as its last file; not of a report, which may change."""
    reports = {directory / REPORT_DATA, directory / REPORT_PAGE}
    paths = [path for path in files_below(directory) if path.is_file() and path not in reports]
    files = {
        path.relative_to(directory).as_posix(): {"sha256": found, "size": path.stat().st_size}
        for path, found in zip(paths, file_hashes(paths), strict=True)
    }
    write_json(directory / MANIFEST, sealed({"schema": SCHEMA, **content, "files": files}))


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the checksum that belongs to it, in place of another."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return {**content, "checksum": digest(content)}


def read_sealed(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`; None if there is none as it was written, by its own checksum.

    A GptqError if the file may not be read: then nobody knows what it is.
    """
    if not is_file(file):
        return None
    with file_errors(file, writing=False):
        raw = file.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if is_intact(content) else None


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in `directory`; None if there is none of ours that can be read."""
    content = read_sealed(directory / MANIFEST)
    return content if content is not None and content.get("schema") == SCHEMA else None


def is_intact(content: Any) -> bool:
    """Whether what was read is as it was written, by its own checksum."""
    return isinstance(content, dict) and content == sealed(content)
