"""Rows in files of this machine: JSON and CSV; `tables.py` reads those that have a schema.

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
from typing import Any

from gptq_cli.calibration.chats import Form
from gptq_cli.calibration.columns import Content, LineRow, Row, columns_of_row, kind_of
from gptq_cli.calibration.encodings import TABLES, decoded, decoded_lines, suffix_of
from gptq_cli.errors import InputError

FIX = "fix that line"


def json_rows(file: Path, form: Form | None) -> Iterator[Row]:  # noqa: ARG001
    """Yield a row for each object: one on each line, or all in one list.

    A list of texts has the column `text`.
    """
    lines = _filled_lines(file)
    first = next(lines, None)
    if first is None:
        return
    if not _is_whole_document(first[1], file):
        for number, line in chain([first], lines):
            row = _row(_parsed(line.rstrip(), file, number), file, f"line {number}")
            yield LineRow.of(row, number)
        return
    document = _parsed(decoded(file), file)
    if not isinstance(document, list):
        document = [document]
    for number, item in enumerate(document, start=1):
        if isinstance(item, str):
            yield {"text": item}
        else:
            yield _row(item, file, f"item {number}")


def _filled_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield each line that is not blank, with its number."""
    for number, line in enumerate(decoded_lines(file), start=1):
        if line.strip():
            yield number, line


def csv_rows(file: Path, form: Form | None) -> Iterator[Row]:  # noqa: ARG001
    """Yield a row for each record after the header, its fields as text."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(decoded_lines(file), strict=True)
    end = 0  # line of the file on which the record before has ended
    header: list[str] = []
    try:
        for record in reader:
            begin, end = end + 1, reader.line_num
            if not record:
                continue
            if not header:
                _check_header(record, file)
                header = record
                continue
            if len(record) > len(header):
                many = f"{len(record)} fields, but the header has {len(header)}"
                raise _broken(file, f"line {end} has {many}", FIX)
            yield LineRow.of(dict(zip_longest(header, record)), begin)
    except csv.Error as error:
        raise _broken(file, f"line {reader.line_num} is not CSV: {error}", FIX) from error


def table_rows(file: Path, form: Form) -> Iterator[Row]:
    """Yield the rows of a file that has a schema; see `tables.table_rows`."""
    from gptq_cli.calibration import tables

    return tables.table_rows(file, form)


def columns_of_file(file: Path) -> dict[str, Content]:
    """Return the content of each column of a file of rows.

    It is that of the schema or of the first row; there are no columns if the file has no row.
    """
    if file.stat().st_size == 0:
        return {}
    if suffix_of(file) in TABLES:
        from gptq_cli.calibration import tables

        return tables.columns_of_table(file)
    return columns_of_row(next(READERS[suffix_of(file)](file, None), None))


READERS: dict[str, Callable[[Path, Any], Iterator[Row]]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".csv": csv_rows,
    ".parquet": table_rows,
    ".arrow": table_rows,
}


def _is_whole_document(line: str, file: Path) -> bool:
    """Return whether a first line begins one value that fills the file.

    That is a list, or in a .json file an object that ends on a later line.
    """
    if line.lstrip().startswith("["):
        return True
    if suffix_of(file) != ".json":
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
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


def _broken(file: Path, reason: str, hint: str) -> InputError:
    return InputError("E_DATA_FORMAT", f"dataset `{file}` cannot be read: {reason}", hint=hint)
