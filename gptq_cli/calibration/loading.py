"""Rows of text through the `datasets` library; its failures and the Hub's become InputErrors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from threading import Thread
from typing import Any

from gptq_cli.calibration.chats import (
    ChatTemplate,
    Form,
    form_of,
    rendered_chats,
)
from gptq_cli.calibration.columns import (
    Row,
    check_schema,
    columns_of_row,
    columns_of_schema,
    texts_of,
)
from gptq_cli.errors import GptqError, InputError, causes
from gptq_cli.files import is_directory
from gptq_cli.hub_errors import GATED, NETWORK, OFFLINE, first_line, hub_refusal

REACH_SECONDS = 2.0

OWN = "give text of this machine (--dataset FILE, or --dataset english), or "
READERS = ("datasets", "pyarrow", "pandas")  # whose errors are about the content of files
ASK = "check the id; a private dataset needs `hf auth login`"


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A request for rows of a Hub dataset.

    `label` is the user's name for it; `stream` reads rows on demand and keeps no copy; `hint` is
    for the error if there is no such dataset.
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
    """The texts or rendered chats of rows; can be read again.

    Errors as `texts_of` and `rendered_chats`.
    """

    rows: Iterable[Row]
    form: Form
    request: LoadRequest
    template: ChatTemplate

    def __iter__(self) -> Iterator[str]:
        if self.form.is_chat:
            return rendered_chats(self._rows(), self.form, self.request.label, self.template)
        return texts_of(self._rows(), self.form.columns, self.request.label)

    def _rows(self) -> Iterator[Row]:
        rows = iter(self.rows)
        while True:
            with refusals(self.request):
                row = next(rows, None)
            if row is None:
                return
            yield row


def open_column(
    request: LoadRequest, columns: Sequence[str], template: ChatTemplate
) -> tuple[TextColumn, str | None]:
    """Return the texts of the rows, and the commit of the rows if it is known.

    `columns` are those that the user named; without one, the columns of the rows decide. Only a
    dataset without a schema is read before its texts are, for the columns of its first row. Raises
    the InputErrors of `refusal`, and E_DATA_COLUMN if the schema has no such column of strings.
    """
    _refuse_namesakes(request)
    with refusals(request):
        reach_hub(request.path)
        rows, revision = _open(request)
    # A stream may not know its features before a row is read.
    features = getattr(rows, "features", None)
    if features:
        schema = features.arrow_schema
        form = form_of(columns_of_schema(schema), columns)
        if not form.is_chat:
            check_schema(schema, form.columns, request.label)
    else:
        with refusals(request):
            first = next(iter(rows), None)
        form = form_of(columns_of_row(first), columns)
    return TextColumn(rows, form, request, template), revision


def _refuse_namesakes(request: LoadRequest) -> None:
    """Raise E_DATA_NOT_FOUND for a name that means something else to `datasets`."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as KINDS

    if request.path in KINDS:
        message = f"dataset `{request.label}` is a type of file for `datasets`, not a Hub dataset"
        raise InputError("E_DATA_NOT_FOUND", message, hint="give the path of the file itself")
    if Path(request.path).exists():
        message = (
            f"`{request.path}` in the current directory has the name of the Hub dataset "
            f"`{request.label}`"
        )
        hint = f"run in another directory, or rename `{request.path}` here"
        raise InputError("E_DATA_NOT_FOUND", message, hint=hint)


def check_reach(dataset: str, label: str) -> None:
    """Raise InputError E_HUB_NETWORK if the Hub gives no answer about a dataset in two seconds.

    It is for the time before torch is loaded. `label` is the user's name for the dataset.
    """
    try:
        reach_hub(dataset)
    except Exception as error:
        refused = hub_refusal(error, f"dataset `{label}`")
        if refused is None:
            raise
        raise InputError(refused.code, str(refused), hint=f"{OWN}{refused.hint}") from error


def is_out_of_reach(error: GptqError) -> bool:
    """Return whether text could not be had because there is no network."""
    return error.code in ("E_HUB_NETWORK", "E_HUB_OFFLINE")


