"""What a failure of the Hub's client means to a user, the same for models and datasets."""

from __future__ import annotations

from gptq_cli.errors import InputError

LOGIN = "log in with a token that may read it: hf auth login"
GATED = "accept its terms on its page on the Hub, then log in: hf auth login"
OFFLINE = "allow the network (HF_HUB_OFFLINE is set), or fetch it before: hf download"
NETWORK = "check the network and HF_ENDPOINT, then run again: what was fetched is kept; HF_HUB_OFFLINE=1 uses the cache"


def hub_refusal(error: BaseException, what: str, revision: str | None = None) -> InputError | None:
    """The InputError for a failure to read `what` (a kind and an id); None if it is none of the Hub or the network.

    E_HUB_GATED, E_HUB_NOT_FOUND (repository, revision or file), E_HUB_AUTH, E_HUB_OFFLINE, E_HUB_NETWORK.
    """
    links = [error]
    while (cause := links[-1].__cause__) is not None:
        links.append(cause)
    said = next((refused for link in links if (refused := _from_answer(link, what, revision))), None)
    return said or _from_silence(links, what)


def _from_answer(error: BaseException, what: str, revision: str | None) -> InputError | None:
    """What the Hub said no to."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):  # a kind of RepositoryNotFoundError, so it is asked first
        return InputError("E_HUB_GATED", f"{what} is gated on the Hub", hint=GATED)
    if isinstance(error, hub.RevisionNotFoundError):
        hint = "look at its branches and tags on the Hub"
        return InputError("E_HUB_NOT_FOUND", f"{what} has no revision {revision!r}", hint=hint)
    if isinstance(error, hub.RepositoryNotFoundError):
        hint = f"check the spelling; if it is private, {LOGIN}"
        return InputError("E_HUB_NOT_FOUND", f"{what} is not on the Hub", hint=hint)
    if isinstance(error, hub.RemoteEntryNotFoundError):
        hint = "look at its files on the Hub: it may have changed while it was read"
        return InputError("E_HUB_NOT_FOUND", f"{what} lacks a file: {_line(error)}", hint=hint)
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
        reason = _line(network[-1] if network else links[0])
        return InputError("E_HUB_NETWORK", f"{what} could not be fetched from the Hub: {reason}", hint=NETWORK)
    return None


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(("httpx", "httpcore"))


def _line(error: BaseException) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
