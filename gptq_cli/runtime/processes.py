"""The processes that share a run on one machine: starting them, letting them meet, ending them.

They meet in a file that nobody else may read or write, and talk over loopback, so that no port is
open to a network. If one process ends with a failure, all end.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gptq_cli.errors import ResourceError, Stopped

# Variables in the environment of each process: the file to meet in, and the launcher's process id.
MEETING, LAUNCHER = "_GPTQ_STORE", "_GPTQ_LAUNCHER"
# Exit code of a process that ends because another one has failed and has reported the reason.
REPORTED_ELSEWHERE = 76
FIRST_KERNELS = "first kernels"  # name of the thread that compiles them
PATIENCE = 30.0  # seconds that processes get to end after they were asked to
POLL_SECONDS = 0.05
LOOPBACK = ("lo", "lo0")
IGNORED = ("NCCL_COMM_ID",)  # an address where NCCL would meet in spite of torch


class Processes:
    """Runs this command in `n` processes; if one fails, the others are asked to end."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signal = 0  # the first that came
        self.ended: list[int] = []  # ranks, in the order in which they ended

    def run(self, directory: Path, environment: dict[str, str]) -> list[int]:
        """Run the processes in `directory` until they end.

        Return the exit code of each, or minus the number of the signal that ended it. Raise Stopped
        if a signal to this process ended them all before one could report it, and ResourceError
        E_DISK if there is no directory for the file to meet in.
        """
        with _meeting_file() as meeting:
            for rank in range(self._n):
                self._start(directory, environment | _rank_environment(rank, self._n, meeting))
            if not self._wait():
                self._end_others()
        codes = [process.returncode for process in self._processes]
        if self._signal and max(codes) <= 0 and min(codes) < 0:
            raise Stopped(self._signal)
        return codes

    def forward(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal to this process: send it to all processes."""
        self._signal = self._signal or number
        self._send(number)

    def _start(self, directory: Path, environment: dict[str, str]) -> None:
        # In a session of its own, a process gets a terminal's signals once: from this process.
        process = subprocess.Popen(
            _command(),
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes.append(process)
        if self._signal:  # it came while the process was started
            process.send_signal(self._signal)

    def _wait(self) -> bool:
        """Wait until all have ended, or one has failed; return true if all have succeeded."""
        while len(self.ended) < self._n:
            for rank, process in enumerate(self._processes):
                if rank not in self.ended and process.poll() is not None:
                    self.ended.append(rank)
                    if process.returncode:
                        return False
            time.sleep(POLL_SECONDS)
        return True

    def _end_others(self) -> None:
        if not self._signal:  # or they have been told already
            self._send(signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for rank in range(self._n):
            if rank not in self.ended:
                self.ended.append(rank)

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def launcher_is_gone() -> bool:
    """Return true if `Processes` of another process started this one, and that process is gone."""
    return LAUNCHER in os.environ and os.getppid() != int(os.environ[LAUNCHER])


def local_environment() -> dict[str, str]:
    """Return this environment, changed for processes that talk over loopback only."""
    environment = dict(os.environ)
    for name in IGNORED:
        environment.pop(name, None)
    loopback = _loopback()
    environment["GLOO_SOCKET_IFNAME"] = loopback
    environment["NCCL_SOCKET_IFNAME"] = f"={loopback}"
    environment["NCCL_RAS_ENABLE"] = "0"
    environment[LAUNCHER] = str(os.getpid())
    return environment


def _loopback() -> str:
    """Return the name of the loopback interface."""
    for _, name in socket.if_nameindex():
        if name in LOOPBACK:
            return name
    raise OSError("this machine has no loopback interface")


@contextmanager
def _meeting_file() -> Iterator[Path]:
    """Give the path of a file to meet in, which does not exist yet.

    ResourceError E_DISK if no directory can be made for it.
    """
    try:
        directory = tempfile.TemporaryDirectory(prefix="gptq-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ResourceError(
            "E_DISK",
            f"cannot make a temporary directory: {error.strerror}",
            hint="set TMPDIR to a directory that you may write",
        ) from None
    with directory as path:
        yield Path(path, "store")


def _rank_environment(rank: int, n: int, meeting: Path) -> dict[str, str]:
    """Return the variables of process `rank` of `n`: torchrun's, and the file to meet in."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        MEETING: str(meeting),
    }


def _command() -> list[str]:
    """Return the command of this process, so that it finds the same modules.

    Python itself would look for modules in the current directory first, which may be a model that
    was downloaded.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from gptq_cli.__main__ import main; main()"
    return [sys.executable, "-c", code, *sys.argv[1:]]
