"""Rows in files of this machine: JSON, CSV and Parquet.

`datasets` does not read them: it would take the name of a file for a pattern or an address
(`data[1].jsonl`, `a::b.csv`).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from gptq_cli.calibration.chats import BESIDE_CHATS, Form, columns_of_row
from gptq_cli.calibration.columns import Row, check_schema, columns_of_schema, kind_of
from gptq_cli.calibration.encodings import decoded, decoded_lines
from gptq_cli.errors import InputError

PARQUET_ROWS = 1024
FIX = "fix that line"


def json_rows(file: Path, form: Form | None) -> Iterator[Row]:  # noqa: ARG001
    """Yield a row for each object: one on each line, or all in one list.

    A list of texts has the column `text`.
    """
    with file.open("rb") as stream:
        lines = _filled_lines(stream, str(file))
        first = next(lines, None)
        if first is None:
            return
        if not _is_whole_document(first[1], file):
            for number, line in chain([first], lines):
                yield _row(_parsed(line.rstrip(), file, number), file, f"line {number}")
            return
    document = _parsed(decoded(file), file)
    if not isinstance(document, list):
        document = [document]
    for number, item in enumerate(document, start=1):
        if isinstance(item, str):
            yield {"text": item}
        else:
            yield _row(item, file, f"item {number}")


def _filled_lines(stream: BinaryIO, label: str) -> Iterator[tuple[int, str]]:
    """Yield each line that is not blank, with its number."""
    for number, line in enumerate(decoded_lines(stream, label), start=1):
        if line.strip():
            yield number, line


def csv_rows(file: Path, form: Form | None) -> Iterator[Row]:  # noqa: ARG001
    """Yield a row for each record after the header, its fields as text."""
    csv.field_size_limit(sys.maxsize)
    with file.open("rb") as stream:
        reader = csv.reader(decoded_lines(stream, str(file)), strict=True)
        records = filter(None, reader)
        try:
            header = next(records, [])
            _check_header(header, file)
            for record in records:
                if len(record) > len(header):
                    many = f"{len(record)} fields, but the header has {len(header)}"
                    raise _broken(file, f"line {reader.line_num} has {many}", FIX)
                yield dict(zip_longest(header, record))
        except csv.Error as error:
            raise _broken(file, f"line {reader.line_num} is not CSV: {error}", FIX) from error


def parquet_rows(file: Path, form: Form) -> Iterator[Row]:
    """Yield the rows with the columns of `form`, and with those that a chat may have besides.

    Raises InputError E_DATA_COLUMN if the schema lacks the column of text.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with file.open("rb") as stream:
        try:
            table = ParquetFile(stream)
            columns = list(form.columns)
            if form.is_chat:
                columns += [name for name in BESIDE_CHATS if name in table.schema_arrow.names]
            else:
                check_schema(table.schema_arrow, form.columns[0], str(file))
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise _damaged(file, error) from error


def _parquet_columns(file: Path) -> dict[str, bool]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    with file.open("rb") as stream:
        try:
            return columns_of_schema(read_schema(stream))
        except (ArrowException, OSError) as error:
            raise _damaged(file, error) from error


def columns_of_file(file: Path) -> dict[str, bool]:
    """Return the columns of a file of rows, true for each that holds chat messages.

    They are those of the schema or of the first row; none if the file has no row.
    """
    if file.stat().st_size == 0:
        return {}
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet_columns(file)
    return columns_of_row(next(READERS[suffix](file, None), None))


READERS: dict[str, Callable[[Path, Any], Iterator[Row]]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def _is_whole_document(line: str, file: Path) -> bool:
    """Return whether a first line begins one value that fills the file.

    That is a list, or in a .json file an object that ends on a later line.
    """
    if line.lstrip().startswith("["):
        return True
    if file.suffix.lower() != ".json":
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _parsed(text: str, file: Path, line: int = 1) -> Any:
    """Return the JSON value in `text`, which begins at a line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1} is not JSON: {error.msg}, column {error.colno}"
        raise _broken(file, place, FIX) from error
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"line {line} cannot be read: {error}", FIX) from error


def _row(item: Any, file: Path, place: str) -> Row:
    if not isinstance(item, dict):
        reason = f"{place} holds {kind_of(item)}, not an object"
        raise _broken(file, reason, 'write {"text": "..."} for each text')
    return item


def _check_header(header: list[str], file: Path) -> None:
    for name in header:
        if header.count(name) > 1:
            raise _broken(file, f"its header has the column `{name}` twice", "rename one of them")


def _damaged(file: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return _broken(file, reason, "check that it is a whole Parquet file")


def _broken(file: Path, reason: str, hint: str) -> InputError:
    return InputError("E_DATA_FORMAT", f"dataset `{file}` cannot be read: {reason}", hint=hint)
