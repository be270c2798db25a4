"""Rows of text through the `datasets` library, whose failures become errors with a hint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

from gptq_cli.calibration.columns import Row, check_schema, texts_of
from gptq_cli.calibration.refusals import refusal
from gptq_cli.errors import InputError

REACH_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Which rows of a Hub dataset are asked for.

    `label` is what the user called it; `stream` reads rows on demand and keeps no copy; `hint` is said when nothing is
    found.
    """

    path: str
    label: str
    split: str
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    stream: bool = False
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class TextColumn:
    """The strings of one column, row by row; may be read again. Reading raises InputError as `texts_of`."""

    rows: Iterable[Row]
    column: str
    request: LoadRequest

    def __iter__(self) -> Iterator[str]:
        return texts_of(self._rows(), self.column, self.request.label)

    def _rows(self) -> Iterator[Row]:
        rows = iter(self.rows)
        while True:
            with refusals(self.request):
                row = next(rows, None)
            if row is None:
                return
            yield row


def open_column(request: LoadRequest, column: str) -> tuple[TextColumn, str | None]:
    """A column of the rows asked for, and the commit they come from if it is known; no row is read yet.

    Raises InputError as `refusal` says, and E_DATA_COLUMN if the schema has no such column of strings.
    """
    _refuse_namesakes(request)
    with refusals(request):
        _reach_hub(request.path)
        rows, revision = _open(request)
    features = getattr(rows, "features", None)  # of a stream they may not be known before a row is read
    if features:
        check_schema(features.arrow_schema, column, request.label)
    return TextColumn(rows, column, request), revision


def _refuse_namesakes(request: LoadRequest) -> None:
    """`datasets` would rather read a folder of this name here, or take the name for a kind of file."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as KINDS

    if request.path in KINDS:
        message = f"dataset `{request.label}` is a kind of file to `datasets`, and no Hub dataset"
        raise InputError("E_DATA_NOT_FOUND", message, hint="give the path of the file itself")
    if Path(request.path).exists():
        message = f"`{request.path}` in the current directory has the name of the Hub dataset `{request.label}`"
        raise InputError("E_DATA_NOT_FOUND", message, hint="run in another directory, or rename what is there")


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

    builder = datasets.load_dataset_builder(request.path, request.config, data_files=request.data_files)
    if request.stream:
        rows = builder.as_streaming_dataset(split=request.split)
    else:
        builder.download_and_prepare()
        rows = builder.as_dataset(split=request.split)
    # the builder of a Hub dataset is known by the commit that it was resolved to
    return rows, builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else None


@contextmanager
def refusals(request: LoadRequest) -> Iterator[None]:
    """Failures of `datasets` inside it leave as InputError, and it shows no logs and progress bars of its own."""
    with _silence():
        try:
            yield
        except Exception as error:
            refused = refusal(error, request.label, request.hint)
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
