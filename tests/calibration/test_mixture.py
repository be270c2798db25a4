"""Several datasets in one calibration: shares, windows, refusals and identity."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest

from gptq_cli.calibration.corpus import split_share
from gptq_cli.calibration.mixture import divide
from gptq_cli.errors import ConfigError, ExistsError, InputError
from gptq_cli.planning.checks import _check_text, calibration_sources
from gptq_cli.quantization.run import quantize_checkpoint
from tests.calibration.rows import json_lines
from tests.disks import Killed
from tests.families import save_model
from tests.runs import calibration_ids, config, quantize_with_events
from tests.tiny import SMALL, killer

A, B = ord("a"), ord("b")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", **SMALL)


@pytest.fixture
def letters(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that gives the path of a file of one letter only, of 2,000 letters."""

    def write(letter: str) -> str:
        file = tmp_path / f"{letter}.txt"
        file.write_text(letter * 2000)
        return str(file)

    return write


def counts(config_: object, model: Path) -> tuple[list[int], int]:
    """Return the number of windows of each kind, in order of their number, and of all windows."""
    ids = calibration_ids(model, config_)
    kinds = ids[:, 1].tolist()
    assert all(len(set(row[1:])) == 1 for row in ids.tolist()), "a window holds one dataset"
    return sorted(kinds.count(kind) for kind in set(kinds)), len(kinds)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (("", ""), [5, 5]),
        ((":0.7", ":0.3"), [3, 7]),
        ((":1", ":9"), [1, 9]),
        ((":.5", ":1"), [3, 7]),
    ],
)
def test_each_dataset_gives_windows_by_its_share(
    shares: tuple[str, str], expected: list[int], letters: Callable[[str], str], model: Path
) -> None:
    names = [letters(letter) + share for letter, share in zip("ab", shares, strict=True)]
    chosen = config(dataset=names, nsamples=10, seqlen=16)
    assert counts(chosen, model) == (expected, 10)
    first = calibration_ids(model, chosen)
    assert first.equal(calibration_ids(model, chosen)), "two runs have the same windows"
    assert first[:, 1].tolist() != sorted(first[:, 1].tolist()), "the windows are mixed"


def test_windows_are_divided_as_by_the_definition() -> None:
    for total, shares in product((1, 7, 10, 128), ((1, 1), (2, 1, 1), (1, 3, 5), (7, 2, 1, 1))):
        found = divide(total, [Fraction(share) for share in shares])
        exact = [total * share / sum(shares) for share in shares]
        assert sum(found) == total
        for count, wanted in zip(found, exact, strict=True):
            assert abs(count - wanted) < 1
    assert divide(3, [Fraction(1), Fraction(1)]) == [2, 1], "the first of equals wins"


def test_a_file_whose_name_ends_like_a_share_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:0.5").write_text("text")
    assert split_share("a:0.5") == ("a:0.5", None)
    assert split_share("b:0.5") == ("b", "0.5")
    assert split_share("owner/name:2") == ("owner/name", "2")
    assert split_share("C:name") == ("C:name", None)


WRONG = {
    "one share": (["a.txt:0.5", "b.txt"], "E_CFG_CONFLICT", "`b.txt` has no share", "b.txt:0.5"),
    "zero": (["a.txt:0", "b.txt:1"], "E_CFG_RANGE", "must be more than 0, got 0", "leave the"),
    "twice": (["a.txt:1", "a.txt:2"], "E_CFG_CONFLICT", "`a.txt` is given twice", "keep one"),
    "no window": (["a.txt:99", "b.txt:1"], "E_CFG_RANGE", "give none of 4 windows", "--nsamples"),
    "lonely": (["a.txt:0.5"], "E_CFG_CONFLICT", "but it is the only one", "remove `:0.5`"),
    "a text": (["a.txt", "just some words"], "E_DATA_NOT_FOUND", "words` is not a", ".txt file"),
    "no file": (["a.txt", "gone.txt"], "E_DATA_NOT_FOUND", "`gone.txt` does not exist", ".jsonl"),
}


@pytest.mark.parametrize("case", WRONG)
def test_datasets_that_cannot_be_mixed_are_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, code, message, hint = WRONG[case]
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("text")
    with pytest.raises((ConfigError, InputError)) as caught:
        _check_text(config(dataset=names, nsamples=4))
    assert (caught.value.code, caught.value.exit_code) == (code, 2 + code.startswith("E_DATA"))
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_an_option_reaches_the_datasets_that_take_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text(json_lines([{"body": "b", "n": "1"}]))
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "owner/name"]
    given = {"text_column": "body", "dataset_split": "extra"}
    found = [source for source, _ in calibration_sources(config(dataset=names, **given))]
    assert [source.text_column for source in found] == [None, "body", "body"]
    assert [source.split for source in found] == [None, None, "extra"]
    with pytest.raises(ConfigError, match="dataset_split `extra` has no meaning for any") as caught:
        calibration_sources(config(dataset=names[:2], **given))
    assert (caught.value.code, caught.value.hint) == ("E_CFG_CONFLICT", "remove dataset_split")


def test_a_moved_text_resumes_a_run_and_a_changed_one_does_not(
    model: Path, tmp_path: Path, letters: Callable[[str], str]
) -> None:
    output, names = tmp_path / "out", [letters("a"), letters("b")]
    settings = {"seqlen": 16, "nsamples": 4, "batch_size": 2}
    with pytest.raises(Killed):
        quantize_checkpoint(str(model), output, config(dataset=names, **settings), report=killer(0))
    Path(names[0]).write_text("c" * 2000)
    with pytest.raises(ExistsError, match="the calibration text is another one"):
        quantize_checkpoint(str(model), output, config(dataset=names, **settings))
    moved = tmp_path / "moved.txt"
    moved.write_text("a" * 2000)
    chosen = {"dataset": [str(moved), names[1]], **settings}
    result, _ = quantize_with_events(model, output, **chosen)
    assert result.resumed_blocks == 1


def test_the_hint_names_what_fits_all_datasets(
    letters: Callable[[str], str], tmp_path: Path, model: Path
) -> None:
    (tmp_path / "b.txt").write_text("b" * 500)
    names = [letters("a") + ":3", f"{tmp_path}/b.txt:1"]
    tight = {"dataset": names, "nsamples": 44, "seqlen": 64}
    with pytest.raises(InputError) as caught:
        calibration_ids(model, config(**tight))
    assert (caught.value.code, caught.value.exit_code) == ("E_DATA_SHORT", 3)
    # 31 windows of the one have 64 tokens, 7 of the other: 30 and 7 windows, not 30 and 10
    fits = "30 windows in all (--nsamples) or windows of 45 tokens (--seqlen)"
    assert caught.value.hint == f"give more text, or what fits: {fits}"
    assert "a.txt` gives 31 windows of 64 tokens" in str(caught.value)
    assert len(calibration_ids(model, config(**tight | {"nsamples": 30}))) == 30
    assert len(calibration_ids(model, config(**tight | {"seqlen": 45}))) == 44
    for one_more in ({"nsamples": 31}, {"seqlen": 46}):
        with pytest.raises(InputError):
            calibration_ids(model, config(**tight | one_more))
