"""The same call resumes a run that ended early anywhere, and writes the same output."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from gptq_cli.errors import ConfigError, ExistsError, PausedError, ResourceError
from gptq_cli.events import BlockStarted, Event, LayerStarted, PhaseStarted, Resumed, WorkKept
from gptq_cli.models.stream import ModelStream
from gptq_cli.quantization.run_state import FinishedBlocks, Limits
from gptq_cli.runtime.memory import Memory
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.runtime.ranks import Ranks
from tests.architectures import build
from tests.disks import CountingDisk, DyingDisk, FailingDisk, Killed, using
from tests.families import random_model, save, save_model, written
from tests.runs import config, digest
from tests.tiny import SMALL, WORK, Case, kill_after_block, killer

EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])


@EVERY
def test_a_rerun_after_any_kill_writes_the_same_output(
    every: bool, case: Case, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for last in case.moments(every):
        assert case.interrupted(output, last)
        assert not output.exists() or digest(output) == case.tree, (
            f"torn output after operation {last}"
        )
        with using(CountingDisk()):
            case.run(output)
        assert digest(output) == case.tree, f"another output after a kill at operation {last}"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(output)
    assert len(case.operations) > 100
    assert not case.interrupted(output, len(case.operations) + 1)


# Either an error lasts at every second moment, or a slow test has each moment with both kinds.
@pytest.mark.parametrize(
    ("every", "lasting"),
    [
        (False, "some"),
        pytest.param(True, "all", marks=pytest.mark.slow),
        pytest.param(True, "none", marks=pytest.mark.slow),
    ],
)
def test_a_rerun_after_any_disk_error_writes_the_same_output(
    lasting: str, every: bool, case: Case, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    codes = [errno.ENOSPC, errno.EIO, errno.EDQUOT]
    for number, first in enumerate(case.moments(every)):
        code = codes[first % 3]
        for_ever = {"all": True, "none": False, "some": number % 2 == 0}[lasting]
        with (
            using(FailingDisk(first, code, for_ever=for_ever)),
            pytest.raises(ResourceError) as caught,
        ):
            case.run(output)
        assert caught.value.code == "E_DISK"
        assert os.strerror(code) in str(caught.value)
        assert not output.exists() or digest(output) == case.tree
        with using(CountingDisk()):
            case.run(output)
        assert digest(output) == case.tree, f"another output after an error at operation {first}"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(output)


def test_a_kill_loses_only_the_block_at_work(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill_after_block(case, output, 0)
    events: list[Event] = []
    result = case.run(output, report=events.append)
    assert [event.index for event in events if isinstance(event, Resumed)] == [1]
    assert [event.index for event in events if isinstance(event, BlockStarted)] == [1]
    assert (result.resumed_blocks, len(result.layers)) == (1, 5)
    assert [layer.block for layer in result.layers] == [0, 0, 1, 1, 2]
    assert digest(output) == case.tree


@pytest.mark.parametrize("lm_head", [False, True])
def test_unused_blocks_in_the_file_are_no_steps_of_the_run(lm_head: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **(SMALL | {"num_hidden_layers": 3}))
    output = tmp_path / "out"
    declared = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(declared | {"num_hidden_layers": 2}))
    case = Case(model, {}, [])

    def stop_before_verifying(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == "verify":
            raise Killed

    with pytest.raises(Killed):
        case.run(output, lm_head=lm_head, report=stop_before_verifying)
    events: list[Event] = []
    result = case.run(output, lm_head=lm_head, report=events.append)
    resumed = [(event.index, event.n_blocks) for event in events if isinstance(event, Resumed)]
    assert resumed == [(2 + lm_head, 2 + lm_head)]
    assert not [event for event in events if isinstance(event, BlockStarted | LayerStarted)]
    assert {layer.block for layer in result.layers} == set(range(2 + lm_head))


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_that_adds_zeros_changes_no_other(block: int, tmp_path: Path) -> None:
    model = random_model("llama", **SMALL | {"num_hidden_layers": 4})
    with torch.no_grad():
        model.model.layers[block].self_attn.o_proj.weight.zero_()
    case = Case(save(model, tmp_path / "model"), {}, [])
    case.run(tmp_path / "whole", preset="best", nsamples=4)
    with pytest.raises(Killed):
        case.run(tmp_path / "out", preset="best", nsamples=4, report=killer(0))
    case.run(tmp_path / "out", preset="best", nsamples=4)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_rerun_does_not_touch_a_complete_output(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = case.run(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for options in ({}, {"overwrite": True}, {"resume": "require"}):
        again = case.run(output, **options)
        assert again.already_done
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
        errors = [layer.relative_error for layer in again.layers]
        assert errors == [layer.relative_error for layer in first.layers]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"bits": 3}, "--bits was 4, is 3"),
        ({"seed": 1}, "--seed was 0, is 1"),
        (
            {"dataset": written("another text of ten words or so, " * 20)},
            "with other settings: the calibration text is another one",
        ),
    ],
)
def test_work_of_another_run_is_neither_used_nor_deleted(
    changes: dict[str, object], field: str, case: Case, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    kill_after_block(case, output, 0)
    before = digest(tmp_path / WORK)
    with pytest.raises(ExistsError) as caught:
        case.run(output, **changes)
    assert (caught.value.code, caught.value.exit_code) == ("E_RESUME_MISMATCH", 6)
    assert "holds 1 finished block of a run with other settings" in str(caught.value)
    assert field in str(caught.value)
    assert "--resume never" in (caught.value.hint or "")
    assert f"gptq resume {output}," in (caught.value.hint or "")
    del before["holder.json"]
    assert before.items() <= digest(tmp_path / WORK).items()
    case.run(output)
    assert digest(output) == case.tree


def test_changed_texts_under_the_same_name_are_another_run(case: Case, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("one " * 400)

    with pytest.raises(Killed):
        case.run(output, dataset=str(text), report=killer(0))
    text.write_text("two " * 400)
    with pytest.raises(
        ExistsError,
        match=r"holds 1 finished block .*other settings: the calibration text is another one",
    ):
        case.run(output, dataset=str(text))


def test_changed_weights_under_the_same_name_are_another_run(case: Case, tmp_path: Path) -> None:
    model, output = shutil.copytree(case.model, tmp_path / "model"), tmp_path / "out"
    other = Case(model, {}, [])
    kill_after_block(other, output, 0)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        ExistsError, match=r"with other settings: `model\.safetensors` of the model is not the same"
    ):
        other.run(output)


def test_resume_never_starts_over_but_resume_require_refuses_to(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ExistsError, match="no finished block to resume from") as caught:
        case.run(output, resume="require")
    assert caught.value.code == "E_RESUME_NOTHING"
    assert list(tmp_path.iterdir()) == []
    kill_after_block(case, output, 0)
    assert case.run(output, resume="never").resumed_blocks == 0
    shutil.rmtree(output)
    kill_after_block(case, output, 0)
    assert case.run(output, resume="require").resumed_blocks == 1
    assert digest(output) == case.tree


def test_a_block_that_would_exceed_max_runtime_does_not_start() -> None:
    clock = [100.0]
    limits = Limits(config(), 60, now=lambda: clock[0])
    limits.check_time_for_block()
    clock[0] = 130.0
    limits.add_block(25.0)
    limits.check_time_for_block()
    clock[0] = 136.0
    limits.check_time()
    with pytest.raises(
        PausedError, match=r"would not finish within --max-runtime .60 s."
    ) as caught:
        limits.check_time_for_block()
    assert (caught.value.code, caught.value.exit_code) == ("E_PAUSED", 75)
    assert caught.value.hint is None  # the command that resumes the run is printed
    clock[0] = 161.0
    with pytest.raises(PausedError, match="which will start over, did not finish within") as late:
        limits.check_time()
    assert late.value.hint is None


def test_time_spent_before_the_run_is_part_of_max_runtime() -> None:
    clock = [100.0]
    limits = Limits(config(), 9, spent=7.5, now=lambda: clock[0])
    limits.check_time_for_block()
    clock[0] = 101.6
    with pytest.raises(PausedError, match=r"within --max-runtime .9 s.") as caught:
        limits.check_time()
    assert caught.value.hint == "this call has finished no block: allow more time"
    over = Limits(config(), 9, spent=9.5, now=lambda: clock[0])
    with pytest.raises(PausedError, match=r"would not finish within --max-runtime .9 s."):
        over.check_time_for_block()


def test_a_run_out_of_time_keeps_its_work_and_reports_where(case: Case, tmp_path: Path) -> None:
    events: list[Event] = []
    with pytest.raises(PausedError):
        case.run(tmp_path / "out", max_seconds=0, report=events.append)
    assert list(tmp_path.iterdir()) == []
    assert not [event for event in events if isinstance(event, WorkKept)]
    kill_after_block(case, tmp_path / "out", 0)
    with pytest.raises(PausedError):
        case.run(tmp_path / "out", max_seconds=0, report=events.append)
    assert [event.directory for event in events if isinstance(event, WorkKept)] == [tmp_path / WORK]
    case.run(tmp_path / "out")
    assert digest(tmp_path / "out") == case.tree


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
)
def test_a_run_out_of_memory_keeps_its_work_and_names_flags(
    error: Exception, case: Case, tmp_path: Path
) -> None:
    def exhaust(event: Event) -> None:
        if isinstance(event, LayerStarted) and event.name.startswith("model.layers.1."):
            raise error

    with pytest.raises(ResourceError) as caught:
        case.run(tmp_path / "out", report=exhaust)
    assert (caught.value.code, caught.value.exit_code) == ("E_OOM", 5)
    for flag in ("--batch-size 1", "--seqlen", "--device cpu"):
        assert flag in (caught.value.hint or "")
    assert case.run(tmp_path / "out").resumed_blocks == 1
    assert digest(tmp_path / "out") == case.tree


def test_a_disk_too_small_for_the_output_is_refused_at_once(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, 4096, real.f_blocks, 10, 10, *list(real)[5:]))
    monkeypatch.setattr("gptq_cli.planning.checks.os.statvfs", lambda _: full)
    with pytest.raises(
        ResourceError,
        match=r"has \S+ KB free, \d+ KB are needed: \S+ KB of output, \S+ KB of hidden states",
    ) as caught:
        case.run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert "fewer --nsamples" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_cannot_become_the_output(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("gptq_cli.files.os.path.ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(ConfigError, match="is a mount point") as caught:
        case.run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_OUT_MOUNT", 2)


def test_overwriting_resumes_after_a_kill(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # At the first "unlink" the output has its name, but the work directory still exists.
    last = case.operations.index("unlink")
    for extra in (-8, -4, 0, 2, 4):
        shutil.copytree(case.model, output)
        with pytest.raises(Killed), using(DyingDisk(last + extra)):
            case.run(output, overwrite=True)
        assert digest(output) in (case.tree, digest(case.model))
        case.run(output, overwrite=True)
        assert digest(output) == case.tree
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(output)


@pytest.mark.parametrize(
    "settings",
    [
        {"true_sequential": False},
        {"batch_size": 2},
        {"desc_act": True, "bits": 3},
        {"asymmetric_calibration": 0.5},
        {"asymmetric_calibration": 0.5, "true_sequential": False},
    ],
    ids=str,
)
def test_a_run_resumes_with_settings_of_all_kinds(
    settings: dict[str, object], case: Case, tmp_path: Path
) -> None:
    case.run(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        case.run(tmp_path / "out", report=killer(0), **settings)
    assert case.run(tmp_path / "out", **settings).resumed_blocks == 1
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_resumed_run_keeps_the_token_counts_of_experts(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mixtral", hidden_size=32, intermediate_size=64)
    tiny = Case(model, {}, [])
    changes = {"dynamic": {}, "lm_head": False, "nsamples": 6, "seqlen": 64}
    whole = tiny.run(tmp_path / "whole", **changes)
    with pytest.raises(Killed):
        tiny.run(tmp_path / "out", report=killer(0), **changes)
    result = tiny.run(tmp_path / "out", **changes)
    assert result.resumed_blocks == 1
    tokens = [(layer.name, layer.tokens) for layer in result.layers]
    assert tokens == [(layer.name, layer.tokens) for layer in whole.layers]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore")  # the warnings of transformers do not matter here
@pytest.mark.parametrize("model_type", ["gemma4_text", "gpt2", "zaya"])
def test_a_resumed_run_keeps_values_carried_between_blocks(model_type: str, tmp_path: Path) -> None:
    tiny = Case(save(build(model_type), tmp_path / "model"), {}, [])
    rules = {"-:.*router_mlp": {}} if model_type == "zaya" else {}
    changes = {
        "dynamic": rules,
        "lm_head": False,
        "moe_uncovered": "rtn",
        "asymmetric_calibration": 0.5,
    }
    tiny.run(tmp_path / "whole", **changes)
    with pytest.raises(Killed):
        tiny.run(tmp_path / "out", report=killer(1), **changes)
    assert tiny.run(tmp_path / "out", **changes).resumed_blocks == 2
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


class Dealer(Ranks):
    """The ranks of a process that writes nothing; the leader broadcasts `answers`."""

    size, rank = 2, 1

    def __init__(self, states: list[tuple[tuple[torch.Tensor, ...], list[dict[str, int]]]]) -> None:
        self.states, self.kept, self.answers = states, [], [1, False, True]

    def scatter(self, values: object, n_batches: int) -> list[Any]:
        assert (values, n_batches) == (None, 4)
        return self.states[2:]

    def gather(self, mine: Sequence[Any]) -> None:
        self.kept.append(list(mine))

    def broadcast(self, value: object = None) -> Any:
        assert value is None
        return self.answers.pop(0)


def test_a_rank_that_writes_nothing_gets_and_returns_its_share() -> None:
    cpu = torch.device("cpu")
    states = [
        ((torch.full((1,), float(n)), torch.full((1,), -float(n))), [{"keys": n}]) for n in range(4)
    ]
    ways = [HiddenStates([torch.zeros(1), torch.zeros(1)], Memory(cpu), 2, 4) for _ in range(2)]
    stream = cast(ModelStream, SimpleNamespace(device=cpu, carried=[[{}], [{}]]))
    team = Dealer(states)
    blocks = FinishedBlocks(team, 4)
    assert (blocks.restore(stream, ways), blocks.complete) == (1, False)
    assert [[float(state) for state in way.stored] for way in ways] == [[2.0, 3.0], [-2.0, -3.0]]
    assert stream.carried == [[{"keys": 2}], [{"keys": 3}]]
    blocks.finished(1, stream, ways)
    assert (team.kept, blocks.n_finished) == ([], 1)  # the leading process did not ask for a save
    blocks.finished(2, stream, ways)
    assert (team.kept, blocks.n_finished) == ([states[2:]], 3)
    blocks.finished(3, stream, [])  # after the last block nothing is needed
    assert (team.kept, team.answers, blocks.complete) == ([states[2:]], [], True)
    team.answers = [3]
    assert FinishedBlocks(team, 3).complete
