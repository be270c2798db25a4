"""What a failure of the Hub's client means to a user, the same for models and datasets, and for what is sent there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from gptq_cli.errors import InputError

LOGIN = "log in with a token that may read it: hf auth login"
GATED = "accept its terms on its page on the Hub, then log in: hf auth login"
OFFLINE = "allow the network (HF_HUB_OFFLINE is set), or fetch it before: hf download"
NETWORK = "check the network and HF_ENDPOINT, then run again: what was fetched is kept; HF_HUB_OFFLINE=1 uses the cache"
WRITER = "log in with a token that may write there: hf auth login"
AGAIN = "run the same command again: what was uploaded is not sent twice"

_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_KINDS = {"models", "datasets", "spaces"}
_VIEWS = {
    "tree",
    "blob",
    "resolve",
    "raw",
    "commit",
    "commits",
    "discussions",
}  # pages of a repository
_OF_THE_CACHE = re.compile(r"(?:models|datasets)--([^/]+?)(?:--([^/]+))?/?")


@dataclass(frozen=True, slots=True)
class Pasted:
    """The id that somebody meant with an address of the Hub, or with the name of a folder in its cache."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        said = self.revision not in (None, "main")
        return f"{self.id} --revision {self.revision}" if said else self.id


def pasted_id(text: str) -> Pasted | None:
    """What `text` means if it is an address or a folder's name, where an id belongs; None if it is neither."""
    if cached := _OF_THE_CACHE.fullmatch(text):
        return Pasted("/".join(part for part in cached.groups() if part))
    if text.startswith("git@hf.co:"):
        text = "https://hf.co/" + text.removeprefix("git@hf.co:")
    address = text if "://" in text else f"https://{text}"
    try:
        host, path = urlsplit(address).hostname, urlsplit(address).path
    except ValueError:  # brackets, as an IPv6 address has them
        return None
    if text.startswith("hf://"):
        host, path = "hf.co", text.removeprefix("hf://")
    parts = [unquote(part) for part in path.split("/") if part]
    if (
        host not in _HOSTS
        or not parts
        or (text.startswith("hf://") and "@" not in text and parts[0] not in _KINDS)
    ):
        return None
    parts = parts[1:] if parts[0] in _KINDS else parts
    n_parts = 1 if len(parts) > 1 and parts[1] in _VIEWS else 2
    name, _, revision = "/".join(parts[:n_parts]).removesuffix(".git").partition("@")
    view = parts[n_parts:]
    if len(view) > 1 and view[0] in _VIEWS - {"discussions"}:
        revision = view[1]
    return Pasted(name, revision or None) if name else None


def plain_name(folder: str) -> str:
    """What a model is called whose directory has this name: in the Hub's cache its owner is a part of it."""
    return folder.rpartition("--")[2] if folder.startswith("models--") else folder


