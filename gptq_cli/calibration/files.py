"""Texts in files of this machine: a .txt file is one document, each row of other files is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.calibration.columns import texts_of
from gptq_cli.calibration.encodings import decoded
from gptq_cli.calibration.rows import READERS
from gptq_cli.errors import InputError
from gptq_cli.files import file_errors, is_directory, is_file, resolved, status_of
from gptq_cli.shell import shell_word

TEXT = ".txt"
SUFFIXES = (TEXT, *READERS)
KINDS = ", ".join(SUFFIXES)


@dataclass(frozen=True, slots=True)
class FileTexts:
    """The texts of some files in order, read on demand."""

    files: tuple[Path, ...]
    column: str

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with file_errors(file, writing=False):
                if file.stat().st_size == 0:
                    message = f"dataset `{file}` is an empty file"
                    raise InputError("E_DATA_EMPTY", message, hint="choose a file that holds text")
                yield from self._texts(file)

    def _texts(self, file: Path) -> Iterable[str]:
        if suffix_of(file) == TEXT:
            return [decoded(file)]
        rows = READERS[suffix_of(file)](file, self.column)
        return texts_of(rows, self.column, str(file))


def suffix_of(file: Path) -> str:
    """Return the suffix of a file's name in small letters: TRAIN.TXT is a text, too."""
    return file.suffix.lower()


def read_files(path: Path, column: str) -> Iterable[str]:
    """Return the texts of a file, or of the files of a folder sorted by name.

    Raises InputError: E_DATA_NOT_FOUND, and E_DATA_FORMAT for a folder of another kind. Reading the
    texts raises E_DATA_ENCODING, E_DATA_FORMAT, E_DATA_COLUMN and E_DATA_EMPTY.
    """
    return FileTexts(_files_at(path), column)


def _listed(folder: Path) -> list[Path]:
    with file_errors(folder, writing=False):
        return list(folder.iterdir())


def has_columns(path: Path) -> bool:
    """Return whether `path` leads to a file of rows, or to a folder that holds one."""
    files = _listed(path) if is_directory(path) else [path]
    return any(suffix_of(file) in READERS for file in files)


def _files_at(path: Path) -> tuple[Path, ...]:
    if status_of(path) is None:
        hint = f"give a {KINDS} file, a folder or a Hub id"
        raise InputError("E_DATA_NOT_FOUND", f"dataset `{path}` does not exist", hint=hint)
    if path.is_dir():
        _refuse_saved(path)
        return _files_in(path)
    if not path.is_file() or suffix_of(path) not in SUFFIXES:
        message = f"dataset `{path}` is not a supported type of file"
        raise InputError("E_DATA_NOT_FOUND", message, hint=f"give {KINDS}")
    return (path,)


def _files_in(folder: Path) -> tuple[Path, ...]:
    files = []
    for file in sorted(_listed(folder)):
        if suffix_of(file) in SUFFIXES and not file.name.startswith("."):
            files.append(file)
    if not files:
        message = f"folder `{folder}` holds no file that is read"
        raise InputError("E_DATA_NOT_FOUND", message, hint=f"put {KINDS} files there")
    return tuple(files)


def _refuse_saved(folder: Path) -> None:
    """Raise E_DATA_FORMAT for a folder of `save_to_disk`, whose JSON files hold no texts."""
    place = resolved(folder)
    splits = sorted(file.parent.name for file in folder.glob("*/state.json"))
    if is_file(folder / "dataset_dict.json") and splits:
        split = "train" if "train" in splits else splits[0]
        loaded = f"load_from_disk({str(place)!r})[{split!r}]"
    elif is_file(folder / "dataset_info.json") and is_file(folder / "state.json"):
        loaded = f"load_from_disk({str(place)!r})"
    else:
        return
    target = str(place.with_name(f"{place.name}.jsonl"))
    code = f"from datasets import load_from_disk; {loaded}.to_json({target!r})"
    message = f"folder `{folder}` was written by save_to_disk of datasets: Arrow files are not read"
    hint = f"write it as JSON: python -c {shell_word(code)}"
    raise InputError("E_DATA_FORMAT", message, hint=hint)
