"""Each command refuses unreadable files with path and hint, never as damage, never as a bug."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.gptq_files import gptq_files
from tests.families import save_model, texts
from tests.fuzzing import REPORT
from tests.rights import Said, held_back, in_a_child


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a plain model, a quantized one with a report, a text and a recipe."""
    folder = tmp_path_factory.mktemp("unreadable")
    save_model(folder / "model", num_hidden_layers=1)
    gptq_files().write(folder / "packed")
    (folder / "packed" / "gptq_report.json").write_text(json.dumps(REPORT))
    (folder / "packed" / "gptq_config.yaml").write_text("bits: 4\n")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(texts(2_000)[0])
    (folder / "recipe.yaml").write_text("bits: 4\n")
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(said: Said, path: str, code: str = "E_FILE", exit_code: int = 3) -> None:
    assert (said.exit_code, said.stdout) == (exit_code, ""), said
    assert f"error[{code}]: cannot " in said.stderr
    assert path in said.stderr.splitlines()[-3]
    assert said.stderr.splitlines()[-3].endswith("Permission denied")
    assert "hint: " in said.stderr
    for word in ("Traceback", "download", "damaged", "complete"):
        assert word not in said.stderr


QUANTIZE = ("-b4", "-g32", "--nsamples=4", "--seqlen=32", "--device=cpu", "-q", "--output=out")


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("model/config.json", ("plan", "model", "-b4")),
        ("model/model.safetensors", ("plan", "model", "-b4", "-g32")),
        ("model/model.safetensors", ("validate-config", "recipe.yaml", "--model", "model")),
        ("model", ("plan", "model", "-b4")),
        ("model/config.json", ("inspect", "model")),
        ("model/model.safetensors", ("compare", "model", "model")),
        ("model/tokenizer.json", ("quantize", "model", *QUANTIZE, "--dataset=texts")),
        ("texts", ("quantize", "model", *QUANTIZE, "--dataset=texts")),
        ("texts/a.txt", ("quantize", "model", *QUANTIZE, "--dataset=texts")),
        (
            "texts/a.txt",
            ("eval-ppl", "model", "--dataset=texts/a.txt", "--seqlen=32", "--device=cpu", "-q"),
        ),
        (
            "model/tokenizer.json",
            ("eval-ppl", "model", "--dataset=texts", "--seqlen=32", "--device=cpu", "-q"),
        ),
        ("packed/config.json", ("verify", "packed")),
        ("packed", ("verify", "packed")),
        ("packed", ("report", "packed")),
        ("packed/gptq_config.yaml", ("inspect", "packed")),
        ("packed/config.json", ("convert", "packed", "--to=gptq_v2", "--output=out")),
        ("packed/config.json", ("dequantize", "packed", "--output=out")),
        ("packed/config.json", ("push", "packed", "me/tiny", "--base-model=a/b", "-n")),
        ("packed/gptq_report.json", ("report", "packed")),
    ],
)
def test_an_unreadable_file_is_refused_with_its_path(
    closed: str, words: tuple[str, ...], here: Path
) -> None:
    (here / closed).chmod(0)
    said = held_back(*words)
    (here / closed).chmod(0o700)
    refused(said, closed)
    assert "chmod u+r" in said.stderr
    assert not (here / "out").exists()
    assert not list(here.glob(".out*"))


def test_a_closed_folder_is_refused_with_its_path(here: Path) -> None:
    (here / "closed").mkdir()
    (here / "model").rename(here / "closed" / "model")
    (here / "closed").chmod(0)
    for words in (
        ("plan", "closed/model", "-b4"),
        ("verify", "closed/model"),
        ("report", "closed/model"),
    ):
        said = held_back(*words)
        refused(said, "closed/model")
        assert f"hint: you own `{here}/closed`: chmod u+rx {here}/closed" in said.stderr
    (here / "closed").chmod(0o700)
    (here / "closed" / "model").rename(here / "model")
    (here / "texts").rename(here / "closed" / "texts")
    (here / "closed").chmod(0)
    said = held_back(
        "eval-ppl", "model", "--dataset=closed/texts", "--seqlen=32", "--device=cpu", "-q"
    )
    refused(said, "closed/texts")
    (here / "closed").chmod(0o700)


def test_an_unwritable_output_is_refused_with_a_hint(here: Path) -> None:
    (here / "fixed").mkdir(0o500)
    for words in (
        ("quantize", "model", *QUANTIZE[:-1], "--output=fixed/out", "--dataset=texts"),
        ("convert", "packed", "--to=gptq_v2", "--output=fixed/out"),
        ("dequantize", "packed", "--output=fixed/out"),
        ("report", "packed", "--output=fixed/page.html"),
    ):
        said = held_back(*words)
        refused(said, "fixed", "E_DISK", 5)
        assert "hint: choose an output you may write to" in said.stderr


def test_an_unreadable_recipe_or_card_is_a_usage_error(here: Path) -> None:
    (here / "recipe.yaml").chmod(0)
    for words in (("validate-config", "recipe.yaml"), ("plan", "model", "--config=recipe.yaml")):
        refused(held_back(*words), "recipe.yaml", "E_CFG_FILE", 2)
    said = held_back("push", "packed", "me/tiny", "--card=recipe.yaml", "-n")
    refused(said, "recipe.yaml", "E_CFG_FILE", 2)


def test_a_removed_current_directory_is_reported(here: Path) -> None:
    def run() -> list[object]:
        (here / "gone").mkdir()
        os.chdir(here / "gone")
        (here / "gone").rmdir()
        return [*held_back("plan", here / "model", "-b4"), *held_back("verify", ".")]

    said = in_a_child(run)
    expected = (
        "error[E_FILE]: the current directory has been removed\n\nhint: change to another one: cd\n"
    )
    assert said == [3, "", expected, 3, "", expected]


def test_a_closed_folder_below_the_model_is_refused(here: Path) -> None:
    (here / "model" / "more").mkdir()
    (here / "model" / "more" / "LICENSE").touch()
    (here / "model" / "more").chmod(0)
    refused(held_back("plan", "model", "-b4", "-g32"), "model/more")
    # a folder that is never copied need not be readable
    (here / "model" / "more").rename(here / "model" / ".git")
    assert held_back("plan", "model", "-b4", "-g32").exit_code == 0
    (here / "model" / ".git").chmod(0o700)
