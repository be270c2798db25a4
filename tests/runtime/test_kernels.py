"""A machine that cannot compile kernels is told early, and does without them."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch

from gptq_cli.config.layer import LayerConfig
from gptq_cli.errors import ResourceError
from gptq_cli.events import Event, ignore
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.runtime import kernels
from gptq_cli.runtime.device import Worker, settle_kernels, with_kernels
from gptq_cli.runtime.kernels import KernelTrial, why_no_kernels
from gptq_cli.runtime.memory import device_errors
from gptq_cli.runtime.ranks import SINGLE_PROCESS, Ranks
from gptq_cli.solver import numerics
from tests.families import save_model
from tests.runs import config, digest, messages
from tests.simulated_gpu import CUDA, simulated_gpu

simulated = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)
LAYER = LayerConfig(group_size=32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a trial has found holds for one test."""
    yield
    numerics.WITHOUT_KERNELS.clear()


class Other(Ranks):
    """One of two processes."""

    def all_gather(self, mine: Any) -> list[Any]:
        return [*mine, "the other one has no compiler"]


def settled(ranks: Ranks = SINGLE_PROCESS) -> list[str]:
    """The messages of a trial on the device."""
    events: list[Event] = []
    KernelTrial(CUDA, LAYER).settle(ranks, events.append)
    return messages(events, "W_NO_KERNELS")


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first launch end with `error`."""

    def launch(*_: object) -> None:
        raise error

    monkeypatch.setattr(kernels, "_launch", launch)


@simulated
def test_a_run_without_kernels_warns_once_and_writes_the_same_bytes(tmp_path: Path) -> None:
    model = str(save_model(tmp_path / "model", num_hidden_layers=2))
    quantize_checkpoint(model, tmp_path / "cpu", config(preset="gptq"))
    for output in ("first", "second"):  # a later run tries again, and warns again
        events: list[Event] = []
        with simulated_gpu():  # which has no driver that Triton could use
            settings = config(preset="gptq", device="cuda")
            quantize_checkpoint(model, tmp_path / output, settings, report=events.append)
        (message,) = messages(events, "W_NO_KERNELS")
        assert message.startswith("the solver's kernels cannot run on cuda:0: ")
        assert message.endswith("torch does the same steps, about ten times slower (estimated)")
        written = digest(tmp_path / output)["model.safetensors"]
        assert written == digest(tmp_path / "cpu")["model.safetensors"]


def test_the_cpu_begins_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(AssertionError("launched"), monkeypatch)
    events: list[Event] = []
    worker = with_kernels(None, config(device="cpu"))
    assert worker == Worker(SINGLE_PROCESS, CPU)
    settle_kernels(worker, events.append)
    assert events == []
    assert not numerics.WITHOUT_KERNELS


def test_a_launch_begins_once_for_each_process_and_all_hear_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[object] = []
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(kernels, "_launch", lambda *about: launched.append(about))
    team = Other()
    begun = with_kernels(Worker(team, CUDA), config(group_size=64))
    assert with_kernels(begun, config()) is begun
    events: list[Event] = []
    settle_kernels(begun, events.append)
    settle_kernels(begun, events.append)  # for the run after a measurement
    (message,) = messages(events, "W_NO_KERNELS")
    assert "the other one has no compiler" in message
    assert launched == [(CUDA, config(group_size=64).base)]


def test_a_machine_without_another_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(kernels.Thread, "start", start)
    with pytest.raises(ResourceError) as caught:
        with_kernels(Worker(SINGLE_PROCESS, CUDA), config())
    assert (caught.value.code, caught.value.exit_code) == ("E_OOM", 5)
    assert caught.value.hint


def test_a_triton_that_cannot_be_imported_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"{name} needs another library")

    failing(AssertionError("launched"), monkeypatch)
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(kernels, "import_module", missing)
    (message,) = settled()
    assert "ImportError: gptq_cli.solver.triton_kernels needs another library" in message


def test_a_process_that_ends_waits_for_its_compiler() -> None:
    program = """if True:
        import atexit, subprocess, sys, threading, torch
        from gptq_cli.config.layer import LayerConfig
        from gptq_cli.runtime import kernels

        def launch(*_):
            threading.main_thread().join()
            subprocess.run([sys.executable, "-c", ""])  # as the assembler of Triton is
            print("compiled", flush=True)

        kernels.has_triton = lambda: True
        kernels.KERNELS = "gptq_cli.errors"
        kernels._launch = launch
        atexit.register(print, "ended", flush=True)
        kernels.KernelTrial(torch.device("cpu"), LayerConfig())
        sys.exit(3)
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (3, "compiled\nended\n"), done.stderr


