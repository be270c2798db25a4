"""The script that says what a KL means: its questions, their answers, its intervals and figures."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq_cli.calibration.windows import load_encoder
from tests.families import save_model
from tests.runs import quantize

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
WORDS = [
    "stone",
    "river",
    "quiet",
    "lantern",
    "over",
    "under",
    "house",
    "seven",
    "green",
    "window",
    "bread",
    "light",
]


def text_of(n_sentences: int) -> str:
    """Return sentences of 5 to 12 words whose ends are marked in both ways of the data sets."""
    draw = random.Random(3)
    sentences = []
    for _ in range(n_sentences):
        words = draw.choices(WORDS, k=draw.randint(5, 12))
        sentences.append(" ".join(words) + draw.choice([".", " .", "?"]))
    return " ".join(sentences) + "\n"


TEXT = text_of(150)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench-verdicts")
    shape = {"num_hidden_layers": 1, "max_position_embeddings": 512}
    return save_model(folder / "model", "llama", **shape)


def test_last_words_end_sentences_and_occur_before(
    script: Callable[[str], ModuleType], model: Path
) -> None:
    tasks = script("text_tasks")
    encoder = load_encoder(model, trust_remote_code=False)
    questions = tasks.last_words(TEXT, encoder, 20, seed=0)
    assert len(questions) == 20
    for question in questions:
        context = encoder.tokenizer.decode(question.context)
        word = encoder.tokenizer.decode(question.answers[0])
        place = TEXT.index(context + word) + len(context + word)
        assert TEXT[place : place + 2].strip()[0] in ".?"
        assert len(context.split()) == tasks.WORDS_BEFORE
        assert word.strip() in context.split()
        assert len(word.strip()) >= tasks.LEAST_LETTERS


def test_the_first_continuation_is_the_one_in_the_text(
    script: Callable[[str], ModuleType], model: Path
) -> None:
    tasks = script("text_tasks")
    encoder = load_encoder(model, trust_remote_code=False)
    questions = tasks.continuations(TEXT, encoder, 12, seed=0)
    rights = [question.answers[0] for question in questions]
    assert len(questions) == len(set(rights)) == 12
    for question in questions:
        context = encoder.tokenizer.decode(question.context)
        endings = list(map(encoder.tokenizer.decode, question.answers))
        assert context.rstrip()[-1] in ".?"
        assert context + endings[0] in TEXT
        assert len(set(question.answers)) == tasks.CHOICES
        assert set(question.answers) <= set(rights)
        assert {len(answer) for answer in question.answers} == {tasks.ENDING_TOKENS}


def test_the_same_seed_gives_the_same_questions(
    script: Callable[[str], ModuleType], model: Path
) -> None:
    tasks = script("text_tasks")
    encoder = load_encoder(model, trust_remote_code=False)
    for make in (tasks.last_words, tasks.continuations):
        first, again, other = (make(TEXT, encoder, 8, seed=seed) for seed in (0, 0, 1))
        assert first == again != other


def likelihood(whole: Any, context: tuple[int, ...], answer: tuple[int, ...]) -> tuple[float, bool]:
    """Return log-likelihood and greedy choice by one forward for each token."""
    total, greedy, ids = 0.0, True, list(context)
    for token in answer:
        with torch.no_grad():
            logits = whole(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return total, greedy


def most_likely(whole: Any, context: list[int], n_tokens: int) -> tuple[int, ...]:
    ids = list(context)
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = whole(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return tuple(ids[len(context) :])


def test_answers_are_those_of_single_forwards(
    script: Callable[[str], ModuleType], model: Path
) -> None:
    tasks, verdicts = script("text_tasks"), script("bench_verdicts")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    draw = random.Random(1)
    single, several = [], []
    for number in range(24):
        context = draw.choices(range(3, 259), k=5 + number % 3)
        answer = most_likely(whole, context, 2 + number % 2)
        if number % 3 == 0:
            answer = (*answer[:-1], (answer[-1] + 1) % 259)
        single.append(tasks.Question(tuple(context), (answer,)))
        choices = tuple(tuple(draw.choices(range(3, 259), k=4)) for _ in range(4))
        several.append(tasks.Question(tuple(context), choices))
    parts = [verdicts.Task("single", single, tasks.batches_of(single))]
    parts.append(verdicts.Task("several", several, tasks.batches_of(several)))
    windows = [torch.tensor([[5, 6, 7, 8]])]
    measured = verdicts.Measured(windows, parts)
    found = measured.answers(measured.forward(model, "float32"))
    for question, right in zip(single, found["single"], strict=True):
        assert right == likelihood(whole, question.context, question.answers[0])[1]
    for question, right in zip(several, found["several"], strict=True):
        values = [likelihood(whole, question.context, answer)[0] for answer in question.answers]
        assert right == (values[0] == max(values))
    assert sum(found["single"]) == 16
    assert 0 < sum(found["several"]) < 24


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (8, 10), (150, 200)])
def test_limits_of_an_interval_are_1_96_errors_away(
    script: Callable[[str], ModuleType], successes: int, trials: int
) -> None:
    for limit in script("text_tasks").wilson(successes, trials):
        error = math.sqrt(max(0.0, limit * (1 - limit)) / trials)
        assert abs(limit - successes / trials) == pytest.approx(1.96 * error, abs=1e-9)


def test_outputs_stand_beside_the_original(
    script: Callable[[str], ModuleType],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, _ = quantize(tmp_path, model, bits=2)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    figures, picture = tmp_path / "verdicts.json", tmp_path / "verdicts.png"
    line = ["bench_verdicts.py", str(model), str(output), str(model), "--text", str(text)]
    line += ["--windows", "3", "--seqlen", "64", "--last-words", "24", "--continuations", "12"]
    monkeypatch.setattr("sys.argv", [*line, "--json", str(figures), "--png", str(picture)])
    script("bench_verdicts").main()
    content = json.loads(figures.read_text())
    two_bits, same = content["rows"]
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert (same["top1"], same["perplexity_ratio"]) == (1, 1)
    assert two_bits["kl"] > 0.01
    for name, task in same["tasks"].items():
        assert task["accuracy"] == content["original"][name]["accuracy"]
        assert (task["lost"], task["gained"]) == (0, 0)
    for name, task in two_bits["tasks"].items():
        changed = (task["gained"] - task["lost"]) / task["questions"]
        assert task["accuracy"] == pytest.approx(content["original"][name]["accuracy"] + changed)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("| model | 0.0000 | 100.0 | 1.000 | ")
    assert first.endswith(" | hardly differs from the original |")
    assert second.startswith(f"| {output.name} | {two_bits['kl']:.4f} | ")
    assert picture.stat().st_size > 10_000
