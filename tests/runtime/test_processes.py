"""The processes of `--devices`: their common end, their meeting place, their modules."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.cli.launch import launch
from gptq_cli.errors import GptqError, PausedError, ResourceError, Stopped
from gptq_cli.runtime import processes, torchrun
from gptq_cli.runtime.processes import (
    REPORTED_ELSEWHERE,
    Processes,
    launcher_is_gone,
    local_environment,
)
from gptq_cli.runtime.ranks import _give, _take

HERE = Path.cwd()
# The process that reported nothing ends before the process with an error of its own.
SLOW_ERROR = (
    "signal.signal(15, signal.SIG_IGN); time.sleep([1.5, 0.7][rank]); sys.exit([4, 76][rank])"
)


def scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let every process run `script`, which knows its number as `rank`."""
    code = f"import os, signal, sys, time; rank = int(os.environ['RANK']); {script}"
    monkeypatch.setattr(processes, "_command", lambda: [sys.executable, "-c", code])


def test_every_process_ends_with_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripted(monkeypatch, "time.sleep(0.3 * rank); open(str(rank), 'w').close()")
    assert Processes(3).run(tmp_path, local_environment()) == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_the_other_processes_end_if_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "sys.exit(3) if rank == 1 else time.sleep(60)")
    run = Processes(3)
    assert run.run(HERE, local_environment()) == [-signal.SIGTERM, 3, -signal.SIGTERM]
    assert run.ended[0] == 1


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    scripted(
        monkeypatch,
        "signal.signal(15, signal.SIG_IGN); "
        "time.sleep(60) if rank else (time.sleep(0.5), sys.exit(5))",
    )
    assert Processes(2).run(HERE, local_environment()) == [5, -signal.SIGKILL]


def test_a_signal_reaches_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripted(
        monkeypatch,
        "signal.signal(10, lambda *_: sys.exit(138)); open(str(rank), 'w').close(); time.sleep(60)",
    )
    run = Processes(2)

    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        run.forward(signal.SIGUSR1, None)

    sending = threading.Thread(target=send)
    sending.start()
    assert run.run(tmp_path, local_environment()) == [138, 138]
    sending.join()


def test_an_unreported_signal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "time.sleep(60)")
    run = Processes(2)
    threading.Timer(0.3, run.forward, (signal.SIGTERM, None)).start()
    with pytest.raises(Stopped) as caught:
        run.run(HERE, local_environment())
    assert caught.value.exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("sys.exit([76, 3][rank])", 3),
        (SLOW_ERROR, 4),
        ("sys.exit(0)", 0),
        ("os.kill(os.getpid(), 9) if rank else time.sleep(60)", ResourceError.exit_code),
    ],
)
def test_the_exit_code_comes_from_the_process_that_reported(
    script: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert REPORTED_ELSEWHERE == 76
    scripted(monkeypatch, script)
    assert launch(["cpu", "cpu"], as_json=False, directory=HERE) == code
    lost = "error[E_RANK_LOST]: process 1 of 2 (the first is 0) was killed by SIGKILL"
    assert capsys.readouterr().err.startswith(lost if code == ResourceError.exit_code else "")


def test_processes_meet_in_a_directory_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(
        monkeypatch,
        "store = os.environ['_GPTQ_STORE']; mode = os.stat(os.path.dirname(store)).st_mode; "
        "print(store, mode, sep='\\n', end='', file=open(str(rank), 'w'))",
    )
    Processes(2).run(tmp_path, local_environment())
    (first, mode), (second, _) = ((tmp_path / name).read_text().split("\n") for name in "01")
    assert first == second
    assert (stat.S_IMODE(int(mode)), Path(first).parent.exists()) == (0o700, False)


def test_the_error_without_a_meeting_place_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processes.tempfile, "TemporaryDirectory", full)
    with pytest.raises(
        ResourceError, match="cannot make a temporary directory: No space left on device"
    ) as caught:
        Processes(2).run(HERE, {})
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert caught.value.hint == "set TMPDIR to a directory that you may write"


def test_the_environment_always_names_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth")
    monkeypatch.setenv("NCCL_COMM_ID", "10.0.0.1:5")
    environment = local_environment()
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    assert "NCCL_COMM_ID" not in environment


def test_a_process_notices_that_its_launcher_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launcher_is_gone()
    monkeypatch.setenv("_GPTQ_LAUNCHER", str(os.getppid()))
    assert not launcher_is_gone()
    monkeypatch.setenv("_GPTQ_LAUNCHER", str(os.getppid() + 1))
    assert launcher_is_gone()


