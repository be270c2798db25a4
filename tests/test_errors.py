"""Errors keep their problems on the way to another process, and name their causes in order."""

from __future__ import annotations

import pickle

import pytest

from gptq_cli.errors import ConfigError, GptqError, Location, PausedError, Problem, causes


@pytest.mark.parametrize("kind", [ConfigError, PausedError])
def test_a_pickled_error_keeps_its_problems(kind: type[GptqError]) -> None:
    problems = (
        Problem("E_CFG_RANGE", "bits must be 2, 3, 4 or 8", "choose one", Location("a.yaml", 3, 7)),
        Problem("E_CFG_UNKNOWN", "there is no field `bit`"),
    )
    loaded = pickle.loads(pickle.dumps(kind.of(problems)))
    assert type(loaded) is kind
    assert loaded.problems == problems
    assert str(loaded) == "bits must be 2, 3, 4 or 8; there is no field `bit`"
    assert (loaded.code, loaded.hint) == ("E_CFG_RANGE", "choose one")


def raised(error: BaseException, *, hides: bool) -> BaseException:
    """Return `error` as raised while a KeyError with a ValueError as cause is handled."""
    try:
        try:
            raise KeyError from ValueError()
        except KeyError:
            if hides:
                raise error from None
            raise error  # noqa: B904
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("hides", "hidden", "expected"),
    [
        (False, False, [OSError, KeyError, ValueError]),
        (True, False, [OSError]),
        (True, True, [OSError, KeyError, ValueError]),
    ],
)
def test_causes_are_those_of_a_traceback(hides: bool, hidden: bool, expected: list[type]) -> None:
    error = raised(OSError(), hides=hides)
    assert [type(link) for link in causes(error, hidden=hidden)] == expected
