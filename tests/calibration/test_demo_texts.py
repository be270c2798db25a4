"""The texts of the demo: the seeds reproduce them, and their information is exact."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def language() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_language", SCRIPTS / "demo_language.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_language"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["calibration", "heldout"])
def test_the_seeds_write_the_committed_texts(name: str, language: ModuleType) -> None:
    text = (SCRIPTS / "demo" / f"{name}.txt").read_text()
    assert language.write_text(name, 180_000).text == text


def test_no_word_is_in_two_lexicons(language: ModuleType) -> None:
    words = [
        *language.NAMES,
        *language.PLACES,
        *language.WEEKDAYS,
        *language.NUMBERS,
        *language.COLOURS,
        *language.ANIMALS,
        *language.ADJECTIVES,
        *language.ADVERBS,
    ]
    for word in [*language.NOUNS, *language.VERBS]:
        words += [word, f"{word}s"]
    assert len(words) == len(set(words))


def test_equal_clauses_have_equal_information(language: ModuleType) -> None:
    information: dict[str, float] = {}
    met_again = 0
    for seed in range(20_000):
        writer = language.Writer(random.Random(seed))
        clause = writer.action("mill")
        met_again += clause in information
        assert information.setdefault(clause, writer.surprisal) == pytest.approx(
            writer.surprisal, rel=1e-12
        )
    assert met_again > 100


def test_surprisal_follows_from_the_probabilities(language: ModuleType) -> None:
    writer = language.Writer(random.Random(0))
    half = language.Distribution(("a", "b"), (0.5, 0.5))
    drawn = [writer.choose(half) for _ in range(1000)]
    assert writer.surprisal == pytest.approx(1000 * 0.6931471805599453)
    assert 400 < drawn.count("a") < 600
