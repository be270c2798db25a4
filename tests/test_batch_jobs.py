"""The examples for batch systems run on a tiny model; they react to each exit code as intended."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptq_cli import errors
from tests.families import save_model, texts
from tests.forked import serving
from tests.hub import Hub, serve

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SLURM = EXAMPLES / "quantize.sbatch"
WORKFLOW = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())["jobs"]["quantize"]
JOB = yaml.safe_load((EXAMPLES / "kubernetes-job.yaml").read_text())["spec"]
CONTAINER = JOB["template"]["spec"]["containers"][0]
SIGUSR1 = 138


@dataclass(frozen=True)
class Place:
    """Commands of a batch system that only note their call, and a real or a scripted `gptq`."""

    folder: Path
    environment: dict[str, str]

    def command(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        calls = shlex.quote(str(self.folder))
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {calls}/calls\n{script}\n')
        path.chmod(0o755)

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        env = {**os.environ, **self.environment, **variables, **path}
        return subprocess.run(
            words, capture_output=True, text=True, env=env, cwd=self.folder, check=False
        )

    @property
    def calls(self) -> list[str]:
        """The calls since the last look."""
        file = self.folder / "calls"
        found = file.read_text().splitlines() if file.exists() else []
        file.write_text("")
        return [call.split()[0] + " " + call.split()[1] for call in found]


def batch_system(folder: Path, gptq: str, environment: dict[str, str]) -> Place:
    place = Place(folder, {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", **environment})
    place.command("gptq", gptq)
    place.command("srun", 'exec "$@"')
    for name in ("scontrol", "gh", "pip"):
        place.command(name, "exit 0")
    place.command("python", "exit 0")
    return place


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve({}, kind="model") as found:
        yield found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[str]:
    """Yield a shell line that acts as `gptq "$@"` and starts at once."""
    folder = tmp_path_factory.mktemp("forked")
    with serving(folder, hub.environment(folder / "home")) as words:
        yield shlex.join(["exec", *words]) + ' "$@"'


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, hub: Hub, program: str) -> Place:
    """Return a batch system with a tiny model; variables override model and text of the recipe."""
    folder = tmp_path_factory.mktemp("batch")
    save_model(folder / "model", num_hidden_layers=2)
    (folder / "text.txt").write_text(texts(4000)[0])
    settings = {
        "group_size": 32,
        "preset": "gptq",
        "dataset": folder / "text.txt",
        "nsamples": 4,
        "seqlen": 64,
        "device": "cpu",
    }
    said = {f"GPTQ_{name.upper()}": str(value) for name, value in settings.items()}
    names = {"MODEL": folder / "model", "OUT": folder / "store/me/tiny",
             "TEXT": folder / "text.txt",
             "STORE": folder / "store", "REPO": "me/tiny", "MAX_INCREASE": "10000",
             "CONFIG": "vllm-4bit"}  # fmt: skip
    environment = (
        said
        | {name: str(value) for name, value in names.items()}
        | hub.environment(folder / "home")
    )
    return batch_system(folder, program, environment)


@pytest.fixture
def told(tmp_path: Path) -> Place:
    """Return a batch system whose `gptq` exits with $QUANTIZE or $EVAL, or else with 0."""
    ends = 'case $1 in quantize) exit "${QUANTIZE:-0}" ;; eval-ppl) exit "${EVAL:-0}" ;; esac'
    return batch_system(
        tmp_path, ends, {"MODEL": "m", "OUT": "out", "STORE": "store", "REPO": "me/tiny"}
    )


def workflow(place: Place, **variables: str) -> tuple[int, list[str]]:
    """Run the steps; return the exit code of the first that fails, and the calls of all steps."""
    defaults = {name: value for name, value in WORKFLOW["env"].items() if "${{" not in str(value)}
    outputs = place.folder / "outputs"
    outputs.write_text("")
    for step in WORKFLOW["steps"]:
        known = dict(line.split("=") for line in outputs.read_text().splitlines())
        wanted = re.fullmatch(r"steps\.quantize\.outputs\.(\w+) == '(\w+)'", step.get("if", ""))
        assert wanted or "if" not in step
        if wanted and known.get(wanted[1]) != wanted[2]:
            continue
        given = {**defaults, **place.environment, **variables, "GITHUB_OUTPUT": str(outputs)}
        done = place.run("bash", "-e", "-o", "pipefail", "-c", step["run"], **given)
        if done.returncode:
            return done.returncode, place.calls
    return 0, place.calls


def job(place: Place, **variables: str) -> subprocess.CompletedProcess[str]:
    defaults = {
        item["name"]: item["value"] for item in CONTAINER["env"] if item["name"] != "HF_HOME"
    }
    return place.run(
        *CONTAINER["command"], *CONTAINER["args"], **{**defaults, **place.environment, **variables}
    )


@dataclass(frozen=True)
class SlurmRun:
    """The calls of `gptq` by the Slurm script, and when its weights were written."""

    calls: list[str]
    modified: int


def modified(place: Place) -> int:
    """Return when the weights of the output were written, in nanoseconds."""
    return (place.folder / "store/me/tiny/model.safetensors").stat().st_mtime_ns


@pytest.fixture(scope="module")
def slurm_run(real: Place) -> SlurmRun:
    done = real.run("bash", str(SLURM))
    assert done.returncode == 0, done.stderr
    calls = [call for call in real.calls if call.startswith("gptq")]
    return SlurmRun(calls, modified(real))


def test_slurm_script_quantizes_measures_and_verifies(real: Place, slurm_run: SlurmRun) -> None:
    assert slurm_run.calls == ["gptq quantize", "gptq eval-ppl", "gptq verify"]
    measured = json.loads((real.folder / "store/me/tiny.ppl.json").read_text())
    assert measured["baseline_perplexity"] > 1


@pytest.mark.usefixtures("slurm_run")
def test_workflow_publishes_a_finished_output(
    real: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The runner names a base model by its id on the Hub, but this test has none.
    step = next(step for step in WORKFLOW["steps"] if step["name"] == "Publish")
    assert '--base-model "$MODEL"' in step["run"]
    monkeypatch.setitem(step, "run", step["run"].replace('"$MODEL"', "org/tiny"))
    code, calls = workflow(real, HF_TOKEN="none")
    assert (code, calls[-1]) == (0, "gptq push")
    card = hub.repos["me/tiny"]["README.md"].decode()
    assert "model-index" not in card  # the text of this test is on no Hub
    assert "## Perplexity" in card


def test_kubernetes_job_keeps_a_finished_output(real: Place, slurm_run: SlurmRun) -> None:
    again = job(real)
    assert again.returncode == 0, again.stderr
    assert "done   already, by an earlier run of the same command" in again.stdout
    assert modified(real) == slurm_run.modified


@pytest.mark.parametrize("code", [75, SIGUSR1])
def test_slurm_job_out_of_time_is_queued_again(code: int, told: Place) -> None:
    assert told.run("bash", str(SLURM), QUANTIZE=str(code)).returncode == 0
    assert told.calls == ["srun gptq", "gptq quantize", "scontrol requeue"]


def test_workflow_out_of_time_starts_itself_again(told: Place) -> None:
    code, calls = workflow(told, QUANTIZE="75", MODEL="m", CONFIG="c")
    assert (code, calls) == (0, ["python -m", "gptq quantize", "gh workflow"])


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6])
def test_failure_keeps_its_exit_code_and_publishes_nothing(code: int, told: Place) -> None:
    assert told.run("bash", str(SLURM), QUANTIZE=str(code)).returncode == code
    assert told.calls == ["srun gptq", "gptq quantize"]
    assert workflow(told, QUANTIZE=str(code), CONFIG="c") == (code, ["python -m", "gptq quantize"])
    assert job(told, QUANTIZE=str(code)).returncode == code


def test_failed_gate_stops_all_later_steps(told: Place) -> None:
    assert told.run("bash", str(SLURM), EVAL="4").returncode == 4
    assert told.calls[-1] == "gptq eval-ppl"
    code, calls = workflow(told, EVAL="4", CONFIG="c")
    assert (code, calls[-1]) == (4, "gptq eval-ppl")
    assert job(told, EVAL="4").returncode == 4


def test_slurm_job_names_missing_variables_and_requests_requeue() -> None:
    bare = subprocess.run(
        ["bash", SLURM],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        check=False,
    )
    assert bare.returncode != 0
    assert "say which model" in bare.stderr
    asked = re.findall(r"^#SBATCH (--[\w-]+)", SLURM.read_text(), flags=re.MULTILINE)
    assert {"--signal", "--requeue", "--time", "--open-mode"} <= set(asked)


def test_kubernetes_replaces_paused_pods_and_ends_failing_jobs() -> None:
    rules = JOB["podFailurePolicy"]["rules"]
    action = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    classes = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.GptqError)
    ]
    resource = errors.ResourceError.exit_code
    expected: dict[int, Any] = {
        kind.exit_code: "FailJob" for kind in classes if kind.exit_code != resource
    }
    assert action == expected | {errors.PausedError.exit_code: "Ignore", 143: "Ignore"}
    assert JOB["template"]["spec"]["restartPolicy"] == "Never"  # a failure policy needs it
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
        CONTAINER["name"]
    }
