"""The manifest of an output, the journal of a run, and the hashes in both.

`gptq_manifest.json` holds the identity of the run, size and SHA-256 of each file, and a checksum
over itself; no times and no host names. Several files are hashed at a time, in threads: hashing and
reading release Python's lock.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeGuard, TypeVar

from gptq_cli.errors import __version__, size
from gptq_cli.events import PhaseStarted, Report, ignore
from gptq_cli.files import ByteCount, file_errors, files_below, is_file, resolved
from gptq_cli.storage.durable import (
    OpenFile,
    json_bytes,
    remove,
    sync_directory,
    write_file,
    write_json,
)

Entry = dict[str, Any]


class Journal:
    """Entries in a file: lines of JSON, each with a checksum over itself and the line before it.

    The chain of checksums starts at `seed`. Reading ends at the first line that was torn, changed,
    moved, or written for another run.
    """

    def __init__(self, path: Path, seed: str) -> None:
        self._path, self._seed = path, seed
        self._file: OpenFile | None = None
        self._end = 0
        self.entries: list[Entry] = []
        self.damaged_bytes = 0
        self._checksum = seed
        content = b""
        if path.exists():
            with file_errors(path, writing=False):
                content = path.read_bytes()
        for line in content.splitlines(keepends=True):
            entry = self._read(line)
            if entry is None:
                break
            self._note(entry, line)
        self.damaged_bytes = len(content) - self._end

    def begin(self) -> None:
        """Create the file, without entries: if it is missing later, somebody has removed it."""
        write_file(self._path, b"")

    def append(self, entry: Entry) -> None:
        """Append an entry; it is durable on return."""
        if self._file is None:
            self._file = OpenFile(self._path, self._end)
            sync_directory(self._path.parent)
        line = self._line(entry)
        self._file.write_at(self._end, line)
        self._file.sync()
        self._note(entry, line)

    def cut(self, count: int) -> None:
        """Keep the first `count` entries, in a new file.

        A new file, because the last line of the old one may never have reached the disk.
        """
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
            remove(self._path)  # without a journal no block counts as finished

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _note(self, entry: Entry, line: bytes) -> None:
        self.entries.append(entry)
        self._checksum = self._sum(entry)
        self._end += len(line)

    def _read(self, line: bytes) -> Entry | None:
        try:
            entry: Entry = json.loads(line)
            checksum = entry.pop("checksum")
            intact = line.endswith(b"\n") and checksum == self._sum(entry)
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            return None
        if intact:
            return entry
        return None

    def _line(self, entry: Entry) -> bytes:
        return (json.dumps({**entry, "checksum": self._sum(entry)}) + "\n").encode()

    def _sum(self, entry: Entry) -> str:
        return sha256((self._checksum + canonical(entry)).encode()).hexdigest()


def canonical(value: Any) -> str:
    """Return JSON that is the same text for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(value: Any) -> str:
    """Return a hash of JSON data."""
    return sha256(canonical(value).encode()).hexdigest()


INDEX_NAME = "model.safetensors.index.json"
QUANTIZE_CONFIG = "quantize_config.json"
MAX_CONFIG_BYTES, MAX_JSON_BYTES = 5_000_000, 50_000_000

MANIFEST = "gptq_manifest.json"
CONFIG_FILE = "gptq_config.yaml"  # the resolved configuration
REPORT_DATA, REPORT_PAGE = "gptq_report.json", "gptq_report.html"  # the report of the run
REPORT_VERSION = 1
ALLOCATION = "gptq_allocation.json"  # the measurement that the widths of layers were chosen by
# about a run, not about the model
RUN_FILES = {CONFIG_FILE, MANIFEST, REPORT_DATA, REPORT_PAGE, ALLOCATION}
SCHEMA = 1

MOST_THREADS = 8
CHUNK_BYTES = 16 * 2**20
TICK = 0.1  # seconds between two looks at the bytes that threads have read
Item = TypeVar("Item")
Result = TypeVar("Result")


def write_manifest(
    directory: Path,
    content: dict[str, Any],
    report: Report = ignore,
    begun: Mapping[Path, GrowingHash] | None = None,
) -> None:
    """Write `content` and the hashes of all files in `directory` as its last file.

    A hash that was `begun` is continued. The report of a run is not hashed, because it may be
    written again later.
    """
    reports = {directory / REPORT_DATA, directory / REPORT_PAGE}
    paths = [path for path in files_below(directory) if path.is_file() and path not in reports]
    total = sum(path.stat().st_size for path in paths)
    report(PhaseStarted("manifest", f"hashing {size(total)}"))
    files = {}
    hashes = _continued(paths, begun or {}, ByteCount(report, total))
    for path, found in zip(paths, hashes, strict=True):
        name = path.relative_to(directory).as_posix()
        files[name] = {"sha256": found, "size": path.stat().st_size}
    write_json(directory / MANIFEST, sealed({"schema": SCHEMA, **content, "files": files}))


