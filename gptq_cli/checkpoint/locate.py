"""MODEL as the user wrote it -> a local directory: a path as it is, a Hub id downloaded at one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_cli.checkpoint.headers import TensorInfo, tensor_info
from gptq_cli.checkpoint.side_files import CONFIG_NAMES, SKIPPED_FOLDERS, WEIGHT_SUFFIXES
from gptq_cli.checkpoint.source import (
    Checkpoint,
    Stored,
    merge_shards,
    open_checkpoint,
    read_config,
    refuse_other_kinds,
    remarks_on,
)
from gptq_cli.errors import GptqError, InputError, ResourceError
from gptq_cli.files import (
    expanded,
    file_cause,
    file_errors,
    is_directory,
    is_file,
    refuse_other_than_utf8,
    resolved,
    status_of,
)
from gptq_cli.hub_errors import first_line, hub_refusal, id_flaw, pasted_id
from gptq_cli.shell import shell_word
from gptq_cli.storage.manifest import INDEX_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SKIPPED = [
    *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"),
    *(f"{folder}/*" for folder in SKIPPED_FOLDERS),
]
UNSEEN = ("E_HUB_NOT_FOUND", "E_HUB_OFFLINE", "E_HUB_NETWORK")  # what a misspelt path ends in


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
    return _local(model, revision) or _download(hub_id(model), revision)


def peek_model(model: str, revision: str | None = None) -> tuple[ModelSource, Checkpoint]:
    """MODEL with its config and the headers of its weights; of a Hub id not more than these is fetched.

    The directory of a Hub id holds its configuration only, unless the Hub cannot be asked and the cache has all of it.
    Raises as `locate_model` and `open_checkpoint` do.
    """
    if local := _local(model, revision):
        return local, open_checkpoint(local.directory)
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    identifier = hub_id(model)
    if HF_HUB_OFFLINE:
        cached = _download(identifier, revision)  # from the cache, or refused
        return cached, open_checkpoint(cached.directory)
    try:
        with _hub_errors(identifier, revision):
            return _peek(HfApi(), identifier, revision)
    except InputError as refused:
        cached_model = _cached(identifier, revision) if _is_silence(refused) else None
        if cached_model is None:
            raise
        return cached_model


def hub_id(model: str) -> str:
    """The id that MODEL, which is no directory, has on the Hub; InputError E_MODEL_NOT_FOUND if it can be none."""
    path = expanded(model)
    if status_of(path) is not None:
        raise InputError(
            "E_MODEL_NOT_FOUND", f"`{model}` is not a directory", hint=_instead_of(path)
        )
    identifier = model.removeprefix("hf://")
    if model.startswith((".", "/", "~")):
        hint = "give a model directory or a Hub id"
        raise InputError("E_MODEL_NOT_FOUND", f"`{model}` is not a directory", hint=hint)
    if pasted := pasted_id(model):
        message = (
            f"`{model}` is not a directory and not an id, but an address or a name that holds one"
        )
        raise InputError("E_MODEL_NOT_FOUND", message, hint=f"use {pasted}")
    if flaw := id_flaw(identifier):
        message = f"`{model}` is not a directory, and no id of the Hub: {flaw}"
        raise InputError("E_MODEL_NOT_FOUND", message, hint="give a model directory or a Hub id")
    return identifier


def model_directory(model: str | Path) -> Path | None:
    """The directory on this machine that MODEL names; None if it names none.

    The folder of a model in the Hub's cache stands for its snapshot. InputError E_FILE for what may not be looked at,
    E_MODEL_NOT_FOUND for a folder of the cache with several snapshots.
    """
    path = expanded(model)
    if not is_directory(path):
        return None
    return _snapshot(path) if is_cache_folder(path) else path


def model_name(folder: str) -> str:
    """Return the model's name for a directory's name: in the Hub's cache it holds the owner too."""
    if folder.startswith("models--"):
        return folder.rpartition("--")[2]
    return folder


def local_model(model: Path) -> Path:
    """The directory that MODEL names, for commands that fetch nothing; InputError E_MODEL_NOT_FOUND if it is none."""
    directory = model_directory(model)
    if directory is not None:
        return directory
    path = expanded(model)
    hint = "give the directory of a GPTQ checkpoint on this machine"
    hint = _instead_of(path) if status_of(path) is not None else hint
    raise InputError("E_MODEL_NOT_FOUND", f"`{model}` is not a directory", hint=hint)


def is_cache_folder(path: Path) -> bool:
    """Whether `path` is a model's own folder in the Hub's cache, which holds its snapshots."""
    return resolved(path).name.startswith("models--") and is_directory(path / "snapshots")


def _snapshot(folder: Path) -> Path:
    """The snapshot of the main branch in a model's folder of the cache, or the only one."""
    with file_errors(writing=False):
        found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        main = (
            (folder / "refs" / "main").read_text().strip()
            if is_file(folder / "refs" / "main")
            else ""
        )
    chosen = [path for path in found if path.name == main] or found
    if len(chosen) == 1:
        return chosen[0]
    message = f"`{folder}` is a folder of the Hub's cache with {len(found)} snapshots and none of its main branch"
    hint = f"give one of them: {found[0]}" if found else f"use {pasted_id(resolved(folder).name)}"
    raise InputError("E_MODEL_NOT_FOUND", message, hint=hint)