class Harm:
    """Something whose pickle runs a command."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def sent(message: bytes) -> list[torch.Tensor]:
    return [torch.tensor(len(message)), torch.frombuffer(bytearray(message), dtype=torch.uint8)]


def taken(tensors: list[torch.Tensor]) -> Any:
    coming = iter(tensors)
    return _take(lambda tensor: tensor.copy_(next(coming)), torch.device("cpu"))


@pytest.mark.parametrize(
    "harm", [Harm(), {"a": [Harm()]}, exec, os.system, type, subprocess.Popen, pickle.loads]
)
def test_a_value_from_another_process_runs_no_code(
    harm: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="which is not a plain value"):
        taken(sent(pickle.dumps(harm)))
    assert not list(tmp_path.iterdir())


def test_a_value_cannot_be_an_attribute_of_our_modules() -> None:
    module, name = b"gptq_cli.runtime.ranks", b"pickle.Pickler"
    words = b"".join(b"\x8c" + bytes([len(word)]) + word for word in (module, name))
    with pytest.raises(pickle.UnpicklingError, match="which is not a plain value"):
        taken(sent(b"\x80\x05" + words + b"\x93."))


@pytest.mark.parametrize(
    "value", [{"a": (1, 2.5, None, True)}, [b"x", "y", {3}, range(2)], torch.float16, Path("a/b")]
)
def test_values_arrive_unchanged(value: object) -> None:
    tensors: list[torch.Tensor] = []
    weight = torch.arange(6).view(2, 3)
    _give([value, weight], tensors.append, torch.device("cpu"))
    found, other = taken(tensors)
    assert found == value
    assert torch.equal(other, weight)


PROBE = "import json, sys; print(json.dumps(sys.path))"


def test_children_search_modules_where_this_process_does(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("open('harmed', 'w').close()")
    command = processes._command()
    code = command[2].replace(
        "from gptq_cli.__main__ import main; main()", "import yaml; print(sys.path, yaml.__file__)"
    )
    found = subprocess.run(
        [command[0], "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(repr(sys.path))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("words", [None, "", ".", ":/nowhere", "/nowhere:"])
def test_python_m_loads_no_module_of_the_current_directory(
    words: str | None, tmp_path: Path
) -> None:
    for name in ("yaml", "typer", "pydantic", "json", "typing", "dataclasses"):
        (tmp_path / f"{name}.py").write_text(
            f"open('harmed by {name}', 'w').close()\nraise ImportError('not the real one')"
        )
    (tmp_path / "recipe.txt").write_text("bits: 4\n")
    environment = {**os.environ} if words is None else {**os.environ, "PYTHONPATH": words}
    for command in ([sys.executable, "-m", "gptq_cli"], [Path(sys.executable).with_name("gptq")]):
        run = [*map(str, command), "validate-config", "recipe.txt"]
        found = subprocess.run(
            run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (found.returncode, found.stderr) == (0, "")
    assert list(tmp_path.glob("harmed*")) == []


def test_a_directory_named_in_pythonpath_is_used(tmp_path: Path) -> None:
    code = f"from gptq_cli.__main__ import leave_out_current_directory as do; do(); {PROBE}"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/:"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert json.loads(found.stdout)[0] == str(tmp_path)


def test_a_removed_current_directory_is_no_failure(tmp_path: Path) -> None:
    command = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir ../gone && "
    command += f"exec {sys.executable} -m gptq_cli --version"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


class Claims:
    """The store of two processes that have noted that they end."""

    def __init__(self) -> None:
        self.rank = ""

    def set(self, *_: object) -> None:
        """Forget what is noted."""

    def check(self, _: object) -> bool:
        return True

    def compare_set(self, _key: str, _before: str, rank: str) -> str:
        self.rank = self.rank or rank
        return self.rank


@pytest.mark.parametrize(
    ("error", "reports"),
    [(PausedError("E_PAUSED", "x"), True), (ResourceError("E_RANK_LOST", "x"), False)],
)
def test_a_process_claims_its_own_error_before_others_see_that_it_ends(
    error: GptqError, reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Claims()
    monkeypatch.setattr(torchrun, "_let_go", lambda _: store.compare_set("", "", "1"))
    raised = torchrun.Watch(store, 0, 2, lambda _: None).error_to_raise(error)
    assert (raised is error) == reports
    assert reports or isinstance(raised, torchrun.ReportedByAnotherRank)
