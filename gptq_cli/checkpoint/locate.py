"""MODEL of the command line -> a local directory: a path, or a Hub id downloaded at one commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptq_cli.checkpoint.headers import TensorInfo, tensor_info
from gptq_cli.checkpoint.model_files import (
    ADAPTER_CONFIG,
    OTHER_WEIGHTS,
    SETTINGS_NAMES,
    SKIPPED_FOLDERS,
    read_config,
    refuse_other_kinds,
)
from gptq_cli.checkpoint.source import (
    Checkpoint,
    StoredTensors,
    merge_shards,
    open_checkpoint,
    remarks_on,
)
from gptq_cli.errors import GptqError, InputError, ResourceError, shell_word
from gptq_cli.files import (
    expanded,
    file_cause,
    file_errors,
    hint_at_near,
    is_directory,
    is_file,
    refuse_other_than_utf8,
    resolved,
    status_of,
)
from gptq_cli.hub_errors import (
    NETWORK_UNCACHED,
    first_line,
    hub_refusal,
    id_flaw,
    pasted_id,
)
from gptq_cli.storage.manifest import INDEX_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SKIPPED = [
    *(f"*{suffix}" for suffix in OTHER_WEIGHTS),
    *(f"{folder}/*" for folder in SKIPPED_FOLDERS),
]
NO_DIRECTORY = "there is no directory of that name"
UNSEEN = ("E_HUB_NOT_FOUND", "E_HUB_OFFLINE", "E_HUB_NETWORK")  # may be a misspelt path


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The directory of a model and its name; `commit` is None for a local directory.

    `is_complete` is false if the weights are not in the directory, but on the Hub only.
    """

    directory: Path
    name: str
    commit: str | None
    is_complete: bool = True


def locate_model(model: str, revision: str | None = None) -> ModelSource:
    """Return the directory of MODEL; a Hub id is downloaded first.

    The revision is resolved to a commit once. A MODEL that starts with ".", "/" or "~", or exists
    here, is never sent to the Hub. InputError E_MODEL_NOT_FOUND if nothing is there, E_HUB_* if the
    Hub refuses or cannot be reached; ResourceError E_DISK if the cache is full.
    """
    return _local(model, revision) or _download(hub_id(model), revision)


def peek_model(model: str, revision: str | None = None) -> tuple[ModelSource, Checkpoint]:
    """Return MODEL with its config and the headers of its weights; no weights are fetched.

    The directory of a Hub id holds its configuration only, unless the cache holds the whole model.
    Raises the errors of `locate_model` and `open_checkpoint`.
    """
    local = _local(model, revision)
    if local:
        return local, open_checkpoint(local.directory)
    return look_up(hub_id(model), revision, _peek)


