"""`--devices` and torchrun: names of devices, several processes of one run, and two machines."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from gptq_cli.cli import launch
from gptq_cli.cli.console import log
from gptq_cli.cli.launch import parse_devices
from gptq_cli.errors import ConfigError, InputError, ResourceError
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.runtime import torchrun
from gptq_cli.runtime.processes import LAUNCHER, REPORTED_ELSEWHERE
from gptq_cli.runtime.torchrun import rank_lost
from tests.disks import Killed
from tests.families import save_model, text_file
from tests.runs import config, digest
from tests.tiny import SETTINGS, SMALL, WORK, killer
from tests.vision import save_chats, save_vision_model

from .conftest import Run
from .processes import GPTQ

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO_NODES = r"""
set -e
ip link set lo up
ip link add gq0 type veth peer name gq1
unshare -n sleep 300 & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link set gq1 netns $other
ip addr add 10.99.0.1/24 dev gq0 && ip link set gq0 up
nsenter -t $other -n sh -c \
  "ip addr add 10.99.0.2/24 dev gq1 && ip link set gq1 up && ip link set lo up"
node() {
  "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 \
    --master-addr 10.99.0.1 --master-port 29511 "$@"
}
export -f node
GLOO_SOCKET_IFNAME=gq1 nsenter -t $other -n bash -c 'node --node-rank 1 -m gptq_cli "$@"' \
  two quantize "$COPY" -o /no/where -c "$RECIPE" &
second=$!
GLOO_SOCKET_IFNAME=gq0 node --node-rank 0 \
  -m gptq_cli quantize "$MODEL" -o "$OUT" -c "$RECIPE" && first=0 || first=$?
