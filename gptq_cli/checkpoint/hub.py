"""MODEL as the user wrote it -> a local directory: a path as it is, a Hub id downloaded at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.errors import InputError

SKIPPED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.tflite",
    "original/*",
    "onnx/*",
]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model lies and what to call it; `commit` is None for a local directory."""

    directory: Path
    name: str
    commit: str | None


def locate_model(model: str, revision: str | None = None) -> ModelSource:
    """The directory of MODEL, downloading a Hub id first; its revision is resolved to a commit once.

    What starts with ".", "/" or "~" or exists here is never sent to the Hub. InputError E_MODEL_NOT_FOUND when nothing
    is there, E_MODEL_HUB when the Hub refuses or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError("E_MODEL_NOT_FOUND", f"`{model}` is a local directory and has no revision {revision!r}")
        return ModelSource(path, path.resolve().name, None)
    identifier = model.removeprefix("hf://")
    if model.startswith((".", "/", "~")) or path.exists() or not _HUB_ID.fullmatch(identifier):
        raise InputError(
            "E_MODEL_NOT_FOUND", f"`{model}` is not a directory", hint="give a model directory or a Hub id"
        )
    return _download(identifier, revision)


def _download(identifier: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        directory = Path(snapshot_download(identifier, revision=revision, ignore_patterns=SKIPPED))
    except GatedRepoError as error:
        raise _refused(f"`{identifier}` is gated", "accept its terms on the Hub, then log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise _refused(f"`{identifier}` has no revision {revision!r}", "look at its branches on the Hub") from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model log in: hf auth login"
        raise InputError(
            "E_MODEL_NOT_FOUND", f"`{identifier}` is no directory here and no model on the Hub", hint=hint
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        hint = "check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or download the model and give its directory"
        raise _refused(f"`{identifier}` could not be downloaded: {_first_line(error)}", hint) from error
    return ModelSource(directory, identifier, directory.name)  # the cache names a snapshot by its commit


def _refused(message: str, hint: str) -> InputError:
    return InputError("E_MODEL_HUB", message, hint=hint)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
