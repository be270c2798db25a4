"""A run with a goal from Python: it measures, then quantizes, and resumes in both parts."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptq_cli import allocate, quantize
from gptq_cli.allocation.first_order import HarmPass
from gptq_cli.allocation.harms import Measurement
from gptq_cli.errors import InputError, size
from gptq_cli.events import BlockFinished, Event, PhaseStarted, Report, StepsDone, WorkKept
from gptq_cli.quantization.run_state import SavingTimes
from gptq_cli.runtime import device
from tests.allocation.measuring import ends_step, goal
from tests.cli.conftest import run_gptq
from tests.disks import Killed
from tests.families import save_model
from tests.runs import digest, messages


def killer(n_steps: int, events: list[Event]) -> Report:
    """Return a report that kills the run in this step of the measurement, or block behind it.

    It collects the events.
    """
    begun = 0

    def stop(event: Event) -> None:
        nonlocal begun
        events.append(event)
        begun += ends_step(event) or isinstance(event, BlockFinished)
        if begun == n_steps:
            raise Killed

    return stop


@pytest.mark.parametrize(
    ("again", "kills"),  # in the third of seven steps, and after the first block behind them
    [
        ("call", (3, 6)),
        pytest.param("resume", (3, 6), marks=pytest.mark.slow),
        ("resume", (3,)),
    ],
)
def test_a_killed_run_with_a_goal_writes_the_same_bytes(
    again: str, kills: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SavingTimes, "is_due", lambda *_: True)
    model = save_model(tmp_path / "model", "llama")
    wanted = goal(bits=2.5)
    whole = quantize(model, wanted, tmp_path / "whole").output
    out = tmp_path / "out"
    for n_steps in kills:
        events: list[Event] = []
        with pytest.raises(Killed):
            quantize(model, wanted, out, on_event=killer(n_steps, events))
        blocks = isinstance(events[-2], BlockFinished)
        assert events[-1] == WorkKept(tmp_path / ".out.gptq-work", blocks=blocks)
    if again == "call":
        assert quantize(model, wanted, out).resumed_blocks == 1
    else:
        assert run_gptq("resume", tmp_path / ".out.gptq-work").exit_code == 0
    assert digest(out) == digest(whole)
    assert (out / "gptq_allocation.json").is_file()
    assert quantize(model, wanted, out).already_done
    assert not list(tmp_path.glob(".*.gptq-work"))


def test_the_measurement_and_the_run_after_it_say_the_same_of_the_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    events: list[Event] = []
    quantize(model, goal(bits=2.5), tmp_path / "out", on_event=events.append)
    said = []
    for event in events:
        if isinstance(event, PhaseStarted) and event.name == "source":
            said.append(event.detail)
    n_bytes = 0
    for tensor in load_file(model / "model.safetensors").values():
        n_bytes += tensor.numel() * 2
    assert said == [f"identifying {size(n_bytes)}"] * 2


def test_a_run_with_a_goal_warns_of_slow_16_bits_once_and_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(device, "LONG_RUN", 1)
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    events: list[Event] = []
    wanted = goal(bits=2.5, dtype="auto", device="cpu")
    quantize(model, wanted, tmp_path / "out", on_event=events.append)
    assert len(messages(events, "W_SLOW_DTYPE")) == 1
    measured = [type(event) for event in events].index(StepsDone)
    assert len(messages(events[:measured], "W_SLOW_DTYPE")) == 1


@pytest.mark.parametrize(
    ("capability", "asked", "computed_in"),
    [("AVX2", "auto", "float32"), ("AVX2", "bfloat16", "bfloat16"), ("AVX512", "auto", "bfloat16")],
)
def test_a_measurement_computes_in_float32_if_the_cpu_multiplies_16_bits_slowly(
    capability: str,
    asked: str,
    computed_in: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(device, "LONG_RUN", 1)
    dtypes = []

    def seen(run: HarmPass) -> Measurement:
        dtypes.append(run.stream.dtype)
        raise InputError("E_STOP", "enough was seen")

    monkeypatch.setattr(HarmPass, "measure", seen)
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    events: list[Event] = []
    with pytest.raises(InputError, match="enough was seen"):
        allocate(model, goal(bits=2.5, dtype=asked, device="cpu"), on_event=events.append)
    assert dtypes == [getattr(torch, computed_in)]
    assert messages(events, "W_SLOW_DTYPE") == []  # a run that follows is slow, this is not
