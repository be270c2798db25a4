"""What a run looks like: plain lines in a log, a live view on a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from gptq_cli.cli.console import Console
from gptq_cli.cli.progress import APART, SILENCE, Progress
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    LayerSolved,
    PhaseStarted,
    Report,
    StepsDone,
)
from gptq_cli.files import BytesDone

from .conftest import layer_report, play


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_for_each_block(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(Console()) as progress:
        play(progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == """\
plan: 4 layers in 2 blocks, 1 kept, 8 MB -> 2.5 MB, 4.25 bits a weight
calibration: 128 windows
warning[W_TEST]: a warning in block 0
block 1/2 model.layers.0 error 2.0e-04 (rtn 6.0e-04) 18.2 s eta 0:00:18 mem 2.15 GB
warning[W_TEST]: a warning in block 1
block 2/2 model.layers.1 error 2.0e-04 (rtn 6.0e-04) 18.2 s eta 0:00:00 mem 2.15 GB
"""
    )


@pytest.mark.parametrize(("n_blocks", "step"), [(80, 8), (20, 2), (10, 1), (7, 1)])
def test_a_log_gets_a_line_for_each_tenth(
    n_blocks: int, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    progress = Progress(Console(), now=lambda: now[0])
    for index in range(n_blocks):
        progress(BlockStarted(index, n_blocks, "b"))
        progress(BlockFinished(index, n_blocks, "b", 1.0, 10**9, 0))
    lines = capsys.readouterr().err.splitlines()
    told = [int(line.split("/")[0].removeprefix("block ")) for line in lines]
    assert told == list(range(step, n_blocks + 1, step))
    now[0] += SILENCE + 1  # a slow block gets a line, whichever it is
    progress(BlockStarted(0, n_blocks, "b"))
    progress(BlockFinished(0, n_blocks, "b", 70.0, 10**9, 0))
    assert capsys.readouterr().err.startswith(f"block 1/{n_blocks} ")


def pass_bytes(progress: Report, now: list[float], seconds: float) -> None:
    """Report a step of 200 MB that takes so many seconds."""
    progress(PhaseStarted("verify", "the hashes of 200 MB"))
    for done in range(1, 201):
        now[0] += seconds / 200
        progress(BytesDone(done * 10**6, 200 * 10**6))


def test_a_log_gets_a_line_for_each_tenth_of_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    pass_bytes(Progress(Console(), now=lambda: now[0]), now, 4000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "verify: the hashes of 200 MB",
        "verify: 10 % of 200 MB, 1:00:00 left",
        "verify: 20 % of 200 MB, 0:53:20 left",
    ]
    assert len(lines) == 11
    assert lines[-1] == "verify: 100 % of 200 MB, 0:00:00 left"


def test_a_log_gets_a_line_for_each_tenth_of_the_steps_of_a_pass(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    progress = Progress(Console(), now=lambda: now[0])
    progress(PhaseStarted("gradients", "16,384 tokens backward"))
    for done in range(1, 31):
        now[0] += 60
        progress(StepsDone(done, 30))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "gradients: 16,384 tokens backward",
        "gradients: 10 % of 30 steps, 0:27:00 left",
    ]
    assert len(lines) == 11


def test_the_time_left_of_a_pass_counts_only_steps_of_its_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    progress = Progress(Console(), now=lambda: now[0])
    progress(PhaseStarted("gradients", "16,384 tokens backward"))
    for done in (5, 6, 7):
        now[0] += 60
        progress(StepsDone(done, 9, before=4))
    assert capsys.readouterr().err.splitlines()[1:] == [
        "gradients: 55 % of 9 steps, 0:04:00 left",
        "gradients: 66 % of 9 steps, 0:03:00 left",
        "gradients: 77 % of 9 steps, 0:02:00 left",
    ]


def test_a_part_of_a_step_counts_in_the_progress_of_a_pass(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    progress = Progress(Console(), now=lambda: now[0])
    progress(PhaseStarted("gradients", "16,384 tokens backward"))
    for done in (0.5, 0.75):
        now[0] += 60
        progress(StepsDone(done, 2))
    assert capsys.readouterr().err.splitlines()[1:] == [
        "gradients: 25 % of 2 steps, 0:03:00 left",
        "gradients: 37 % of 2 steps, 0:03:20 left",
    ]
    assert progress._view().startswith("gradients █████████░░░░░░░░░░░░░░░ 37 % of 2 steps")


@pytest.mark.parametrize(("seconds", "n_lines"), [(0.9 * APART, 0), (3.1 * APART, 3)])
def test_lines_about_bytes_are_at_least_a_second_apart(
    seconds: float, n_lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    pass_bytes(Progress(Console(), now=lambda: now[0]), now, seconds)
    assert len(capsys.readouterr().err.splitlines()) == 1 + n_lines


def test_quiet_shows_no_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Progress(Console(quiet=True), now=lambda: now[0]) as progress:
        pass_bytes(progress, now, 4000)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_of_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, terminal = [0.0], Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(Console(), now=lambda: now[0]) as progress:
        pass_bytes(progress, now, 4000)
        half = Progress(Console(), now=lambda: now[0])
        half(PhaseStarted("copy", "12 other tensors"))
        now[0] += 60
        half(BytesDone(10**9, 4 * 10**9))
        assert half._view() == (
            "copy ██████░░░░░░░░░░░░░░░░░░ 25 % of 4 GB, 0:03:00 left\ncopy: 12 other tensors"
        )
    assert "verify ████" in terminal.getvalue()
    assert "left\r\n" not in terminal.getvalue()  # no line of a log beside the bar


@pytest.mark.parametrize("columns", [30, 40, 60])
def test_a_narrow_terminal_shortens_the_bar(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress(Console(), now=lambda: 0.0) as progress:
        progress(BlockStarted(3, 4, "b"))
        progress(BlockFinished(2, 4, "b", 10.0, 10**9, 0))
        first = progress._view().splitlines()[0]
    assert len(first) <= columns
    assert re.fullmatch(r"block 4/4 █+░+ 0:00:10 left", first)
    assert "0:00:10 left" in terminal.getvalue()


def test_the_view_ends_before_the_client_of_the_hub_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(Console()) as progress:
        progress(PhaseStarted("hash", "4 GB"))
        assert "\x1b[?25h" not in terminal.getvalue()
        progress(PhaseStarted("upload", "2 files to me/small"))
        assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back
    assert terminal.getvalue().endswith("upload: 2 files to me/small\n")


def test_finished_blocks_stay_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(Console()) as progress:
        progress(PhaseStarted("device", "the CPU"))
        progress(PhaseStarted("calibration", "4 windows"))
        play(progress)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for line in (
        "device: the CPU",
        "block 1/2 model.layers.0 error 2.0e-04 (rtn 6.0e-04) 18.2 s eta 0:00:18 mem 2.15 GB",
        "block 2/2 model.layers.1 error 2.0e-04 (rtn 6.0e-04) 18.2 s eta 0:00:00 mem 2.15 GB",
    ):
        assert line in [found.strip() for found in plain.splitlines()]


def test_a_terminal_keeps_the_line_about_work_of_an_earlier_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "say", lambda _, line: said.append(line))
    with Progress(Console()) as progress:
        progress(PhaseStarted("resume", "5 of 9 steps are finished"))
        progress(PhaseStarted("gradients", "16,384 tokens backward"))
    assert said == ["resume: 5 of 9 steps are finished"]


def test_what_parts_of_a_command_repeat_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for text in ("a.txt, 90 tokens", "a.txt, 90 tokens", "b.txt, 70 tokens"):
        with Progress(console) as progress:
            progress(PhaseStarted("device", "1 thread of the CPU"))
            progress(PhaseStarted("text", text))
            progress(PhaseStarted("verify", "the hashes of 4 MB"))
    assert capsys.readouterr().err.splitlines() == [
        "device: 1 thread of the CPU",
        "text: a.txt, 90 tokens",
        "verify: the hashes of 4 MB",
        "verify: the hashes of 4 MB",
        "text: b.txt, 70 tokens",
        "verify: the hashes of 4 MB",
    ]


def test_blocks_without_errors_leave_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(Console()) as progress:
        for index in range(2):
            progress(BlockStarted(index, 2, "model.layers"))
            progress(BlockFinished(index, 2, "model.layers", 1.0, 10**9, 0))
    seen = terminal.getvalue()
    assert "0:00:01 left" in seen
    assert " eta " not in seen


def test_a_long_block_prints_a_line_for_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 1.0, SILENCE + 1, SILENCE + 1, SILENCE + 2])
    with Progress(Console(), now=lambda: next(seconds)) as progress:
        progress(BlockStarted(0, 9, "model.layers.0"))
        for name in ("a", "b", "c"):
            progress(LayerSolved(layer_report(0, name)))
    assert capsys.readouterr().err == "block 1/9 model.layers.0.b error 1.0e-04 (rtn 3.0e-04)\n"


def test_a_terminal_gets_a_live_view_and_its_cursor_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(Console()) as progress:
        play(progress)
    seen = terminal.getvalue()
    for words in (
        "block 1/2 ",
        "0:00:18 left",
        "model.layers.1.[bold]down  error 3.0e-04 (rtn 9.0e-04)",
        "memory 2.15 GB",
    ):
        assert words in seen
    assert "[bold]down  error 1.0e-04" not in seen  # the error of the layer before it
    assert seen.index(": a warning in block 0") < seen.index("block 2/2 ")
    assert "\x1b[?25h" in seen  # the cursor is shown again


def test_the_live_view_counts_blocks_of_earlier_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(Console())
    progress(BlockStarted(5, 8, "model.layers.5"))
    assert progress._view().startswith("block 6/8 ███████████████░░░░░░░░░ ? left")
    progress(
        BlockFinished(
            index=5, n_blocks=8, name="model.layers.5", seconds=10.0, host_bytes=0, device_bytes=0
        )
    )
    assert progress._view().startswith("block 6/8 ██████████████████░░░░░░ 0:00:20 left")
    progress(PhaseStarted("embeddings", "3 batches"))  # as when a block has run out of memory
    progress(BlockStarted(6, 8, "model.layers.6"))
    assert progress._view().startswith("block 7/8 ██████████████████░░░░░░ ? left")
    capsys.readouterr()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with Progress(Console()) as progress:
        play(progress)
    assert "\x1b" not in terminal.getvalue()
    assert "block 2/2 model.layers.1 error" in terminal.getvalue()
