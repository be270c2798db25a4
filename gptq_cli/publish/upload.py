"""Upload of a finished checkpoint to the Hub, in one commit.

A commit is atomic: readers of `main` see the old state or the new one. The Hub keeps the large
files that it has received, so a repeated push sends only the missing ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_cli.errors import ExistsError, GptqError, InputError, counted, size
from gptq_cli.events import PhaseStarted, Report
from gptq_cli.files import ByteCount
from gptq_cli.hub_errors import AGAIN, push_refusal
from gptq_cli.storage.manifest import CONFIG_FILE, MANIFEST, QUANTIZE_CONFIG

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

OF_A_CHECKPOINT = (".safetensors", ".safetensors.index.json")
SETTINGS = {QUANTIZE_CONFIG, CONFIG_FILE, MANIFEST}
LISTED = 3  # files that an error names


@dataclass(frozen=True, slots=True)
class Published:
    """The state of a repository after a push.

    `commit` is the head of its `main`; `deleted` are the files of an earlier checkpoint that the
    push removed.
    """

    url: str
    commit: str
    deleted: tuple[str, ...]
    already_there: bool


class _Hub:
    """A repository on the Hub and the files that it will hold."""

    def __init__(self, api: HfApi, repo: str, files: Sequence[CommitOperationAdd]) -> None:
        self.api = api
        self.repo = repo
        self.files = {file.path_in_repo: file for file in files}

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    def head(self) -> str:
        """Return the commit that `main` names."""
        commit = self.api.model_info(self.repo).sha
        assert commit is not None
        return commit

    def tree(self, revision: str) -> dict[str, RepoFile]:
        """Return the files of a revision by their paths."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def differing(self, tree: Mapping[str, RepoFile]) -> list[str]:
        """Return the paths of our files that `tree` lacks or holds with other bytes."""
        paths = []
        for path, file in self.files.items():
            if path not in tree or not _is_same(file, tree[path]):
                paths.append(path)
        return paths

    def stale(self, tree: Mapping[str, RepoFile]) -> list[str]:
        """Return the weights and settings of another checkpoint, which must not mix with ours."""
        return [path for path in tree if path not in self.files and _is_of_a_checkpoint(path)]


def publish(
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    public: bool,
    overwrite: bool,
    progress: bool,
    report: Report,
    check: Callable[[], None],
) -> Published:
    """Make `main` of the model repository `repo` hold `files`.

    `files` maps paths in the repository to files here, or to their bytes. With `progress` the
    client of the Hub shows bars of its own for what it sends. `check` is called once
    the bytes to send are known; it raises if they are not the intended ones. If the repository does
    not exist, it is created, private unless `public`. If `main` holds all files, nothing is sent.
    Raises ExistsError E_OUT_EXISTS if the repository holds other content under these names and
    `overwrite` is false; InputError E_PUSH if the Hub refuses or holds other files afterwards, and
    E_HUB_* as `push_refusal` does.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not progress:
        disable_progress_bars()
    additions = _hashed(files, report)
    check()
    with _push_errors(f"model `{repo}`"):
        hub = _Hub(HfApi(), repo, additions)
        _open(hub, public=public)
        head = hub.head()
        main = hub.tree(head)
        different, stale = hub.differing(main), hub.stale(main)
        if not different and not stale:
            return Published(hub.url, head, (), already_there=True)
        occupied = [path for path in different if path in main] + stale
        _refuse_occupied(repo, occupied, overwrite=overwrite)
        report(PhaseStarted("upload", f"{counted(len(different), 'file')} to {repo}"))
        if not progress:
            _send_large(hub, different, report)
        commit = _commit(hub, stale, head)
        report(PhaseStarted("compare", f"{repo} with the files here"))
        if hub.differing(hub.tree(commit)):
            message = (
                f"commit {commit[:12]} of model `{repo}` does not hold the files that were sent"
            )
            hint = f"{AGAIN}; if the error persists, check the history of the repository"
            raise InputError("E_PUSH", message, hint=hint)
        return Published(hub.url, commit, tuple(stale), already_there=False)


def _open(hub: _Hub, *, public: bool) -> None:
    """Create the repository if there is none; refuse one whose visibility differs from `public`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        private = bool(hub.api.model_info(hub.repo).private)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        hub.api.create_repo(hub.repo, private=not public, exist_ok=True)
        return
    if private == public:
        state, advice = "public", "add --public if everybody may read it"
        if private:
            state, advice = "private", "omit --public"
        message = f"model `{hub.repo}` is {state} already; a push does not change the visibility"
        hint = f"{advice}, or change the repository on the Hub"
        raise InputError("E_PUSH", message, hint=hint)


def _refuse_occupied(repo: str, occupied: Sequence[str], *, overwrite: bool) -> None:
    if occupied and not overwrite:
        listed = ", ".join(occupied[:LISTED])
        if len(occupied) > LISTED:
            listed += ", ..."
        message = f"model `{repo}` holds other files already: {listed}"
        hint = "choose another name, or add --overwrite: the Hub keeps the old state in its history"
        raise ExistsError("E_OUT_EXISTS", message, hint=hint)


def _hashed(files: Mapping[str, Path | bytes], report: Report) -> list[CommitOperationAdd]:
    """Return the files as what adds them to a commit; the client hashes them for that."""
    from huggingface_hub import CommitOperationAdd

    sizes = {}
    for path, content in files.items():
        sizes[path] = len(content) if isinstance(content, bytes) else content.stat().st_size
    total = sum(sizes.values())
    report(PhaseStarted("hash", size(total)))
    count, additions = ByteCount(report, total), []
    for path, content in sorted(files.items()):
        additions.append(CommitOperationAdd(path, content))
        count.passed(sizes[path])
    return additions


def _send_large(hub: _Hub, paths: Sequence[str], report: Report) -> None:
    """Send large files one by one, to report their bytes; the commit does not send them again."""
    count = ByteCount(report, sum(hub.files[path].upload_info.size for path in paths))
    for path in paths:
        hub.api.preupload_lfs_files(hub.repo, [hub.files[path]], free_memory=False)
        count.passed(hub.files[path].upload_info.size)


def _commit(hub: _Hub, stale: Sequence[str], head: str) -> str:
    """Send all files in one commit on top of `head` and return the new commit."""
    from huggingface_hub import CommitOperationDelete

    deletions = [CommitOperationDelete(path) for path in stale]
    operations: list[Any] = [*hub.files.values(), *deletions]
    # With `parent_commit` the Hub refuses the commit if somebody else has pushed after `head`.
    done = hub.api.create_commit(
        hub.repo, operations, commit_message="Upload with gptq", parent_commit=head
    )
    return str(done.oid)


def _is_of_a_checkpoint(path: str) -> bool:
    return "/" not in path and (path.endswith(OF_A_CHECKPOINT) or path in SETTINGS)


def _is_same(file: CommitOperationAdd, entry: RepoFile) -> bool:
    """Return whether the Hub holds the bytes of `file`.

    Large files are compared by SHA-256, the others by git's hash.
    """
    if entry.size != file.upload_info.size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as stream:
        content = stream.read()
    return bool(entry.blob_id == sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def _push_errors(target: str) -> Iterator[None]:
    """Translate errors of the Hub and of the network into InputError."""
    try:
        yield
    except GptqError:
        raise
    except Exception as error:
        refused = push_refusal(error, target)
        if refused is None and isinstance(error, ValueError | RuntimeError | OSError):
            refused = InputError("E_PUSH", f"the upload to {target} failed: {error}", hint=AGAIN)
        if refused is None:
            raise
        raise refused from error