def look_up(identifier: str, revision: str | None, look: Look) -> tuple[ModelSource, Checkpoint]:
    """Return a model of the Hub from the cache if it is there as a whole, else what `look` finds.

    If the Hub cannot be reached, the cache decides which commit the revision is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        cached = _download(identifier, revision)  # from the cache, or refused
        return cached, open_checkpoint(cached.directory)
    try:
        with _hub_errors(identifier, revision):
            api = HfApi()
            listed = _listed(api, identifier, revision)
            return _cached(identifier, listed.commit) or look(api, listed)
    except InputError as refused:
        if not _may_be_cached(refused):
            raise
        cached_model = _cached(identifier, revision)
        if cached_model is None and refused.code == "E_HUB_NETWORK":
            hint = f"{_no_directory(identifier)}; {NETWORK_UNCACHED}"
            raise InputError(refused.code, str(refused), hint=hint) from refused
        if cached_model is None:
            raise
        return cached_model


def hub_id(model: str) -> str:
    """Return the id of MODEL, which is not a directory, on the Hub.

    InputError E_MODEL_NOT_FOUND if it cannot be an id.
    """
    path = expanded(model)
    if status_of(path) is not None:
        raise _not_a_directory(model, _hint_for_file(path))
    hint = hint_at_near(path, folders=True) or "give a model directory or a Hub id"
    if model.startswith((".", "/", "~")):
        raise _not_a_directory(model, hint)
    pasted = pasted_id(model)
    if pasted:
        message = f"`{model}` is neither a directory nor an id, but an address that contains an id"
        raise InputError("E_MODEL_NOT_FOUND", message, hint=f"use {pasted}")
    identifier = model.removeprefix("hf://")
    flaw = id_flaw(identifier)
    if flaw:
        message = f"`{model}` is not a directory, and not a Hub id: {flaw}"
        raise InputError("E_MODEL_NOT_FOUND", message, hint=hint)
    return identifier


def _no_directory(identifier: str) -> str:
    """Return the hint for a MODEL that the Hub does not show, and that may be a misspelt path."""
    near = hint_at_near(Path(identifier), folders=True)
    if near is None:
        return NO_DIRECTORY
    return f"{near} {NO_DIRECTORY}"


def _not_a_directory(model: str | Path, hint: str) -> InputError:
    return InputError("E_MODEL_NOT_FOUND", f"`{model}` is not a directory", hint=hint)


def model_directory(model: str | Path) -> Path | None:
    """Return the directory on this machine that MODEL names; None if it names none.

    The folder of a model in the Hub's cache stands for its snapshot. InputError E_FILE if the
    directory cannot be accessed, E_MODEL_NOT_FOUND if a folder of the cache has several snapshots.
    """
    path = expanded(model)
    if not is_directory(path):
        return None
    if is_cache_folder(path):
        return _snapshot(path)
    return path


def model_name(folder: str) -> str:
    """Return the model's name for a directory's name: in the Hub's cache it holds the owner too."""
    if folder.startswith("models--"):
        return folder.rpartition("--")[2]
    return folder


def local_model(model: Path) -> Path:
    """Return the directory that MODEL names, for commands that fetch nothing.

    InputError E_MODEL_NOT_FOUND if there is no such directory.
    """
    directory = model_directory(model)
    if directory is not None:
        return directory
    path = expanded(model)
    if status_of(path) is not None:
        raise _not_a_directory(model, _hint_for_file(path))
    hint = "give the directory of a GPTQ checkpoint on this machine"
    raise _not_a_directory(model, hint_at_near(path, folders=True) or hint)


def is_cache_folder(path: Path) -> bool:
    """Return whether `path` is the folder of a model in the Hub's cache, with its snapshots."""
    return resolved(path).name.startswith("models--") and is_directory(path / "snapshots")


def _snapshot(folder: Path) -> Path:
    """Return the snapshot of the main branch in a model's folder of the cache, or the only one.

    InputError E_MODEL_NOT_FOUND if there are none, or several.
    """
    main = folder / "refs" / "main"
    with file_errors(writing=False):
        snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        commit = main.read_text().strip() if is_file(main) else ""
    for snapshot in snapshots:
        if snapshot.name == commit:
            return snapshot
    if len(snapshots) == 1:
        return snapshots[0]
    count = f"{len(snapshots)} snapshots, but none of its main branch"
    message = f"`{folder}` is a folder of the Hub's cache with {count}"
    hint = f"use {pasted_id(resolved(folder).name)}"
    if snapshots:
        hint = f"give one of them: {snapshots[0]}"
    raise InputError("E_MODEL_NOT_FOUND", message, hint=hint)


def _hint_for_file(file: Path) -> str:
    """Return the hint for a MODEL that is a file."""
    if file.suffix in (".gguf", ".onnx"):
        return (
            "GGUF and ONNX cannot be read: give the directory of the safetensors checkpoint "
            "that the file was made from"
        )
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
        raise InputError("E_MODEL_NOT_FOUND", message, hint="omit --revision")
    return ModelSource(directory, model_name(resolved(expanded(model)).name), None)


