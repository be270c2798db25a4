"""Hashes of files and parts of them, in their order, whichever thread is done first."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from threading import Barrier, Event

import pytest

from gptq_cli.errors import InputError, ResourceError
from gptq_cli.storage import manifest
from gptq_cli.storage.manifest import Span, file_hash, file_hashes, side_by_side, span_hashes


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Empty, shorter than a chunk, a chunk, and longer; many more than there are threads."""
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 64)
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes((number + place) % 251 for place in range(number * 16)))
    return paths


def test_file_hashes_are_sha256_in_the_order_of_the_files(files: list[Path]) -> None:
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert list(file_hashes(files)) == expected
    assert [file_hash(path) for path in files] == expected
    assert list(file_hashes([])) == []


@pytest.mark.parametrize(
    ("start", "size"), [(0, 0), (0, 64), (3, 130), (64, 64), (300, 4), (250, 500), (400, 10)]
)
def test_span_is_hashed_up_to_the_end_of_its_file(start: int, size: int, files: list[Path]) -> None:
    (found,) = span_hashes([Span(files[19], start, size)])
    assert found == hashlib.sha256(files[19].read_bytes()[start : start + size]).hexdigest()


def test_missing_file_raises_input_error(files: list[Path]) -> None:
    files[3].unlink()
    with pytest.raises(InputError, match=r"cannot read `.*3`: No such file"):
        list(span_hashes(Span(path, 0, 4) for path in files))


def test_tasks_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MOST_THREADS", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    both = Barrier(2, timeout=60)
    assert sorted(side_by_side(lambda _: both.wait(), range(2))) == [0, 1]


def test_closed_iterator_does_not_wait_for_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, read = Event(), []
    monkeypatch.setattr(manifest, "Event", lambda: given_up)
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 1)
    (tmp_path / "small").write_bytes(b"s")
    (tmp_path / "large").write_bytes(b"l" * 100)

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        data = usual(descriptor, size, offset)
        if data == b"l":
            read.append(offset)
            given_up.wait(10)
        return data

    usual = os.pread
    monkeypatch.setattr(os, "pread", pread)
    hashes = file_hashes([tmp_path / "small", tmp_path / "large"])
    next(hashes)
    hashes.close()
    assert given_up.is_set()
    assert read in ([], [0])


def test_read_error_of_the_disk_names_the_path(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(ResourceError, match=r"cannot read `.*3`: Input/output error") as caught:
        file_hash(files[3])
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert "dmesg" in (caught.value.hint or "")
