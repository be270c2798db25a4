"""`--devices`: the same command once for each device."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from gptq_cli.cli.console import Console, log, report_problems
from gptq_cli.errors import ConfigError, GptqError, ResourceError, Stopped

# Ctrl-C, `kill` and schedulers, a terminal that closes, a limit of CPU time, Slurm's --signal
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1")
SHOW_CURSOR = "\x1b[?25h"
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled(handler: Handler) -> Iterator[list[int]]:
    """Let `handler` take these signals in the body, whose numbers it is given; ignored ones (nohup) stay so."""
    wanted = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in wanted}
    taken = [number for number in wanted if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield taken
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """Raise Stopped in the body when one of these signals comes.

    It is raised wherever the body is, and not only between layers: whatever it interrupts may as well be killed, since
    only what is finished and durable counts.
    """

    def end_at_once(number: int, _frame: FrameType | None) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)
            sys.stderr.flush()
        os._exit(128 + number)

    def end(number: int, _frame: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, end_at_once)
        console.say(f"stopping on {signal.Signals(number).name}; once more to end at once")
        raise Stopped(number)

    with handled(end) as taken:
        yield


def name_of(exit_code: int) -> str:
    """The name of the signal that an exit code of 128 and more stands for."""
    return signal.Signals(exit_code - 128).name


if TYPE_CHECKING:
    from gptq_cli.runtime.ranks import Worker

FORMS = "numbers of GPUs as in 0,1,2,3, or cpu:4 for four processes on the CPU"


def parse_devices(said: str | None) -> list[str]:
    """The devices that `--devices` names, one for each process; ConfigError E_CFG_RANGE for what is none."""
    devices: list[str] = []
    for part in said.split(",") if said is not None else []:
        match = re.fullmatch(r"cpu(?::(\d{1,3}))?|(?:cuda:)?(\d{1,3})", part.strip())
        if not match or match[1] == "0":
            raise ConfigError(
                "E_CFG_RANGE", f"--devices must be {FORMS}, got {said!r}", hint="--devices 0,1"
            )
        devices += [f"cuda:{int(match[2])}"] if match[2] else ["cpu"] * int(match[1] or 1)
    twice = [device for device in devices if device != "cpu" and devices.count(device) > 1]
    if twice or len({device.partition(":")[0] for device in devices}) > 1:
        why = f"names {twice[0]} twice" if twice else "mixes GPUs and the CPU"
        raise ConfigError("E_CFG_CONFLICT", f"--devices {why}", hint=f"give {FORMS}")
    return devices


def is_one_of_several() -> bool:
    """Whether this process is one of several already, started by `launch` or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_leader() -> bool:
    """Whether this process is the first of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def member(device: str, devices: list[str], *, as_json: bool) -> Iterator[Worker]:
    """This process's place for the body; of errors that end it one process tells."""
    from gptq_cli.runtime.processes import SAID_ELSEWHERE
    from gptq_cli.runtime.torchrun import ReportedByAnotherRank, joined

    def end(error: ResourceError | None) -> None:
        if error is not None:
            _tell(error, as_json)
        os._exit(ResourceError.exit_code)

    try:
        with joined(device, devices, end) as place:
            yield place
    except ReportedByAnotherRank:
        log.muted = True
        raise typer.Exit(SAID_ELSEWHERE) from None
    except BaseException:
        log.muted = False
        raise


def launch(devices: list[str], *, as_json: bool, directory: Path) -> int:
    """Run this command once for each of `devices`, in `directory`; the exit code, when all have ended.

    What a process has to say it says itself; only if one was killed it is said here. InputError E_DEVICE for a device
    that is not there.
    """
    from gptq_cli.runtime.open_model import resolve_device
    from gptq_cli.runtime.processes import SAID_ELSEWHERE, Processes, local_environment

    for device in devices:
        resolve_device(device)
    environment = local_environment()
    if devices[0] == "cpu":  # as torchrun does, and everybody may have a part of the cores
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(devices)))
        )
    log.end()
    processes = Processes(len(devices))
    with handled(processes.forward):
        codes = processes.run(directory, environment)
    failed = [rank for rank in processes.ended if codes[rank]]
    spoken = [codes[rank] for rank in failed if codes[rank] > 0 and codes[rank] != SAID_ELSEWHERE]
    if spoken or not failed:
        return spoken[0] if spoken else 0
    killed = next(rank for rank in failed if codes[rank] < 0)
    return _killed(killed, len(devices), codes[killed], as_json)


def _killed(rank: int, n: int, code: int, as_json: bool) -> int:
    """Say that a process was killed, which no other one could."""
    lost = ResourceError(
        "E_RANK_LOST", f"process {rank} of {n} (the first is 0) was killed by {signal.Signals(-code).name}",
        hint="see whether the machine ran out of memory; the same command goes on after the last finished block",
    )  # fmt: skip
    _tell(lost, as_json)
    return lost.exit_code


def _tell(error: GptqError, as_json: bool) -> None:
    log.muted = False
    report_problems(error.problems, error.exit_code, as_json=as_json)