def _download(identifier: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download

    with _hub_errors(identifier, revision):
        directory = Path(snapshot_download(identifier, revision=revision, ignore_patterns=SKIPPED))
    # The cache names a snapshot by its commit.
    return ModelSource(directory, identifier, directory.name)


def _may_be_cached(refused: InputError) -> bool:
    """Return whether the Hub did not answer, so that `snapshot_download` would use the cache."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if refused.code in ("E_HUB_NETWORK", "E_HUB_AUTH"):
        return True
    return isinstance(refused.__cause__, RepositoryNotFoundError)


def _cached(identifier: str, revision: str | None) -> tuple[ModelSource, Checkpoint] | None:
    """Return a model in the cache; None if it is not there, or not complete."""
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


class Listed(NamedTuple):
    """A model on the Hub: its id, the commit of a revision, and the names of its files."""

    identifier: str
    commit: str
    files: frozenset[str]


Look = Callable[["HfApi", Listed], tuple[ModelSource, Checkpoint]]


def _listed(api: HfApi, identifier: str, revision: str | None) -> Listed:
    info = api.model_info(identifier, revision=revision)
    assert info.sha is not None
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    if "config.json" not in files:
        refuse_other_kinds(identifier, files)
        message = f"`{identifier}` has no config.json"
        raise InputError("E_CKPT_CONFIG", message, hint="name a Hugging Face model")
    return Listed(identifier, info.sha, files)


def _peek(api: HfApi, listed: Listed) -> tuple[ModelSource, Checkpoint]:
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    identifier, commit, files = listed
    fetched = []
    for name in SETTINGS_NAMES:
        if name in files:
            fetched.append(Path(api.hf_hub_download(identifier, name, revision=commit)))
    try:
        stored = _remote_tensors(api, identifier, commit)
    except NotASafetensorsRepoError:
        refuse_other_kinds(identifier, files)
        message = f"`{identifier}` holds no model.safetensors and no {INDEX_NAME}"
        hint = "name a model with safetensors weights"
        raise InputError("E_CKPT_MISSING", message, hint=hint) from None
    except SafetensorsParsingError as error:
        raise InputError("E_CKPT_CORRUPT", f"`{identifier}`: {first_line(error)}") from None
    directory = fetched[0].parent
    config, repeated = read_config(fetched[0])
    has_adapter = ADAPTER_CONFIG in files
    config_remarks = remarks_on(identifier, config, stored.tensors, has_adapter=has_adapter)
    remarks = (*repeated, *stored.remarks, *config_remarks)
    found = Checkpoint(directory, config, stored.tensors, stored.absent, remarks=remarks)
    return ModelSource(directory, identifier, commit, is_complete=False), found


def _remote_tensors(api: HfApi, identifier: str, commit: str) -> StoredTensors:
    """Return the tensors of a Hub model, whose headers are read by range requests.

    Offsets count from the end of a file's header.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    found = api.get_safetensors_metadata(identifier, revision=commit)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for file, header in sorted(found.files_metadata.items()):
        path = Path(identifier) / file
        shards[file] = {}
        for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
            entry = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": tensor.data_offsets,
            }
            shards[file][name] = tensor_info(path, name, entry, 0)
    return merge_shards(f"{identifier}/{INDEX_NAME}", found.weight_map, shards)


@contextmanager
def _hub_errors(identifier: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub, the network and the cache into InputError and ResourceError."""
    try:
        yield
    except GptqError:
        raise
    except Exception as error:
        refused = hub_refusal(error, f"model `{identifier}`", revision) or _refused_by_disk(error)
        if refused is None:
            raise
        if refused.code in UNSEEN:
            hint = f"{_no_directory(identifier)}; {refused.hint}"
            raise InputError(refused.code, str(refused), hint=hint) from error
        raise refused from error


def _refused_by_disk(error: Exception) -> GptqError | None:
    if not isinstance(error, OSError):
        return None
    refused = file_cause(error)
    if refused:
        return refused
    hint = "free some space or move the cache (HF_HOME), then run again: fetched files are kept"
    message = f"cannot write the Hub's cache: {error.strerror or error}"
    return ResourceError("E_DISK", message, hint=hint)
