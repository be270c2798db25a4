"""Each window of chats begins as the template begins a chat, whatever the window before cut off.

The second truth writes the chats by hand, and knows where each turn begins.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer

from gptq_cli.calibration.chats import ChatTemplate
from gptq_cli.calibration.corpus import DatasetSource, Documents, load_documents
from gptq_cli.calibration.windows import (
    Encoder,
    Part,
    Pool,
    calibration_windows,
    load_encoder,
    read_pool,
)
from gptq_cli.errors import InputError
from tests.calibration.rows import json_lines
from tests.families import save_tokenizer

TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
TEMPLATE = "{{ bos_token }}" + TURNS
MARK = re.compile(r"<\w+>|</s>")
Row = dict[str, Any]
Turn = tuple[str, str]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def row(*turns: Turn) -> Row:
    return {"messages": [turn(role, content) for role, content in turns]}


def conversations() -> list[list[Turn]]:
    """Chats of one to five questions of different lengths; some have a turn of the system."""
    chats = []
    for number in range(14):
        turns: list[Turn] = []
        if number % 3 == 0:
            turns.append(("system", "be brief"))
        for question in range(1 + number % 5):
            asked = "abcdefgh"[question] * (3 + 7 * question * (number % 4))
            turns += [("user", asked), ("assistant", f"answer {number} " * (1 + question % 3))]
        chats.append(turns)
    return chats


def tokenizer_in(directory: Path, template: str, *, adds_bos: bool = False) -> Path:
    """Save a tokenizer of letters, which may put a token before every text."""
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


class Chats:
    """Chats in a file, and the tokenizer that renders them with `template`."""

    def __init__(
        self, folder: Path, rows: list[Row], template: str = TEMPLATE, *, adds_bos: bool = False
    ) -> None:
        self.directory = tokenizer_in(folder, template, adds_bos=adds_bos)
        self.file = folder / "chats.jsonl"
        self.file.write_text(json_lines(rows))
        self.encoder = load_encoder(self.directory, trust_remote_code=False)

    @property
    def documents(self) -> Documents:
        return load_documents(
            DatasetSource(str(self.file)), ChatTemplate(self.encoder.tokenizer, self.directory)
        )

    def pool(self, seqlen: int, nsamples: int = 1000) -> Pool:
        bos = self.encoder.bos_token_id
        return read_pool(
            self.documents, self.encoder, seqlen=seqlen, nsamples=nsamples, bos_token_id=bos
        )

    def texts(self, seqlen: int) -> list[str]:
        """The windows as texts, in order."""
        return [self.encoder.tokenizer.decode(window) for window in self.pool(seqlen).windows]


def tokens_of(text: str) -> list[str]:
    """Return the tokens of a text: `<s>`, `</s>`, and letters."""
    return re.findall(r"</?s>|.", text)


def written(turns: list[Turn]) -> list[str]:
    return [f"<{role}>{content}</s>" for role, content in turns]


def slow_windows(chats: list[list[Turn]], seqlen: int, first: str) -> list[str]:
    """The windows of chats, token by token; each chat begins with `first`."""
    windows: list[str] = []
    window: list[str] = []
    for turns in chats:
        system = [turn for turn in turns if turn[0] == "system"]
        rest = turns[len(system) :]
        while rest:
            head = tokens_of(first + "".join(written(system)))
            room = seqlen - len(window)
            window += (head + tokens_of("".join(written(rest))))[:room]
            if len(window) < seqlen:
                break
            windows.append("".join(window))
            window = []
            rest = rest[next_question(rest, room - len(head)) :]
    return windows


def next_question(turns: list[Turn], shown: int) -> int:
    """The number of the first turn of the user that begins after `shown` tokens.

    One that was cut in its mark, `<user>`, counts as well.
    """
    begin = 0
    for number, text in enumerate(written(turns)):
        if number and turns[number][0] == "user" and begin + len("<user>") >= shown:
            return number
        begin += len(tokens_of(text))
    return len(turns)


@pytest.mark.parametrize("first", ["<s>", ""])
@pytest.mark.parametrize("seqlen", [26, 33, 57, 64, 100, 171])
def test_windows_of_chats_are_those_of_the_slow_way(
    seqlen: int, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_cli.calibration.windows.COMPARED", 8)
    template = TEMPLATE if first else TURNS
    chats = Chats(tmp_path, [row(*turns) for turns in conversations()], template, adds_bos=True)
    found = chats.texts(seqlen)
    assert found == slow_windows(conversations(), seqlen, first)
    for window in found:
        assert len(tokens_of(window)) == seqlen
        assert re.match(f"{first}<(system|user)>", window)
        for before, mark in pairwise(["start", *MARK.findall(window)]):
            assert mark != "</s>" or before in ("<system>", "<user>", "<assistant>")


def test_a_long_chat_goes_on_at_its_next_question(tmp_path: Path) -> None:
    turns = [("system", "be brief")]
    for letter in "abcdef":
        turns += [("user", letter * 20), ("assistant", letter.upper() * 20)]
    windows = Chats(tmp_path, [row(*turns)]).texts(60)
    begin = "<s><system>be brief</s><user>"
    assert [window[: len(begin) + 1] for window in windows] == [begin + one for one in "abcdef"]


def test_tokens_up_to_the_next_question_are_counted(tmp_path: Path) -> None:
    turns: list[Turn] = []
    for letter in "abcdef":
        turns += [("user", letter * 20), ("assistant", letter.upper() * 20)]
    pool = Chats(tmp_path, [row(*turns)]).pool(45)
    # A question has 27 tokens and an answer 32; with <s> a window shows 17 tokens of the answer.
    assert (len(pool.windows), pool.cut) == (6, 6 * 15)


def test_a_cut_answer_without_a_later_question_is_dropped(tmp_path: Path) -> None:
    rows = [row(("user", "a"), ("assistant", "A" * 90)), row(("user", "b"), ("assistant", "B" * 9))]
    chats = Chats(tmp_path, rows)
    begins = ["<s><user>a</s><assistant>", "<s><user>b</s><assistant>"]
    assert chats.texts(28) == [begins[0] + "A" * 8, begins[1] + "B" * 8]
    pool = chats.pool(28)
    assert (pool.tokens, pool.cut) == (56, 83 + 2)


def test_the_steps_of_an_agent_go_on_after_their_question(tmp_path: Path) -> None:
    steps = [turn("user", "q")]
    for letter in "abcdef":
        steps += [turn("assistant", letter * 20), turn("tool", letter.upper() * 10)]
    windows = Chats(tmp_path, [{"messages": steps}]).texts(50)
    begin = "<s><user>q</s><assistant>"
    assert [window[: len(begin) + 1] for window in windows] == [begin + one for one in "abcdef"]


def test_a_later_question_of_an_agent_stays_with_its_steps(tmp_path: Path) -> None:
    steps = [turn("user", "p"), turn("assistant", "P" * 60), turn("user", "q" * 12)]
    for letter in "abcd":
        steps += [turn("assistant", letter * 20), turn("tool", letter.upper() * 10)]
    windows = Chats(tmp_path, [{"messages": steps}]).texts(60)
    begin = f"<s><user>{'q' * 12}</s><assistant>"
    assert windows[0].startswith("<s><user>p</s><assistant>PPP")
    assert [window[: len(begin) + 1] for window in windows[1:]] == [begin + one for one in "abcd"]


# Marks in words of their own: the turn of the system stands in the first turn of the user; or
# thoughts are kept in the answers to the last question only, as in Qwen3.
INSIDE = """{% set begin = messages[0].role == 'system' %}{{ bos_token }}
{%- for message in messages[begin | int:] %}<{{ message.role }}>
{%- if loop.first and begin %}{{ messages[0].content }}: {% endif %}{{ message.content }}</s>
{%- endfor %}"""
THINKING = """{{ bos_token }}{% set last = namespace(user=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}
{%- endif %}{% endfor %}{% for message in messages %}<{{ message.role }}>
{%- if loop.index0 > last.user %}{{ message.content }}{% else %}
{{- message.content.split('/')[-1] }}{% endif %}</s>{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "begin"),
    [(INSIDE, "<s><user>be brief: "), (THINKING, "<s><system>be brief</s><user>")],
)
def test_templates_that_look_at_other_turns_begin_chats(
    template: str, begin: str, tmp_path: Path
) -> None:
    turns = [("system", "be brief")]
    for letter in "abcdef":
        turns += [("user", letter * 20), ("assistant", "thought/" + letter.upper() * 20)]
    windows = Chats(tmp_path, [row(*turns)], template).texts(70)
    found = [window.partition("thought/")[0][: len(begin) + 1] for window in windows]
    assert found == [begin + one for one in "abcdef"]


