"""Disks that count, refuse or die: each stands in for `durable.disk`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from gptq_cli.storage import durable
from gptq_cli.storage.durable import Disk

OPERATIONS = tuple(name for name in vars(Disk) if not name.startswith("_"))


class Killed(BaseException):
    """The process ended here: no code of it may change anything from now on."""


class CountingDisk(Disk):
    """A disk that notes the name of each operation and flushes nothing; no process sees that.

    Threads take turns, so that each operation has a number.
    """

    def __init__(self) -> None:
        self.operations: list[str] = []
        self.turn = RLock()

    def before(self, number: int, name: str) -> None:
        """Called with the number of the operation, from 1 on."""

    def note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Called with what the operation was given and what it gave."""

    def after(self, number: int, name: str) -> None:
        """Called when the operation is done."""


def _watched(name: str) -> Any:
    real = getattr(Disk, name)

    def operation(self: CountingDisk, *arguments: Any) -> Any:
        with self.turn:
            return taken(self, *arguments)

    def taken(self: CountingDisk, *arguments: Any) -> Any:
        self.operations.append(name)
        number = len(self.operations)
        self.before(number, name)
        result = None if name == "fsync" else real(self, *arguments)
        self.note(name, arguments, result)
        try:
            self.after(number, name)
        except BaseException:
            if name == "open":
                os.close(result)
            elif name == "lock":
                result.release()  # as the kernel does for a process that is gone
            raise
        return result

    return operation


for _name in OPERATIONS:
    setattr(CountingDisk, _name, _watched(_name))


class DyingDisk(CountingDisk):
    """The process is killed right after operation `last`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last

    def before(self, number: int, _name: str) -> None:
        if number > self._last:
            raise Killed

    def after(self, number: int, _name: str) -> None:
        if number == self._last:
            raise Killed


class DiesWriting(DyingDisk):
    """The process is killed when it begins to write a file."""

    def __init__(self, name: str) -> None:
        super().__init__(sys.maxsize)
        self._name = name

    def note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        del result
        if name == "open" and Path(arguments[0]).name == self._name:
            self._last = len(self.operations)


class FailingDisk(CountingDisk):
    """Refuses operation `first` with `code`, or that and all later ones."""

    def __init__(self, first: int, code: int, *, for_ever: bool) -> None:
        super().__init__()
        self._first, self._code, self._for_ever = first, code, for_ever

    def before(self, number: int, _name: str) -> None:
        if number == self._first or (self._for_ever and number > self._first):
            raise OSError(self._code, os.strerror(self._code))


def damage_last_line(journal: Path, n_lines: int) -> None:
    """Flip a bit in the last of the `n_lines` lines of a journal."""
    content = bytearray(journal.read_bytes())
    assert content.count(b"\n") == n_lines
    content[-9] ^= 1
    journal.write_bytes(content)


@contextmanager
def using(disk: Disk) -> Iterator[None]:
    """`disk` in place of the real one."""
    usual, durable.disk = durable.disk, disk
    try:
        yield
    finally:
        durable.disk = usual
