"""A run that ends early, wherever it does, is gone on with by the same call, and nothing shows of it in the output."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gptq_cli.checkpoint.durable import Disk
from gptq_cli.errors import ExistsError, GateError, InputError, PausedError, ResourceError
from gptq_cli.pipeline import quantize as pipeline
from gptq_cli.pipeline.events import BlockFinished, BlockStarted, Event, LayerStarted, Resumed, Warned, WorkKept
from gptq_cli.pipeline.quantize import QuantizeResult, quantize_checkpoint
from tests.disks import CountingDisk, DyingDisk, FailingDisk, Killed, using
from tests.families import save_model
from tests.pipeline.runs import config, digest

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SETTINGS = {"nsamples": 2, "batch_size": 1, "seqlen": 16, "lm_head": True, "max_shard_size": "60KB"}
SETTINGS |= {"dynamic": {"-:.*(q|k|v|gate|up)_proj": {}}}
SETTINGS |= {"dataset": ["a quick brown fox jumps over the lazy dog and then some more " * 20]}
PARTS = 2  # of a test that takes every operation in turn, for as many processes
WORK = ".out.gptq-work"


@dataclass(frozen=True)
class Case:
    """A small model, what quantizing it gives, and how many operations on the disk that takes."""

    model: Path
    tree: dict[str, str]
    operations: list[str]

    def run(self, output: Path, **changes: object) -> QuantizeResult:
        manner = {key: changes.pop(key) for key in ("resume", "overwrite", "max_seconds", "report") if key in changes}
        return quantize_checkpoint(str(self.model), output, config(**(SETTINGS | changes)), **manner)

    def interrupted(self, output: Path, last: int) -> bool:
        """Run with a kill after operation `last`; whether the run lived that long."""
        try:
            with using(DyingDisk(last)):
                self.run(output)
        except Killed:
            return True
        return False


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("case")
    model = save_model(directory / "model", **SMALL)
    disk = CountingDisk()
    whole = Case(model, {}, [])
    with using(disk):
        whole.run(directory / "out")
    return Case(model, digest(directory / "out"), disk.operations)


def kill_after_block(case: Case, output: Path, block: int) -> None:
    """Run until `block` is finished and durable."""

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.index == block:
            raise Killed

    with pytest.raises(Killed):
        case.run(output, report=stop)


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_after_any_operation_the_output_is_absent_or_whole_and_the_rerun_writes_the_same(
    part: int, case: Case, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for last in range(1 + part, len(case.operations) + 1, PARTS):
        assert case.interrupted(output, last)
        assert not output.exists() or digest(output) == case.tree, f"torn output after operation {last}"
        with using(CountingDisk()):
            case.run(output)
        assert digest(output) == case.tree, f"another output after a kill at operation {last}"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(output)
    assert len(case.operations) > 100
    assert not case.interrupted(output, len(case.operations) + 1)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("for_ever", [False, True])
def test_an_error_of_any_operation_is_said_as_such_and_the_rerun_writes_the_same(
    for_ever: bool, part: int, case: Case, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    codes = [errno.ENOSPC, errno.EIO, errno.EDQUOT]
    for first in range(1 + part, len(case.operations) + 1, PARTS):
        code = codes[first // PARTS % 3]
        with using(FailingDisk(first, code, for_ever=for_ever)), pytest.raises(ResourceError) as caught:
            case.run(output)
        assert caught.value.code == "E_DISK"
        assert os.strerror(code) in str(caught.value)
        assert not output.exists() or digest(output) == case.tree
        with using(CountingDisk()):
            case.run(output)
        assert digest(output) == case.tree, f"another output after an error at operation {first}"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(output)


def test_no_more_than_the_block_at_work_is_lost(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill_after_block(case, output, 0)
    events: list[Event] = []
    result = case.run(output, report=events.append)
    assert [event.index for event in events if isinstance(event, Resumed)] == [1]
    assert [event.index for event in events if isinstance(event, BlockStarted)] == [1]
    assert (result.resumed_blocks, len(result.layers)) == (1, 5)
    assert [layer.block for layer in result.layers] == [0, 0, 1, 1, 2]
    assert digest(output) == case.tree


def test_what_is_complete_already_is_left_alone(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = case.run(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for manner in ({}, {"overwrite": True}, {"resume": "require"}):
        again = case.run(output, **manner)
        assert again.already_done
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
        assert [layer.relative_error for layer in again.layers] == [layer.relative_error for layer in first.layers]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"bits": 3}, "config.bits was 4, is 3"),
        ({"seed": 1}, "config.seed was 0, is 1"),
        ({"dataset": ["another text of a hundred words or so, " * 20]}, "config.dataset was"),
    ],
)
def test_unfinished_work_of_another_run_is_neither_used_nor_dropped(
    changes: dict[str, object], field: str, case: Case, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    kill_after_block(case, output, 0)
    before = digest(tmp_path / WORK)
    with pytest.raises(ExistsError) as caught:
        case.run(output, **changes)
    assert (caught.value.code, caught.value.exit_code) == ("E_RESUME_MISMATCH", 6)
    assert "holds 1 finished blocks of a run that differs" in str(caught.value)
    assert field in str(caught.value)
    assert "--resume never" in (caught.value.hint or "")
    assert {name: old for name, old in before.items() if name != "holder.json"}.items() <= digest(
        tmp_path / WORK
    ).items()
    case.run(output)
    assert digest(output) == case.tree


def test_texts_that_changed_under_the_same_name_are_another_run(case: Case, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("one " * 400)

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished):
            raise Killed

    with pytest.raises(Killed):
        case.run(output, dataset=str(text), report=stop)
    text.write_text("two " * 400)
    with pytest.raises(ExistsError, match=r"holds 1 finished blocks .*differs: calibration_sha256 was"):
        case.run(output, dataset=str(text))


def test_weights_that_changed_under_the_same_name_are_another_run(case: Case, tmp_path: Path) -> None:
    model, output = shutil.copytree(case.model, tmp_path / "model"), tmp_path / "out"
    other = Case(model, {}, [])
    kill_after_block(other, output, 0)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ExistsError, match=r"differs: source\.files\.model\.safetensors was"):
        other.run(output)


def test_resume_never_starts_afresh_and_require_refuses_to(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ExistsError, match="no finished block to go on from") as caught:
        case.run(output, resume="require")
    assert caught.value.code == "E_RESUME_NOTHING"
    assert list(tmp_path.iterdir()) == []
    kill_after_block(case, output, 0)
    assert case.run(output, resume="never").resumed_blocks == 0
    shutil.rmtree(output)
    kill_after_block(case, output, 0)
    assert case.run(output, resume="require").resumed_blocks == 1
    assert digest(output) == case.tree
