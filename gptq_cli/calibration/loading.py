"""Rows of text through the `datasets` library, whose failures become errors with a hint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from logging import CRITICAL
from typing import Any

from gptq_cli.calibration.refusals import refusal
from gptq_cli.errors import InputError

REACH_SECONDS = 10.0
LISTED = 8  # columns named in a message


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What `datasets` is asked for: a Hub id or the name of a file reader, and which rows of it.

    `label` is what the user called it; `local` rows come from files of this machine; `stream` reads rows on demand and
    keeps no copy; `hint` is said when nothing is found.
    """

    path: str
    label: str
    split: str
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    local: bool = False
    stream: bool = False
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class TextColumn:
    """The strings of one column, row by row; may be read again.

    Reading raises InputError E_DATA_COLUMN at a row without a string, E_DATA_EMPTY if there is no row.
    """

    rows: Iterable[Mapping[str, Any]]
    column: str
    request: LoadRequest

    def __iter__(self) -> Iterator[str]:
        rows = iter(self.rows)
        for number in count(1):
            with refusals(self.request):
                row = next(rows, None)
            if row is None:
                break
            text = row.get(self.column)
            if not isinstance(text, str):
                raise self._no_text(number, row, text)
            yield text
        if number == 1:
            raise InputError(
                "E_DATA_EMPTY", f"dataset `{self.request.label}` has no rows", hint="choose a dataset that holds text"
            )

    def _no_text(self, number: int, row: Mapping[str, Any], value: object) -> InputError:
        if self.column not in row:
            return _no_column(self.column, list(row), self.request)
        found = "null" if value is None else type(value).__name__
        return _no_string(f"of row {number} holds {found}, not a string", self.column, list(row), self.request)


def open_column(request: LoadRequest, column: str) -> tuple[TextColumn, str | None]:
    """A column of the rows asked for, and the commit they come from if it is known; no row is read yet.

    Raises InputError as `refusal` says, and E_DATA_COLUMN if the schema has no such column of strings.
    """
    with refusals(request):
        if not request.local:
            _reach_hub(request.path)
        rows, revision = _open(request)
    _check_schema(rows, column, request)
    return TextColumn(rows, column, request), revision


def _reach_hub(dataset: str) -> None:
    """Raises what the Hub's client does when no connection is possible, which `datasets` tries for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if not HF_HUB_OFFLINE:
        with suppress(HfHubHTTPError):  # an answer, whatever it says
            HfApi().dataset_info(dataset, timeout=REACH_SECONDS, expand=["sha"])


def _open(request: LoadRequest) -> tuple[Iterable[Mapping[str, Any]], str | None]:
    import datasets

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


def _check_schema(rows: Iterable[Mapping[str, Any]], column: str, request: LoadRequest) -> None:
    """Refuses by the schema, where one is known before a row is read."""
    features = getattr(rows, "features", None)
    if not features:
        return
    if column not in features:
        raise _no_column(column, list(features), request)
    dtype = getattr(features[column], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise _no_string(f"holds {dtype}, not strings", column, list(features), request)


def _no_column(column: str, columns: list[str], request: LoadRequest) -> InputError:
    message = f"dataset `{request.label}` has no column `{column}`; it has {_listed(columns)}"
    return InputError("E_DATA_COLUMN", message, hint="name the column that holds the text with --text-column")


def _no_string(what: str, column: str, columns: list[str], request: LoadRequest) -> InputError:
    message = f"dataset `{request.label}`: column `{column}` {what}"
    others = [name for name in columns if name != column]
    hint = f"mend it, or name another with --text-column: {_listed(others)}" if others else "mend it"
    return InputError("E_DATA_COLUMN", message, hint=hint)


def _listed(columns: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in columns[:LISTED]) + (", ..." if len(columns) > LISTED else "")


@contextmanager
def refusals(request: LoadRequest) -> Iterator[None]:
    """Failures of `datasets` inside it leave as InputError, and it shows no logs and progress bars of its own."""
    with _silence():
        try:
            yield
        except Exception as error:
            refused = refusal(error, request.label, local=request.local, hint=request.hint)
            if refused is None:
                raise
            raise refused from error


@contextmanager
def _silence() -> Iterator[None]:
    """`datasets` and the Hub client say nothing on stderr; what they had been told before holds again afterwards."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, hub_verbosity = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    bars, hub_bars = datasets.is_progress_bar_enabled(), not are_progress_bars_disabled()
    datasets.logging.set_verbosity(CRITICAL)
    hub_logging.set_verbosity(CRITICAL)
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            datasets.enable_progress_bars()
        if hub_bars:
            enable_progress_bars()
