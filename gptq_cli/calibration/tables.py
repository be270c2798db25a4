"""Rows in files that have a schema: Parquet, Arrow, and the folders that `save_to_disk` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptq_cli.calibration.chats import BESIDE_CHATS, Form
from gptq_cli.calibration.columns import Content, Row, check_schema, columns_of_schema
from gptq_cli.errors import InputError, shown
from gptq_cli.files import file_errors, is_file

BATCH_ROWS = 1024
ARROW_FILE = b"ARROW1"  # the first bytes of a file that can be read from its end; a stream has none
DICT_FILE = "dataset_dict.json"
STATE_FILE = "state.json"
WHOLE = {".parquet": "Parquet", ".arrow": "Arrow"}


def table_rows(file: Path, form: Form) -> Iterator[Row]:
    """Yield the rows with the columns of `form`, and with those that a chat may have besides.

    Raises InputError E_DATA_COLUMN if the schema lacks the column of text, E_DATA_FORMAT if the
    file is damaged.
    """
    with _open_table(file) as table:
        schema = table.schema
        columns = list(form.columns)
        if form.is_chat:
            columns += [name for name in BESIDE_CHATS if name in schema.names]
        else:
            check_schema(schema, form.columns, str(file))
        for batch in table.batches(columns):
            yield from batch.to_pylist()


def columns_of_table(file: Path) -> dict[str, Content]:
    """Return the content of each column of a file; errors as `table_rows`."""
    with _open_table(file) as table:
        return columns_of_schema(table.schema)


class _ParquetTable:
    def __init__(self, stream: Any) -> None:
        from pyarrow.parquet import ParquetFile

        self._file = ParquetFile(stream)
        self.schema = self._file.schema_arrow

    def batches(self, columns: list[str]) -> Iterator[Any]:
        yield from self._file.iter_batches(batch_size=BATCH_ROWS, columns=columns)


class _ArrowTable:
    """A file of Arrow's IPC format: a stream, as `datasets` writes it, or a file with an index."""

    def __init__(self, stream: Any) -> None:
        from pyarrow import ipc

        start = stream.read(len(ARROW_FILE))
        stream.seek(0)
        if start == ARROW_FILE:
            self._reader = ipc.open_file(stream)
        else:
            self._reader = ipc.open_stream(stream)
        self.schema = self._reader.schema

    def batches(self, columns: list[str]) -> Iterator[Any]:
        if not hasattr(self._reader, "num_record_batches"):
            for batch in self._reader:
                yield batch.select(columns)
            return
        for index in range(self._reader.num_record_batches):
            yield self._reader.get_batch(index).select(columns)


@contextmanager
def _open_table(file: Path) -> Iterator[_ParquetTable | _ArrowTable]:
    """Yield the table of a file; InputError E_DATA_FORMAT if it is damaged."""
    from pyarrow import ArrowException

    suffix = file.suffix.lower()
    with file.open("rb") as stream:
        try:
            if suffix == ".parquet":
                yield _ParquetTable(stream)
            else:
                yield _ArrowTable(stream)
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            message = f"dataset `{file}` cannot be read: {reason}"
            hint = f"check that it is a whole {WHOLE[suffix]} file"
            raise InputError("E_DATA_FORMAT", message, hint=hint) from error


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of `datasets`."""
    return is_file(folder / DICT_FILE) or is_file(folder / STATE_FILE)


def has_splits(folder: Path) -> bool:
    """Return whether a folder of `save_to_disk` holds splits, one of which is to be read."""
    return is_file(folder / DICT_FILE)


def saved_files(folder: Path, split: str | None, usual_split: str) -> tuple[Path, ...]:
    """Return the Arrow files of a folder of `save_to_disk`, in the order of their rows.

    `split` is the one that the user named; without one, `usual_split` is read, or the only one.
    Raises InputError E_DATA_SPLIT if there is no such split, E_DATA_FORMAT if a file is missing or
    damaged.
    """
    if has_splits(folder):
        folder = folder / _chosen_split(folder, split, usual_split)
    state = _read(folder / STATE_FILE)
    files = []
    for entry in state.get("_data_files") or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise _not_saved(folder / STATE_FILE, "it names no files")
        file = folder / Path(entry["filename"]).name
        if not is_file(file):
            raise _not_saved(folder / STATE_FILE, f"it names `{file.name}`, which is not there")
        files.append(file)
    if not files:
        raise _not_saved(folder / STATE_FILE, "it names no files")
    return tuple(files)


def _chosen_split(folder: Path, split: str | None, usual_split: str) -> str:
    splits = _splits_of(folder)
    wanted = split or usual_split
    if wanted in splits:
        return wanted
    if split is None and len(splits) == 1:
        return splits[0]
    message = f"dataset `{folder}` has no split `{wanted}`; it has {', '.join(splits)}"
    raise InputError("E_DATA_SPLIT", message, hint="name a split with --dataset-split")


def _splits_of(folder: Path) -> list[str]:
    """Return the splits that the folder names; InputError E_DATA_FORMAT if one is outside."""
    splits = _read(folder / DICT_FILE).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise _not_saved(folder / DICT_FILE, "it names no splits")
    for name in splits:
        if name in ("", ".", "..") or Path(name).name != name:
            raise _not_saved(folder / DICT_FILE, f"its split {shown(name)} is outside the folder")
    return splits


def _read(file: Path) -> dict[str, Any]:
    with file_errors(file, writing=False):
        content = file.read_bytes()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _not_saved(file, f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise _not_saved(file, "it holds no object")
    return values


def _not_saved(file: Path, reason: str) -> InputError:
    message = f"dataset `{file}` cannot be read: {reason}"
    return InputError("E_DATA_FORMAT", message, hint="write the folder again with save_to_disk")
