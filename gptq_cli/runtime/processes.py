"""The processes that share a run on one machine: how they are started, how they find each other, how they end.

They meet in a file that nobody else may read or write, and talk over loopback: no port is open to a network. What
happens to one of them happens to all.
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

MEETING, LAUNCHER = "_GPTQ_STORE", "_GPTQ_LAUNCHER"  # of the environment of each: a file, a process
SAID_ELSEWHERE = (
    76  # exit code of a process that ends because another one has failed, which has said why
)
PATIENCE = 30.0  # seconds in which processes that are told to end may do so
LOOK_SECONDS = 0.05
LOOPBACK = ("lo", "lo0")
# NCCL would meet there, whatever torch says
IGNORED = ("NCCL_COMM_ID",)


class Processes:
    """This command once for each of `n` processes. When one fails the others are told to end."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signal = 0  # the first that has come
        self.ended: list[int] = []  # in this order

    def run(self, directory: Path, environment: dict[str, str]) -> list[int]:
        """Run them in `directory`; what each has ended with, an exit code or minus the number of a signal.

        Stopped if a signal to this process has ended them before one could say so. ResourceError E_DISK if there is no
        place to meet.
        """
        with _meeting_place() as meeting:
            for rank in range(self._n):
                self._start(directory, environment | _place(rank, self._n, meeting))
            if not self._wait():
                self._end_others()
        codes = [process.returncode for process in self._processes]
        if self._signal and max(codes) <= 0 and min(codes) < 0:
            raise Stopped(self._signal)
        return codes

    def forward(self, number: int, _frame: FrameType | None) -> None:
        """A handler of signals: what this process is asked to do, all are asked to do."""
        self._signal = self._signal or number
        self._send(number)

    def _start(self, directory: Path, environment: dict[str, str]) -> None:
        # in a session of its own: what a terminal sends comes once, through this process
        process = subprocess.Popen(
            _command(),
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes.append(process)
        if self._signal:  # came while the process was started
            process.send_signal(self._signal)

    def _wait(self) -> bool:
        """Wait until all have ended, or one with a failure; whether all have succeeded."""
        while len(self.ended) < self._n:
            for rank, process in enumerate(self._processes):
                if rank not in self.ended and process.poll() is not None:
                    self.ended.append(rank)
                    if process.returncode:
                        return False
            time.sleep(LOOK_SECONDS)
        return True

    def _end_others(self) -> None:
        if not self._signal:  # else they know
            self._send(signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.ended += [rank for rank in range(self._n) if rank not in self.ended]

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def launcher_is_gone() -> bool:
    """Whether this process was started by another one, by `Processes`, that does not live any more."""
    return LAUNCHER in os.environ and os.getppid() != int(os.environ[LAUNCHER])


def local_environment() -> dict[str, str]:
    """The environment for processes that talk to each other over loopback alone, whatever this one says of networks."""
    loopback = next(name for _, name in socket.if_nameindex() if name in LOOPBACK)
    kept = {name: value for name, value in os.environ.items() if name not in IGNORED}
    local = {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": f"={loopback}",
        "NCCL_RAS_ENABLE": "0",
    }
    return kept | local | {LAUNCHER: str(os.getpid())}


@contextmanager
def _meeting_place() -> Iterator[Path]:
    """A file to meet in that is not there yet; ResourceError E_DISK if no directory can be made for it."""
    try:
        directory = tempfile.TemporaryDirectory(prefix="gptq-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ResourceError(
            "E_DISK", f"cannot make a temporary directory: {error.strerror}",
            hint="set TMPDIR to a directory that you may write",
        ) from None  # fmt: skip
    with directory as path:
        yield Path(path, "store")


def _place(rank: int, n: int, meeting: Path) -> dict[str, str]:
    """What process `rank` of `n` is told, in torchrun's words and where to meet."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": n,
        "LOCAL_WORLD_SIZE": n,
        MEETING: meeting,
    }
    return {name: str(value) for name, value in place.items()}


def _command() -> list[str]:
    """This command once more, with the modules of this process.

    Python itself would look for modules in the current directory first, which may be a model that was downloaded.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from gptq_cli.__main__ import main; main()"
    return [sys.executable, "-c", code, *sys.argv[1:]]
