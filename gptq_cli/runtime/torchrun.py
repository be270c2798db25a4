"""Join the processes of a run, watch them, and end with them.

The processes meet in a file if `processes` has started them, otherwise in torchrun's store. A
process that fails claims the right to report there, so that a failed run reports its error once.
The others notice a process that disappears: its connections close, or its signs of life stop.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from gptq_cli.errors import ConfigError, GptqError, ResourceError, Stopped
from gptq_cli.runtime.device import Worker, cpu_option, resolve_device
from gptq_cli.runtime.processes import LAUNCHER, MEETING, launcher_is_gone
from gptq_cli.runtime.ranks import SINGLE_PROCESS, DistributedRanks

# A process waits this long for others that work; `Watch` notices those that are gone.
WAIT = timedelta(days=7)
MEETING_TIME = timedelta(minutes=15)  # for others that download the model, or start later
SIGN_SECONDS = 5.0  # between two signs of life
MISSING_SECONDS = 45.0  # without a sign of life, after which a process counts as gone
LAUNCHER_SECONDS = 0.1  # between two looks whether the launcher is still there
PATIENCE = 5.0  # seconds in which a process that has to end reports that it does
HERE, CLAIMED, ENDED, ALIVE = "gptq/here", "gptq/claimed", "gptq/ended", "gptq/alive"
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}  # by the type of the device
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Lost = Callable[[ResourceError | None], None]


class ReportedByAnotherRank(BaseException):
    """Ends a process because another one has failed and reported its error."""


@contextmanager
def joined(device: str, devices: Sequence[str], lost: Lost) -> Iterator[Worker]:
    """Yield this process's worker, on one of `devices` or on the device of its local rank.

    The worker is alone unless the environment names other processes. An error in the body is raised
    again in one process, and ReportedByAnotherRank in the others. If a process disappears while
    this one waits for it, or if the launcher does, a thread calls `lost`, which must end this
    process, with the error to show or None. Raises ConfigError E_CFG_CONFLICT if the number of
    `devices` is not that of the processes, or if there is one device for several processes.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    named = _device_of(local, local_world_size, device, devices)
    own = resolve_device(named, cpu_option(devices))
    if size == 1:
        yield Worker(SINGLE_PROCESS, own)
        return
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if LAUNCHER in os.environ:
        threading.Thread(target=_end_with_launcher, args=(lost,), daemon=True).start()
    store: Any = _meet()
    dist.init_process_group(
        BACKENDS[own.type],
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=size,
        timeout=WAIT,
    )
    watch = Watch(store.clone(), dist.get_rank(), size, lost)
    watch.start()
    try:
        yield Worker(
            DistributedRanks(own, local_world_size=local_world_size, first_here=local == 0), own
        )
    except BaseException as error:
        for number in END_SIGNALS:  # the launcher sends them to the others if a process fails
            signal.signal(number, signal.SIG_IGN)
        raise watch.error_to_raise(error) from error
    watch.stop()
    dist.destroy_process_group()


def _end_with_launcher(lost: Lost) -> None:
    """End this process at once when its launcher is gone, because nobody else could end it.

    A rerun that follows needs the lock, so no work is finished first. The first process reports.
    """
    while not launcher_is_gone():
        time.sleep(LAUNCHER_SECONDS)
    error = None
    if os.environ["RANK"] == "0":
        error = ResourceError(
            "E_RANK_LOST",
            f"the process that started this run, {os.environ[LAUNCHER]}, was killed",
            hint="the same command resumes after the last finished block",
        )
    lost(error)


def _meet() -> Any:
    """Return the store of all processes once all have come, or raise ResourceError E_RANK_LOST."""
    if MEETING in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store: Any = dist.FileStore(os.environ[MEETING], size)  # type: ignore[attr-defined]
    else:
        store, rank, size = next(rendezvous("env://", timeout=MEETING_TIME))
    store.set(f"{HERE}/{rank}", socket.gethostname())
    end = time.monotonic() + MEETING_TIME.total_seconds()
    while missing := [other for other in range(size) if not store.check([f"{HERE}/{other}"])]:
        if time.monotonic() > end:
            raise rank_lost(missing, size)
        time.sleep(0.05)  # a signal ends this wait, but not the store's own
    return store


