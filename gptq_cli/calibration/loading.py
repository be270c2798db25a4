"""Rows of text through the `datasets` library, whose failures become errors with a hint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gptq_cli.calibration.refusals import refusal
from gptq_cli.errors import InputError


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What `datasets` is asked for: a Hub id or the name of a file reader, and which rows of it.

    `label` is what the user called it; `stream` reads rows on demand and keeps no copy; `hint` is said when nothing is found.
    """

    path: str
    label: str
    split: str
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class TextColumn:
    """The strings of one column, row by row; may be read again. A row without a string is InputError E_DATA_COLUMN."""

    rows: Iterable[Mapping[str, Any]]
    column: str
    request: LoadRequest

    def __iter__(self) -> Iterator[str]:
        with refusals(self.request):
            for number, row in enumerate(self.rows, start=1):
                text = row.get(self.column)
                if not isinstance(text, str):
                    raise self._no_text(number, row, text)
                yield text

    def _no_text(self, number: int, row: Mapping[str, Any], value: object) -> InputError:
        label, columns = self.request.label, ", ".join(f"`{name}`" for name in row)
        if self.column not in row:
            message = f"dataset `{label}` has no column `{self.column}`; it has {columns}"
            return InputError("E_DATA_COLUMN", message, hint="name the column that holds the text with --text-column")
        found = "null" if value is None else type(value).__name__
        message = f"dataset `{label}`: column `{self.column}` of row {number} holds {found}, not a string"
        return InputError("E_DATA_COLUMN", message, hint=f"mend the row, or choose another column of {columns}")


def open_column(request: LoadRequest, column: str) -> tuple[TextColumn, str | None]:
    """A column of the rows asked for, and the commit they come from if it is known; its first row has been read.

    Raises InputError as `refusal` says, E_DATA_COLUMN, and E_DATA_EMPTY when there is no row.
    """
    with refusals(request):
        rows, revision = _open(request)
    texts = TextColumn(rows, column, request)
    if next(iter(texts), None) is None:
        raise InputError("E_DATA_EMPTY", f"dataset `{request.label}` has no rows", hint="choose a dataset that holds text")
    return texts, revision


def _open(request: LoadRequest) -> tuple[Iterable[Mapping[str, Any]], str | None]:
    import datasets

    with _silent(datasets):
        builder = datasets.load_dataset_builder(
            request.path, request.config, data_files=request.data_files, **request.options
        )
        if request.stream:
            rows = builder.as_streaming_dataset(split=request.split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=request.split)
    # the builder of a Hub dataset is known by the commit that it was resolved to
    return rows, builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else None


@contextmanager
def refusals(request: LoadRequest) -> Iterator[None]:
    """Failures of `datasets` inside it leave as InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        refused = refusal(error, request.label, local=request.path in LOCAL_READERS, hint=request.hint)
        if refused is None:
            raise
        raise refused from error
