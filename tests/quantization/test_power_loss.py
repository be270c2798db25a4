"""A power cut at any moment publishes no torn output and loses no finished block."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gptq_cli.storage import durable
from gptq_cli.storage.manifest import Journal
from tests.disks import CountingDisk, using
from tests.power_loss import Forgets, PowerLossDisk, State, materialise
from tests.runs import digest
from tests.tiny import Case

WORK, OUT = "disk/.out.gptq-work/", "disk/out"
RERUNS = [8, pytest.param(25, marks=pytest.mark.slow)]


def hash_of(state: State) -> str:
    """Return a hash of all paths of `state` and of what is at each of them."""
    parts = hashlib.sha256()
    for name, content in sorted(state.items()):
        length = "directory"
        if content is not None:
            length = str(len(content))
        parts.update(f"{name!r} {length}\n".encode())
        parts.update(content or b"")
    return parts.hexdigest()


def tree_in(state: State, directory: str = OUT) -> dict[str, str] | None:
    """Hashes of the files below `directory`; None if it is not there."""
    if directory not in state:
        return None
    start = f"{directory}/"
    tree = {}
    for name, content in state.items():
        if name.startswith(start) and content is not None:
            tree[name.removeprefix(start)] = hashlib.sha256(content).hexdigest()
    return tree


def blocks_in(state: State) -> int:
    """Count the blocks that a run could reuse from the work directory, with independent code."""
    lines = (state.get(f"{WORK}journal.jsonl") or b"").split(b"\n")
    tensors = dict(stored_tensors(state))
    count = 0
    if not state.get(f"{WORK}run.json"):
        return 0
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if any(tensors.get(name) != sha256 for name, sha256 in entry["tensors"].items()):
            break
        hidden = hashlib.sha256(state.get(f"{WORK}hidden-{number % 2}") or b"").hexdigest()
        if entry["hidden"] in (None, hidden):
            count = number + 1
    return count


def stored_tensors(state: State) -> Iterator[tuple[str, str]]:
    """Hashes of the tensors in the shards of the work directory."""
    for name, content in state.items():
        if name.startswith(f"{WORK}out/") and name.endswith(".safetensors") and content:
            length = int.from_bytes(content[:8], "little")
            try:
                header = json.loads(content[8 : 8 + length])
            except ValueError:
                continue
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    start, end = (8 + length + offset for offset in entry["data_offsets"])
                    yield tensor, hashlib.sha256(content[start:end]).hexdigest()


class Violated(BaseException):
    """A power cut could cause a torn output or lost work."""


@dataclass
class Observer:
    """Check every state after a possible power cut, and raise `Violated` for a wrong one."""

    allowed: list[dict[str, str] | None]
    final: dict[str, str]
    finished: int = 0
    published: bool = False
    states: dict[str, tuple[State, int]] = field(default_factory=dict)

    def __call__(self, disk: PowerLossDisk) -> None:
        for state in disk.states():
            name = f"{hash_of(state)} {self.finished} {self.published}"
            if name in self.states:
                continue
            self.states[name] = state, self.finished
            found = tree_in(state)
            if found not in self.allowed:
                raise Violated("torn output")
            if found != self.final and (self.published or blocks_in(state) < self.finished):
                raise Violated("lost work")


def observe(
    case: Case,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    old: dict[str, str] | None = None,
    forgets: Forgets = lambda _: False,
) -> Observer:
    """One run below `root`, looked at after each of its operations."""
    observer = Observer([old, case.tree], case.tree)
    append, publish = Journal.append, durable.publish

    def appended(journal: Journal, entry: dict[str, object]) -> None:
        append(journal, entry)
        observer.finished += 1

    def published(*arguments: object, **options: object) -> None:
        publish(*arguments, **options)  # type: ignore[arg-type]
        observer.published = True

    with monkeypatch.context() as patched, using(PowerLossDisk(root, observer, forgets)):
        patched.setattr(Journal, "append", appended)
        patched.setattr(durable, "publish", published)
        case.run(root / OUT, overwrite=old is not None)
    return observer


@pytest.mark.parametrize("reruns", RERUNS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_rerun_after_any_power_cut_writes_the_same_output(
    overwrite: bool, reruns: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, old = tmp_path / "root", None
    (root / "disk").mkdir(parents=True)
    if overwrite:
        (root / OUT).mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(case.model / name, root / OUT / name)
        old = digest(root / OUT)
    observer = observe(case, root, monkeypatch, old=old)
    assert len(observer.states) > 200
    found = list(observer.states.values())
    for number, (state, finished) in enumerate(found[:: len(found) // reruns]):
        after = tmp_path / f"after-{number}"
        after.mkdir()
        materialise(state, after)
        (after / "disk").mkdir(exist_ok=True)
        with using(CountingDisk()):
            result = case.run(after / OUT, overwrite=overwrite)
        assert result.already_done or result.resumed_blocks >= min(finished, 3)
        assert digest(after / OUT) == case.tree


FORGOTTEN: dict[str, Callable[[Path], bool]] = {
    "of directories": Path.is_dir,
    "of shards": lambda path: path.suffix == ".safetensors",
    "of the journal": lambda path: path.name == "journal.jsonl",
    "of hidden states": lambda path: path.name.startswith("hidden-"),
    "before a rename": lambda path: path.suffix == ".tmp",
}


@pytest.mark.parametrize("kind", FORGOTTEN)
def test_the_disk_model_notices_each_missing_fsync(
    kind: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    with pytest.raises(Violated):
        observe(case, tmp_path, monkeypatch, forgets=FORGOTTEN[kind])
