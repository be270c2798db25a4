"""The first signal ends a run in order, the second at once; ignored signals stay ignored."""

from __future__ import annotations

import os
import signal

import pytest

from gptq_cli.cli import launch
from gptq_cli.cli.console import Console
from gptq_cli.cli.launch import NAMES, stoppable
from gptq_cli.errors import Stopped

from .conftest import FakeQuantizer, Run


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
    assert result.stderr.splitlines()[-1] == f"stopped by {name}"
    assert "error[" not in result.stderr