@pytest.mark.parametrize("group_size", [32, 256, -1])
def test_the_first_launch_solves_a_layer_of_these_groups(
    group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(kernels, "solve", lambda weight, *_: seen.append(weight.shape))
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    kernels._launch(CPU, LayerConfig(group_size=group_size))
    assert seen == [CPU, torch.Size([32, max(128, group_size)]), CPU]


def test_kernels_that_launch_are_used_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    numerics.WITHOUT_KERNELS.add("cuda")  # as after an earlier run
    monkeypatch.setattr(kernels, "_launch", lambda *_: None)
    assert settled() == []
    assert not numerics.WITHOUT_KERNELS


@simulated
def test_one_process_without_kernels_switches_them_off_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_launch", lambda *_: None)
    (message,) = settled(Other())
    assert "the other one has no compiler" in message
    assert set(numerics.WITHOUT_KERNELS) == {"cuda"}
    with simulated_gpu():
        assert not numerics.uses_kernels(torch.zeros(2, device=CUDA))
        numerics.WITHOUT_KERNELS.clear()
        assert numerics.uses_kernels(torch.zeros(2, device=CUDA))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "E_OOM"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "E_GPU_LOST"),
    ],
)
def test_a_failed_gpu_is_no_lack_of_kernels(
    error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(error, monkeypatch)
    with pytest.raises(ResourceError) as caught, device_errors():
        KernelTrial(CUDA, LAYER).settle(SINGLE_PROCESS, ignore)
    assert (caught.value.code, caught.value.exit_code) == (code, 5)
    assert caught.value.hint
    assert not numerics.WITHOUT_KERNELS


def test_a_machine_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(AssertionError("launched"), monkeypatch)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    (message,) = settled()
    assert "cannot run on cuda:0: triton is not installed; torch" in message


def test_a_compiler_without_headers_of_python_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = CalledProcessError(1, ["/usr/bin/gcc", "main.c"])
    (tmp_path / "Python.h").touch()
    for folder, words in ((tmp_path, "failed with exit code 1"), (tmp_path / "no", "python3-dev")):
        monkeypatch.setattr(sysconfig, "get_paths", lambda folder=folder: {"include": str(folder)})
        reason = why_no_kernels(error)
        assert "`gcc`" in reason
        assert words in reason


def test_what_triton_itself_raises_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from triton.runtime import build
    from triton.runtime.cache import FileCacheManager

    blocked = tmp_path / "file" / "cache"
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(blocked))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(OSError, match="file") as caught:
        FileCacheManager("0" * 64)
    reason = why_no_kernels(caught.value)
    assert str(blocked) in reason
    assert "set TRITON_CACHE_DIR to a folder that can be written" in reason
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build._find_compiler.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="Failed to find C compiler") as missing:
            build._find_compiler("c")
    finally:
        build._find_compiler.cache_clear()
    assert why_no_kernels(missing.value) == "there is no C compiler; install gcc, or set CC"


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/such/cc")
    error = FileNotFoundError(2, "No such file or directory", "/no/such/cc")
    assert why_no_kernels(error) == (
        "CC names `/no/such/cc`, which cannot run (No such file or directory)"
    )
    assert why_no_kernels(ValueError("one\ntwo")) == "ValueError: one"