def _continued(
    paths: Iterable[Path], begun: Mapping[Path, GrowingHash], count: ByteCount
) -> Iterator[str]:
    """Yield the hash of each file, which may be begun; `count` gets the bytes of both parts."""
    growing = [begun.get(path) or GrowingHash(path) for path in paths]
    count.passed(sum(known.end for known in growing))

    def work(known: GrowingHash, given_up: Event) -> str:
        known.grow(known.path.stat().st_size, given_up, count)
        return known.hexdigest()

    return in_threads(work, growing, count)


def write_report_data(
    output: Path,
    result: Mapping[str, Any],
    command: str,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Write the data of a finished run into its output, for `gptq report`.

    The data of a run that was finished before is kept if it is whole, and gets the `evaluation`.
    """
    file = output / REPORT_DATA
    data = None
    if result.get("already_done"):
        data = _read_report(file)
        if data is not None and evaluation is None:
            return
    if data is None:
        data = {
            "report": REPORT_VERSION,
            "version": __version__,
            "command": command,
            "name": resolved(output).name,
            **result,
        }
        data.pop("output", None)  # the directory may be moved
    if evaluation is not None:
        data["evaluation"] = evaluation
    write_file(file, json_bytes(data, indent=1))


def _read_report(file: Path) -> dict[str, Any] | None:
    """Return the data of a run, None if the file is missing or damaged."""
    if not is_file(file):
        return None
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("report") != REPORT_VERSION:
        return None
    return data


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with its checksum; an old checksum is replaced."""
    content = dict(content)
    content.pop("checksum", None)
    return {**content, "checksum": digest(content)}


def read_sealed(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in `file`; None if the file is missing or its checksum is wrong.

    Raises GptqError if the file exists but cannot be read: its content is unknown then.
    """
    if not is_file(file):
        return None
    with file_errors(file, writing=False):
        raw = file.read_bytes()
    with suppress(ValueError, RecursionError):
        content = json.loads(raw)
        if is_intact(content):
            return content
    return None


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest in `directory`, or None if there is no intact one that gptq wrote."""
    content = read_sealed(directory / MANIFEST)
    if content is None or content.get("schema") != SCHEMA:
        return None
    if not isinstance(content.get("identity", {}), dict):
        return None  # the checksum is right, but gptq has not written it
    return content


def is_intact(content: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether JSON that was read is unchanged, by its own checksum."""
    return isinstance(content, dict) and content == sealed(content)


class Span(NamedTuple):
    """The `size` bytes of a file from byte `start` on."""

    path: Path
    start: int
    size: int


class GrowingHash:
    """The SHA-256 of the bytes of a file from `start` to `end`, which grows with what is final."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path, self.end = path, start
        self._digest = sha256()

    def grow(self, end: int, given_up: Event, count: ByteCount) -> None:
        """Read on to byte `end`, or to the end of the file; stop once `given_up` is set."""
        with file_errors(self.path, writing=False), self.path.open("rb", buffering=0) as stream:
            while self.end < end and not given_up.is_set():
                chunk = os.pread(stream.fileno(), min(CHUNK_BYTES, end - self.end), self.end)
                if not chunk:
                    break
                self._digest.update(chunk)
                self.end += len(chunk)
                count.add(len(chunk))

    def hexdigest(self) -> str:
        """Return the hash of what was read."""
        return self._digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the hash of the bytes of a file."""
    return span_hash(Span(path, 0, path.stat().st_size), Event(), ByteCount())


def file_hashes(paths: Iterable[Path], count: ByteCount | None = None) -> Iterator[str]:
    """Yield the hash of each file, in the order of `paths`; `count` gets the bytes read."""
    return span_hashes((Span(path, 0, path.stat().st_size) for path in paths), count)


def span_hashes(spans: Iterable[Span], count: ByteCount | None = None) -> Iterator[str]:
    """Yield the hash of each span, in order; a span that passes the end of its file is cut off."""
    counted = count or ByteCount()

    def work(span: Span, given_up: Event) -> str:
        return span_hash(span, given_up, counted)

    return in_threads(work, spans, counted)


def in_threads(
    work: Callable[[Item, Event], Result],
    items: Iterable[Item],
    count: ByteCount,
    given_up: Event | None = None,
) -> Iterator[Result]:
    """Yield `work(item, event)` for each item, in order; several run at a time.

    `work` should return early once the event, which may be given, is set: nobody waits for its
    result any more. What it adds to `count` is told in this thread.
    """
    given_up = given_up or Event()
    with _threads() as threads:
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(threads.submit(work, item, given_up))
            while running:
                while wait([running[0]], TICK).not_done:
                    count.tell()
                count.tell()
                yield running.popleft().result()
        finally:
            given_up.set()
            for future in running:
                future.cancel()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `work(item)` for each item, in order, while threads work on the next items.

    If the caller stops iterating, it waits until running tasks finish; keep `work` short.
    """
    with _threads() as threads:
        yield from threads.map(work, items)


def n_threads() -> int:
    """Return the number of threads that hash files side by side."""
    return min(MOST_THREADS, os.cpu_count() or 1)


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads(), "side by side")


def span_hash(span: Span, given_up: Event, count: ByteCount) -> str:
    """Return the hash of a span; a wrong one once `given_up` is set."""
    growing = GrowingHash(span.path, span.start)
    growing.grow(span.start + span.size, given_up, count)
    return growing.hexdigest()
