"""What a failure of `datasets` or of the Hub means to a user."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.errors import InputError
from gptq_cli.hub import GATED, first_line, hub_refusal

OWN = ", or give a file of your own"
READERS = ("datasets", "pyarrow", "pandas")  # whose errors are about the content of files
ASK = "check the id; a private dataset needs `hf auth login`"


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
        return InputError("E_DATA_FORMAT", message, hint="a file of it is damaged on the Hub: choose another dataset")
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
        return InputError("E_DATA_NOT_FOUND", f"dataset `{label}` has no files of text", hint="choose another dataset")
    missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if missing or isinstance(error, DatasetNotFoundError):
        return InputError("E_DATA_NOT_FOUND", f"dataset `{label}` is not on the Hub", hint=hint or ASK)
    refused = hub_refusal(error, f"dataset `{label}`")
    if refused is not None and refused.code in ("E_HUB_NETWORK", "E_HUB_OFFLINE"):
        return InputError(refused.code, str(refused), hint=f"{refused.hint}{OWN}")
    return refused


def _from_request(error: BaseException, label: str) -> InputError | None:
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        message = f"dataset `{label}` is not UTF-8: byte 0x{error.object[error.start]:02x}"
        return InputError("E_DATA_ENCODING", message, hint="choose another dataset, or convert a copy of it")
    if "Dataset scripts are no longer supported" in text:
        message = f"dataset `{label}` needs a loading script, which `datasets` 4 and later do not run"
        return InputError("E_DATA_SCRIPT", message, hint="look for a copy of it in Parquet, or use a file of your own")
    if isinstance(error, ValueError) and ("Config name is missing" in text or "BuilderConfig" in text):
        message = f"dataset `{label}`: {' '.join(text.split('Example of usage')[0].split())}"
        return InputError("E_DATA_CONFIG", message, hint="name a configuration with --dataset-config")
    if isinstance(error, ValueError) and ("Unknown split" in text or "Bad split" in text):
        return InputError("E_DATA_SPLIT", f"dataset `{label}`: {text}", hint="name a split with --dataset-split")
    return None