def _instead_of(file: Path) -> str:
    """What to give instead of a file."""
    if file.suffix in (".gguf", ".onnx"):
        return "GGUF and ONNX are not read: give the directory of the safetensors checkpoint that it was made from"
    if is_file(file.absolute().parent / "config.json"):
        return f"give its directory: {shell_word(str(file.absolute().parent))}"
    return "give the directory of a safetensors checkpoint"


def _local(model: str, revision: str | None) -> ModelSource | None:
    directory = model_directory(model)
    if directory is None:
        return None
    refuse_other_than_utf8(directory)
    if revision is not None:
        message = f"`{model}` is a local directory and has no revision {revision!r}"
        raise InputError("E_MODEL_NOT_FOUND", message, hint="leave --revision out")
    return ModelSource(directory, model_name(resolved(expanded(model)).name), None)


def _download(identifier: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download

    with _hub_errors(identifier, revision):
        directory = Path(snapshot_download(identifier, revision=revision, ignore_patterns=SKIPPED))
    return ModelSource(
        directory, identifier, directory.name
    )  # the cache names a snapshot by its commit


def _is_silence(refused: InputError) -> bool:
    """Whether the Hub has not let itself be asked for the model: then `snapshot_download` takes what the cache has."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return refused.code in ("E_HUB_NETWORK", "E_HUB_AUTH") or isinstance(
        refused.__cause__, RepositoryNotFoundError
    )


def _cached(identifier: str, revision: str | None) -> tuple[ModelSource, Checkpoint] | None:
    """A model in the cache; None if it is not there, or not all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            identifier, revision=revision, ignore_patterns=SKIPPED, local_files_only=True
        )
        directory = Path(found)
        return ModelSource(directory, identifier, directory.name), open_checkpoint(directory)
    except LocalEntryNotFoundError:
        return None
    except InputError as error:
        if error.code in ("E_CKPT_MISSING", "E_CKPT_CONFIG"):
            return None
        raise


def _peek(api: HfApi, identifier: str, revision: str | None) -> tuple[ModelSource, Checkpoint]:
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    info = api.model_info(identifier, revision=revision)
    assert info.sha is not None
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if "config.json" not in files:
        refuse_other_kinds(identifier, files)
        raise InputError(
            "E_CKPT_CONFIG", f"`{identifier}` has no config.json", hint="name a Hugging Face model"
        )
    fetched = [
        Path(api.hf_hub_download(identifier, name, revision=info.sha))
        for name in CONFIG_NAMES
        if name in files
    ]
    try:
        stored = _remote_tensors(api, identifier, info.sha)
    except NotASafetensorsRepoError:
        refuse_other_kinds(identifier, files)
        message = f"`{identifier}` holds no model.safetensors and no {INDEX_NAME}"
        raise InputError(
            "E_CKPT_MISSING", message, hint="name a model with safetensors weights"
        ) from None
    except SafetensorsParsingError as error:
        raise InputError("E_CKPT_CORRUPT", f"`{identifier}`: {first_line(error)}") from None
    directory = fetched[0].parent
    config, twice = read_config(fetched[0])
    remarks = (*twice, *stored.remarks, *remarks_on(identifier, files, config, stored.tensors))
    found = Checkpoint(directory, config, stored.tensors, stored.absent, remarks=remarks)
    return ModelSource(directory, identifier, info.sha), found


def _remote_tensors(api: HfApi, identifier: str, commit: str) -> Stored:
    """The headers of a Hub model by range requests; offsets count from the end of a file's header."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    found = api.get_safetensors_metadata(identifier, revision=commit)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for file, header in sorted(found.files_metadata.items()):
        path = Path(identifier) / file
        shards[file] = {
            name: tensor_info(
                path, name, {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}, 0
            )
            for name, t in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
        }
    return merge_shards(f"{identifier}/{INDEX_NAME}", found.weight_map, shards)


@contextmanager
def _hub_errors(identifier: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub, the way to it and its cache refuse into InputError and ResourceError."""
    try:
        yield
    except GptqError:
        raise
    except Exception as error:
        refused = hub_refusal(error, f"model `{identifier}`", revision) or _refused_by_disk(error)
        if refused is None:
            raise
        if refused.code in UNSEEN:
            raise InputError(
                refused.code,
                str(refused),
                hint=f"no directory of that name is here; {refused.hint}",
            ) from error
        raise refused from error


def _refused_by_disk(error: Exception) -> GptqError | None:
    if not isinstance(error, OSError):
        return None
    if refused := file_cause(error):
        return refused
    hint = "free some space or move the cache (HF_HOME), then run again: what was fetched is kept"
    return ResourceError(
        "E_DISK", f"cannot write the Hub's cache: {error.strerror or error}", hint=hint
    )
