"""The processes of a run: `--devices`, signals, and the messages of one process for all."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from gptq_cli.cli.console import Console, log, report_problems
from gptq_cli.cli.progress import Progress
from gptq_cli.errors import ConfigError, GptqError, ResourceError, Stopped
from gptq_cli.events import Report, ignore
from gptq_cli.files import Identity, identity
from gptq_cli.storage.work_directory import WorkDirectory

if TYPE_CHECKING:
    from gptq_cli.planning.checks import PreparedRun
    from gptq_cli.runtime.device import Worker

# Ctrl-C, `kill` and schedulers, a closed terminal, a limit of CPU time, Slurm's --signal
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1")
OF_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}  # environment variables
SHOW_CURSOR = "\x1b[?25h"
FORMS = "numbers of GPUs as in 0,1,2,3, or cpu:4 for four processes on the CPU"
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled(handler: Handler) -> Iterator[list[int]]:
    """Let `handler` handle the signals of NAMES in the body, and yield their numbers.

    Signals that are ignored, as nohup does, stay ignored.
    """
    before = {}
    for name in NAMES:
        if hasattr(signal, name):
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield list(before)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """Raise Stopped in the body when a signal of NAMES arrives.

    It is raised at any line, not only between layers: the interrupted work may as well be killed,
    because only finished and durable work counts. A second signal ends the process at once.
    """

    def end_at_once(number: int, _frame: FrameType | None) -> None:
        _exit_now(128 + number)

    def end(number: int, _frame: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, end_at_once)
        name = signal.Signals(number).name
        console.say(f"stopping on {name}; a second signal exits immediately")
        raise Stopped(number)

    with handled(end) as taken:
        yield


def _exit_now(code: int) -> NoReturn:
    """End the process at any line of any thread; the terminal gets its cursor back."""
    try:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)
            sys.stderr.flush()
    finally:
        os._exit(code)


def end_process(code: int) -> NoReturn:
    """End the process with `code`, without waiting for kernels that compile after a failure.

    They may compile for half a minute. In this time another process of the run would be killed,
    and Python would answer a second Ctrl-C with a traceback. All messages are flushed already.
    """
    from gptq_cli.runtime.processes import FIRST_KERNELS

    if FIRST_KERNELS in [thread.name for thread in threading.enumerate()]:
        _exit_now(code)
    sys.exit(code)


def name_of(exit_code: int) -> str:
    """Return the name of the signal for an exit code above 128."""
    return signal.Signals(exit_code - 128).name


def parse_devices(text: str | None) -> list[str]:
    """Return the devices that the value of --devices names, one for each process; [] for None.

    Raise ConfigError E_CFG_RANGE for a value of another form, E_CFG_CONFLICT for devices that
    cannot share a run.
    """
    if text is None:
        return []
    devices: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"cpu(?::(\d{1,3}))?|(?:cuda:)?(\d{1,3})", part.strip())
        if not match or match[1] == "0":
            message = f"--devices must be {FORMS}, got {text!r}"
            hint = "for one device, use --device in place of --devices"
            raise ConfigError("E_CFG_RANGE", message, hint=hint)
        if match[2]:
            devices.append(f"cuda:{int(match[2])}")
        else:
            devices += ["cpu"] * int(match[1] or 1)
    _check_together(devices)
    return devices


def _check_together(devices: list[str]) -> None:
    for device in devices:
        if device != "cpu" and devices.count(device) > 1:
            raise ConfigError(
                "E_CFG_CONFLICT", f"--devices names {device} twice", hint=f"give {FORMS}"
            )
    if "cpu" in devices and set(devices) != {"cpu"}:
        message = "--devices mixes GPUs and the CPU"
        raise ConfigError("E_CFG_CONFLICT", message, hint=f"give {FORMS}")


def is_one_of_several() -> bool:
    """Return whether `launch` or torchrun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_leader() -> bool:
    """Return whether this process is the first of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Return whether this process is the first one of a run on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def joined_worker(device: str, devices: list[str], *, as_json: bool) -> Iterator[Worker]:
    """Yield this process's device and its connection to the other processes of the run.

    `device` is that of the configuration, `devices` are those of --devices. Of several processes
    only one reports an error that ends the run.
    """
    if not devices and not OF_TORCHRUN & os.environ.keys():
        from gptq_cli.runtime.device import Worker, resolve_device
        from gptq_cli.runtime.ranks import SINGLE_PROCESS

        yield Worker(SINGLE_PROCESS, resolve_device(device))
        return
    from gptq_cli.runtime.processes import REPORTED_ELSEWHERE
    from gptq_cli.runtime.torchrun import ReportedByAnotherRank, joined

    def end(error: ResourceError | None) -> None:
        if error is None:
            _exit_now(REPORTED_ELSEWHERE)
        try:
            _report(error, as_json)
        finally:
            _exit_now(error.exit_code)

    try:
        with joined(device, devices, end) as worker:
            yield worker
    except ReportedByAnotherRank:
        log.muted = True
        raise typer.Exit(REPORTED_ELSEWHERE) from None
    except BaseException:
        log.muted = False
        raise


@contextmanager
def telling_if_nothing_is_saved(console: Console, output: Path | None) -> Iterator[None]:
    """Tell after a signal that the next call starts over, if the work for `output` is not saved.

    Work that is saved is reported by the run. None is the output of work that is never saved.
    """
    before = None
    if output is not None:
        before = identity(output)
    try:
        yield
    except Stopped:
        if is_leader() and _is_nothing_saved(output, before):
            console.advise("nothing was saved yet: the same command starts from the beginning")
        raise


def _is_nothing_saved(output: Path | None, before: Identity | None) -> bool:
    """Return whether the work is lost; `before` is the file at `output` when the work began."""
    if output is None:
        return True
    # A signal may arrive when the output is complete and its work directory is being removed.
    return not WorkDirectory(output).holds_work() and identity(output) == before


@contextmanager
def working(
    console: Console, prepared: PreparedRun, devices: list[str], output: Path | None
) -> Iterator[tuple[Worker, Report]]:
    """Yield the place of this process in the run, and a receiver of events that shows progress.

    On a GPU the first launch of kernels has begun, so the body imports transformers while they
    compile. Of several processes only the first one shows progress. Signals stop the body, whose
    work is saved in the work directory of `output`.
    """
    device = prepared.config.device
    with (
        stoppable(console),
        telling_if_nothing_is_saved(console, output),
        joined_worker(device, devices, as_json=console.as_json) as worker,
        ExitStack() as stack,
    ):
        report: Report = ignore
        if worker.team.is_leader:
            report = stack.enter_context(Progress(console))
        from gptq_cli.runtime.device import with_kernels

        yield with_kernels(worker, prepared.config), report


def launch_processes(
    console: Console, prepared: PreparedRun, devices: list[str], directory: Path
) -> None:
    """Run the command once for each of several `devices`, in `directory`, and exit.

    Return if there are not several, or if this process is one of theirs.
    """
    from gptq_cli.planning.checks import check_shares, check_sharing

    if len(devices) > 1 and not is_one_of_several():
        check_sharing(prepared.plan.source, len(devices))
        check_shares(_n_batches(prepared, len(devices)), len(devices))
        sys.exit(launch(devices, as_json=console.as_json, directory=directory))


def _n_batches(prepared: PreparedRun, n_processes: int) -> int:
    """Return the number of calibration batches.

    Chats with images are batches of their own, and only windows of one length share a batch. If the
    settings alone give too few batches for the processes, the text is read to count them.
    """
    config = prepared.config
    n_batches = -(-config.nsamples // config.batch_size)
    if n_batches >= n_processes:
        return n_batches
    from gptq_cli.quantization.run import calibrate
    from gptq_cli.runtime.ranks import SINGLE_PROCESS

    calibration = calibrate(prepared.plan.source, config, ignore, SINGLE_PROCESS)
    return len(calibration.windows.batches(config.batch_size))


def launch(devices: list[str], *, as_json: bool, directory: Path) -> int:
    """Run this command once for each of `devices`, in `directory`, and return its exit code.

    Each process reports its own errors; only a killed one is reported here. Raise InputError
    E_DEVICE for a device that is not there.
    """
    from gptq_cli.runtime.device import cpu_option, resolve_device
    from gptq_cli.runtime.processes import Processes, local_environment

    for device in devices:
        resolve_device(device, cpu_option(devices))
    environment = local_environment()
    if devices[0] == "cpu":  # the processes share the cores; torchrun sets this variable too
        n_threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
        environment.setdefault("OMP_NUM_THREADS", str(n_threads))
    log.end()
    processes = Processes(len(devices))
    with handled(processes.forward):
        codes = processes.run(directory, environment)
    return _exit_code(processes.ended, codes, as_json)


def _exit_code(ended: list[int], codes: list[int], as_json: bool) -> int:
    """Return the exit code of the first process that reported an error, `ended` being their order.

    If none did but one was killed, report that.
    """
    from gptq_cli.runtime.processes import REPORTED_ELSEWHERE

    for rank in ended:
        if codes[rank] > 0 and codes[rank] != REPORTED_ELSEWHERE:
            return codes[rank]
    for rank in ended:
        if codes[rank] < 0:
            return _report_killed(rank, codes, as_json)
    return max(codes)


def _report_killed(rank: int, codes: list[int], as_json: bool) -> int:
    """Report for a process that it was killed, and return the exit code."""
    name = signal.Signals(-codes[rank]).name
    lost = ResourceError(
        "E_RANK_LOST",
        f"process {rank} of {len(codes)} (the first is 0) was killed by {name}",
        hint="check whether the machine ran out of memory; "
        "the same command resumes after the last finished block",
    )
    _report(lost, as_json)
    return lost.exit_code


def _report(error: GptqError, as_json: bool) -> None:
    log.muted = False
    report_problems(error.problems, error.exit_code, as_json=as_json)
