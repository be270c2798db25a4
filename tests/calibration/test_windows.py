"""Windows of token ids for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import pytest
import torch

from gptq_cli.calibration.corpus import Documents
from gptq_cli.calibration.windows import calibration_windows, check_token_ids, evaluation_windows
from gptq_cli.errors import ConfigError, InputError
from tests.calibration.words import BOS, WordEncoder, numbered


def all_ids(documents: Documents, encoder: WordEncoder) -> list[int]:
    return encoder(documents.join.join(documents.texts), False)


@pytest.mark.parametrize(("seqlen", "bos"), [(7, None), (7, BOS), (16, BOS), (2, BOS), (1, None)])
def test_calibration_windows_are_distinct_slices_of_the_text(seqlen: int, bos: int | None) -> None:
    encoder, documents = WordEncoder(), numbered(200)
    windows = calibration_windows(
        documents, encoder, seqlen=seqlen, nsamples=11, seed=3, bos_token_id=bos
    )
    assert windows.ids.shape == (11, seqlen)
    assert windows.ids.dtype == torch.int64
    assert windows.tokens == 11 * seqlen
    rows, length = windows.ids.tolist(), seqlen
    if bos is not None:
        assert {row[0] for row in rows} == {BOS}
        rows, length = [row[1:] for row in rows], seqlen - 1
    ids = all_ids(documents, encoder)
    slices = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    # a window of one blank occurs after every word, so its position is not unique
    positions = [slices.index(row) for row in rows if row != [encoder.words[" "]]]
    assert len(set(positions)) == len(positions)
    assert all(BOS not in row for row in rows)


def test_the_seed_determines_the_windows_and_their_order() -> None:
    def draw(seed: int) -> torch.Tensor:
        return calibration_windows(
            numbered(500), WordEncoder(), seqlen=10, nsamples=8, seed=seed
        ).ids

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    starts = draw(1)[:, 0].tolist()
    assert starts != sorted(starts)


def test_each_window_is_drawn_once_if_all_are_requested() -> None:
    windows = calibration_windows(numbered(50), WordEncoder(), seqlen=10, nsamples=10, seed=0)
    assert sorted(windows.ids.flatten().tolist()) == sorted(all_ids(numbered(50), WordEncoder()))


def test_the_hash_covers_the_ids_as_little_endian_int64() -> None:
    windows = calibration_windows(numbered(50), WordEncoder(), seqlen=10, nsamples=3, seed=0)
    ids = np.asarray(windows.ids.tolist(), dtype="<i8")
    assert windows.sha256 == sha256(ids.tobytes()).hexdigest()


def test_documents_are_joined_by_their_join_string() -> None:
    documents = Documents("three", ["a b", "c", "d e"], join="|")
    encoder = WordEncoder()
    windows = calibration_windows(documents, encoder, seqlen=1, nsamples=5, seed=0)
    words = {number: word for word, number in encoder.words.items()}
    found = [words[number] for number in windows.ids.flatten().tolist()]
    assert sorted(found) == [" ", " ", "a", "b|c|d", "e"]


def test_a_stream_is_read_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.calibration.windows.PIECE", 100)
    read = []

    def endless(limit: int) -> Documents:
        def texts() -> Iterator[str]:
            for index in range(limit):
                read.append(index)
                yield f"document {index} has six words"

        return Documents("stream", texts())

    short = calibration_windows(endless(1000), WordEncoder(), seqlen=10, nsamples=4, seed=0)
    assert max(read) < 100
    read.clear()
    longer = calibration_windows(endless(100_000), WordEncoder(), seqlen=10, nsamples=4, seed=0)
    assert max(read) < 100
    assert short.sha256 == longer.sha256


def test_windows_do_not_depend_on_the_size_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Documents("many", [f"text number {index} of many" for index in range(500)])
    hashes = set()
    for piece in (50, 333, 1_000_000):
        monkeypatch.setattr("gptq_cli.calibration.windows.PIECE", piece)
        windows = calibration_windows(documents, WordEncoder(), seqlen=12, nsamples=5, seed=0)
        hashes.add(windows.sha256)
    assert len(hashes) == 1


def test_a_long_document_is_cut_into_pieces_before_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.calibration.windows.PIECE", 64)
    encoder = WordEncoder()
    windows = calibration_windows(numbered(300), encoder, seqlen=10, nsamples=60, seed=0)
    assert len(encoder.calls) > 20
    assert max(length for length, _ in encoder.calls) <= 64
    assert sorted(windows.ids.flatten().tolist()) == sorted(all_ids(numbered(300), WordEncoder()))


def test_text_without_blanks_is_cut_into_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.calibration.windows.PIECE", 10)
    windows = calibration_windows(
        Documents("one word", ["x" * 95]),
        lambda text, _: [len(text)],
        seqlen=1,
        nsamples=10,
        seed=0,
    )
    assert sorted(windows.ids.flatten().tolist()) == [5] + [10] * 9


def test_too_few_windows_are_refused_with_the_counts() -> None:
    with pytest.raises(InputError) as caught:
        calibration_windows(
            numbered(500, "small.txt"), WordEncoder(), seqlen=100, nsamples=11, seed=0
        )
    assert caught.value.code == "E_DATA_SHORT"
    message = "dataset `small.txt` gives 10 windows of 100 tokens (1,000 tokens), but 11 are needed"
    assert str(caught.value) == message
    fits = "10 windows (--nsamples) or windows of 90 tokens (--seqlen)"
    assert caught.value.hint == f"give more text, or what fits: {fits}"


def test_a_window_without_room_for_text_is_refused() -> None:
    text, encode = numbered(50, "small.txt"), WordEncoder()
    with pytest.raises(ConfigError) as caught:
        calibration_windows(text, encode, seqlen=1, nsamples=4, seed=0, bos_token_id=7)
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_RANGE", 2)
    assert str(caught.value) == "seqlen must be 2 or more for this model, got 1"
    hint = "each window begins with the model's BOS token: choose a larger --seqlen"
    assert caught.value.hint == hint
    alone = calibration_windows(text, encode, seqlen=1, nsamples=4, seed=0)
    assert alone.ids.shape == (4, 1)


def test_evaluation_takes_every_full_window_in_order() -> None:
    encoder, documents = WordEncoder(), Documents("rows", ["a b c", "", "d e f g"])
    windows = evaluation_windows(documents, encoder, seqlen=4)
    ids = encoder("a b c\n\n\n\nd e f g", True)
    assert len(ids) == 17
    assert windows.ids.tolist() == [ids[0:4], ids[4:8], ids[8:12], ids[12:16]]


def test_evaluation_tokenizes_once_with_special_tokens() -> None:
    encoder = WordEncoder()
    windows = evaluation_windows(numbered(100), encoder, seqlen=20)
    assert encoder.calls == [(len(next(iter(numbered(100).texts))), True)]
    assert (windows.ids == BOS).sum() == 1
    assert windows.ids[0, 0] == BOS


@pytest.mark.parametrize(
    ("of_caller", "of_corpus", "expected"),
    [(3, None, 3), (None, 4, 4), (5, 2, 2), (2, 5, 2), (99, 99, 10)],
)
def test_the_caller_and_the_corpus_limit_evaluation_windows(
    of_caller: int | None, of_corpus: int | None, expected: int
) -> None:
    documents = Documents("limited", numbered(100).texts, max_windows=of_corpus)
    windows = evaluation_windows(documents, WordEncoder(), seqlen=20, max_windows=of_caller)
    assert len(windows.ids) == expected


def test_evaluation_refuses_less_than_one_window() -> None:
    with pytest.raises(InputError) as caught:
        evaluation_windows(numbered(4, "tiny"), WordEncoder(), seqlen=10)
    assert caught.value.code == "E_DATA_SHORT"
    message = "dataset `tiny` gives 0 windows of 10 tokens (9 tokens), but 1 is needed"
    assert str(caught.value) == message


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\n"]])
def test_a_blank_dataset_is_empty_not_short(texts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        evaluation_windows(Documents("blank", texts), WordEncoder(), seqlen=4)
    assert caught.value.code == "E_DATA_EMPTY"


def test_calibration_refuses_an_empty_dataset() -> None:
    with pytest.raises(InputError) as caught:
        calibration_windows(Documents("none", []), WordEncoder(), seqlen=4, nsamples=1, seed=0)
    assert caught.value.code == "E_DATA_EMPTY"


def test_a_token_id_beyond_the_embedding_is_refused() -> None:
    check_token_ids(torch.tensor([[0, 9], [3, 4]]), 10)
    with pytest.raises(InputError) as caught:
        check_token_ids(torch.tensor([[0, 1], [10, 4]]), 10)
    assert caught.value.code == "E_TOKENIZER"
    assert str(caught.value) == "token id 10 is beyond the embedding, which has 10 rows"
