"""MODEL as the user wrote it -> a local directory: a path as it is, a Hub id downloaded at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.errors import InputError, ResourceError
from gptq_cli.hub import hub_refusal

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
    is there, E_HUB_* when the Hub refuses or cannot be reached; ResourceError E_DISK when the cache is full.
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

    try:
        directory = Path(snapshot_download(identifier, revision=revision, ignore_patterns=SKIPPED))
    except Exception as error:
        refused = hub_refusal(error, f"model `{identifier}`", revision) or _refused_by_disk(error)
        if refused is None:
            raise
        raise refused from error
    return ModelSource(directory, identifier, directory.name)  # the cache names a snapshot by its commit


def _refused_by_disk(error: Exception) -> ResourceError | None:
    if not isinstance(error, OSError):
        return None
    hint = "free some space or move the cache (HF_HOME), then run again: what was fetched is kept"
    return ResourceError("E_DISK", f"cannot write the Hub's cache: {error.strerror or error}", hint=hint)
