"""Real processes: killed, asked to end, and racing for one output."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from tests.quantization import children
from tests.runs import config, digest
from tests.tiny import SETTINGS, WORK, Case

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.quantization.children"])


def recipe(directory: Path) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(config(**SETTINGS).model_dump(mode="json")))
    return path


def run(when: str, signals: list[int], *words: str | Path) -> tuple[int, str, str]:
    """Run the command line in a forked process; return its exit code, stdout and stderr.

    It sends itself `signals` after the first block, before a layer or never, as `when` says.
    """
    with TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        arguments = (when, [int(number) for number in signals], [*map(str, words)], *printed)
        process = CHILDREN.Process(target=children.be_gptq, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode, printed[0].read_text(), printed[1].read_text()


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
    assert f"resume with: gptq resume {stopped.directory}/out\n" in stopped.stderr
    assert stopped.stderr.splitlines()[-1] == f"stopped by {name}"
    assert "error[" not in stopped.stderr
    assert json.loads(stopped.stdout)["exit_code"] == 128 + stopped.number


def test_gptq_resume_finishes_the_work_after_a_signal(stopped: Stopped, case: Case) -> None:
    code, stdout, stderr = run("never", [], "resume", stopped.directory / WORK, "--json")
    assert code == 0, stderr
    assert f"resuming after {stopped.blocks} of 3 blocks" in stderr
    assert json.loads(stdout)["resumed_blocks"] == stopped.blocks
    assert digest(stopped.directory / "out") == case.tree
