"""A thousand damaged inputs of each kind: accepted or refused, but no traceback and no hang.

`scripts/fuzz.py` takes a hundred times as many.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_cli.storage.manifest import REPORT_DATA, REPORT_PAGE
from tests.fuzzing import REPORT, SUBJECTS, Subject, fuzz
from tests.fuzzing_commands import CALLS, call

INPUTS, CALLED = 1000, 20


@pytest.mark.parametrize("kind", SUBJECTS)
def test_damaged_inputs_are_refused_or_accepted(kind: str, tmp_path: Path) -> None:
    tally = fuzz(SUBJECTS[kind], INPUTS, seed=0, folder=tmp_path)
    assert tally.failures == []
    assert sum(tally.outcomes.values()) == INPUTS
    assert len(tally.outcomes) > 1  # neither is all of it noticed, nor nothing


@pytest.mark.parametrize("kind", CALLS)
def test_commands_accept_or_refuse_damaged_files(kind: str, tmp_path: Path) -> None:
    tally = fuzz(CALLS[kind], CALLED * CALLS[kind].weight, seed=0, folder=tmp_path)
    assert tally.failures == []
    assert (tally.inputs, sum(tally.outcomes.values())) == (CALLED, CALLED)
    assert len(tally.outcomes) > 1


def test_write_beside_the_output_is_found(tmp_path: Path) -> None:
    output = tmp_path / "trial" / "out"
    output.mkdir(parents=True)
    (output / REPORT_DATA).write_text(json.dumps(REPORT))
    assert call(tmp_path, "report", output, may_change=[output / REPORT_PAGE]) == "done"
    with pytest.raises(AssertionError, match=r"gptq .*report.*: exit code 0"):
        call(tmp_path, "report", output, "-o", tmp_path / "page.html", may_change=[output])
    assert call(tmp_path, "report", tmp_path, may_change=[]) == "E_REPORT"


def test_traceback_of_a_command_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("layers")

    monkeypatch.setattr("gptq_cli.publish.report.read_run", fail)
    (tmp_path / "trial").mkdir()
    with pytest.raises(AssertionError, match="KeyError: 'layers'"):
        call(tmp_path, "report", tmp_path)


@pytest.mark.parametrize(
    "error", [ValueError("x"), RecursionError("deep"), AssertionError("lies"), KeyError("k")]
)
def test_other_exceptions_are_failures_with_repeatable_numbers(
    error: Exception, tmp_path: Path
) -> None:
    def read(content: bytes, _: Path) -> str:
        if len(content) % 3 == 0:
            raise error
        return "accepted"

    first = fuzz(Subject([b"some content"], read), 50, seed=1, folder=tmp_path)
    again = fuzz(Subject([b"some content"], read), 50, seed=1, folder=tmp_path)
    assert 0 < len(first.failures) < 50
    assert [one["number"] for one in first.failures] == [one["number"] for one in again.failures]
    assert type(error).__name__ in first.failures[0]["what"]


def test_input_that_takes_too_long_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzzing.SECONDS", 0.05)

    def read(content: bytes, _: Path) -> str:
        while True:
            len(content)

    tally = fuzz(Subject([b"content"], read), 1, seed=0, folder=tmp_path)
    assert "TooSlowError" in tally.failures[0]["what"]
