"""Texts in files of this machine: one document of a .txt file, one of each row of the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.calibration.loading import LoadRequest, open_column
from gptq_cli.calibration.refusals import encoding_refusal
from gptq_cli.errors import InputError
from gptq_cli.files import file_errors, is_directory, status_of

# pandas would read the words "NA" and "None" of a CSV file as null; a Parquet file without rows has no batch size
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {"batch_size": 1024}),
}


@dataclass(frozen=True, slots=True)
class FileTexts:
    """The texts of some files, in order, read when they are asked for."""

    files: tuple[Path, ...]
    column: str

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with file_errors(file, writing=False):
                file.open("rb").close()  # libraries say less of what may not be read
                size = file.stat().st_size
            if size == 0:
                raise InputError(
                    "E_DATA_EMPTY", f"dataset `{file}` is an empty file", hint="choose a file that holds text"
                )
            if file.suffix == ".txt":
                yield _read_text(file)
            else:
                yield from _read_rows(file, self.column)


def read_files(path: Path, column: str) -> Iterable[str]:
    """The texts of a file, or of the files of a folder sorted by name.

    Raises InputError E_DATA_NOT_FOUND; reading them raises E_DATA_ENCODING, E_DATA_FORMAT, E_DATA_COLUMN, E_DATA_EMPTY.
    """
    return FileTexts(_files_at(path), column)


def _listed(folder: Path) -> list[Path]:
    with file_errors(folder, writing=False):
        return list(folder.iterdir())


def has_columns(path: Path) -> bool:
    """Whether what lies at `path` is read by column: a file of rows, or a folder that holds one."""
    files = _listed(path) if is_directory(path) else [path]
    return any(file.suffix in READERS and file.suffix != ".txt" for file in files)


def _files_at(path: Path) -> tuple[Path, ...]:
    kinds = ", ".join(READERS)
    if status_of(path) is None:
        raise InputError(
            "E_DATA_NOT_FOUND", f"dataset `{path}` does not exist", hint=f"give a {kinds} file, a folder or a Hub id"
        )
    if not path.is_dir() and not (path.is_file() and path.suffix in READERS):
        raise InputError(
            "E_DATA_NOT_FOUND", f"dataset `{path}` is not a kind of file that is read", hint=f"give {kinds}"
        )
    if path.is_file():
        return (path,)
    files = tuple(sorted(file for file in _listed(path) if file.suffix in READERS and not file.name.startswith(".")))
    if not files:
        raise InputError(
            "E_DATA_NOT_FOUND", f"folder `{path}` holds no file that is read", hint=f"put {kinds} files there"
        )
    return files


def _read_rows(file: Path, column: str) -> Iterator[str]:
    try:
        yield from open_column(_request(file), column)[0]
    except InputError as error:
        broken = _broken_line(file) if error.code == "E_DATA_FORMAT" and file.suffix == ".jsonl" else None
        if broken is None:
            raise
        raise InputError(
            "E_DATA_FORMAT", f"dataset `{file}` cannot be read: {broken}", hint="mend that line"
        ) from error


def _broken_line(file: Path) -> str | None:
    """The first line of a file of one JSON object a line that is none, and why."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except (ValueError, RecursionError) as error:
                return f"line {number} is not JSON: {error}"
    return None


def _read_text(file: Path) -> str:
    try:
        with file_errors(file, writing=False):
            return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise encoding_refusal(str(file), error, whole_file=True) from error


def _request(file: Path) -> LoadRequest:
    reader, options = READERS[file.suffix]
    return LoadRequest(
        reader,
        label=str(file),
        split="train",
        data_files={"train": str(file)},
        options=options,
        local=True,
        stream=True,
    )
