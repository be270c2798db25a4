"""Files of rows in the formats that datasets have."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping

import pyarrow
from pyarrow import parquet


def parquet_bytes(table: pyarrow.Table) -> bytes:
    """Return the Parquet file of `table`."""
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def json_lines(rows: Iterable[Mapping[str, object]]) -> str:
    """Return the text of a file with one JSON object per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)
