"""Open a model of the Hub whose weights are downloaded while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_cli.checkpoint.download import Download, RemoteWeights
from gptq_cli.checkpoint.layout import quantized_names
from gptq_cli.checkpoint.locate import (
    SKIPPED,
    Listed,
    ModelSource,
    hub_id,
    locate_model,
    look_up,
    model_directory,
)
from gptq_cli.checkpoint.model_files import (
    ADAPTER_CONFIG,
    CONFIG_NAMES,
    MODELOPT_CONFIG,
    side_files,
)
from gptq_cli.checkpoint.ranges import WHOLE, HubFiles
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.files import Stamp
from gptq_cli.storage.manifest import INDEX_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def stream_model(model: str, revision: str | None, folder: Path) -> tuple[ModelSource, Checkpoint]:
    """Return a Hub model whose weights will be fetched into `folder` when they are read.

    Everything but the weights is downloaded now, and so are the headers. If the cache holds the
    whole model, this is it, and nothing will be fetched. ConfigError E_CFG_CONFLICT for a local
    directory, InputError E_STREAM for a quantized model or a Hub without ranges; raises the errors
    of `locate_model` and `open_checkpoint`, too.
    """
    if model_directory(model) is not None:
        message = f"--stream-download is about models of the Hub, but `{model}` is a directory"
        raise ConfigError("E_CFG_CONFLICT", message, hint="omit --stream-download")
    located, found = look_up(hub_id(model), revision, partial(_open, folder))
    if found.download is None:  # the cache holds the weights, but it may lack other files
        located = locate_model(model, located.commit)
        found = open_checkpoint(located.directory)
    return located, found


def _open(folder: Path, api: HfApi, listed: Listed) -> tuple[ModelSource, Checkpoint]:
    identifier, commit, _ = listed
    skipped = [*SKIPPED, "*.safetensors"]
    directory = Path(api.snapshot_download(identifier, revision=commit, ignore_patterns=skipped))
    remote = RemoteWeights(HubFiles(identifier, commit), listed.files)
    found = open_checkpoint(directory, remote)
    if not found.coded() and (found.is_packed or quantized_names(found.tensors)):
        message = f"`{identifier}` is quantized, and its codes are checked as a whole before a run"
        raise InputError("E_STREAM", message, hint=WHOLE)
    download = Download(remote, folder, found.tensors)
    stamps = _of_the_model(listed, directory, found.stamps)
    found = replace(found, tensors=download.tensors, stamps=stamps, download=download)
    return ModelSource(directory, identifier, commit, is_complete=False), found


def _of_the_model(
    listed: Listed, directory: Path, stamps: Mapping[Path, Stamp]
) -> dict[Path, Stamp]:
    """Return the stamps of the files that belong to a whole model with all files that are listed.

    An earlier download may have left others: files in a folder whose weights show that the folder
    is another model.
    """
    settings = (*CONFIG_NAMES, MODELOPT_CONFIG, ADAPTER_CONFIG, INDEX_NAME)
    wanted = set(map(Path, settings))
    wanted.update(side_files(Path(), map(Path, listed.files)))
    return {path: stamp for path, stamp in stamps.items() if path.relative_to(directory) in wanted}
