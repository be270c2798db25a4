"""A run with a goal from Python: it measures, then quantizes, and resumes in both parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_cli import quantize
from gptq_cli.events import BlockFinished, Event, Report
from gptq_cli.quantization.run_state import SavingTimes
from tests.allocation.measuring import goal
from tests.cli.conftest import run_gptq
from tests.disks import Killed
from tests.families import save_model
from tests.runs import digest

BLOCKS = 3


def killer(n_blocks: int) -> Report:
    """Return a report that kills the run when it has finished this many blocks in both parts."""
    finished = 0

    def stop(event: Event) -> None:
        nonlocal finished
        finished += isinstance(event, BlockFinished)
        if finished == n_blocks:
            raise Killed

    return stop


@pytest.mark.parametrize("again", ["call", "resume"])
def test_a_killed_run_with_a_goal_writes_the_same_bytes(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SavingTimes, "is_due", lambda *_: True)
    model = save_model(tmp_path / "model", "llama")
    wanted = goal(bits=2.5)
    whole = quantize(model, wanted, tmp_path / "whole").output
    out = tmp_path / "out"
    for n_blocks in (1, BLOCKS):  # in the measurement, and in the block after its last one
        with pytest.raises(Killed):
            quantize(model, wanted, out, on_event=killer(n_blocks))
    if again == "call":
        assert quantize(model, wanted, out).resumed_blocks == 1
    else:
        assert run_gptq("resume", tmp_path / ".out.gptq-work").exit_code == 0
    assert digest(out) == digest(whole)
    assert (out / "gptq_allocation.json").is_file()
    assert quantize(model, wanted, out).already_done
    assert not list(tmp_path.glob(".*.gptq-work"))
