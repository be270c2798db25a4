"""Rows in files of this machine: JSON, CSV and Parquet.

`datasets` takes the name of a file for a pattern or an address (`data[1].jsonl`, `a::b.csv`), so it is given none.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from gptq_cli.calibration.columns import Row, check_schema, kind_of
from gptq_cli.calibration.encodings import decoded, decoded_lines
from gptq_cli.errors import InputError

PARQUET_ROWS = 1024


def json_rows(file: Path, column: str) -> Iterator[Row]:  # noqa: ARG001
    """A row for each object: one on each line, or all in one list; a list of texts has the column `text`."""
    with file.open("rb") as stream:
        lines = enumerate(decoded_lines(stream, str(file)), start=1)
        filled = ((number, line) for number, line in lines if line.strip())
        first = next(filled, None)
        if first is None:
            return
        if not _is_whole_document(first[1], file):
            for number, line in chain([first], filled):
                yield _row(_parsed(line.rstrip(), file, number), file, f"line {number}")
            return
    document = _parsed(decoded(file), file)
    for number, item in enumerate(document if isinstance(document, list) else [document], start=1):
        yield {"text": item} if isinstance(item, str) else _row(item, file, f"item {number}")


def csv_rows(file: Path, column: str) -> Iterator[Row]:  # noqa: ARG001
    """A row for each record after the header, its fields as text."""
    csv.field_size_limit(sys.maxsize)
    with file.open("rb") as stream:
        reader = csv.reader(decoded_lines(stream, str(file)), strict=True)
        records = filter(None, reader)
        try:
            header = next(records, [])
            _check_header(header, file)
            for record in records:
                if len(record) > len(header):
                    many = f"{len(record)} fields, the header {len(header)}"
                    raise _broken(file, f"line {reader.line_num} has {many}", "fix that line")
                missing = [None] * (len(header) - len(record))
                yield dict(zip(header, [*record, *missing], strict=True))
        except csv.Error as error:
            raise _broken(
                file, f"line {reader.line_num} is not CSV: {error}", "fix that line"
            ) from error


def parquet_rows(file: Path, column: str) -> Iterator[Row]:
    """The rows of one column, some at a time; InputError E_DATA_COLUMN if the schema does not have it as text."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with file.open("rb") as stream:
        try:
            table = ParquetFile(stream)
            check_schema(table.schema_arrow, column, str(file))
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for text in batch.column(column).to_pylist():
                    yield {column: text}
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise _broken(file, reason, "check its content: is it Parquet, and whole?") from error


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def _is_whole_document(line: str, file: Path) -> bool:
    """Whether a first line begins one value that fills the file: a list, or in a .json file an unfinished object."""
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
    """The JSON value in `text`, which begins at a line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1} is not JSON: {error.msg}, column {error.colno}"
        raise _broken(file, place, "fix that line") from error
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"line {line} cannot be taken: {error}", "fix that line") from error


def _row(item: Any, file: Path, place: str) -> Row:
    if not isinstance(item, dict):
        raise _broken(
            file,
            f"{place} holds {kind_of(item)}, not an object",
            'write {"text": "..."} for each text',
        )
    return item


def _check_header(header: list[str], file: Path) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise _broken(file, f"its header has the column `{twice}` twice", "rename one of them")


def _broken(file: Path, why: str, hint: str) -> InputError:
    return InputError("E_DATA_FORMAT", f"dataset `{file}` cannot be read: {why}", hint=hint)