wait $second
kill $other
exit $first
"""


@pytest.mark.parametrize(
    ("said", "devices"),
    [
        ("0,1,2", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:3, 05", ["cuda:3", "cuda:5"]),
        ("cpu:3", ["cpu"] * 3),
        ("cpu,cpu", ["cpu"] * 2),
        ("cpu", ["cpu"]),
        (None, []),
    ],
)
def test_devices_name_gpus_or_count_cpu_processes(said: str | None, devices: list[str]) -> None:
    assert parse_devices(said) == devices


@pytest.fixture
def quantize_words(tmp_path: Path) -> list[str | Path]:
    """Return the words of a quantization of a small model and a text."""
    model = save_model(tmp_path / "model")
    return ["quantize", model, "-b4", "-g32", "--dataset", text_file(), "-o", tmp_path / "out"]


@pytest.mark.parametrize(("devices", "nsamples"), [("cpu:120", 128), ("cpu:3", 2)])
def test_more_processes_than_batches_are_refused(
    devices: str,
    nsamples: int,
    quantize_words: list[str | Path],
    gptq: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    result = gptq(*quantize_words, "--devices", devices, f"--nsamples={nsamples}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_CFG_RANKS]" in result.stderr
    assert "use fewer processes" in result.stderr


@pytest.mark.parametrize(("devices", "exit_code"), [("cpu:4", 0), ("cpu:5", 2)])
def test_each_chat_with_images_is_a_batch_to_share(
    devices: str, exit_code: int, gptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def note(names: list[str], **_: object) -> int:
        started.append(names)
        return 0

    monkeypatch.setattr(launch, "launch", note)
    model = save_vision_model(tmp_path / "model", "gemma3")
    words = ["quantize", model, "-b4", "-g32", "--dataset", save_chats(tmp_path), "--nsamples=4"]
    result = gptq(*words, "-o", tmp_path / "out", "--devices", devices)
    assert result.exit_code == exit_code, result.stderr
    assert len(started) == 1 - bool(exit_code)
    refused = "5 processes cannot share 4 calibration batches" in result.stderr
    assert refused == bool(exit_code)


def test_a_missing_device_is_refused_once_before_the_start(
    quantize_words: list[str | Path], gptq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = gptq(*quantize_words, "--devices", "0,1")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("error[E_DEVICE]: no CUDA device 0")
    assert result.stderr.count("error[") == 1
    assert "hint: use --devices cpu:2, or look at" in result.stderr
    alone = gptq(*quantize_words, "--devices", "1")
    assert alone.stderr.splitlines()[0].startswith("error[E_DEVICE]: no CUDA device 1")
    assert "hint: use --devices cpu:1, or look at" in alone.stderr


@pytest.mark.parametrize("said", ["", "cpu:0", "0,,1", "gpu", "-1", "cuda", "0;1"])
def test_words_that_name_no_device_are_refused(said: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--devices must be numbers of GPUs as in 0,1,2,3, or cpu:4"
    ) as caught:
        parse_devices(said)
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_RANGE", 2)
    assert caught.value.hint == "for one device, use --device in place of --devices"


@pytest.mark.parametrize(
    ("said", "why"), [("0,1,cuda:0", "names cuda:0 twice"), ("0,cpu", "mixes GPUs and the CPU")]
)
def test_devices_that_cannot_work_together_are_refused(said: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"--devices {why}") as caught:
        parse_devices(said)
    assert caught.value.code == "E_CFG_CONFLICT"


def test_a_wrong_path_is_refused_once_before_the_start(gptq: Run, tmp_path: Path) -> None:
    result = gptq("quantize", str(tmp_path / "none"), "--bits", "4", "--devices", "cpu:2")
    assert result.exit_code == InputError.exit_code
    assert result.stderr.count("error[") == 1


def test_each_process_gets_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun.torch.cuda, "is_available", lambda: True)
    assert torchrun._device_of(1, 2, "auto", []) == "cuda:1"
    assert torchrun._device_of(1, 2, "cpu", []) == "cpu"
    assert torchrun._device_of(1, 2, "auto", ["cuda:4", "cuda:6"]) == "cuda:6"


def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun.torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ConfigError, match="device cuda:1 is one device, but 2 processes run here"
    ) as caught:
        torchrun._device_of(0, 2, "cuda:1", [])
    assert caught.value.hint == "name a device for each: --devices 0,1"
    with pytest.raises(ConfigError, match="--devices names 3 devices, but 2 processes run here"):
        torchrun._device_of(0, 2, "auto", ["cpu"] * 3)


def test_a_lost_process_is_named_with_a_hint() -> None:
    error = rank_lost([1, 3], 4)
    assert str(error) == "process 1, 3 of 4 (the first is 0) was killed or cannot be reached"
    assert (error.code, error.exit_code) == ("E_RANK_LOST", ResourceError.exit_code)
    assert error.hint is not None
    assert error.hint.endswith("the same command resumes after the last finished block")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_ends_with_its_launcher_and_the_first_one_reports(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[ResourceError | None] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv(LAUNCHER, "4711")  # which is not the parent of this process
    torchrun._end_with_launcher(ended.append)
    (error,) = ended
    if rank:
        assert error is None
        return
    assert error is not None
    assert str(error) == "the process that started this run, 4711, was killed"
    assert (error.code, error.exit_code) == ("E_RANK_LOST", 5)
    assert error.hint == "the same command resumes after the last finished block"


@pytest.mark.parametrize(("error", "code"), [(rank_lost([1], 2), 5), (None, REPORTED_ELSEWHERE)])
def test_a_process_that_another_one_ends_leaves_the_exit_code_to_it(
    error: ResourceError | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def joined(_device: str, _devices: list[str], lost: torchrun.Lost) -> Iterator[None]:
        lost(error)
        yield

    monkeypatch.setattr(torchrun, "joined", joined)
    monkeypatch.setattr(launch, "_exit_now", sys.exit)
    with (
        pytest.raises(SystemExit) as caught,
        launch.joined_worker("cpu", ["cpu", "cpu"], as_json=False),
    ):
        pass
    assert caught.value.code == code
    assert ("E_RANK_LOST" in capsys.readouterr().err) == (error is not None)


def test_a_command_that_fails_does_not_wait_for_kernels_that_compile() -> None:
    program = """if True:
        import sys, threading, torch
        from gptq_cli.cli.app import app
        from gptq_cli.config.layer import LayerConfig
        from gptq_cli.runtime import kernels

        def launch(*_):
            threading.main_thread().join()
            print("compiled", flush=True)

        kernels.has_triton = lambda: True
        kernels.KERNELS = "gptq_cli.errors"
        kernels._launch = launch
        kernels.KernelTrial(torch.device("cpu"), LayerConfig())
        sys.argv = ["gptq", "quantize", "--json"]
        app()
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "error[E_USAGE]" in done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["exit_code"] == 2


def test_a_muted_process_prints_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log.muted = True
    try:
        from gptq_cli.cli.console import Console

        console = Console()
        console.say("progress")
        console.warn("W_X", "a warning")
        console.result({}, "result", "short")
    finally:
        log.muted = False
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def write_recipe(path: Path, **settings: object) -> Path:
    """Write the configuration of a run with `settings`; return its path."""
    path.write_text(yaml.safe_dump(config(**settings).model_dump(mode="json")))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write the recipe of the smallest run."""
    return write_recipe(tmp_path / "recipe.yaml", **SETTINGS)


def start(model: Path, recipe: Path, *words: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a quantization into `out` beside `recipe`."""
    output = recipe.parent / "out"
    command = [*GPTQ, "quantize", str(model), "-o", str(output), "-c", str(recipe), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ALONE, cwd=cwd)


def wait_for_a_finished_block(run: subprocess.Popen[str], journal: Path) -> None:
    """Return when the run has written its journal or has ended."""
    while not journal.exists() and run.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
def test_two_devices_write_the_output_of_one(recipe: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **SMALL)
    run = start(model, recipe, "--devices", "cpu:2", "--quiet")
    stdout, stderr = run.communicate(timeout=120)
    assert (run.returncode, stdout) == (0, f"{tmp_path / 'out'}\n")
    codes = re.findall(r"^warning\[(\w+)\]", stderr, flags=re.MULTILINE)
    assert len(codes) == len(set(codes)) == len(stderr.splitlines()), stderr
    quantize_checkpoint(str(model), tmp_path / "alone", config(**SETTINGS))
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")


