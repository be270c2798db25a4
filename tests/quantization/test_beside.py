"""While blocks are quantized, a thread copies the other tensors and reads the output back."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event as Signal
from threading import current_thread
from typing import Any

import pytest

from gptq_cli.checkpoint import writer
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import GateError, ResourceError
from gptq_cli.events import BlockFinished, BlockStarted, Event
from gptq_cli.files import ByteCount
from gptq_cli.quantization.run_state import SavingTimes
from gptq_cli.storage.durable import Disk
from gptq_cli.storage.manifest import Span
from tests.disks import Killed, using
from tests.runs import digest
from tests.tiny import WORK, Case

PATIENCE = 60  # seconds
PACKED = ("qweight", "qzeros", "scales", "g_idx")


def is_beside() -> bool:
    return current_thread().name.startswith("beside")


class WatchedDisk(Disk):
    """A disk that calls `before` with the name and number of each operation of the thread."""

    def __init__(self, before: Callable[[str, int], None]) -> None:
        self._before, self.beside = before, list[str]()

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._note("write")
        return super().write(descriptor, data, offset)

    def fsync(self, descriptor: int) -> None:
        self._note("fsync")
        super().fsync(descriptor)

    def _note(self, name: str) -> None:
        if is_beside():
            self.beside.append(name)
            self._before(name, len(self.beside))


class DiesBeside(WatchedDisk):
    """The process is killed right before operation `last` of the thread."""

    def __init__(self, last: int) -> None:
        super().__init__(self._kill)
        self._last, self._dead = last, False

    def _kill(self, _name: str, number: int) -> None:
        if number == self._last:
            self._dead = True
        if self._dead:
            raise Killed

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self._dead:
            raise Killed
        return super().write(descriptor, data, offset)

    def rename(self, source: Path, target: Path) -> None:
        if self._dead:
            raise Killed
        super().rename(source, target)


@pytest.fixture(scope="module")
def operations(case: Case, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The operations of the thread in a whole run."""
    disk = WatchedDisk(lambda *_: None)
    with using(disk):
        case.run(tmp_path_factory.mktemp("whole") / "out")
    return disk.beside


def test_tensors_are_copied_while_the_first_block_is_in_work(
    case: Case, tmp_path: Path, operations: list[str]
) -> None:
    begun, copied = Signal(), Signal()

    def hold_back(_name: str, number: int) -> None:
        assert begun.wait(PATIENCE)
        if number == operations.index("fsync") + 1:
            copied.set()

    def wait_for_the_copies(event: Event) -> None:
        if isinstance(event, BlockStarted) and event.index == 0:
            begun.set()
        if isinstance(event, BlockFinished) and event.index == 0:
            assert copied.wait(PATIENCE)

    with using(WatchedDisk(hold_back)):
        case.run(tmp_path / "out", report=wait_for_the_copies)
    assert operations.index("fsync") >= 6  # a write for each tensor before
    assert digest(tmp_path / "out") == case.tree


