"""`gptq_manifest.json`: what a finished output is, size and SHA-256 of each of its files, and a
checksum over itself.

No times, no hosts. Files are hashed several at a time: hashing and reading let other threads go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

from gptq_cli.files import file_errors, files_below, is_file
from gptq_cli.storage.durable import OpenFile, remove, sync_directory, write_file, write_json

Entry = dict[str, Any]


class Journal:
    """Entries in a file, each a line of JSON with a checksum over itself and the one before; the first one's is `seed`.

    So a line that was torn, changed, moved or written for another run ends what is read.
    """

    def __init__(self, path: Path, seed: str) -> None:
        self._path, self._seed = path, seed
        self._file: OpenFile | None = None
        self._end = 0
        self.entries: list[Entry] = []
        self.damaged_bytes = 0
        self._checksum = seed
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines(keepends=True):
            entry = self._read(line)
            if entry is None:
                break
            self._note(entry, line)
        self.damaged_bytes = len(content) - self._end

    def append(self, entry: Entry) -> None:
        """One more entry, which survives once this has returned."""
        if self._file is None:
            self._file = OpenFile(self._path, self._end)
            sync_directory(self._path.parent)
        line = self._line(entry)
        self._file.write_at(self._end, line)
        self._file.sync()
        self._note(entry, line)

    def cut(self, count: int) -> None:
        """Keep the first `count` entries, in a new file: the old one's last line may never have reached the disk."""
        kept, self.entries = self.entries[:count], []
        self._checksum, self._end = self._seed, 0
        content = b""
        for entry in kept:
            line = self._line(entry)
            self._note(entry, line)
            content += line
        if content:
            write_file(self._path, content)
        else:
            remove(self._path)  # where no journal is, nothing is finished

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _note(self, entry: Entry, line: bytes) -> None:
        self.entries.append(entry)
        self._checksum = self._sum(entry)
        self._end += len(line)

    def _read(self, line: bytes) -> Entry | None:
        try:
            entry = json.loads(line)
            checksum = entry.pop("checksum")
        except (ValueError, AttributeError, TypeError, KeyError):
            return None
        return entry if line.endswith(b"\n") and checksum == self._sum(entry) else None

    def _line(self, entry: Entry) -> bytes:
        return (json.dumps({**entry, "checksum": self._sum(entry)}) + "\n").encode()

    def _sum(self, entry: Entry) -> str:
        return sha256((self._checksum + canonical(entry)).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(value: Any) -> str:
    """A hash of JSON data."""
    return sha256(canonical(value).encode()).hexdigest()


INDEX_NAME = "model.safetensors.index.json"
QUANTIZE_CONFIG = "quantize_config.json"
MAX_CONFIG_BYTES, MAX_JSON_BYTES = 5_000_000, 50_000_000

MANIFEST = "gptq_manifest.json"
CONFIG_FILE = "gptq_config.yaml"  # the resolved configuration
REPORT_DATA, REPORT_PAGE = "gptq_report.json", "gptq_report.html"  # the report of the run
OF_THE_RUN = {
    CONFIG_FILE,
    MANIFEST,
    REPORT_DATA,
    REPORT_PAGE,
}  # what is about a run, not of the model
SCHEMA = 1

MOST_THREADS = 8
CHUNK_BYTES = 16 * 2**20
Item = TypeVar("Item")
Result = TypeVar("Result")


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """`content` and the hashes of all files in `directory`, as its last file; not of a report, which may change."""
    reports = {directory / REPORT_DATA, directory / REPORT_PAGE}
    paths = [path for path in files_below(directory) if path.is_file() and path not in reports]
    files = {
        path.relative_to(directory).as_posix(): {"sha256": found, "size": path.stat().st_size}
        for path, found in zip(paths, file_hashes(paths), strict=True)
    }
    write_json(directory / MANIFEST, sealed({"schema": SCHEMA, **content, "files": files}))


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the checksum that belongs to it, in place of another."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return {**content, "checksum": digest(content)}


def read_sealed(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`; None if there is none as it was written, by its own checksum.

    A GptqError if the file may not be read: then nobody knows what it is.
    """
    if not is_file(file):
        return None
    with file_errors(file, writing=False):
        raw = file.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if is_intact(content) else None


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in `directory`; None if there is none of ours that can be read."""
    content = read_sealed(directory / MANIFEST)
    if content is None or content.get("schema") != SCHEMA:
        return None
    if not isinstance(content.get("identity", {}), dict):
        return None  # sealed, but not by gptq
    return content


def is_intact(content: Any) -> bool:
    """Whether what was read is as it was written, by its own checksum."""
    return isinstance(content, dict) and content == sealed(content)


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
