"""Files and directories appear complete or not at all, and what stood there before is not lost."""

from __future__ import annotations

import errno
import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from gptq_cli.errors import ExistsError, ResourceError
from gptq_cli.storage import durable, work_directory
from gptq_cli.storage.durable import (
    Disk,
    OpenFile,
    make_directory,
    publish,
    remove,
    repair,
    sweep,
    write_file,
)
from gptq_cli.storage.work_directory import WorkDirectory, locked, refuse_locked, refuse_network_fs
from tests.disks import CountingDisk, DyingDisk, Killed, using


class Refusing(Disk):
    """A disk on which one operation fails."""

    def __init__(self, name: str, code: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        setattr(self, name, fail)


def test_parts_of_a_file_may_come_in_any_order(tmp_path: Path) -> None:
    with OpenFile(tmp_path / "shard", 10) as file:
        file.write_at(6, b"6789")
        file.write_at(0, memoryview(b"012345"))
        file.sync()
    assert (tmp_path / "shard").read_bytes() == b"0123456789"


def test_opened_file_keeps_its_content_and_gets_its_length(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"0123456789abc")
    with OpenFile(tmp_path / "shard", 10) as file:
        file.write_at(2, b"--")
    assert (tmp_path / "shard").read_bytes() == b"01--456789"


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    class Slow(Disk):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            return super().write(descriptor, data[:3], offset)

    with using(Slow()):
        write_file(tmp_path / "shard", b"0123456789")
    assert (tmp_path / "shard").read_bytes() == b"0123456789"


@pytest.mark.parametrize("name", ["open", "truncate", "write", "fsync", "rename"])
@pytest.mark.parametrize(
    ("code", "hint"), [(errno.ENOSPC, "free some space"), (errno.EIO, "choose an output")]
)
def test_disk_error_names_path_and_reason_and_keeps_the_old_file(
    name: str, code: int, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(b"old")
    with (
        using(Refusing(name, code)),
        pytest.raises(ResourceError, match=rf"config\.json.*: {os.strerror(code)}") as caught,
    ):
        write_file(tmp_path / "config.json", b"new")
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert (caught.value.hint or "").startswith(hint)
    assert (tmp_path / "config.json").read_bytes() == b"old"


def test_failed_fsync_is_not_repeated(tmp_path: Path) -> None:
    class Once(CountingDisk):
        def before(self, _number: int, name: str) -> None:
            if name == "fsync" and self.operations.count("fsync") == 1:
                raise OSError(errno.EIO, "lost")

    disk = Once()
    with using(disk), pytest.raises(ResourceError, match="lost"):
        write_file(tmp_path / "file", b"new")
    assert disk.operations.count("fsync") == 1
    assert not (tmp_path / "file").exists()


def test_a_failed_fsync_of_an_open_file_fails_every_later_one(tmp_path: Path) -> None:
    class Once(CountingDisk):
        def before(self, _number: int, name: str) -> None:
            if name == "fsync" and self.operations.count("fsync") == 2:
                raise OSError(errno.EIO, "lost")

    with using(Once()), OpenFile(tmp_path / "shard", 4) as file:
        file.sync()
        with ThreadPoolExecutor(1) as thread:
            told = thread.submit(file.sync).exception()
        assert isinstance(told, ResourceError)
        for _ in range(2):
            with pytest.raises(ResourceError, match=r"cannot write `.*shard`: lost") as caught:
                file.sync()
            assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)


def test_files_are_not_written_through_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(ResourceError, match="symbolic link"):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_make_directory_creates_and_syncs_each_parent(tmp_path: Path) -> None:
    disk = CountingDisk()
    with using(disk):
        make_directory(tmp_path / "a" / "b")
        make_directory(tmp_path / "a" / "b")
    assert disk.operations == ["mkdir", "open", "fsync"] * 2
    assert (tmp_path / "a" / "b").is_dir()


def test_directory_made_by_another_process_meanwhile_is_accepted(tmp_path: Path) -> None:
    class Overtaken(Disk):
        def mkdir(self, path: Path, mode: int) -> None:
            super().mkdir(path, mode)
            super().mkdir(path, mode)

    with using(Overtaken()):
        make_directory(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="exists"):
        make_directory(tmp_path / "file")


def test_remove_deletes_links_but_not_their_targets(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "a" / "kept").touch()
    sweep(tmp_path / "a", ["kept"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    remove(tmp_path / "a")
    remove(tmp_path / "a")
    assert (tmp_path / "precious" / "file").exists()


def finished(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A stage to be published, the output and the place aside."""
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    (work / "out" / "file").write_text("new")
    return work / "out", tmp_path / "out", work / "old"


def occupied(output: Path) -> None:
    output.mkdir()
    (output / "file").write_text("old")


@pytest.mark.parametrize("empty", [False, True])
def test_publish_renames_the_stage_to_the_output(empty: bool, tmp_path: Path) -> None:
    stage, output, aside = finished(tmp_path)
    if empty:
        output.mkdir()
    publish(stage, output, aside, overwrite=False)
    assert (output / "file").read_text() == "new"
    assert not stage.exists()


def test_output_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    stage, output, aside = finished(tmp_path)
    occupied(output)
    with pytest.raises(ExistsError, match="appeared while") as caught:
        publish(stage, output, aside, overwrite=False)
    assert (caught.value.code, caught.value.exit_code) == ("E_OUT_EXISTS", 6)
    assert (output / "file").read_text() == "old"


class NoExchange(DyingDisk):
    """A system that cannot swap two names."""

    def exchange(self, one: Path, other: Path) -> None:
        del one, other
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("kind", [DyingDisk, NoExchange])
def test_repair_after_a_kill_gives_the_old_or_the_new_output(
    kind: type[DyingDisk], tmp_path: Path
) -> None:
    seen = []
    for last in range(1, 12):
        stage, output, aside = finished(tmp_path / str(last))
        occupied(output)
        try:
            with using(kind(last)):
                publish(stage, output, aside, overwrite=True)
        except Killed:
            assert kind is NoExchange or output.exists()
        repair(output, aside)
        seen.append((output / "file").read_text())
        assert seen[-1] == "new" or not aside.exists()
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == ({"old", "new"} if kind is NoExchange else {"new"})


def test_failed_exchange_raises_error_and_keeps_the_old_output(
    tmp_path: Path,
) -> None:
    stage, output, aside = finished(tmp_path)
    occupied(output)
    with (
        using(Refusing("exchange", errno.EIO)),
        pytest.raises(ResourceError, match=os.strerror(errno.EIO)),
    ):
        publish(stage, output, aside, overwrite=True)
    assert (output / "file").read_text() == "old"


def test_exchange_without_system_support_raises_enosys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        Disk().exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.undo()
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        Disk().exchange(tmp_path / "a", tmp_path / "b")


def interrupted() -> AbstractContextManager[object]:
    return pytest.raises(KeyboardInterrupt)


def test_work_directory_is_private_and_removed_if_empty(tmp_path: Path) -> None:
    with interrupted(), locked(tmp_path / "deep" / "out") as work:
        assert stat.S_IMODE(work.path.stat().st_mode) == 0o700
        (work.path / "something").touch()
        raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []


def test_work_directory_keeps_finished_files_and_removes_others(tmp_path: Path) -> None:
    with interrupted(), locked(tmp_path / "out") as work:
        for name in ("journal.jsonl", "run.json", "hidden-0", ".run.json.tmp"):
            (work.path / name).write_text("content")
        raise KeyboardInterrupt
    with locked(tmp_path / "out") as work:
        names = sorted(path.name for path in work.path.iterdir())
    assert names == ["hidden-0", "holder.json", "journal.jsonl", "lock", "run.json"]
    assert list(tmp_path.iterdir()) == []


def test_second_run_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    refuse_locked(tmp_path / "out")
    process = rf"\(process {os.getpid()} on {socket.gethostname()}\)"
    holder = rf"another run {process} is writing `{tmp_path}/out`"
    with locked(tmp_path / "out"):
        for second in (
            lambda: refuse_locked(tmp_path / "out"),
            lambda: locked(tmp_path / "out").__enter__(),
        ):
            with pytest.raises(ExistsError, match=holder) as caught:
                second()
            assert (caught.value.code, caught.value.exit_code) == ("E_LOCKED", 6)
            assert caught.value.hint == "wait for it, or choose another -o"
        for damaged in ("{", "[" * 100_000):
            (tmp_path / ".out.gptq-work" / "holder.json").write_text(damaged)
            with pytest.raises(ExistsError, match=r"^another run is writing"):
                refuse_locked(tmp_path / "out")


def test_work_directory_of_another_process_is_not_used(tmp_path: Path) -> None:
    work = tmp_path / ".out.gptq-work"

    class Overtaken(Disk):
        def lock(self, path: Path) -> object:  # type: ignore[override]
            path.parent.rmdir()
            return super().lock(path)

    with (
        using(Overtaken()),
        pytest.raises(ExistsError, match="you alone"),
        locked(tmp_path / "out"),
    ):
        pass
    assert not work.exists()


def test_lock_file_of_a_successor_keeps_the_work_directory(tmp_path: Path) -> None:
    class Succeeded(Disk):
        def rmdir(self, path: Path) -> None:
            if path.name == ".out.gptq-work":
                (path / "lock").touch()
            super().rmdir(path)

    with using(Succeeded()), locked(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.gptq-work" / "lock").exists()


def test_undeletable_work_directory_raises_error(tmp_path: Path) -> None:
    with (
        using(Refusing("rmdir", errno.EIO)),
        pytest.raises(ResourceError, match="gptq-work"),
        locked(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("kind", ["mode", "link", "file"])
def test_work_directory_writable_by_others_is_refused(kind: str, tmp_path: Path) -> None:
    path = WorkDirectory(tmp_path / "out").path
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if kind == "mode":
        path.mkdir(mode=0o755)
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.touch()
    with pytest.raises((ExistsError, ResourceError)) as caught, locked(tmp_path / "out"):
        pass
    assert caught.value.code == ("E_DISK" if kind == "file" else "E_WORK_UNSAFE")


def test_lock_in_a_directory_of_others_is_not_opened(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out")
    work.path.mkdir(mode=0o755)
    (tmp_path / "precious").write_text("precious")
    work.lock.hardlink_to(tmp_path / "precious")
    with pytest.raises(ExistsError) as caught:
        refuse_locked(tmp_path / "out")
    assert (caught.value.code, (tmp_path / "precious").read_text()) == ("E_WORK_UNSAFE", "precious")


def test_unwritable_parent_raises_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ResourceError) as caught, locked(tmp_path / "file" / "out"):
        pass
    assert caught.value.code == "E_DISK"


def test_lock_that_cannot_be_opened_raises_resource_error(tmp_path: Path) -> None:
    with (
        using(Refusing("lock", errno.EROFS)),
        pytest.raises(ResourceError) as caught,
        locked(tmp_path / "out"),
    ):
        pass
    assert caught.value.code == "E_DISK"


def test_network_file_systems_are_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_network_fs(tmp_path)
    assert work_directory._file_system(Path("/proc")) == 0x9FA0
    monkeypatch.setitem(
        work_directory.NETWORK_FILE_SYSTEMS, work_directory._file_system(tmp_path), "NFS"
    )
    with (
        pytest.raises(ResourceError, match=r"network file system \(NFS\)") as caught,
        locked(tmp_path / "out"),
    ):
        pass
    assert (caught.value.code, caught.value.exit_code) == ("E_FS_UNSAFE", 5)
    assert "--allow-network-fs" in (caught.value.hint or "")
    with locked(tmp_path / "out", allow_network_fs=True) as work:
        assert work.path.exists()
    monkeypatch.setattr(work_directory.sys, "platform", "darwin")
    refuse_network_fs(tmp_path)
