"""Real processes: killed, asked to end, and racing for one output."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.quantization import children
from tests.runs import config, digest
from tests.tiny import SETTINGS, WORK, Case

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.quantization.children"])

# A command line that sends signals to itself after the first block or before a layer.
PROGRAM = """
import os, sys, torch
torch.set_num_threads(1)
from gptq_cli.quantization import run_state
from gptq_cli.__main__ import main
from gptq_cli.storage import durable
when, signals = sys.argv.pop(1), [int(number) for number in sys.argv.pop(1).split(",")]
def send():
    for number in signals:
        os.kill(os.getpid(), number)
if when == "block":
    usual = run_state.FinishedBlocks.finished
    def finished(*arguments):
        usual(*arguments)
        send()
    run_state.FinishedBlocks.finished = finished
elif when == "forward":
    from gptq_cli.models import paused_forwards
    usual = paused_forwards._Batch.before_linear
    def before_linear(self, stage, name, inputs):
        if "layers.1.mlp.down" in name:
            send()
        return usual(self, stage, name, inputs)
    paused_forwards._Batch.before_linear = before_linear
main()
"""


def recipe(directory: Path) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(config(**SETTINGS).model_dump(mode="json")))
    return path


def start(when: str, signals: list[int], *words: str | Path) -> subprocess.Popen[str]:
    numbers = ",".join(str(int(number)) for number in signals) or "0"
    command = [sys.executable, "-c", PROGRAM, when, numbers, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run(when: str, signals: list[int], *words: str | Path) -> tuple[int, str, str]:
    process = start(when, signals, *words)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def quantize(case: Case, directory: Path) -> list[str | Path]:
    return ["quantize", case.model, "-o", directory / "out", "-c", recipe(directory)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 0.9])
def test_the_same_call_resumes_the_work_of_a_killed_process(
    share: float, case: Case, tmp_path: Path
) -> None:
    last = int(share * len(case.operations))
    process = CHILDREN.Process(
        target=children.die, args=(case.model, tmp_path / "out", SETTINGS["dataset"], last)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() or digest(tmp_path / "out") == case.tree
    result = case.run(tmp_path / "out")
    assert digest(tmp_path / "out") == case.tree
    assert len(result.layers) == 5


def test_one_of_eight_processes_racing_for_one_output_works(case: Case, tmp_path: Path) -> None:
    barrier, answers = CHILDREN.Barrier(8), CHILDREN.Queue()
    processes = [
        CHILDREN.Process(
            target=children.race,
            args=(case.model, tmp_path / "out", SETTINGS["dataset"], barrier, answers),
        )
        for _ in range(8)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert found.count("worked") == 1, found
    others = [answer for answer in found if answer not in ("worked", "already done")]
    for answer in others:
        assert re.match(
            r"E_LOCKED: another run( \(process \d+ on .+\))? is writing `.*/out`$", answer
        )
    assert digest(tmp_path / "out") == case.tree
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@dataclass(frozen=True)
class Stopped:
    """A run that a signal stopped after `blocks` blocks, and its printed output."""

    number: int
    blocks: int
    directory: Path
    code: int
    stdout: str
    stderr: str


@pytest.fixture(
    scope="module",
    params=[(signal.SIGINT, "block", 1), (signal.SIGTERM, "forward", 1)],
    ids=["SIGINT", "SIGTERM"],
)
def stopped(
    case: Case, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Stopped:
    number, when, blocks = request.param
    directory = tmp_path_factory.mktemp("stopped")
    printed = run(when, [number], *quantize(case, directory), "--json")
    return Stopped(number, blocks, directory, *printed)


def test_a_signal_ends_the_run_and_shows_the_resume_command(stopped: Stopped) -> None:
    name = signal.Signals(stopped.number).name
    assert stopped.code == 128 + stopped.number, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert f"stopping on {name}; a second signal exits immediately" in stopped.stderr
    assert f"resume with: gptq resume {stopped.directory}/{WORK}\n" in stopped.stderr
    assert stopped.stderr.splitlines()[-1] == f"stopped by {name}"
    assert "error[" not in stopped.stderr
    assert json.loads(stopped.stdout)["exit_code"] == 128 + stopped.number


def test_gptq_resume_finishes_the_work_after_a_signal(stopped: Stopped, case: Case) -> None:
    code, stdout, stderr = run("never", [], "resume", stopped.directory / WORK, "--json")
    assert code == 0, stderr
    assert f"resuming after {stopped.blocks} of 3 blocks" in stderr
    assert json.loads(stdout)["resumed_blocks"] == stopped.blocks
    assert digest(stopped.directory / "out") == case.tree
