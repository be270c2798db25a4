"""Finished blocks of a run that has failed, or cannot go on here, do not block the next one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.errors import ExistsError, InputError
from gptq_cli.events import BlockStarted, Event, Resumed, Warned, WorkKept
from gptq_cli.inspection.convert import convert_checkpoint
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from tests.disks import Killed
from tests.families import save_model
from tests.tiny import SETTINGS, SMALL, WORK, Case, kill_after_block

BEYOND = "model.layers.1.mlp.down_proj.weight"


def failing(case: Case, directory: Path) -> Case:
    """The case with a weight of the last block that no scale of float16 reaches."""
    model = shutil.copytree(case.model, directory / "failing")
    tensors = load_file(model / "model.safetensors")
    tensors[BEYOND] *= 1e9
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return Case(model, {}, [])


def fail(case: Case, output: Path) -> list[Event]:
    events: list[Event] = []
    with pytest.raises(InputError) as caught:
        case.run(output, report=events.append)
    assert caught.value.code == "E_CKPT_NONFINITE"
    return events


def test_other_settings_replace_the_work_of_a_failed_run(case: Case, tmp_path: Path) -> None:
    other, output = failing(case, tmp_path), tmp_path / "out"
    assert fail(other, output)[-1] == WorkKept(tmp_path / WORK, failed=True)
    again = fail(other, output)  # with the same settings it counts
    assert [event.index for event in again if isinstance(event, Resumed)] == [1]
    rules = {"dynamic": {**SETTINGS["dynamic"], "-:" + BEYOND.removesuffix(".weight"): {}}}
    events: list[Event] = []
    with pytest.raises(ExistsError) as caught:
        other.run(output, resume="require", **rules)
    assert (caught.value.code, caught.value.exit_code) == ("E_RESUME_MISMATCH", 6)
    result = other.run(output, report=events.append, **rules)
    assert (result.resumed_blocks, result.already_done) == (0, False)
    text = f"discarding the finished blocks in `{tmp_path / WORK}`: "
    text += "their run failed with E_CKPT_NONFINITE and would fail again"
    assert Warned("W_RESUME_DROPPED", text) in events
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failing", "out"]


@pytest.mark.parametrize("command", ["convert", "dequantize"])
def test_convert_and_dequantize_replace_the_work_of_a_failed_run(
    command: str, case: Case, tmp_path: Path
) -> None:
    case.run(tmp_path / "quantized")
    fail(failing(case, tmp_path), tmp_path / "out")
    events: list[Event] = []
    source, output = str(tmp_path / "quantized"), tmp_path / "out"
    if command == "convert":
        convert_checkpoint(source, output, "gptq_v2", report=events.append)
    else:
        dequantize_checkpoint(source, output, report=events.append)
    assert [event.code for event in events if isinstance(event, Warned)] == ["W_RESUME_DROPPED"]
    assert not (tmp_path / WORK).exists()


def test_a_failed_run_that_was_then_killed_keeps_its_work(case: Case, tmp_path: Path) -> None:
    other, output = failing(case, tmp_path), tmp_path / "out"
    fail(other, output)

    def kill(event: Event) -> None:
        if isinstance(event, BlockStarted):
            raise Killed

    with pytest.raises(Killed):
        other.run(output, report=kill)
    with pytest.raises(ExistsError, match="holds 1 finished block of"):
        other.run(output, bits=3)


@pytest.mark.parametrize("place", ["version", "device", "model"])
def test_no_hint_proposes_to_resume_an_unresumable_run(
    place: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Case(shutil.copytree(case.model, tmp_path / "model"), {}, [])
    kill_after_block(other, tmp_path / "out", 0)
    if place == "version":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif place == "device":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    else:
        (other.model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ExistsError) as caught:
        other.run(tmp_path / "out")
    assert (caught.value.code, caught.value.hint) == (
        "E_RESUME_MISMATCH",
        "discard it: --resume never",
    )


def test_the_hint_for_another_model_proposes_to_resume(case: Case, tmp_path: Path) -> None:
    kill_after_block(case, tmp_path / "out", 0)
    second = Case(save_model(tmp_path / "second", seed=1, **SMALL), {}, [])
    with pytest.raises(
        ExistsError,
        match=r"with other settings: .*`model\.safetensors` of the model is not the same",
    ) as caught:
        second.run(tmp_path / "out")
    hint = f"resume that run: gptq resume {tmp_path / 'out'}, or discard it: --resume never"
    assert (caught.value.code, caught.value.hint) == ("E_RESUME_MISMATCH", hint)
