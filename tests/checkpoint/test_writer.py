"""The writer accepts exactly the planned tensors and writes them in the background."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from threading import Event as Signal
from threading import Timer, current_thread, main_thread
from threading import enumerate as enumerate_threads

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.checkpoint import writer as writer_module
from gptq_cli.checkpoint.headers import read_header
from gptq_cli.checkpoint.layout import TensorSpec, plan_layout
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.writer import MOST_WAITING, CheckpointWriter
from gptq_cli.errors import GateError, ResourceError
from gptq_cli.events import Event
from gptq_cli.files import ByteCount, BytesDone
from gptq_cli.storage.durable import Disk
from gptq_cli.storage.manifest import MANIFEST, Span, write_manifest
from tests.disks import using

LAYOUT = plan_layout([(TensorSpec("a", "F32", (2, 3)),), (TensorSpec("b", "I32", (4,)),)], 30)
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.int32)


def test_tensors_may_be_written_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("b", B)
        writer.write("a", A)
        writer.finish()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert sorted(open_checkpoint(tmp_path / "out").tensors) == ["a", "b"]


def test_a_second_writer_holds_the_tensors_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("b", B)
        writer.write("a", A)
        hashes = writer.sync()
        writer.finish()
    with CheckpointWriter(tmp_path / "out", LAYOUT) as again:
        assert again.holds(hashes)
        assert not again.holds({"a": hashes["b"]})
        assert not again.holds({"c": hashes["b"]})
        again.mark_written(hashes)
        again.finish()


def test_a_second_write_replaces_the_first(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("a", A - 1)
        old = writer.sync()
        writer.write("b", B)
        writer.write("a", A)
        hashes = writer.sync()
        writer.finish()
    with CheckpointWriter(tmp_path / "out", LAYOUT) as again:
        assert again.holds(hashes)
        assert not again.holds(old)


def test_unplanned_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    message = r"a: planned F32 \(2, 3\), got torch.float32 \(3, 2\)"
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        with pytest.raises(ValueError, match=message):
            writer.write("a", A.T)
        writer.write("a", A)
        with pytest.raises(ValueError, match="never written: b"):
            writer.finish()


def test_the_writer_closes_its_shards_if_one_cannot_be_opened(tmp_path: Path) -> None:
    opened: list[int] = []

    class OpensOneShard(Disk):
        def open(self, path: Path, flags: int) -> int:
            if "00002" in path.name:
                raise OSError(errno.EMFILE, "too many")
            opened.append(super().open(path, flags))
            return opened[-1]

    refused = pytest.raises(ResourceError, match="too many")
    with using(OpensOneShard()), refused, CheckpointWriter(tmp_path / "out", LAYOUT):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[-1])


def test_write_waits_only_if_too_many_tensors_are_pending(tmp_path: Path) -> None:
    class Slow(Disk):
        may_write = Signal()
        writing = 0

        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if current_thread() is not main_thread():
                self.writing += 1
                assert self.may_write.wait(60)
            return super().write(descriptor, data, offset)

    disk, names = Slow(), [f"t{number}" for number in range(MOST_WAITING + 1)]
    layout = plan_layout([(TensorSpec(name, "F32", (2, 3)),) for name in names], 10**9)
    with using(disk), CheckpointWriter(tmp_path / "out", layout) as writer:
        for name in names[:MOST_WAITING]:
            writer.write(name, A)
        assert disk.writing <= 1
        Timer(0.05, disk.may_write.set).start()
        writer.write(names[-1], A)
        assert disk.may_write.is_set()
        assert writer.sync().keys() == set(names)
        assert writer.sync() == {}


def test_sync_raises_an_error_of_an_earlier_write(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if current_thread() is not main_thread():
                raise OSError(errno.ENOSPC, "no room")
            return super().write(descriptor, data, offset)

    with using(Full()), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("a", A)
        writer.write("b", B)
        with pytest.raises(ResourceError, match="no room"):
            writer.sync()
        assert writer.sync() == {}  # the error of the second tensor is not raised again
    assert "writer" not in {thread.name.partition("_")[0] for thread in enumerate_threads()}


@pytest.mark.parametrize("call", ["write", "sync", "finish"])
def test_the_next_call_raises_an_error_of_the_copying_thread(call: str, tmp_path: Path) -> None:
    class FullForCopies(Disk):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if current_thread().name.startswith("beside"):
                raise OSError(errno.ENOSPC, "no room")
            return super().write(descriptor, data, offset)

    save_file({"a": A}, tmp_path / "source.safetensors")
    calls: dict[str, Callable[[CheckpointWriter], object]] = {
        "write": lambda writer: writer.write("b", B),
        "sync": CheckpointWriter.sync,
        "finish": CheckpointWriter.finish,
    }
    with using(FullForCopies()), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.copy_beside(read_header(tmp_path / "source.safetensors").values())
        wait(writer._tasks)
        with pytest.raises(ResourceError, match="no room") as caught:
            calls[call](writer)
        assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert "beside" not in {thread.name.partition("_")[0] for thread in enumerate_threads()}


def test_the_end_waits_for_the_copies(tmp_path: Path) -> None:
    class Held(Disk):
        may_write = Signal()

        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if current_thread().name.startswith("beside"):
                assert self.may_write.wait(60)
            return super().write(descriptor, data, offset)

    save_file({"a": A}, tmp_path / "source.safetensors")
    with using(Held()), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.copy_beside(read_header(tmp_path / "source.safetensors").values())
        writer.write("b", B)
        writer.finish(lambda _: Held.may_write.set())
    assert load_file(tmp_path / "out" / LAYOUT.shards[0].file)["a"].equal(A)


def test_a_tensor_is_copied_once_by_either_thread(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "source.safetensors")
    (tensor,) = read_header(tmp_path / "source.safetensors").values()
    told: list[BytesDone] = []
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("b", B)
        writer.copy_beside([tensor])
        writer.copy(tensor, ByteCount(told.append, tensor.nbytes))
        assert told == [BytesDone(24, 24)]
        assert writer.sync().keys() == {"b"}
        writer.finish()
    assert load_file(tmp_path / "out" / LAYOUT.shards[0].file)["a"].equal(A)


def test_what_was_read_back_beside_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end: list[int] = []
    usual = writer_module.span_hashes

    def noted(spans: Iterable[Span], count: ByteCount) -> Iterator[str]:
        listed = list(spans)
        at_the_end.extend(span.size for span in listed)
        return usual(listed, count)

    monkeypatch.setattr(writer_module, "span_hashes", noted)
    told: list[Event] = []
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("a", A)
        writer.read_back_beside()
        writer.sync()
        writer.write("b", B)
        writer.finish(told.append)
    assert at_the_end == [B.nbytes]
    assert told[-1] == BytesDone(A.nbytes + B.nbytes, A.nbytes + B.nbytes)


def test_hashes_of_files_grow_with_the_first_tensors_that_were_read(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    layout = plan_layout([(TensorSpec(name, "F32", (2, 3)),) for name in names], 10**9)
    (shard,) = layout.shards
    with CheckpointWriter(tmp_path / "out", layout) as writer:
        ends = []
        for some in (["b"], ["a"], ["d"], ["c"]):
            for name in some:
                writer.write(name, A + ord(name))
            writer.read_back_beside()
            writer.sync()
            while writer._tasks:
                writer._tasks.popleft().result()
            ends.append(writer.file_hashes[tmp_path / "out" / shard.file].end)
        writer.finish()
    assert ends == [shard.offsets["a"], shard.offsets["c"], shard.offsets["c"], shard.size]
    write_manifest(tmp_path / "out", {}, begun=writer.file_hashes)
    content = (tmp_path / "out" / shard.file).read_bytes()
    files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    assert files[shard.file]["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_tensor_that_replaces_one_that_was_read_is_read_again(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        for a in (A - 1, A):
            writer.write("a", a)
            writer.write("b", B)
            writer.read_back_beside()
        writer.sync()
        writer.write("a", A + 1)
        writer.finish()
    write_manifest(tmp_path / "out", {}, begun=writer.file_hashes)
    files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    assert len(files) == 3
    for name, entry in files.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert load_file(tmp_path / "out" / LAYOUT.shards[0].file)["a"].equal(A + 1)


@pytest.mark.parametrize("beside", [False, True])
def test_other_bytes_on_the_disk_are_refused(beside: bool, tmp_path: Path) -> None:
    class Flips(Disk):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if current_thread().name.startswith("writer"):
                data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
            return super().write(descriptor, data, offset)

    with using(Flips()), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("a", A)
        writer.write("b", B)
        if beside:
            writer.read_back_beside()
        with pytest.raises(GateError, match="`a` in model-00001-of-00002") as caught:
            writer.finish()
    assert (caught.value.code, caught.value.exit_code) == ("E_VERIFY", 4)
    assert str(caught.value).endswith("reads back with other bytes than were written")
    assert "write to another one" in (caught.value.hint or "")


def test_files_are_read_from_the_disk_after_they_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    class Noting(Disk):
        def fsync(self, descriptor: int) -> None:
            if current_thread().name.startswith("beside"):
                steps.append("flush")
            super().fsync(descriptor)

    monkeypatch.setattr(writer_module, "_forget_cached", lambda _: steps.append("forget"))
    usual = writer_module.span_hash

    def noted(span: Span, given_up: Signal, count: ByteCount) -> str:
        steps.append("read")
        return usual(span, given_up, count)

    monkeypatch.setattr(writer_module, "span_hash", noted)
    with using(Noting()), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.write("a", A)
        writer.write("b", B)
        writer.read_back_beside()
        writer.finish()
    assert steps == ["flush", "forget"] * 2 + ["read"] * 2
