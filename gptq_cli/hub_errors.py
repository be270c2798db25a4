"""Failures of the Hub's client as errors of this program, for models, datasets and uploads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gptq_cli.errors import InputError, causes

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "log in with a token that may read it: hf auth login"
GATED = "accept its terms on its page on the Hub, then log in: hf auth login"
OFFLINE = "allow the network (HF_HUB_OFFLINE is set), or download it first: hf download"
NETWORK = (
    "check the network and HF_ENDPOINT, then run again: downloaded files are kept; "
    "HF_HUB_OFFLINE=1 uses the cache"
)
NETWORK_MIDWAY = (
    "check the network and HF_ENDPOINT, then run the same command again: finished blocks are kept"
)
NETWORK_UNCACHED = (
    "check the network and HF_ENDPOINT, then run the same command again: "
    "the cache does not hold the whole model"
)
GONE = "look at its files on the Hub: it may have changed during the download"
WRITER = "log in with a token that may write there: hf auth login"
AGAIN = "run the same command again: it sends only what is missing"

OF_THE_HUB = (  # codes of failures that may pass, although nothing changes here
    "E_HUB_AUTH", "E_HUB_GATED", "E_HUB_NETWORK", "E_HUB_NOT_FOUND", "E_HUB_OFFLINE",
)  # fmt: skip

_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_KINDS = {"models", "datasets", "spaces"}
_REVISION_VIEWS = {"tree", "blob", "resolve", "raw", "commit", "commits"}  # pages of one revision
_VIEWS = {*_REVISION_VIEWS, "discussions"}  # pages of a repository
_OF_THE_CACHE = re.compile(r"(?:models|datasets)--([^/]+?)(?:--([^/]+))?/?")


@dataclass(frozen=True, slots=True)
class Pasted:
    """The id in an address of the Hub or in the name of a folder in its cache."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        if self.revision in (None, "main"):
            return self.id
        return f"{self.id} --revision {self.revision}"


def pasted_id(text: str) -> Pasted | None:
    """Return the id that `text` holds if it is an address or a cache folder's name, else None."""
    cached = _OF_THE_CACHE.fullmatch(text)
    if cached:
        return Pasted("/".join(filter(None, cached.groups())))
    parts = _address_parts(text)
    n_parts = 2
    if len(parts) > 1 and parts[1] in _VIEWS:  # an id without an owner, such as gpt2
        n_parts = 1
    name, _, revision = "/".join(parts[:n_parts]).removesuffix(".git").partition("@")
    view = parts[n_parts:]
    if len(view) > 1 and view[0] in _REVISION_VIEWS:
        revision = view[1]
    if not name:
        return None
    return Pasted(name, revision or None)


def _address_parts(text: str) -> list[str]:
    """Return the parts of an id and a view in an address of the Hub; [] for any other text."""
    host, path = _host_and_path(text)
    if host not in _HOSTS:
        return []
    parts = [unquote(part) for part in path.split("/") if part]
    if parts and parts[0] in _KINDS:
        return parts[1:]
    if text.startswith("hf://") and "@" not in text:  # hf://OWNER/NAME stands for the id itself
        return []
    return parts


def _host_and_path(text: str) -> tuple[str | None, str]:
    if text.startswith("git@hf.co:"):
        text = "https://hf.co/" + text.removeprefix("git@hf.co:")
    if "://" not in text:
        text = f"https://{text}"
    try:
        host, path = urlsplit(text).hostname, urlsplit(text).path
    except ValueError:  # of brackets, which belong to IPv6 addresses
        return None, ""
    if text.startswith("hf://"):
        return "hf.co", text.removeprefix("hf://")
    return host, path


