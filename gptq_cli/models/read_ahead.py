"""Tensors read by a thread before their turn comes, into memory from which a device takes them by itself."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor


class Source(Protocol):
    """Where the weights come from."""

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint; its memory may be the file's own pages."""

    def expect(self, names: Iterable[str]) -> None:
        """Be told what will be read next, instead of what was said before, while what was read is at work."""

    def check_unchanged(self) -> None:
        """InputError if a file is no longer the one that was read."""

    def release(self) -> None:
        """Hold on to no file any more."""


class ReadAhead:
    """`source` with what is expected of it in pinned memory, up to `most_bytes`; the rest is read when its turn comes.

    A copy from there to a device goes on beside the host's work, and the thread's reading beside both.
    """

    def __init__(self, source: Source, most_bytes: int) -> None:
        self._source, self._most_bytes = source, most_bytes
        self._thread = ThreadPoolExecutor(1, "reader")
        self._ahead: dict[str, Future[Tensor | None]] = {}

    def read(self, name: str) -> Tensor:
        """The tensor, in pinned memory if it was expected and fits."""
        ahead = self._ahead[name].result() if name in self._ahead else None
        return self._source.read(name) if ahead is None else ahead

    def expect(self, names: Iterable[str]) -> None:
        """Let go of what was expected before, and begin to read `names`."""
        names = list(names)
        for future in self._ahead.values():
            future.cancel()
        self._source.expect(names)
        room = _Room(self._most_bytes)
        self._ahead = {name: self._thread.submit(self._fetch, name, room) for name in names}

    def check_unchanged(self) -> None:
        """As the source does."""
        self._source.check_unchanged()

    def release(self) -> None:
        """As the source does."""
        self._source.release()

    def _fetch(self, name: str, room: _Room) -> Tensor | None:
        tensor = self._source.read(name)
        if not room.take(tensor.nbytes):
            return None
        try:
            return tensor.pin_memory()
        except RuntimeError:  # the system pins no more; the tensor can be copied from where it is
            return None


class _Room:
    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes

    def take(self, n_bytes: int) -> bool:
        """Whether so many bytes are left; they are no more."""
        if n_bytes > self._left:
            return False
        self._left -= n_bytes
        return True