def _let_go(error: BaseException | None) -> None:
    """Close the connections, so that processes that wait for this one learn that it ends.

    The frames of `error` may hold a connection, so they are cleared.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    # A thread, because closing may wait for a kernel
    closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
    closing.start()
    closing.join(PATIENCE)


class Watch:
    """Gives signs of life in the store and watches those of others.

    The first process watches all others; the others watch the first one.
    """

    def __init__(self, store: Any, rank: int, size: int, lost: Lost) -> None:
        self._store, self._rank, self._size, self._lost = store, rank, size, lost
        self._others = [0]
        if rank == 0:
            self._others = list(range(1, size))
        self._stopped = threading.Event()
        self._looked = time.monotonic()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._look, self._look_after)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching, because this process has finished its work."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._mark_ended()

    def error_to_raise(self, error: BaseException) -> BaseException:
        """Return what to end with: `error`, its cause, or ReportedByAnotherRank."""
        self._stopped.set()
        try:
            self._mark_ended()
            if not _may_follow_a_loss(error):
                self._claimed()  # before others can see that a connection closes
            _let_go(error)
            if _may_follow_a_loss(error):
                missing = self._missing()
                if missing:
                    error = rank_lost(missing, self._size)
            if self._claimed() == self._rank:
                return error
        except RuntimeError:  # the store is gone, and so is the process that keeps it
            return error
        return ReportedByAnotherRank()

    def _claimed(self) -> int:
        """Return the rank that may report the error: the first one to ask."""
        return int(self._store.compare_set(CLAIMED, "", str(self._rank)))

    def _mark_ended(self) -> None:
        self._store.set(f"{ENDED}/{self._rank}", socket.gethostname())

    def _missing(self) -> list[int]:
        """Return the processes that neither work nor have noted that they end."""
        missing = list(range(self._size))
        end = time.monotonic() + PATIENCE
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not self._store.check([f"{ENDED}/{rank}"])]
            time.sleep(0.05)
        return missing

    def _look(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        count = 0
        while not self._stopped.wait(SIGN_SECONDS):
            count += 1
            self._looked = time.monotonic()
            try:
                self._store.set(f"{ALIVE}/{self._rank}", str(count))
                missing = [other for other in self._others if self._is_missing(other, seen)]
                if not missing and not self._store.check([CLAIMED]):
                    continue
                if self._stopped.wait(PATIENCE):  # the main thread has noticed by itself
                    return
                speaks = self._claimed() == self._rank
            except RuntimeError:
                missing, speaks = [0], True
            self._lost(rank_lost(missing, self._size) if speaks else None)

    def _look_after(self) -> None:
        """Report the first process as lost if its store no longer answers."""
        while not self._stopped.wait(SIGN_SECONDS):
            if time.monotonic() - self._looked > MISSING_SECONDS:
                self._lost(rank_lost([0], self._size))

    def _is_missing(self, other: int, seen: dict[int, tuple[int, float]]) -> bool:
        now = time.monotonic()
        signs = self._store.add(f"{ALIVE}/{other}", 0)
        if other not in seen or seen[other][0] != signs:
            seen[other] = (signs, now)
        return now - seen[other][1] > MISSING_SECONDS and not self._store.check(
            [f"{ENDED}/{other}"]
        )


def rank_lost(missing: Sequence[int], size: int) -> ResourceError:
    """Return ResourceError E_RANK_LOST for processes that have disappeared."""
    who = ", ".join(map(str, missing))
    return ResourceError(
        "E_RANK_LOST",
        f"process {who} of {size} (the first is 0) was killed or cannot be reached",
        hint="check whether its machine ran out of memory; the same command resumes "
        "after the last finished block",
    )


def _may_follow_a_loss(error: BaseException) -> bool:
    if isinstance(error, Stopped):
        return True
    return isinstance(error, GptqError) and error.code == "E_RANK_LOST"


def _device_of(local: int, local_world_size: int, device: str, devices: Sequence[str]) -> str:
    """Return the name of the device of the process with this local rank."""
    running = f"{local_world_size} processes run here"
    if devices:
        if len(devices) != local_world_size:
            text = f"--devices names {len(devices)} devices, but {running}"
            raise ConfigError("E_CFG_CONFLICT", text, hint="leave out --devices under torchrun")
        return devices[local]
    if local_world_size == 1 or device == "cpu":
        return device
    if device == "auto" and not torch.cuda.is_available():
        return device
    if ":" in device:
        numbers = ",".join(map(str, range(local_world_size)))
        raise ConfigError(
            "E_CFG_CONFLICT",
            f"device {device} is one device, but {running}",
            hint=f"name a device for each: --devices {numbers}",
        )
    return f"cuda:{local}"
