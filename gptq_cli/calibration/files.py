"""Texts in files of this machine: one document of a .txt file, one of each row of the others."""

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


@dataclass(frozen=True, slots=True)
class FileTexts:
    """The texts of some files, in order, read when they are asked for."""

    files: tuple[Path, ...]
    column: str

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with file_errors(file, writing=False):
                if file.stat().st_size == 0:
                    raise InputError(
                        "E_DATA_EMPTY",
                        f"dataset `{file}` is an empty file",
                        hint="choose a file that holds text",
                    )
                yield from self._texts(file)

    def _texts(self, file: Path) -> Iterable[str]:
        if suffix_of(file) == TEXT:
            return [decoded(file)]
        return texts_of(READERS[suffix_of(file)](file, self.column), self.column, str(file))


def suffix_of(file: Path) -> str:
    """How the name of `file` ends, in small letters: TRAIN.TXT is a text, too."""
    return file.suffix.lower()


def read_files(path: Path, column: str) -> Iterable[str]:
    """The texts of a file, or of the files of a folder sorted by name.

    Raises InputError E_DATA_NOT_FOUND, E_DATA_FORMAT for a folder of another kind; reading them raises E_DATA_ENCODING,
    E_DATA_FORMAT, E_DATA_COLUMN, E_DATA_EMPTY.
    """
    return FileTexts(_files_at(path), column)


def _listed(folder: Path) -> list[Path]:
    with file_errors(folder, writing=False):
        return list(folder.iterdir())


def has_columns(path: Path) -> bool:
    """Whether what lies at `path` is read by column: a file of rows, or a folder that holds one."""
    files = _listed(path) if is_directory(path) else [path]
    return any(suffix_of(file) in READERS for file in files)


def _files_at(path: Path) -> tuple[Path, ...]:
    kinds = ", ".join(SUFFIXES)
    if status_of(path) is None:
        raise InputError(
            "E_DATA_NOT_FOUND",
            f"dataset `{path}` does not exist",
            hint=f"give a {kinds} file, a folder or a Hub id",
        )
    if not path.is_dir() and not (path.is_file() and suffix_of(path) in SUFFIXES):
        raise InputError(
            "E_DATA_NOT_FOUND",
            f"dataset `{path}` is not a kind of file that is read",
            hint=f"give {kinds}",
        )
    if path.is_file():
        return (path,)
    _refuse_saved(path)
    files = tuple(
        file
        for file in sorted(_listed(path))
        if suffix_of(file) in SUFFIXES and file.name[0] != "."
    )
    if not files:
        raise InputError(
            "E_DATA_NOT_FOUND",
            f"folder `{path}` holds no file that is read",
            hint=f"put {kinds} files there",
        )
    return files


def _refuse_saved(folder: Path) -> None:
    """Name what `save_to_disk` of datasets has written, whose JSON files are about the texts."""
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
    message = f"folder `{folder}` was written by save_to_disk of datasets: Arrow files, which are not read"
    raise InputError(
        "E_DATA_FORMAT", message, hint=f"write it as JSON: python -c {shell_word(code)}"
    )
