"""A finished checkpoint to the Hub: through a pull request that is compared with what is here before it is merged.

Readers of `main` see the old state or the new one. What was uploaded stays with the Hub, so that another try goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_cli.checkpoint.manifest import CONFIG_FILE, MANIFEST
from gptq_cli.checkpoint.source import QUANTIZE_CONFIG
from gptq_cli.errors import ExistsError, GptqError, InputError
from gptq_cli.hub import AGAIN, push_refusal

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

MAIN = "main"
OF_A_CHECKPOINT = (".safetensors", ".safetensors.index.json")
SETTINGS = {QUANTIZE_CONFIG, CONFIG_FILE, MANIFEST}
LISTED = 3  # files that an error names

Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a repository: `commit` is its `main` now, `deleted` are files of an earlier checkpoint."""

    url: str
    commit: str
    pull_request: int | None
    deleted: tuple[str, ...]
    already_there: bool


class _Hub:
    """One repository: what it holds, and what is to be there."""

    def __init__(self, api: HfApi, repo: str, files: Sequence[CommitOperationAdd]) -> None:
        self.api, self.repo, self.files = api, repo, {file.path_in_repo: file for file in files}

    def tree(self, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def differing(self, tree: Mapping[str, RepoFile]) -> list[str]:
        """Files that `tree` has not, or otherwise."""
        return [path for path, file in self.files.items() if path not in tree or not _is_same(file, tree[path])]

    def stale(self, tree: Mapping[str, RepoFile]) -> list[str]:
        """Weights and settings of another checkpoint: beside ours they would make a mixture."""
        return [path for path in tree if path not in self.files and _is_of_a_checkpoint(path)]

    def is_wanted(self, tree: Mapping[str, RepoFile], main: Mapping[str, RepoFile]) -> bool:
        """Whether `tree` is `main` with our files, without stale ones, and nothing else."""
        others = {path: file.blob_id for path, file in main.items()}
        others = {path: others[path] for path in others.keys() - self.files.keys() - set(self.stale(main))}
        found = {path: file.blob_id for path, file in tree.items() if path not in self.files}
        return not self.differing(tree) and found == others

    @property
    def title(self) -> str:
        """Names the pull request by what it brings, so that another try finds it."""
        digest = sha256()
        for path, file in sorted(self.files.items()):
            digest.update(f"{path}\0{file.upload_info.sha256.hex()}\n".encode())
        return f"Upload with gptq, {digest.hexdigest()[:16]}"


def publish(
    repo: str, files: Mapping[str, Path | bytes], *, public: bool, overwrite: bool, progress: bool, say: Say
) -> Published:
    """Make `main` of the model repository `repo` hold `files` (path in the repository -> a file here, or its bytes).

    The repository is made if it is not there, private unless `public`. Nothing is done where all is there already.
    ExistsError E_OUT_EXISTS for other content under these names without `overwrite`; InputError E_PUSH if the Hub
    refuses or holds something else afterwards, E_HUB_* as `push_refusal` says.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not progress:
        disable_progress_bars()
    additions = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    with _push_errors(f"model `{repo}`"):
        hub = _Hub(HfApi(), repo, additions)
        _open(hub, public=public)
        main = hub.tree(MAIN)
        different, stale = hub.differing(main), hub.stale(main)
        if not different and not stale:
            return _published(hub, None, (), already_there=True)
        _refuse_occupied(repo, [path for path in different if path in main] + stale, overwrite=overwrite)
        number = _begun(hub, main)
        if number is None:
            say("upload", f"{len(different)} files to a pull request of {repo}")
            number = _commit(hub, stale)
        say("compare", f"refs/pr/{number} with the files here")
        if not hub.is_wanted(hub.tree(f"refs/pr/{number}"), main):
            raise _not_as_sent(hub, f"refs/pr/{number}")
        say("merge", f"pull request {number}")
        _merge(hub, number)
        if hub.differing(hub.tree(MAIN)):
            raise _not_as_sent(hub, MAIN)
        return _published(hub, number, tuple(stale), already_there=False)


def _open(hub: _Hub, *, public: bool) -> None:
    """See to it that the repository is there, and as private as was said."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        private = bool(hub.api.model_info(hub.repo).private)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        hub.api.create_repo(hub.repo, private=not public, exist_ok=True)
        return
    if private == public:
        state, wish = ("private", "leave out --public") if private else ("public", "add --public if all may read it")
        hint = f"{wish}, or change the repository on the Hub"
        raise InputError("E_PUSH", f"model `{hub.repo}` is {state} already, and a push does not change that", hint=hint)


def _refuse_occupied(repo: str, occupied: Sequence[str], *, overwrite: bool) -> None:
    if occupied and not overwrite:
        listed = ", ".join(occupied[:LISTED]) + (", ..." if len(occupied) > LISTED else "")
        hint = "choose another name, or add --overwrite: the Hub keeps the old state in its history"
        raise ExistsError("E_OUT_EXISTS", f"model `{repo}` holds something else already: {listed}", hint=hint)


def _begun(hub: _Hub, main: Mapping[str, RepoFile]) -> int | None:
    """The pull request of an earlier try that brings just this."""
    for found in hub.api.get_repo_discussions(hub.repo, discussion_type="pull_request", discussion_status="open"):
        if found.title == hub.title and hub.is_wanted(hub.tree(f"refs/pr/{found.num}"), main):
            return int(found.num)
    return None


def _commit(hub: _Hub, stale: Sequence[str]) -> int:
    """All files in one commit on a new pull request, its number."""
    from huggingface_hub import CommitOperationDelete

    operations: list[Any] = [*hub.files.values(), *(CommitOperationDelete(path) for path in stale)]
    number = hub.api.create_commit(hub.repo, operations, commit_message=hub.title, create_pr=True).pr_num
    assert number is not None
    return number


def _merge(hub: _Hub, number: int) -> None:
    if hub.api.get_discussion_details(hub.repo, number).status == "draft":
        hub.api.change_discussion_status(hub.repo, number, "open")
    hub.api.merge_pull_request(hub.repo, number)


def _published(hub: _Hub, number: int | None, deleted: tuple[str, ...], *, already_there: bool) -> Published:
    commit = hub.api.model_info(hub.repo).sha
    assert commit is not None
    return Published(f"{hub.api.endpoint}/{hub.repo}", commit, number, deleted, already_there)


def _is_of_a_checkpoint(path: str) -> bool:
    return "/" not in path and (path.endswith(OF_A_CHECKPOINT) or path in SETTINGS)


def _is_same(file: CommitOperationAdd, entry: RepoFile) -> bool:
    """Whether the Hub holds the bytes of `file`: by SHA-256 for large files, by git's hash for the others."""
    if entry.size != file.upload_info.size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as stream:
        content = stream.read()
    return bool(entry.blob_id == sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _not_as_sent(hub: _Hub, revision: str) -> InputError:
    message = f"what the Hub holds at {revision} of model `{hub.repo}` is not what was sent"
    return InputError("E_PUSH", message, hint=f"{AGAIN}; if it persists, look at the repository's history")


@contextmanager
def _push_errors(what: str) -> Iterator[None]:
    """Turn what the Hub and the way to it refuse into InputError."""
    try:
        yield
    except GptqError:
        raise
    except Exception as error:
        refused = push_refusal(error, what)
        if refused is None and isinstance(error, ValueError | RuntimeError | OSError):
            refused = InputError("E_PUSH", f"the upload to {what} failed: {error}", hint=AGAIN)
        if refused is None:
            raise
        raise refused from error