@pytest.mark.slow
def test_several_devices_resume_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", **SMALL)
    for name in ("begun", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    settings = config(**SETTINGS)
    with pytest.raises(Killed):
        quantize_checkpoint(str(model), Path("../out"), settings, report=killer(0))
    words = [*GPTQ, "resume", f"../{WORK}", "--devices", "cpu:2"]
    run = subprocess.run(
        words, capture_output=True, text=True, env=ALONE, cwd=tmp_path / "elsewhere", check=False
    )
    assert run.returncode == 0, run.stderr
    assert "resuming after 1 of" in run.stderr
    quantize_checkpoint(str(model), tmp_path / "alone", settings)
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (
            signal.SIGKILL,
            5,
            "error[E_RANK_LOST]: process 1 of 2 (the first is 0) was killed or cannot be reached",
        ),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
    ],
)
def test_a_signal_to_one_process_ends_all_with_one_error(
    number: int, code: int, message: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=4)
    recipe = write_recipe(tmp_path / "recipe.yaml", nsamples=100, batch_size=1)
    run = start(model, recipe, "--devices", "cpu:2")
    journal = tmp_path / WORK / "journal.jsonl"
    wait_for_a_finished_block(run, journal)
    assert journal.exists(), run.communicate()
    second = sorted(psutil.Process(run.pid).children(), key=lambda process: process.pid)[1]
    os.kill(second.pid if number == signal.SIGKILL else run.pid, number)
    began = time.monotonic()
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == code, stderr
    assert stderr.count("error[") == message.count("error["), stderr
    assert stderr.count(message) == 1, stderr
    assert "resume with: gptq resume" in stderr
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_processes_of_one_machine_listen_only_on_loopback(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    (model / "yaml.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w').close()")
    recipe = write_recipe(tmp_path / "recipe.yaml", nsamples=40, batch_size=1)
    run = start(model, recipe, "--devices", "cpu:2", cwd=model)
    addresses: set[str] = set()
    while run.poll() is None:
        addresses |= listening(psutil.Process(run.pid))
        time.sleep(0.02)
    _, stderr = run.communicate()
    assert run.returncode == 0, stderr
    assert addresses == {"127.0.0.1"}
    assert not (tmp_path / "harmed").exists()
    assert not list(model.glob("__pycache__"))


def listening(process: psutil.Process) -> set[str]:
    """Return the addresses at which `process` and its children take connections."""
    addresses: set[str] = set()
    try:
        for member in [process, *process.children(recursive=True)]:
            for socket in member.net_connections(kind="inet"):
                if socket.status == psutil.CONN_LISTEN:
                    addresses.add(socket.laddr.ip)
    except psutil.Error:  # it has just ended
        return set()
    return addresses


@pytest.mark.slow
def test_a_rerun_finds_the_output_free_if_the_launcher_is_killed(tmp_path: Path) -> None:
    # With so many blocks the run is still going when its processes look for their parent.
    model = save_model(tmp_path / "model", num_hidden_layers=48)
    recipe = write_recipe(tmp_path / "recipe.yaml", nsamples=100, batch_size=1)
    run = start(model, recipe, "--devices", "cpu:2")
    journal = tmp_path / WORK / "journal.jsonl"
    wait_for_a_finished_block(run, journal)
    assert len(psutil.Process(run.pid).children()) == 2
    run.kill()
    again = start(model, recipe, "--devices", "cpu:2", "--max-runtime", "1s")
    _, stderr = run.communicate(timeout=120)  # ends when no process can write to the pipe
    killed = f"error[E_RANK_LOST]: the process that started this run, {run.pid}, was killed\n"
    assert stderr.count(killed) == 1, stderr
    assert stderr.count("error[") == 1, stderr
    assert journal.exists()
    _, stderr = again.communicate(timeout=120)
    assert again.returncode == 75, stderr
    assert "resuming after" in stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("unshare") and shutil.which("ip") and shutil.which("nsenter")),
    reason="needs network namespaces",
)
def test_two_machines_read_their_own_copies_and_one_writes(recipe: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed")
    model = save_model(tmp_path / "model", **SMALL)
    shutil.copytree(model, tmp_path / "copy")
    environment = {
        **ALONE,
        "PYTHON": sys.executable,
        "MODEL": str(model),
        "COPY": str(tmp_path / "copy"),
        "OUT": str(tmp_path / "out"),
        "RECIPE": str(recipe),
    }
    run = subprocess.run(
        ["unshare", "-rn", "bash", "-c", TWO_NODES],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"^verify: reading", run.stderr, flags=re.MULTILINE)) == 1
    quantize_checkpoint(str(model), tmp_path / "alone", config(**SETTINGS))
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")