def test_a_block_is_read_back_while_the_next_one_is_in_work(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, whole, read = Signal(), Signal(), list[str]()
    usual = CheckpointWriter._refuse_other

    def hold_back(self: CheckpointWriter, name: str, found: str) -> None:
        usual(self, name, found)
        if name.startswith("model.layers.0.") and name.endswith(PACKED):
            assert begun.wait(PATIENCE)
            assert is_beside()
            read.append(name)
        if len(read) == 2 * len(PACKED):  # of both linears
            whole.set()

    def wait_for_the_thread(event: Event) -> None:
        if isinstance(event, BlockStarted) and event.index == 1:
            begun.set()
        if isinstance(event, BlockFinished) and event.index == 1:
            assert whole.wait(PATIENCE)

    monkeypatch.setattr(CheckpointWriter, "_refuse_other", hold_back)
    monkeypatch.setattr(SavingTimes, "is_due", lambda *_: False)
    case.run(tmp_path / "out", report=wait_for_the_thread)
    assert digest(tmp_path / "out") == case.tree


def test_a_block_that_reads_back_otherwise_ends_the_run_early(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, started = Signal(), list[int]()
    usual = writer.span_hash

    def differs(span: Span, given_up: Signal, count: ByteCount) -> str:
        found = usual(span, given_up, count)
        refused.set()
        return found[::-1]

    def wait_for_the_thread(event: Event) -> None:
        if isinstance(event, BlockStarted):
            started.append(event.index)
            assert event.index == 0 or refused.wait(PATIENCE)

    monkeypatch.setattr(writer, "span_hash", differs)
    with pytest.raises(GateError, match="reads back with other bytes") as caught:
        case.run(tmp_path / "out", report=wait_for_the_thread)
    assert (caught.value.code, caught.value.exit_code) == ("E_VERIFY", 4)
    assert started in ([0], [0, 1])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writer, "span_hash", usual)
    case.run(tmp_path / "out")
    assert digest(tmp_path / "out") == case.tree


def test_a_rerun_after_a_kill_of_the_thread_writes_the_same(
    case: Case, tmp_path: Path, operations: list[str]
) -> None:
    for last in range(1, len(operations) + 1):
        with pytest.raises(Killed), using(DiesBeside(last)):
            case.run(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        case.run(tmp_path / "out")
        assert digest(tmp_path / "out") == case.tree, f"after a kill at operation {last}"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize(("code", "way_out"), [(errno.ENOSPC, "free some space"), (errno.EIO, "")])
def test_a_disk_error_in_the_thread_is_that_of_the_run(
    name: str, code: int, way_out: str, case: Case, tmp_path: Path, operations: list[str]
) -> None:
    first = operations.index(name) + 1

    def refuse(_name: str, number: int) -> None:
        if number == first:
            raise OSError(code, os.strerror(code))

    with using(WatchedDisk(refuse)), pytest.raises(ResourceError) as caught:
        case.run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert f"{WORK}/out/model-0000" in str(caught.value)
    assert str(caught.value).endswith(os.strerror(code))
    assert (caught.value.hint or "").startswith(way_out)
    assert not (tmp_path / "out").exists()
    case.run(tmp_path / "out")
    assert digest(tmp_path / "out") == case.tree


def test_every_file_is_flushed_after_its_last_copy(case: Case, tmp_path: Path) -> None:
    last: dict[int, str] = {}

    class Noting(Disk):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if is_beside():
                last[descriptor] = "write"
            return super().write(descriptor, data, offset)

        def fsync(self, descriptor: int) -> None:
            if is_beside():
                last[descriptor] = "fsync"

    with using(Noting()):
        case.run(tmp_path / "out")
    assert len(last) >= 2
    assert set(last.values()) == {"fsync"}


def test_a_signal_need_not_wait_for_the_copies(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, written = Signal(), []
    monkeypatch.setattr("gptq_cli.checkpoint.writer.Event", lambda: given_up)
    monkeypatch.setattr("gptq_cli.checkpoint.writer.COPY_BYTES", 8)

    def stay(_name: str, number: int) -> None:
        written.append(number)
        if number == 2:
            assert given_up.wait(PATIENCE)

    def stop(event: Event) -> None:
        if isinstance(event, BlockStarted):
            raise KeyboardInterrupt

    with using(WatchedDisk(stay)), pytest.raises(KeyboardInterrupt):
        case.run(tmp_path / "out", report=stop)
    assert len(written) <= 2


def test_copied_tensors_are_in_no_line_of_the_journal(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, str]] = []
    sync = CheckpointWriter.sync

    def noted(self: CheckpointWriter) -> dict[str, Any]:
        for begun in self._tasks:
            begun.result()
        saved.append(sync(self))
        return saved[-1]

    monkeypatch.setattr(CheckpointWriter, "sync", noted)
    case.run(tmp_path / "out")
    names = [name for found in saved for name in found]
    assert len(names) == 20
    assert all(name.endswith(PACKED) for name in names)