def check_cached(dataset: str, label: str) -> None:
    """Raise InputError E_HUB_OFFLINE in offline mode if the cache holds nothing of a dataset."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_OFFLINE

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    if HF_HUB_OFFLINE and not is_directory(cache / dataset.replace("/", "___")):
        message = f"dataset `{label}` is not in the cache, and offline mode is on"
        raise InputError("E_HUB_OFFLINE", message, hint=f"{OWN}{OFFLINE}")


def reach_hub(dataset: str) -> None:
    """Raise the error of the Hub's client at once if there is no connection.

    `datasets` would try for half a minute. The client bounds neither the time to find an address
    nor the number of addresses, so a thread waits for it.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return
    failures: list[Exception] = []
    thread = Thread(target=_ask_hub, args=(dataset, failures), daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {REACH_SECONDS:g} seconds")
    if failures:
        raise failures[0]


def _ask_hub(dataset: str, failures: list[Exception]) -> None:
    """Ask the Hub about a dataset; put the error into `failures` if there is no answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(dataset, timeout=REACH_SECONDS, expand=["sha"])
    except HfHubHTTPError as answer:
        # An answer proves the connection, unless it is that of a server that is out of order.
        if answer.response.status_code >= 500:
            failures.append(answer)
    except Exception as error:  # noqa: BLE001
        failures.append(error)


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
    # The hash of a Hub dataset's builder is the commit.
    revision = builder.hash or ""
    return rows, revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None


@contextmanager
def refusals(request: LoadRequest) -> Iterator[None]:
    """Turn failures of `datasets` into InputErrors, and hide its logs and progress bars."""
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
    """Keep `datasets` and the Hub's client from writing to stderr; restore their settings after."""
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
    """Return the InputError that `error` means for dataset `label`, None for an unknown failure.

    `hint` is for a dataset that the Hub does not know.
    """
    links = list(causes(error))
    for cause in links:
        refused = _from_hub(cause, label, hint) or _from_datasets(cause, label)
        if refused is not None:
            return refused
    if type(error).__module__.partition(".")[0] in READERS:
        message = f"dataset `{label}` cannot be read: {first_line(links[-1])}"
        hint = "a file of it is damaged on the Hub: choose another dataset"
        return InputError("E_DATA_FORMAT", message, hint=hint)
    return None


def _from_hub(error: BaseException, label: str, hint: str | None) -> InputError | None:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    subject = f"dataset `{label}`"
    if isinstance(error, DatasetNotFoundError) and "gated" in str(error):
        return InputError("E_HUB_GATED", f"{subject} is gated on the Hub", hint=GATED)
    if isinstance(error, (DataFilesNotFoundError, EmptyDatasetError)):
        message = f"{subject} has no files of text"
        return InputError("E_DATA_NOT_FOUND", message, hint="choose another dataset")
    missing = (DatasetNotFoundError, RepositoryNotFoundError)
    if isinstance(error, missing) and not isinstance(error, GatedRepoError):
        return InputError("E_DATA_NOT_FOUND", f"{subject} is not on the Hub", hint=hint or ASK)
    refused = hub_refusal(error, subject)
    if refused is not None and refused.code in ("E_HUB_NETWORK", "E_HUB_OFFLINE"):
        return InputError(refused.code, str(refused), hint=f"{OWN}{refused.hint}")
    return refused


def _from_datasets(error: BaseException, label: str) -> InputError | None:
    text = str(error)
    subject = f"dataset `{label}`"
    if isinstance(error, UnicodeDecodeError):
        message = f"{subject} is not UTF-8: byte 0x{error.object[error.start]:02x}"
        hint = "choose another dataset, or convert a copy of it"
        return InputError("E_DATA_ENCODING", message, hint=hint)
    if "Dataset scripts are no longer supported" in text:
        return InputError(
            "E_DATA_SCRIPT",
            f"{subject} needs a loading script, which `datasets` 4 and later do not run",
            hint="look for a copy of it in Parquet, or use a file of your own",
        )
    if isinstance(error, FileNotFoundError) and "LocalEntryNotFoundError" in text:
        # Something answered that is not the Hub, such as a page to log in to a network.
        message = f"{subject} could not be fetched from the Hub: no usable answer"
        return InputError("E_HUB_NETWORK", message, hint=f"{OWN}{NETWORK}")
    if not isinstance(error, ValueError):
        return None
    if "Config name is missing" in text or "BuilderConfig" in text:
        message = f"{subject}: {' '.join(text.split('Example of usage')[0].split())}"
        hint = "name a configuration with --dataset-config"
        return InputError("E_DATA_CONFIG", message, hint=hint)
    if "Unknown split" in text or "Bad split" in text:
        hint = "name a split with --dataset-split"
        return InputError("E_DATA_SPLIT", f"{subject}: {text}", hint=hint)
    return None
