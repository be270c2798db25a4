"""Rows of text through the `datasets` library; failures of it and of the Hub become errors with a
hint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

from gptq_cli.calibration.columns import Row, check_schema, texts_of
from gptq_cli.errors import InputError
from gptq_cli.hub_errors import GATED, first_line, hub_refusal

REACH_SECONDS = 10.0

OWN = ", or give a file of your own"
READERS = ("datasets", "pyarrow", "pandas")  # whose errors are about the content of files
ASK = "check the id; a private dataset needs `hf auth login`"


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
    features = getattr(
        rows, "features", None
    )  # of a stream they may not be known before a row is read
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
        raise InputError(
            "E_DATA_NOT_FOUND", message, hint="run in another directory, or rename what is there"
        )


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
        request.path, request.config, data_files=request.data_files
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
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

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


def refusal(error: Exception, label: str, hint: str | None = None) -> InputError | None:
    """The InputError that says what `error` means for dataset `label`; None if it is not a known way to fail.

    `hint` is said when the Hub does not know the dataset.
    """
    for link in _chain(error):
        refused = _from_hub(link, label, hint) or _from_request(link, label)
        if refused is not None:
            return refused
    if type(error).__module__.partition(".")[0] in READERS:
        message = f"dataset `{label}` cannot be read: {first_line(list(_chain(error))[-1])}"
        return InputError(
            "E_DATA_FORMAT",
            message,
            hint="a file of it is damaged on the Hub: choose another dataset",
        )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _from_hub(error: BaseException, label: str, hint: str | None) -> InputError | None:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, DatasetNotFoundError) and "gated" in str(error):
        return InputError("E_HUB_GATED", f"dataset `{label}` is gated on the Hub", hint=GATED)
    if isinstance(error, (DataFilesNotFoundError, EmptyDatasetError)):
        return InputError(
            "E_DATA_NOT_FOUND",
            f"dataset `{label}` has no files of text",
            hint="choose another dataset",
        )
    missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if missing or isinstance(error, DatasetNotFoundError):
        return InputError(
            "E_DATA_NOT_FOUND", f"dataset `{label}` is not on the Hub", hint=hint or ASK
        )
    refused = hub_refusal(error, f"dataset `{label}`")
    if refused is not None and refused.code in ("E_HUB_NETWORK", "E_HUB_OFFLINE"):
        return InputError(refused.code, str(refused), hint=f"{refused.hint}{OWN}")
    return refused


def _from_request(error: BaseException, label: str) -> InputError | None:
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        message = f"dataset `{label}` is not UTF-8: byte 0x{error.object[error.start]:02x}"
        return InputError(
            "E_DATA_ENCODING", message, hint="choose another dataset, or convert a copy of it"
        )
    if "Dataset scripts are no longer supported" in text:
        message = (
            f"dataset `{label}` needs a loading script, which `datasets` 4 and later do not run"
        )
        return InputError(
            "E_DATA_SCRIPT",
            message,
            hint="look for a copy of it in Parquet, or use a file of your own",
        )
    if isinstance(error, ValueError) and (
        "Config name is missing" in text or "BuilderConfig" in text
    ):
        message = f"dataset `{label}`: {' '.join(text.split('Example of usage')[0].split())}"
        return InputError(
            "E_DATA_CONFIG", message, hint="name a configuration with --dataset-config"
        )
    if isinstance(error, ValueError) and ("Unknown split" in text or "Bad split" in text):
        return InputError(
            "E_DATA_SPLIT", f"dataset `{label}`: {text}", hint="name a split with --dataset-split"
        )
    return None
