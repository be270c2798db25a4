"""Blocks are saved if a save takes little time; a resumed run writes the same for any saves."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.events import BlockFinished, BlockStarted, Event, LayerStarted, PhaseStarted
from gptq_cli.quantization import run_state
from gptq_cli.quantization.run_state import SavingTimes
from tests.disks import CountingDisk, DyingDisk, Killed, using
from tests.families import save_model
from tests.runs import digest, messages
from tests.tiny import SMALL, WORK, Case, kill_after_block

BLOCKS = 5
KILLS = [47, pytest.param(7, marks=pytest.mark.slow)]  # after every so many operations
SAVED_BLOCKS = [(), (1,), (0, 2), (1, 2, 3), (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a model of five blocks and a head with its output if all blocks are saved."""
    tmp_path = tmp_path_factory.mktemp("deep")
    plain = Case(save_model(tmp_path / "model", **(SMALL | {"num_hidden_layers": BLOCKS})), {}, [])
    operations = counted(plain, tmp_path / "out")
    return Case(plain.model, digest(tmp_path / "out"), operations)


@pytest.fixture
def saved_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that limits the saves of later runs to the given blocks and the last."""

    def only(*blocks: int) -> None:
        def is_due(self: SavingTimes, nbytes: int) -> bool:
            assert nbytes == 2 * 16 * 32 * 4  # two windows of 16 tokens, 32 float32 features each
            seen = vars(self).setdefault("seen", 0)
            vars(self)["seen"] = seen + 1
            return self.always or seen in blocks

        monkeypatch.setattr(SavingTimes, "is_due", is_due)

    return only


def counted(case: Case, output: Path, **changes: object) -> list[str]:
    """Run, and return the operations on the disk."""
    disk = CountingDisk()
    with using(disk):
        case.run(output, **changes)
    return disk.operations


def journal(tmp_path: Path) -> list[int]:
    """Return the numbers of the saved blocks."""
    file = tmp_path / WORK / "journal.jsonl"
    if not file.exists():
        return []
    return [json.loads(line)["block"] for line in file.read_text().splitlines()]


def ticking(*times: float) -> Any:
    return iter(times).__next__


def test_a_save_is_due_if_it_takes_a_twentieth_of_the_time() -> None:
    gigabyte = 10**9
    times = SavingTimes(now=ticking(100.0, 119.0, 120.0, 121.0, 140.0, 141.0, 141.0))
    assert [times.is_due(gigabyte), times.is_due(gigabyte)] == [False, True]
    times.saved()
    due = [times.is_due(gigabyte), times.is_due(gigabyte), times.is_due(2 * gigabyte)]
    assert due == [False, True, False]


def test_a_save_is_always_due_with_a_time_limit() -> None:
    assert SavingTimes(always=True, now=ticking(0.0)).is_due(10**15)


@pytest.mark.parametrize("blocks", SAVED_BLOCKS, ids=str)
def test_a_run_resumes_after_the_last_saved_block(
    blocks: tuple[int, ...], deep: Case, tmp_path: Path, saved_after: Any
) -> None:
    output, finished = tmp_path / "out", max([-1, *blocks]) + 1
    saved_after(*blocks)
    kill_after_block(deep, output, BLOCKS - 2)
    assert journal(tmp_path) == list(blocks)
    result = deep.run(output)
    assert result.resumed_blocks == finished
    assert [layer.block for layer in result.layers] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert digest(output) == deep.tree


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("blocks", [(), (0, 2)], ids=str)
def test_a_rerun_after_any_kill_writes_the_same_for_any_saves(
    blocks: tuple[int, ...], kills: int, deep: Case, tmp_path: Path, saved_after: Any
) -> None:
    output = tmp_path / "out"
    saved_after(*blocks)
    operations = iter(range(1, len(deep.operations), kills))
    for last in operations:
        try:
            with using(DyingDisk(last)):
                deep.run(output)
        except Killed:
            assert not output.exists() or digest(output) == deep.tree
            deep.run(output)
            assert digest(output) == deep.tree, f"another output after a kill at operation {last}"
            shutil.rmtree(output)
        else:
            break  # with fewer saves there are fewer operations
    assert last > 60


@pytest.mark.parametrize(
    ("blocks", "resumed_after"), [((0, 2), 1), ((1,), 0), ((0, 1, 3), 2), ((1, 2), 2)], ids=str
)
def test_damaged_states_resume_from_the_save_before(
    blocks: tuple[int, ...], resumed_after: int, deep: Case, tmp_path: Path, saved_after: Any
) -> None:
    output = tmp_path / "out"
    saved_after(*blocks)
    kill_after_block(deep, output, BLOCKS - 2)
    states = tmp_path / WORK / f"hidden-{(len(blocks) - 1) % 2}"
    states.write_bytes(states.read_bytes()[:-1] + b"?")
    events: list[Event] = []
    assert deep.run(output, report=events.append).resumed_blocks == resumed_after
    (warned,) = messages(events, "W_RESUME_DAMAGED")
    expected = f"the hidden states after block {blocks[-1] + 1} are not as they were written"
    assert warned.startswith(expected)
    assert digest(output) == deep.tree


def test_slow_saving_saves_only_the_last_block(
    deep: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "BYTES_PER_SECOND", 1.0)
    assert len(counted(deep, tmp_path / "out")) < len(deep.operations)
    assert digest(tmp_path / "out") == deep.tree
    kill_after_block(deep, tmp_path / "other", BLOCKS - 2)
    assert not list(tmp_path.glob(".other.gptq-work/hidden-*"))


def test_a_rerun_before_verification_repeats_no_block(
    deep: Case, tmp_path: Path, saved_after: Any
) -> None:
    def stop_before_verifying(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == "verify":
            raise Killed

    saved_after(1)
    with pytest.raises(Killed):
        deep.run(tmp_path / "out", report=stop_before_verifying)
    assert journal(tmp_path) == [1, BLOCKS]
    assert deep.run(tmp_path / "out").resumed_blocks == BLOCKS + 1
    assert digest(tmp_path / "out") == deep.tree


def test_every_block_is_saved_after_a_memory_shortage(
    deep: Case, tmp_path: Path, saved_after: Any
) -> None:
    events: list[Event] = []

    def run_out_once_and_end(event: Event) -> None:
        begun = [known.index for known in events if isinstance(known, BlockStarted)]
        events.append(event)
        if isinstance(event, LayerStarted) and begun == [0, 1, 2]:
            raise MemoryError
        if isinstance(event, BlockFinished) and event.index == 3:
            raise Killed

    saved_after(0)
    with pytest.raises(Killed):
        deep.run(tmp_path / "out", report=run_out_once_and_end)
    started = [event.index for event in events if isinstance(event, BlockStarted)]
    assert started == [0, 1, 2, 1, 2, 3]
    (warned,) = messages(events, "W_OOM_RETRY")
    assert warned.startswith("out of memory in `model.layers.1`, which runs again with less")
    assert journal(tmp_path) == [0, 1, 2, 3]
    deep.run(tmp_path / "out")
    assert digest(tmp_path / "out") == deep.tree


def test_the_clock_restarts_at_each_save(
    deep: Case, tmp_path: Path, saved_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[int]] = []
    monkeypatch.setattr(SavingTimes, "saved", lambda _: told.append(journal(tmp_path)))
    saved_after(1, 3)
    deep.run(tmp_path / "out")
    assert told == [[1], [1, 3], [1, 3, BLOCKS]]


def test_a_run_with_a_time_limit_saves_every_block(
    deep: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "BYTES_PER_SECOND", 1.0)
    operations = counted(deep, tmp_path / "out", max_seconds=1e6)
    assert Counter(operations) == Counter(deep.operations)  # threads take turns in any order