def test_a_system_turn_that_fills_windows_is_taken_once(tmp_path: Path) -> None:
    turns = [("system", "s" * 90), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert len(Chats(tmp_path, [row(*turns), row(*turns)]).texts(40)) == 2


def test_a_turn_with_which_the_template_fails_begins_nothing(tmp_path: Path) -> None:
    guard = "{% if messages[0].content[0] == 'b' %}{{ raise_exception('no') }}{% endif %}"
    turns = []
    for letter in "abc":
        turns += [("user", letter * 20), ("assistant", letter.upper() * 20)]
    windows = Chats(tmp_path, [row(*turns)], guard + TEMPLATE).texts(45)
    assert [window[9] for window in windows] == ["a", "c"]


def test_a_chat_that_ends_with_its_window_is_not_cut(tmp_path: Path) -> None:
    rows = [row(("user", letter * 22)) for letter in "abcdef"]
    chats = Chats(tmp_path, rows)
    assert chats.texts(30) == [f"<s><user>{letter * 22}</s>" for letter in "abcdef"]
    assert chats.pool(30).cut == 0


def test_what_goes_on_is_not_counted_as_another_chat(tmp_path: Path) -> None:
    chats = Chats(tmp_path, [row(*turns) for turns in conversations()])
    documents = chats.documents
    pool = read_pool(documents, chats.encoder, seqlen=24, nsamples=1000)
    assert documents.chats is not None
    assert documents.chats.rendered == 14
    part = Part(documents, pool, 4, 24, chats.encoder)
    assert pool.cut > 0
    assert f"{pool.tokens:,} tokens ({pool.cut:,} more are cut off); 4 windows" in part.summary
    assert len(pool.windows) == (pool.tokens or 0) // 24


def test_the_hint_names_lengths_that_fit_chats(tmp_path: Path) -> None:
    chats = Chats(tmp_path, [row(*turns) for turns in conversations()])

    def draw(nsamples: int, seqlen: int) -> None:
        calibration_windows(
            chats.documents, chats.encoder, seqlen=seqlen, nsamples=nsamples, seed=0
        )

    with pytest.raises(InputError) as caught:
        draw(26, 100)
    assert (caught.value.code, caught.value.exit_code) == ("E_DATA_SHORT", 3)
    fits = re.fullmatch(
        r"give more text \(a long answer gives only its beginning\), or what fits: "
        r"(\d+) windows \(--nsamples\) or windows of (\d+) tokens \(--seqlen\)",
        caught.value.hint or "",
    )
    assert fits is not None
    draw(int(fits[1]), 100)
    draw(26, int(fits[2]))
    with pytest.raises(InputError):
        draw(int(fits[1]) + 1, 100)
    with pytest.raises(InputError):
        draw(26, int(fits[2]) + 1)


def questions(number: int) -> Row:
    turns: list[Turn] = []
    for index in range(number):
        turns += [("user", f"{index} " * 15), ("assistant", f"answer {index} " * 5)]
    return row(*turns)


class FirstLetterDiffers:
    """A tokenizer of letters that marks the first letter of each text, and counts letters."""

    added_tokens_decoder: ClassVar = {1: AddedToken("</s>", special=True)}

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.letters = 0

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        self.letters += len(text)
        ids = [ord(letter) for letter in text]
        return {"input_ids": [ids[0] + self.mark, *ids[1:]] if ids else []}


def packed(chats: Chats, mark: int) -> tuple[Pool, int]:
    """The windows [70] of chats, and how many letters were tokenized."""
    tokenizer = FirstLetterDiffers(mark)
    encoder = Encoder(tokenizer, None)
    return read_pool(chats.documents, encoder, seqlen=70, nsamples=100), tokenizer.letters


def test_a_chat_of_many_turns_is_tokenized_about_once(tmp_path: Path) -> None:
    chats = Chats(tmp_path, [questions(60)])
    letters = len(next(iter(chats.documents.texts)))
    pool, tokenized = packed(chats, 0)
    assert len(pool.windows) == 60
    assert tokenized < 3 * letters


def test_texts_are_tokenized_whole_if_pieces_give_other_ids(tmp_path: Path) -> None:
    chats = Chats(tmp_path, [questions(20)])
    pool, tokenized = packed(chats, 1000)
    plain = read_pool(chats.documents, lambda text, _: list(map(ord, text)), seqlen=70, nsamples=9)
    first = ord("<") + 1000
    assert pool.windows == [[first, *window[1:]] for window in plain.windows]
    assert tokenized > 5 * len(next(iter(chats.documents.texts)))


def shortage_of(chats: Chats, seqlen: int, nsamples: int) -> InputError:
    pool = chats.pool(seqlen, nsamples)
    error = Part(chats.documents, pool, nsamples, seqlen, chats.encoder).shortage
    assert error is not None
    return error


def test_the_refusal_counts_what_a_long_answer_loses(tmp_path: Path) -> None:
    chats = Chats(tmp_path, [row(("user", "a"), ("assistant", "A" * 4990))])
    error = shortage_of(chats, 128, 2)
    gives = "gives 1 window of 128 tokens (128 tokens, 4,883 more are cut off), but 2 are needed"
    assert str(error) == f"dataset `{chats.file}` {gives}"
    assert (error.code, error.exit_code) == ("E_DATA_SHORT", 3)
    more = "give more text (a long answer gives only its beginning)"
    assert error.hint == f"{more}, or what fits: 1 window (--nsamples)"


def test_the_hint_names_no_length_if_the_search_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(tmp_path, [questions(20)])
    assert "(--seqlen)" in (shortage_of(chats, 400, 15).hint or "")
    monkeypatch.setattr("gptq_cli.calibration.windows.TRIED", 1000)
    assert (shortage_of(chats, 400, 15).hint or "").endswith("windows (--nsamples)")
