"""Files and directories appear complete or not at all, and what stood there before is not lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gptq_cli.checkpoint import durable
from gptq_cli.checkpoint.durable import ShardFile, copy_file, publish, work_directory, write_file
from gptq_cli.errors import ExistsError, ResourceError


def refuse(code: int):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_parts_of_a_shard_may_come_in_any_order(tmp_path: Path) -> None:
    file = ShardFile(tmp_path / "shard", 10)
    file.write_at(6, b"6789")
    file.write_at(0, memoryview(b"012345"))
    file.close()
    assert (tmp_path / "shard").read_bytes() == b"0123456789"


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:3], offset))
    file = ShardFile(tmp_path / "shard", 10)
    file.write_at(0, b"0123456789")
    file.close()
    assert (tmp_path / "shard").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["pwrite", "fsync", "open", "truncate"])
@pytest.mark.parametrize(("code", "hint"), [(errno.ENOSPC, "free some space"), (errno.EIO, "choose an output")])
def test_what_the_disk_refuses_is_a_resource_error_with_path_and_reason(
    call: str, code: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        file = ShardFile(tmp_path / "shard", 4)
        file.write_at(0, b"data")
        file.close()

    monkeypatch.setattr(os, call, refuse(code))
    with pytest.raises(ResourceError, match=f"shard`: {os.strerror(code)}") as caught:
        work()
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert (caught.value.hint or "").startswith(hint)


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "config.json"
    write_file(target, b"old")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(ResourceError):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"


def test_a_copy_is_byte_for_byte_and_makes_its_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    copy_file(tmp_path / "a", tmp_path / "x" / "y" / "b")
    assert (tmp_path / "x" / "y" / "b").read_bytes() == bytes(range(256))


def finished(output: Path, content: str = "new") -> Path:
    with work_directory(output) as work:
        (work / "file").write_text(content)
    return work


def test_publishing_gives_the_work_directory_its_name(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    publish(finished(output), output, overwrite=False)
    assert (output / "file").read_text() == "new"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_output_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    work = finished(output)
    output.mkdir()
    (output / "file").write_text("somebody else's")
    with pytest.raises(ExistsError, match="appeared while") as caught:
        publish(work, output, overwrite=False)
    assert caught.value.code == "E_OUT_EXISTS"
    assert (output / "file").read_text() == "somebody else's"


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "stale").write_text("old")
    publish(finished(output), output, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_that_fails_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("old")
    work = finished(output)
    monkeypatch.setattr(durable, "_sync_tree", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        publish(work, output, overwrite=True)
    assert (output / "precious").read_text() == "old"


def test_the_work_directory_goes_when_the_run_fails_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    stale = tmp_path / ".out.gptq-work"
    stale.mkdir()
    (stale / "left over").write_text("x")

    def interrupted_run() -> None:
        with work_directory(output) as work:
            assert list(work.iterdir()) == []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ResourceError) as caught, work_directory(tmp_path / "file" / "out"):
        pass
    assert caught.value.code == "E_DISK"
