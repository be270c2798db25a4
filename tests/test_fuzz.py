"""A thousand damaged inputs of each kind: refused or accepted, never a traceback, never a hang; 10^5 by the script."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing import SUBJECTS, Subject, fuzz

INPUTS = 1000


@pytest.mark.parametrize("kind", SUBJECTS)
def test_damaged_inputs_are_refused_or_accepted(kind: str, tmp_path: Path) -> None:
    tally = fuzz(SUBJECTS[kind], INPUTS, seed=0, folder=tmp_path)
    assert tally.failures == []
    assert sum(tally.outcomes.values()) == INPUTS
    assert len(tally.outcomes) > 1  # neither is all of it noticed, nor nothing


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError("deep"), AssertionError("lies"), KeyError("k")])
def test_any_other_exception_is_a_failure_with_the_number_that_makes_it_again(error: Exception, tmp_path: Path) -> None:
    def read(content: bytes, _: Path) -> str:
        if len(content) % 3 == 0:
            raise error
        return "accepted"

    first = fuzz(Subject([b"some content"], read), 50, seed=1, folder=tmp_path)
    again = fuzz(Subject([b"some content"], read), 50, seed=1, folder=tmp_path)
    assert 0 < len(first.failures) < 50
    assert [one["number"] for one in first.failures] == [one["number"] for one in again.failures]
    assert type(error).__name__ in first.failures[0]["what"]


def test_an_input_that_takes_too_long_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzzing.SECONDS", 0.05)

    def read(content: bytes, _: Path) -> str:
        while True:
            len(content)

    tally = fuzz(Subject([b"content"], read), 1, seed=0, folder=tmp_path)
    assert "TooSlowError" in tally.failures[0]["what"]
