"""The first signal ends a run in order, the second at once; ignored signals stay ignored."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gptq_cli.cli import launch
from gptq_cli.cli.console import Console
from gptq_cli.cli.launch import NAMES, stoppable, telling_if_nothing_is_saved
from gptq_cli.errors import Stopped

from .conftest import FakeQuantizer, Run

NOTHING_SAVED = "nothing was saved yet: the same command starts from the beginning"


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_the_body_and_restores_its_handler(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, stoppable(Console()):
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"stopping on {name}; a second signal exits immediately\n"


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)

    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    with stoppable(Console(quiet=True)):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            monkeypatch.setattr(launch.sys, "stderr", None)
            os.kill(os.getpid(), signal.SIGINT)
            terminal = Terminal()
            monkeypatch.setattr(launch.sys, "stderr", terminal)
            os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [130, 143]
    assert terminal.text == launch.SHOW_CURSOR


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stoppable(Console()):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_has_the_exit_code_of_its_signal(
    name: str, exit_code: int, gptq: Run, quantizer: FakeQuantizer
) -> None:
    quantizer.error = Stopped(getattr(signal, name))
    result = gptq("quantize", "m", "-b", "4", "-q")
    assert result.exit_code == exit_code
    assert result.stderr.splitlines()[-2:] == [NOTHING_SAVED, f"stopped by {name}"]
    assert "error[" not in result.stderr


@pytest.mark.parametrize(
    "saved",
    ["journal.jsonl", "allocation.jsonl", "gradients/journal.jsonl", "harms/journal.jsonl"],
)
def test_a_stopped_run_with_saved_work_does_not_claim_to_have_none(
    saved: str, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    kept = tmp_path / ".o.gptq-work" / saved
    kept.parent.mkdir(parents=True)
    (tmp_path / ".o.gptq-work").chmod(0o700)
    kept.write_text("a line")
    quantizer.error = Stopped(signal.SIGINT)
    result = gptq("quantize", "m", "-b", "4", "-o", tmp_path / "o")
    assert result.exit_code == 130
    assert NOTHING_SAVED not in result.stderr


@pytest.mark.parametrize("existed", [False, True])
def test_a_signal_after_the_output_is_complete_claims_no_loss(
    existed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, new = tmp_path / "o", tmp_path / "new"
    new.mkdir()
    if existed:
        output.mkdir()

    def publish() -> None:
        new.rename(output)
        raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped), telling_if_nothing_is_saved(Console(), output):
        publish()
    assert capsys.readouterr().err == ""


def test_a_stopped_measurement_that_is_never_saved_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Stopped), telling_if_nothing_is_saved(Console(quiet=True), None):
        raise Stopped(signal.SIGTERM)
    assert capsys.readouterr().err == f"{NOTHING_SAVED}\n"
