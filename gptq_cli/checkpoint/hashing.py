"""SHA-256 of what lies in files, several at a time: hashing and reading let other threads go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import NamedTuple, TypeVar

from gptq_cli.files import file_errors

MOST_THREADS = 8
CHUNK_BYTES = 16 * 2**20
Item = TypeVar("Item")
Result = TypeVar("Result")


class Span(NamedTuple):
    """`size` bytes of a file from `start` on."""

    path: Path
    start: int
    size: int


def file_hash(path: Path) -> str:
    """The hash of a file's bytes."""
    return _hash(Span(path, 0, path.stat().st_size), Event())


def file_hashes(paths: Iterable[Path]) -> Iterator[str]:
    """The hash of each file's bytes, in their order."""
    return span_hashes(Span(path, 0, path.stat().st_size) for path in paths)


def span_hashes(spans: Iterable[Span]) -> Iterator[str]:
    """The hash of each span, in their order; of as many bytes as are there, if the file is shorter."""
    return in_threads(_hash, spans)


def in_threads(work: Callable[[Item, Event], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `work` makes of each of `items`, in their order; it ends early once the event is set that it is given."""
    given_up = Event()
    with _threads() as threads:
        try:
            yield from threads.map(lambda item: work(item, given_up), items)
        finally:
            given_up.set()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `work` makes of each of `items`, in their order, while threads are at work on the next ones.

    Whoever stops asking waits for what is at work: it must be short.
    """
    with _threads() as threads:
        yield from threads.map(work, items)


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "side by side")


def _hash(span: Span, given_up: Event) -> str:
    digest, end = sha256(), span.start + span.size
    with file_errors(span.path, writing=False), span.path.open("rb", buffering=0) as stream:
        for start in range(span.start, end, CHUNK_BYTES):
            if given_up.is_set():  # whoever asked has been interrupted, and waits for this thread
                break
            digest.update(os.pread(stream.fileno(), min(CHUNK_BYTES, end - start), start))
    return digest.hexdigest()
