"""How a process joins the team that it has been started for, watches over it, and leaves it.

The processes meet in a file if `processes` has started them, else in torchrun's store. One that fails claims the right
to speak there, so that a run that fails says why once. One that disappears without a word is missed: its connections
close, or it gives no sign of life any more.
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
from gptq_cli.runtime.open_model import resolve_device
from gptq_cli.runtime.processes import LAUNCHER, MEETING, launcher_is_gone
from gptq_cli.runtime.ranks import SINGLE_PROCESS, DistributedRanks, Worker

WAIT = timedelta(days=7)  # for others that work: who is gone is noticed otherwise
MEETING_TIME = timedelta(minutes=15)  # for others that download the model, or start later
SIGN_SECONDS = 5.0  # between two signs of life
MISSING_SECONDS = 45.0  # without a sign: gone
PATIENCE = 5.0  # seconds in which processes that are told to end do say so
HERE, CLAIMED, ENDED, ALIVE = "gptq/here", "gptq/claimed", "gptq/ended", "gptq/alive"
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Lost = Callable[[ResourceError | None], None]


class ReportedByAnotherRank(BaseException):
    """This process ends because another one has failed, which has said why."""


@contextmanager
def joined(device: str, devices: Sequence[str], lost: Lost) -> Iterator[Worker]:
    """The place of this process, its device being one of `devices`, or by its number among its neighbours.

    Alone, unless the environment says otherwise. An error in the body is raised again for one process of the team, and
    SaidElsewhere for the others. `lost` is called, in a thread, if a process has disappeared while this one waits for
    it, with the error to show or None; it must end the process. ConfigError E_CFG_CONFLICT for `devices` that are not
    as many as the processes, or one device for all.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    own = resolve_device(_device_of(local, local_world_size, device, devices))
    if size == 1:
        yield Worker(SINGLE_PROCESS, own)
        return
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if LAUNCHER in os.environ:
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    store: Any = _meet()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", store=store, rank=int(os.environ["RANK"]),
        world_size=size, timeout=WAIT,
    )  # fmt: skip
    watch = Watch(store.clone(), dist.get_rank(), size, lost)
    watch.start()
    try:
        yield Worker(
            DistributedRanks(own, local_world_size=local_world_size, first_here=local == 0), own
        )
    except BaseException as error:
        for number in END_SIGNALS:
            signal.signal(
                number, signal.SIG_IGN
            )  # who started it ends the others of a process that has failed
        raise watch.error_to_raise(error) from error
    watch.stop()
    dist.destroy_process_group()


def _end_with_launcher() -> None:
    """End this process when the one that started it is gone: nobody waits for this run, or could end it."""
    while not launcher_is_gone():
        time.sleep(SIGN_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(128 + signal.SIGTERM)  # a main thread that waits inside a library sees no signal


def _meet() -> Any:
    """The store of all processes, once all are there; ResourceError E_RANK_LOST if they are not in time."""
    if MEETING in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store: Any = dist.FileStore(os.environ[MEETING], size)  # type: ignore[attr-defined]
    else:
        store, rank, size = next(rendezvous("env://", timeout=MEETING_TIME))
    store.set(f"{HERE}/{rank}", socket.gethostname())
    end = time.monotonic() + MEETING_TIME.total_seconds()
    while missing := [other for other in range(size) if not store.check([f"{HERE}/{other}"])]:
        if time.monotonic() > end or launcher_is_gone():
            raise rank_lost(missing, size)
        time.sleep(0.05)  # where a signal is noticed, unlike in the store's own waiting
    return store


def _let_go(error: BaseException | None) -> None:
    """Close the connections, so that whoever waits for this process learns that it ends; `error` may hold on to one."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    closing = threading.Thread(
        target=dist.destroy_process_group, daemon=True
    )  # which may wait for a kernel
    closing.start()
    closing.join(PATIENCE)


class Watch:
    """Gives signs of life in the store and sees that the others do: the first process all, the others the first."""

    def __init__(self, store: Any, rank: int, size: int, lost: Lost) -> None:
        self._store, self._rank, self._size, self._lost = store, rank, size, lost
        self._others = [
            other for other in (range(size) if rank == 0 else range(1)) if other != rank
        ]
        self._stopped = threading.Event()
        self._looked = time.monotonic()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._look, self._look_after)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """This process has done its part."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._mark_ended()

    def error_to_raise(self, error: BaseException) -> BaseException:
        """What this process ends with: `error`, what has caused it, or SaidElsewhere."""
        self._stopped.set()
        try:
            self._mark_ended()
            _let_go(error)
            if isinstance(error, Stopped) or (
                isinstance(error, GptqError) and error.code == "E_RANK_LOST"
            ):
                missing = self._missing()
                error = rank_lost(missing, self._size) if missing else error
            if self._claimed() == self._rank:
                return error
        except RuntimeError:  # the store is gone, and who keeps it
            return error
        return ReportedByAnotherRank()

    def _claimed(self) -> int:
        """Who may speak: the first one to ask."""
        return int(self._store.compare_set(CLAIMED, "", str(self._rank)))

    def _mark_ended(self) -> None:
        self._store.set(f"{ENDED}/{self._rank}", socket.gethostname())

    def _missing(self) -> list[int]:
        """Processes that neither go on nor have said that they end."""
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
        """The store is on the first process's machine: who gets no answer from it cannot reach that machine."""
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
    """E_RANK_LOST for processes that have gone without a word."""
    who = ", ".join(map(str, missing))
    return ResourceError(
        "E_RANK_LOST", f"process {who} of {size} (the first is 0) was killed or cannot be reached",
        hint="see whether its machine ran out of memory; the same command goes on after the last finished block",
    )  # fmt: skip


def _device_of(local: int, local_world_size: int, device: str, devices: Sequence[str]) -> str:
    if devices:
        if len(devices) != local_world_size:
            said = (
                f"--devices names {len(devices)} devices, and {local_world_size} processes run here"
            )
            raise ConfigError("E_CFG_CONFLICT", said, hint="leave out --devices under torchrun")
        return devices[local]
    if (
        local_world_size == 1
        or device == "cpu"
        or (device == "auto" and not torch.cuda.is_available())
    ):
        return device
    if ":" in device:
        said = f"device {device} is one, and {local_world_size} processes run here"
        raise ConfigError(
            "E_CFG_CONFLICT",
            said,
            hint=f"say which: --devices {','.join(map(str, range(local_world_size)))}",
        )
    return f"cuda:{local}"
