"""Names and texts in downloaded files cannot forge lines of the program or control the terminal."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from gptq_cli.cli.app import report_failure
from gptq_cli.cli.console import (
    Console,
    aligned,
    engine_lines,
    indented,
    libraries_quoted,
    log,
    on_one_line,
)
from gptq_cli.config.serving import Verdict
from gptq_cli.errors import InputError
from tests.checkpoint.gptq_files import gptq_files
from tests.families import save_model, texts

from .conftest import Run

EVIL = "x\nerror[E_OK]: everything is fine\r\x1b[31m\u202e\u2028error[E_OK]: yes\x85"
SHOWN = r"x\nerror[E_OK]: everything is fine\r\x1b[31m\u202e\u2028error[E_OK]: yes\x85"


def honest(*streams: str) -> bool:
    """Return True if all letters are printable and no line is forged."""
    for stream in streams:
        for line in stream.split("\n"):
            if not line.isprintable() or line.startswith("error[E_OK]"):
                return False
    return True


def test_line_ends_are_escaped_or_indented() -> None:
    assert on_one_line(EVIL) == SHOWN
    assert on_one_line("a\tb ä 漢") == "a\tb ä 漢"
    assert indented("a\nb\x1b") == "a\n  b\\x1b"


SPOKEN: list[Callable[[Console], None]] = [
    lambda console: console.say(EVIL),
    lambda console: console.detail(EVIL),
    lambda console: console.warn("W_X", EVIL),
    lambda console: console.advise(EVIL),
]


@pytest.mark.parametrize("speak", SPOKEN)
@pytest.mark.parametrize("quiet", [False, True])
def test_each_message_of_the_console_is_one_line(
    quiet: bool,
    speak: Callable[[Console], None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    log.begin(verbose=True, log_file=tmp_path / "log")
    try:
        speak(Console(quiet=quiet))
    finally:
        log.end()
    assert honest(capsys.readouterr().err)
    kept = (tmp_path / "log").read_text()
    assert len(kept.splitlines()) == 2  # the first line marks the file as a log
    assert kept.rstrip("\n").endswith(SHOWN)


def test_a_message_and_its_hint_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(InputError("E_ARCH", EVIL, hint=EVIL), as_json=True) == 3
    found = capsys.readouterr()
    assert found.err == f"error[E_ARCH]: {SHOWN}\n\nhint: {SHOWN}\n"
    assert json.loads(found.out)["problems"][0]["message"] == EVIL


def test_the_lines_of_a_traceback_forge_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise LookupError(EVIL)
    except LookupError as error:
        exit_code = report_failure(error, as_json=False)
    assert exit_code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("Traceback (most recent call last):\n")
    assert stderr.count("\nerror[") == 1
    assert f"\nerror[E_BUG]: LookupError: {SHOWN}\n" in stderr
    assert honest(stderr)


def test_cells_and_lists_are_one_line_each() -> None:
    assert aligned([(EVIL, "b"), ("a", EVIL)]) == [
        f"{SHOWN}  b",
        f"a{' ' * (len(SHOWN) - 1)}  {SHOWN}",
    ]
    assert engine_lines([Verdict("vllm", "no", EVIL)]) == [f"does not load in vllm: {SHOWN}"]


def test_logs_and_warnings_of_libraries_are_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    factory, formatting = logging.getLogRecordFactory(), warnings.formatwarning
    logger = transformers_logging.get_logger("transformers.tests")
    with libraries_quoted(), warnings.catch_warnings():
        warnings.simplefilter("always")
        logger.warning("key %s", EVIL)
        record = logging.getLogRecordFactory()("n", logging.INFO, "f", 1, "key %s", (EVIL,), None)
        text = warnings.formatwarning(EVIL, UserWarning, "f.py", 1)
    assert (logging.getLogRecordFactory(), warnings.formatwarning) == (factory, formatting)
    assert honest(capsys.readouterr().err, record.getMessage(), text.rstrip("\n"))
    assert record.getMessage().startswith("key x\n  error[E_OK]")


@pytest.fixture
def evil_model(tmp_path: Path) -> Path:
    """Write a model with tensors, settings and a file of such a name."""
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    for name in (EVIL, f"model.layers.0.{EVIL}.weight"):
        tensors[name] = torch.zeros(32, 32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, EVIL: 1},
        EVIL: EVIL,
        "eos_token_id": 10**9,
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / f".{EVIL}.txt").write_text("x")
    (tmp_path / "text.txt").write_text(texts(4000)[0])
    return model


WORDS = ["-b4", "-g32", "--nsamples=4", "--seqlen=64", "--device=cpu", "--batch-size=2"]


@pytest.mark.parametrize("command", ["plan", "inspect", "quantize", "layer", "compare"])
def test_no_command_forges_a_line(
    command: str, evil_model: Path, gptq: Run, tmp_path: Path
) -> None:
    log, text, out = tmp_path / "log", tmp_path / "text.txt", tmp_path / "out"
    commands = {
        "plan": ["plan", evil_model, *WORDS],
        "inspect": ["inspect", evil_model],
        "layer": ["inspect", evil_model, "--layer", EVIL],
        "compare": ["compare", evil_model, save_model(tmp_path / "other", num_hidden_layers=1)],
        "quantize": ["quantize", evil_model, "-o", out, "--dataset", text, *WORDS, "--verbose"],
    }
    result = gptq(*commands[command], "--log-file", log)
    assert honest(result.stdout, result.stderr), result.output
    assert "E_OK" in result.output
    for line in log.read_text().splitlines():
        _, _, message = line.partition("Z ")
        assert not message.startswith("error[E_OK]")


@pytest.mark.parametrize("command", ["plan", "inspect", "quantize"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_file_of_the_model_forges_no_line(
    command: str, flags: list[str], gptq: Run, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    (model / f"{EVIL}.txt").write_text("x")
    settings = [] if command == "inspect" else ["-b", "4"]
    result = gptq(command, model, *settings, *flags)
    assert (result.exit_code, bool(result.stdout)) == (3, bool(flags)), result.output
    assert result.stderr.startswith(f"error[E_UNSAFE_PATH]: `{model}/{SHOWN}.txt` has a name")
    assert honest(result.stdout, result.stderr)


@pytest.mark.parametrize(
    "place", ["quant_method", "checkpoint_format", "format", "model_type", "dtype"]
)
def test_no_setting_forges_a_line(place: str, gptq: Run, tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    config = json.loads((directory / "config.json").read_text())
    if place in ("model_type", "dtype"):
        config[place] = EVIL
    else:
        config["quantization_config"][place] = EVIL
    (directory / "config.json").write_text(json.dumps(config))
    dequantize = ["dequantize", directory, "-o", tmp_path / "out"]
    for command in (["inspect", directory], ["verify", directory], dequantize):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        result = gptq(*command)
        assert honest(result.stdout, result.stderr), result.output
        assert result.exit_code in (0, 3, 4), result.output