def id_flaw(name: str) -> str | None:
    """Why the Hub's client takes `name` for no id; None if it takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        rule = "letters, digits, `-`, `_` and `.`, no `--` or `..`, none of these at an end, 96 at most"
        return f"an id is NAME or OWNER/NAME, each of {rule}"
    return None


def hub_refusal(error: BaseException, what: str, revision: str | None = None) -> InputError | None:
    """The InputError for a failure to read `what` (a kind and an id); None if it is none of the Hub or the network.

    E_HUB_GATED, E_HUB_NOT_FOUND (repository, revision or file), E_HUB_AUTH, E_HUB_OFFLINE, E_HUB_NETWORK.
    """
    links = _chain(error)
    said = next(
        (refused for link in links if (refused := _from_answer(link, what, revision))), None
    )
    return said or _from_silence(links, what)


def push_refusal(error: BaseException, what: str) -> InputError | None:
    """The InputError for a failure to send something to `what`; None if it is none of the Hub or the network.

    E_HUB_AUTH, E_HUB_GATED, E_HUB_NOT_FOUND, E_HUB_OFFLINE, E_HUB_NETWORK; E_PUSH for whatever else the Hub refuses.
    """
    from huggingface_hub import errors as hub

    links = _chain(error)
    answer = next((link for link in links if isinstance(link, hub.HfHubHTTPError)), None)
    if answer is None or answer.response.status_code in (429, *range(500, 600)):
        silent = _from_silence(links, what)
        if silent is None:
            return None
        if silent.code == "E_HUB_OFFLINE":
            message = f"{what} cannot be reached: offline mode is on"
            return InputError(
                "E_HUB_OFFLINE",
                message,
                hint="unset HF_HUB_OFFLINE, or see the card with --dry-run",
            )
        reason = first_line(answer or next(link for link in reversed(links) if _is_network(link)))
        return InputError(
            "E_HUB_NETWORK", f"{what} could not be reached on the Hub: {reason}", hint=AGAIN
        )
    if isinstance(answer, hub.GatedRepoError):
        return InputError("E_HUB_GATED", f"{what} is gated on the Hub", hint=GATED)
    if answer.response.status_code == 401:
        return InputError(
            "E_HUB_AUTH", f"the Hub does not know who you are, or not for {what}", hint=WRITER
        )
    if answer.response.status_code == 404:
        return InputError(
            "E_HUB_NOT_FOUND", f"{what} is not on the Hub", hint=f"check the spelling, or {WRITER}"
        )
    said = answer.server_message or first_line(answer)
    hint = (
        WRITER
        if answer.response.status_code == 403
        else "the checkpoint on this machine is as it was; " + AGAIN
    )
    return InputError(
        "E_PUSH", f"the Hub refuses what is sent to {what}: {_first_line(said)}", hint=hint
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, the last cause at the end."""
    links = [error]
    while (cause := links[-1].__cause__) is not None:
        links.append(cause)
    return links


def _from_answer(error: BaseException, what: str, revision: str | None) -> InputError | None:
    """What the Hub said no to."""
    from huggingface_hub import errors as hub

    if isinstance(
        error, hub.GatedRepoError
    ):  # a kind of RepositoryNotFoundError, so it is asked first
        return InputError("E_HUB_GATED", f"{what} is gated on the Hub", hint=GATED)
    if isinstance(error, hub.RevisionNotFoundError):
        hint = "look at its branches and tags on the Hub"
        return InputError("E_HUB_NOT_FOUND", f"{what} has no revision {revision!r}", hint=hint)
    if isinstance(error, hub.RepositoryNotFoundError):
        hint = f"check the spelling; if it is private, {LOGIN}"
        return InputError("E_HUB_NOT_FOUND", f"{what} is not on the Hub", hint=hint)
    if isinstance(error, hub.RemoteEntryNotFoundError):
        hint = "look at its files on the Hub: it may have changed while it was read"
        return InputError("E_HUB_NOT_FOUND", f"{what} lacks a file: {first_line(error)}", hint=hint)
    if isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403):
        return InputError("E_HUB_AUTH", f"the Hub does not let you read {what}", hint=LOGIN)
    return None


def _from_silence(links: list[BaseException], what: str) -> InputError | None:
    """What the Hub could not be asked, or had no good answer to."""
    from huggingface_hub import errors as hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    network = [link for link in links if _is_network(link) or isinstance(link, hub.HfHubHTTPError)]
    absent = isinstance(links[0], hub.LocalEntryNotFoundError)
    if HF_HUB_OFFLINE and (network or absent):
        message = f"{what} is not in the cache, at least not all of it, and offline mode is on"
        return InputError("E_HUB_OFFLINE", message, hint=OFFLINE)
    if network or absent:
        reason = first_line(network[-1] if network else links[0])
        return InputError(
            "E_HUB_NETWORK", f"{what} could not be fetched from the Hub: {reason}", hint=NETWORK
        )
    return None


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(
        ("httpx", "httpcore")
    )


def first_line(error: BaseException) -> str:
    """What `error` says, as far as one line goes; its class where it says nothing."""
    return _first_line(str(error).strip() or type(error).__name__)


def _first_line(text: str) -> str:
    return " ".join(text.splitlines()[0].split())