def id_flaw(name: str) -> str | None:
    """Return why the Hub's client does not accept `name` as an id, or None if it does."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        rule = "letters, digits, `-`, `_` and `.`, no `--` or `..`, none of these at an end"
        return f"an id is NAME or OWNER/NAME, each of {rule}, 96 at most"
    return None


def hub_refusal(error: BaseException, what: str, revision: str | None = None) -> InputError | None:
    """Return the error for a failure to read `what` (a kind and an id).

    None if neither the Hub nor the network caused the failure. Codes: E_HUB_GATED,
    E_HUB_NOT_FOUND (repository, revision or file), E_HUB_AUTH, E_HUB_OFFLINE, E_HUB_NETWORK.
    """
    links = list(causes(error))
    for link in links:
        refused = _from_answer(link, what, revision)
        if refused is not None:
            return refused
    return _from_silence(links, what)


def push_refusal(error: BaseException, what: str) -> InputError | None:
    """Return the error for a failure to upload to `what`.

    None if neither the Hub nor the network caused the failure. Codes: E_HUB_AUTH, E_HUB_GATED,
    E_HUB_NOT_FOUND, E_HUB_OFFLINE, E_HUB_NETWORK, and E_PUSH for any other refusal of the Hub.
    """
    from huggingface_hub.errors import HfHubHTTPError

    links = list(causes(error))
    answers = [link for link in links if isinstance(link, HfHubHTTPError)]
    if not answers:
        return _push_without_answer(links, what)
    answer = answers[0]
    status = answer.response.status_code
    if status == 429 or status in range(500, 600):  # too many requests, or a failure of the Hub
        return _push_without_answer([*links, answer], what)
    return _push_answer(answer, what)


def _push_answer(answer: HfHubHTTPError, what: str) -> InputError:
    """Return the error for an upload that the Hub refused."""
    from huggingface_hub.errors import GatedRepoError

    status = answer.response.status_code
    if isinstance(answer, GatedRepoError):
        return InputError("E_HUB_GATED", f"{what} is gated on the Hub", hint=GATED)
    if status == 401:
        message = f"not logged in to the Hub, or the token has no access to {what}"
        return InputError("E_HUB_AUTH", message, hint=WRITER)
    if status == 404:
        hint = f"check the spelling, or {WRITER}"
        return InputError("E_HUB_NOT_FOUND", f"{what} is not on the Hub", hint=hint)
    reason = answer.server_message or first_line(answer)
    hint = f"the checkpoint on this machine is unchanged; {AGAIN}"
    if status == 403:
        hint = WRITER
    message = f"the Hub refused the upload to {what}: {_first_line(reason)}"
    return InputError("E_PUSH", message, hint=hint)


def _push_without_answer(links: list[BaseException], what: str) -> InputError | None:
    """Return the error for an upload that the Hub did not answer, or answered with its own failure.

    The last of `links` that is of the network or the Hub gives the reason.
    """
    silent = _from_silence(links, what)
    if silent is None:
        return None
    if silent.code == "E_HUB_OFFLINE":
        message = f"{what} cannot be reached: offline mode is on"
        hint = "unset HF_HUB_OFFLINE, or use --dry-run to see the card"
        return InputError("E_HUB_OFFLINE", message, hint=hint)
    reason = first_line(_unanswered(links)[-1])
    message = f"{what} could not be reached on the Hub: {reason}"
    return InputError("E_HUB_NETWORK", message, hint=AGAIN)


def _from_answer(error: BaseException, what: str, revision: str | None) -> InputError | None:
    """Return the error for an answer of the Hub that refuses to show `what`, else None."""
    from huggingface_hub import errors as hub

    # GatedRepoError is a RepositoryNotFoundError too, so it is tested first.
    if isinstance(error, hub.GatedRepoError):
        return InputError("E_HUB_GATED", f"{what} is gated on the Hub", hint=GATED)
    if isinstance(error, hub.RevisionNotFoundError):
        hint = "look at its branches and tags on the Hub"
        return InputError("E_HUB_NOT_FOUND", f"{what} has no revision {revision!r}", hint=hint)
    if isinstance(error, hub.RepositoryNotFoundError):
        hint = f"check the spelling; if it is private, {LOGIN}"
        return InputError("E_HUB_NOT_FOUND", f"{what} is not on the Hub", hint=hint)
    if isinstance(error, hub.RemoteEntryNotFoundError):
        return InputError("E_HUB_NOT_FOUND", f"{what} lacks a file: {first_line(error)}", hint=GONE)
    if isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403):
        return InputError("E_HUB_AUTH", f"the Hub does not let you read {what}", hint=LOGIN)
    return None


def _from_silence(links: list[BaseException], what: str) -> InputError | None:
    """Return the error if the Hub could not be reached or gave no usable answer, else None."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    causes = _unanswered(links)
    if not causes:
        return None
    if HF_HUB_OFFLINE:
        message = f"{what} is not in the cache, or not completely, and offline mode is on"
        return InputError("E_HUB_OFFLINE", message, hint=OFFLINE)
    message = f"{what} could not be fetched from the Hub: {first_line(causes[-1])}"
    return InputError("E_HUB_NETWORK", message, hint=NETWORK)


def _unanswered(links: list[BaseException]) -> list[BaseException]:
    """Return the errors of `links` that come from the network or from the Hub's server.

    If there are none, return the first error if it is a file that only the cache was asked for.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    found = [link for link in links if is_of_network(link) or isinstance(link, HfHubHTTPError)]
    if not found and isinstance(links[0], LocalEntryNotFoundError):
        return links[:1]
    return found


def is_of_network(error: BaseException) -> bool:
    """Return whether a connection failed or broke, so that another try may succeed."""
    of_http = type(error).__module__.startswith(("httpx", "httpcore"))
    return of_http or isinstance(error, ConnectionError | TimeoutError)


def first_line(error: BaseException) -> str:
    """Return the first line of the message of `error`, or its class if it has none."""
    return _first_line(str(error).strip() or type(error).__name__)


def _first_line(text: str) -> str:
    return " ".join(text.splitlines()[0].split())
