"""--log-file refuses files that are no logs, models, outputs and work directories."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gptq_cli import __version__
from gptq_cli.storage.work_directory import write_run
from tests.runs import digest

from .conftest import FakeQuantizer, Run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write two files like those of a model, for commands that are refused before they read it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    return Path("m")


def refused(gptq: Run, log: str | Path, *words: str) -> str:
    """Return the first line of stderr; the command must refuse `log` and change no file."""
    before = digest(Path.cwd())
    result = gptq(*words, "--log-file", log)
    assert (result.exit_code, result.stdout) == (2, "")
    assert digest(Path.cwd()) == before
    assert "hint: choose another place for --log-file" in result.stderr
    return result.stderr.splitlines()[0]


QUANTIZE = ("quantize", "m", "-b", "4")


@pytest.mark.parametrize(
    "log", ["m/run.log", "m/config.json", "link/run.log", "m/../m/run.log", "m"]
)
def test_no_log_is_written_into_the_model(
    log: str, model: Path, gptq: Run, quantizer: FakeQuantizer
) -> None:
    Path("link").symlink_to(model)
    expected = f"error[E_LOG_FILE]: `{log}` is in `m`, which this command reads or writes"
    assert refused(gptq, log, *QUANTIZE) == expected
    assert quantizer.calls == []


@pytest.mark.usefixtures("model", "quantizer")
@pytest.mark.parametrize(
    ("log", "output"),
    [
        ("out", "out"),
        ("new", "deep/../new"),
        ("old/run.log", "old"),
        (".old.gptq-work/run.log", "old"),
        ("x/y", "./x"),
    ],
)
def test_no_log_is_written_into_the_output(log: str, output: str, gptq: Run) -> None:
    """Some of these outputs do not exist yet."""
    for name in ("deep", "old", ".old.gptq-work", "x"):
        Path(name).mkdir()
    assert "which this command reads or writes" in refused(gptq, log, *QUANTIZE, "-o", output)


@pytest.mark.usefixtures("model", "quantizer")
@pytest.mark.parametrize("exists", [False, True])
def test_no_log_is_written_into_the_default_output(exists: bool, gptq: Run) -> None:
    name = "m-GPTQ-Int4-g128"
    if exists:
        Path(name).mkdir()
    log = f"{name}/run.log" if exists else name
    assert f"is in `{name}`" in refused(gptq, log, *QUANTIZE)


@pytest.mark.usefixtures("model")
def test_no_log_is_written_into_a_checkpoint_that_is_read(gptq: Run) -> None:
    for words in (
        ("verify", "m"),
        ("inspect", "m"),
        ("push", "m", "me/m"),
        ("compare", "x", "m"),
        ("env",),
    ):
        assert "is in `" in refused(gptq, "m/run.log", *words)
    assert "a checkpoint" in refused(gptq, "m/run.log", "env")


def test_no_log_is_written_into_the_paths_of_a_resumed_run(model: Path, gptq: Run) -> None:
    work = Path(".out.gptq-work")
    for place in (work, Path("out"), Path("elsewhere")):
        place.mkdir()
    model.rename("elsewhere/m")
    write_run(work, {}, {"model": str(Path("elsewhere").resolve()), "output": "out"})
    for log in (".out.gptq-work/log", "out/log", "elsewhere/log"):
        for named in (work, Path("out")):
            assert "is in `" in refused(gptq, log, "resume", str(named))


@pytest.mark.parametrize("name", ["\ud800", "a\0b"])
def test_an_impossible_name_in_a_run_file_is_no_bug(name: str, gptq: Run) -> None:
    work = Path(".out.gptq-work")
    work.mkdir(mode=0o700)
    write_run(work, {}, {"model": name, "output": "out"})
    result = gptq("resume", str(work), "--log-file", "log")
    assert result.exit_code in (3, 6), result.stderr
    assert "E_BUG" not in result.stderr


@pytest.mark.usefixtures("quantizer")
@pytest.mark.parametrize("content", ["\\documentclass{book}", "\n", "log of gptq 0.1.0\n", "{}"])
def test_a_file_that_is_no_log_of_gptq_stays_unchanged(content: str, gptq: Run) -> None:
    Path("thesis.tex").write_text(content)
    Path("link").symlink_to("thesis.tex")
    for log in ("thesis.tex", "link"):
        expected = f"error[E_LOG_FILE]: `{log}` exists and is not a log of gptq"
        assert refused(gptq, log, *QUANTIZE) == expected


@pytest.mark.usefixtures("quantizer")
def test_a_directory_is_no_log(gptq: Run) -> None:
    Path("folder").mkdir()
    assert "exists and is not a log of gptq" in refused(gptq, "folder", *QUANTIZE)


@pytest.mark.usefixtures("quantizer")
def test_an_unreadable_file_is_no_log(gptq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("secret").write_text("x")
    real = Path.open

    def closed(path: Path, *arguments: object, **named: object) -> object:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **named)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", closed)
        result = gptq(*QUANTIZE, "--log-file", "secret")
    assert result.exit_code == 2
    assert result.stderr.startswith("error[E_LOG_FILE]: cannot read `secret`: Permission denied")
    assert Path("secret").read_text() == "x"


@pytest.mark.usefixtures("quantizer")
def test_new_and_empty_files_become_logs_and_are_continued(gptq: Run) -> None:
    Path("empty").touch()
    for log in ("new", "empty", "new", "empty"):
        assert gptq(*QUANTIZE, "--log-file", log).exit_code == 0
    for log in ("new", "empty"):
        lines = Path(log).read_text().splitlines()
        messages = [line.split(" ", 1)[1] for line in lines]
        assert messages.count(f"log of gptq {__version__}") == 2
        assert lines[0].endswith(f"Z log of gptq {__version__}")
    assert gptq(*QUANTIZE, "--log-file", os.devnull).exit_code == 0
