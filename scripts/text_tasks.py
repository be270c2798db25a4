"""Two small tasks made of any text: last words, as LAMBADA asks them, and the right one of four
continuations, as HellaSwag does (Paperno et al. 2016; Zellers et al. 2019).

A question has a context and answers, all as token ids; the first answer is the right one. The same
text, tokenizer, number and seed give the same questions.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORDS_BEFORE = 48  # a last word
LEAST_LETTERS = 4  # of a last word: shorter ones are guessed from grammar alone
CONTEXT_TOKENS = 48  # before a continuation; 16 are too few to tell it
ENDING_TOKENS = 32  # of a continuation: about 24 words
WORDS_APART = 64  # so that no continuation overlaps with another one
CHOICES = 4
SEQUENCES_AT_ONCE = 32
SENTENCE_END = (".", "!", "?")
Z = 1.96  # of the normal distribution, for 95 %

Encode = Callable[[str, bool], list[int]]
Head = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of its answers, the first of which is right."""

    context: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Batch:
    """Sequences of one length [n, tokens] that end with answers of one length."""

    ids: Tensor
    answer_tokens: int
    places: tuple[tuple[int, int], ...]  # the question and the answer of each sequence


def last_words(text: str, encode: Encode, number: int, seed: int) -> list[Question]:
    """Return questions for the last word of sentences, from the 48 words before it.

    The word has 4 letters or more and occurs in these 48 words, so that the context can tell it.
    """
    words = list(re.finditer(r"\S+", text))
    candidates = []
    for index in range(WORDS_BEFORE, len(words) - 1):
        word = words[index].group().rstrip("".join(SENTENCE_END))
        before = [each.group() for each in words[index - WORDS_BEFORE : index]]
        is_word = word.isalpha() and len(word) >= LEAST_LETTERS
        is_last = words[index].group().endswith(SENTENCE_END)
        is_last = is_last or words[index + 1].group() in SENTENCE_END
        if is_word and is_last and word in before:
            candidates.append((index, word))
    questions = []
    for index, word in _sample(candidates, number, seed):
        context = text[words[index - WORDS_BEFORE].start() : words[index - 1].end()]
        known, answer = _cut(encode, context, f" {word}")
        questions.append(Question(tuple(encode("", True) + known), (tuple(answer),)))
    return questions


def continuations(text: str, encode: Encode, number: int, seed: int) -> list[Question]:
    """Return questions for the 32 tokens after the end of a sentence, from the 48 tokens before.

    The three wrong answers are those of three other questions.
    """
    words = list(re.finditer(r"\S+", text))
    starts: list[int] = []
    for index in range(CONTEXT_TOKENS, len(words) - WORDS_APART):
        far = not starts or index - starts[-1] >= WORDS_APART
        if far and words[index - 1].group().endswith(SENTENCE_END):
            starts.append(index)
    pieces = []
    for index in _sample(starts, number, seed):
        first, last = words[index - CONTEXT_TOKENS], words[index + WORDS_APART - 1]
        middle = words[index - 1].end()
        context, ending = _cut(encode, text[first.start() : middle], text[middle : last.end()])
        if len(context) >= CONTEXT_TOKENS and len(ending) >= ENDING_TOKENS:
            pieces.append((context[-CONTEXT_TOKENS:], tuple(ending[:ENDING_TOKENS])))
    draw = random.Random(seed)
    questions = []
    for own, (context, right) in enumerate(pieces):
        others = [piece[1] for index, piece in enumerate(pieces) if index != own]
        answers = (right, *draw.sample(others, CHOICES - 1))
        questions.append(Question(tuple(encode("", True) + context), answers))
    return questions


def _sample(candidates: Sequence[Any], number: int, seed: int) -> list[Any]:
    """Return up to `number` of the candidates in their order."""
    chosen = random.Random(seed).sample(range(len(candidates)), min(number, len(candidates)))
    return [candidates[index] for index in sorted(chosen)]


def _cut(encode: Encode, context: str, rest: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context, and those that the rest adds to them, as lm-eval does."""
    known = encode(context, False)
    return known, encode(context + rest, False)[len(known) :]


def batches_of(questions: Sequence[Question]) -> list[Batch]:
    """Return the sequences of all answers in batches; the last token of each is not fed."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, question in enumerate(questions):
        for choice, answer in enumerate(question.answers):
            lengths = (len(question.context) + len(answer), len(answer))
            alike.setdefault(lengths, []).append((number, choice))
    batches = []
    for (_, answer_tokens), places in sorted(alike.items()):
        for start in range(0, len(places), SEQUENCES_AT_ONCE):
            part = places[start : start + SEQUENCES_AT_ONCE]
            rows = []
            for number, choice in part:
                rows.append(questions[number].context + questions[number].answers[choice])
            batches.append(Batch(torch.tensor(rows), answer_tokens, tuple(part)))
    return batches


def is_right(
    questions: Sequence[Question], batches: Sequence[Batch], head: Head, hidden: Iterable[Any]
) -> list[bool]:
    """Return for each question whether a model answers it.

    `hidden` are the states of `batch.ids[:, :-1]` after the last block. A question with one answer
    is answered if each token of it is the most likely one, a question with several if the right one
    is the most likely. All of them have one number of tokens, so the sum ranks as the mean does.
    """
    greedy: dict[tuple[int, int], bool] = {}
    likelihoods: dict[tuple[int, int], float] = {}
    for batch, states in zip(batches, hidden, strict=True):
        logits = head(batch.ids[:, :-1], states)[:, -batch.answer_tokens :]
        answers = batch.ids[:, -batch.answer_tokens :]
        for place, rows, answer in zip(batch.places, logits, answers, strict=True):
            of_tokens = rows.float().log_softmax(-1).gather(-1, answer[:, None])
            likelihoods[place] = float(of_tokens.sum())
            greedy[place] = bool((rows.argmax(-1) == answer).all())
    right = []
    for number, question in enumerate(questions):
        if len(question.answers) == 1:
            right.append(greedy[number, 0])
            continue
        wrong = [likelihoods[number, choice] for choice in range(1, len(question.answers))]
        right.append(likelihoods[number, 0] > max(wrong))
    return right


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson (1927).

    >>> [round(limit, 3) for limit in wilson(8, 10)]
    [0.49, 0.943]
    """
    share = successes / trials
    centre = share + Z**2 / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return (centre - spread) / scale, (centre + spread) / scale
