"""`gptq_manifest.json`: what a finished output is, and size and SHA-256 of each of its files. No times, no hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.durable import file_sha256, write_json

MANIFEST = "gptq_manifest.json"
CONFIG_FILE = "gptq_config.yaml"  # the resolved configuration
OF_THE_RUN = {CONFIG_FILE, MANIFEST, "gptq_report.json", "gptq_report.html"}  # what is about a run, not of the model
SCHEMA = 1


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """`content` and the hashes of all files in `directory`, as its last file."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {
        path.relative_to(directory).as_posix(): {"sha256": file_sha256(path), "size": path.stat().st_size}
        for path in paths
    }
    write_json(directory / MANIFEST, {"schema": SCHEMA, **content, "files": files})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in `directory`; None if there is none of ours that can be read."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else None


def damaged_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Names of files that are not there as `manifest` lists them."""
    return [name for name, entry in manifest["files"].items() if not _is_as_listed(directory / name, entry)]


def _is_as_listed(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["size"] and file_sha256(path) == entry["sha256"]
