"""What a run has finished, line by line: only what stands here counts as done, never a file that happens to exist."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from gptq_cli.storage.durable import OpenFile, remove, sync_directory, write_file

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
