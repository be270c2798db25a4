"""Long steps tell how many of their bytes are done, in the thread of the caller."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event as Signal
from threading import get_ident
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors.torch import load_file

from gptq_cli import compare, convert, dequantize, quantize, verify
from gptq_cli.errors import PausedError
from gptq_cli.events import Event, PhaseStarted, ignore
from gptq_cli.files import TOLD, ByteCount, BytesDone
from gptq_cli.publish import upload
from gptq_cli.storage import manifest
from gptq_cli.storage.manifest import file_hashes
from tests.runs import digest
from tests.workspace import (
    MODEL,
    QUANTIZED,
    SETTINGS,
    copy_workspace,
    make_workspace,
    stop_after_the_first_block,
    supply,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def workspace(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_workspace(files, tmp_path))
    supply(files, QUANTIZED)
    return tmp_path


def phases(events: list[Event]) -> list[tuple[str, int]]:
    """Return each phase that counts bytes with its last number; they must grow to the total."""
    found: list[tuple[str, int]] = []
    name, before = "", 0
    for event in events:
        if isinstance(event, PhaseStarted):
            assert not before, f"{name} ended early"
            name = event.name
        if isinstance(event, BytesDone):
            assert before < event.done <= event.total
            before = event.done
            if event.done == event.total:
                found.append((name, event.total))
                before = 0
    return found


def weights(directory: str | Path) -> int:
    """Return the bytes of all tensors in a directory."""
    total = 0
    for file in Path(directory).glob("*.safetensors"):
        total += sum(tensor.nbytes for tensor in load_file(file).values())
    return total


def listed(directory: str | Path) -> int:
    """Return the bytes of the files that a manifest lists: all but itself and the page."""
    total = 0
    for name in digest(Path(directory)):
        if name not in ("gptq_manifest.json", "gptq_report.html"):
            total += (Path(directory) / name).stat().st_size
    return total


def test_bytes_are_told_at_each_half_percent() -> None:
    told: list[Event] = []
    count = ByteCount(told.append, 10_000)
    for _ in range(10_000):
        count.passed(1)
    assert told == [BytesDone(done, 10_000) for done in range(50, 10_001, 50)]
    assert len(told) == TOLD


def test_a_step_without_bytes_tells_nothing() -> None:
    told: list[Event] = []
    ByteCount(told.append, 0).passed(0)
    assert told == []


def test_bytes_of_one_large_file_are_told_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, heard, threads = [], Signal(), set()
    (tmp_path / "large").write_bytes(b"l" * 100)
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 25)

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if offset == 50:  # waits until the caller has heard of the first half
            assert heard.wait(60)
        return usual(descriptor, size, offset)

    def report(event: Event) -> None:
        assert isinstance(event, BytesDone)
        threads.add(get_ident())
        told.append(event.done)
        if event.done >= 50:
            heard.set()

    usual = os.pread
    monkeypatch.setattr(os, "pread", pread)
    assert len(list(file_hashes([tmp_path / "large"], ByteCount(report, 100)))) == 1
    assert 50 in told
    assert told[-1] == 100
    assert threads == {get_ident()}


def test_a_run_tells_the_bytes_of_its_long_steps(workspace: Path) -> None:
    events: list[Event] = []
    quantize(MODEL, SETTINGS, "out", bits=4, on_event=events.append)
    packed = ("qweight", "qzeros", "scales", "g_idx")
    tensors = load_file(workspace / "out" / "model.safetensors")
    kept = [tensors[name].nbytes for name in tensors if not name.endswith(packed)]
    assert phases(events) == [
        ("source", weights(MODEL)),
        ("copy", sum(kept)),
        ("verify", weights("out")),
        ("manifest", listed("out")),
    ]


def test_a_resumed_run_tells_the_bytes_it_reads_again(workspace: Path) -> None:
    assert workspace.is_dir()
    with pytest.raises(PausedError):
        quantize(MODEL, SETTINGS, "out", bits=4, on_event=stop_after_the_first_block)
    events: list[Event] = []
    quantize(MODEL, SETTINGS, "out", bits=4, on_event=events.append)
    tensors = load_file("out/model.safetensors")
    first = [name for name in tensors if ".layers.0." in name and "proj" in name]
    found = dict(phases(events))
    assert found["resume"] == sum(tensors[name].nbytes for name in first)
    assert list(found) == ["source", "resume", "copy", "verify", "manifest"]


def test_a_finished_run_tells_the_bytes_it_checks(workspace: Path) -> None:
    assert workspace.is_dir()
    quantize(MODEL, SETTINGS, "out", bits=4)
    events: list[Event] = []
    assert quantize(MODEL, SETTINGS, "out", bits=4, on_event=events.append).already_done
    assert phases(events) == [("source", weights(MODEL)), ("verify", listed("out"))]


def test_full_verification_tells_its_bytes(workspace: Path) -> None:
    assert workspace.is_dir()
    events: list[Event] = []
    assert verify(QUANTIZED, on_event=events.append).ok
    assert events == []  # it reads little
    assert verify(QUANTIZED, full=True, on_event=events.append).ok
    assert phases(events) == [("verify", weights(QUANTIZED)), ("verify", listed(QUANTIZED))]


def test_comparing_tells_its_bytes(workspace: Path) -> None:
    assert workspace.is_dir()
    events: list[Event] = []
    compare(QUANTIZED, MODEL, on_event=events.append)
    assert phases(events) == [("compare", weights(MODEL))]


@pytest.mark.parametrize("command", ["convert", "dequantize"])
def test_rewriting_tells_its_bytes(command: str, workspace: Path) -> None:
    assert workspace.is_dir()
    events: list[Event] = []
    if command == "convert":
        convert(QUANTIZED, "gptq_v2", "new", on_event=events.append)
    else:
        dequantize(QUANTIZED, "new", on_event=events.append)
    written = weights("new")
    assert phases(events) == [
        ("verify", listed(QUANTIZED)),
        (command, written),
        ("verify", written),
        ("manifest", listed("new")),
    ]


def test_files_to_upload_are_told_as_they_are_hashed(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"b" * 300)
    events: list[Event] = []
    added = upload._hashed({"b": tmp_path / "b", "a": b"a" * 100}, events.append)
    assert [file.path_in_repo for file in added] == ["a", "b"]
    assert events == [PhaseStarted("hash", "400 B"), BytesDone(100, 400), BytesDone(400, 400)]


def test_a_large_file_is_told_when_it_was_sent() -> None:
    done: list[object] = []

    def send(repo: str, files: list[Any], *, free_memory: bool) -> None:
        assert (repo, free_memory) == ("me/small", False)
        done.extend(file.path_in_repo for file in files)

    added = upload._hashed({"a": b"a" * 100, "b": b"b" * 300, "c": b""}, ignore)
    api = cast(Any, SimpleNamespace(preupload_lfs_files=send))
    hub = upload._Hub(api, "me/small", added)
    upload._send_large(hub, ["a", "b"], done.append)
    assert done == ["a", BytesDone(100, 400), "b", BytesDone(400, 400)]
