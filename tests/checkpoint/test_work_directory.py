"""If the work directory of a run is removed, the run ends with that error and changes no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gptq_cli.errors import GptqError, ResourceError, Stopped
from gptq_cli.storage.durable import write_file
from gptq_cli.storage.work_directory import WorkDirectory, locked


def end_without_it(output: Path, error: BaseException) -> None:
    """Begin a run, remove its work directory, and end the run with `error`."""
    with locked(output) as work:
        shutil.rmtree(work.path)
        raise error


def publish_from_another(output: Path) -> None:
    """Publish a run after another run has replaced its work directory."""
    with locked(output) as work:
        begin_another(work)
        write_file(work.stage / "config.json", b"{}")
        work.publish(output.parent, overwrite=False)


def begin_another(work: WorkDirectory) -> None:
    """Remove the directory and let another run begin and finish something in its place."""
    shutil.rmtree(work.path)
    work.path.mkdir(0o700)
    work.lock.touch()
    work.journal.write_text("finished")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "x"), ResourceError("E_DISK", "x"), KeyError()]
)
def test_the_error_names_the_removed_work_directory(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(GptqError) as caught:
        end_without_it(tmp_path / "out", error)
    assert (caught.value.code, caught.value.exit_code) == ("E_WORK_GONE", 5)
    message = f"`{tmp_path}/.out.gptq-work` was removed while this run was working in it"
    assert str(caught.value) == message
    assert caught.value.hint == "let nothing remove it, then run the same command again"
    assert caught.value.__context__ is error
    assert list(tmp_path.iterdir()) == []


def test_publish_refuses_the_work_directory_of_another_run(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        publish_from_another(tmp_path / "out")
    assert caught.value.code == "E_WORK_GONE"
    assert not (tmp_path / "out").exists()
    assert WorkDirectory(tmp_path / "out").journal.read_text() == "finished"


def test_a_successful_run_keeps_the_work_of_another_run(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as work:
        write_file(work.stage / "config.json", b"{}")
        work.publish(tmp_path, overwrite=False)
        begin_another(work)
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    assert work.journal.read_text() == "finished"


def test_a_run_may_lose_its_work_directory_after_it_published(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as work:
        write_file(work.stage / "config.json", b"{}")
        work.publish(tmp_path, overwrite=False)
        shutil.rmtree(work.path)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("error", [Stopped(15), KeyboardInterrupt()])
def test_a_signal_is_raised_unchanged(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        end_without_it(tmp_path / "out", error)


def test_an_error_is_raised_unchanged_if_the_directory_exists(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
