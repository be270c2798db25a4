"""Errors of the file system have a code, the path, the reason and a hint; bugs stay bugs."""

from __future__ import annotations

import errno
import os
import shlex
from pathlib import Path

import pytest

from gptq_cli.errors import GptqError, InputError, ResourceError
from gptq_cli.files import (
    expanded,
    file_cause,
    file_error,
    file_errors,
    files_below,
    hint_at_near,
    is_directory,
    resolved,
    status_of,
)

READ = [
    (errno.EACCES, "E_FILE", 3, "Permission denied", "right to read it|chmod u"),
    (errno.ENOENT, "E_FILE", 3, "No such file", "moved or removed"),
    (errno.ELOOP, "E_FILE", 3, "symbolic links", "leads back to itself"),
    (errno.EISDIR, "E_FILE", 3, "Is a directory", "name a file in it"),
    (errno.EIO, "E_DISK", 5, "Input/output error", "dmesg"),
    (errno.ESTALE, "E_DISK", 5, "Stale", "mount it again"),
    (errno.EMFILE, "E_OPEN_FILES", 5, "Too many open files", "ulimit -n"),
    (errno.ENFILE, "E_OPEN_FILES", 5, "Too many open files", "ulimit -n"),
    (errno.ENOMEM, "E_OOM", 5, "Cannot allocate", "memory"),
    (errno.EBUSY, "E_FILE", 3, "busy", "run again"),
]
WRITTEN = [
    (errno.EACCES, "Permission denied", "an output you may write to"),
    (errno.EROFS, "Read-only", "not read-only"),
    (errno.ENOSPC, "No space", "free some space"),
    (errno.EDQUOT, "quota", "free some space"),
    (errno.ELOOP, "symbolic links", "remove the link"),
    (errno.ENOENT, "No such file", "somebody removes"),
    (errno.EIO, "Input/output", "another disk"),
]


def failed(number: int, *names: str | bytes | int) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(("number", "code", "exit_code", "reason", "hint"), READ)
def test_read_error_names_path_reason_and_next_step(
    number: int, code: str, exit_code: int, reason: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").touch()
    with (
        pytest.raises(GptqError, match=reason) as caught,
        file_errors(tmp_path / "a.json", writing=False),
    ):
        raise failed(number)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert "a.json" in str(caught.value)
    assert any(word in (caught.value.hint or "") for word in hint.split("|"))


@pytest.mark.parametrize(("number", "reason", "hint"), WRITTEN)
def test_write_error_names_path_reason_and_next_step(
    number: int, reason: str, hint: str, tmp_path: Path
) -> None:
    message = rf"cannot write `.*out`: .*{reason}"
    with (
        pytest.raises(ResourceError, match=message) as caught,
        file_errors(tmp_path / "out", writing=True),
    ):
        raise failed(number)
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert hint in (caught.value.hint or "")


def test_error_that_names_its_file_needs_no_other_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json") as caught, file_errors():
        (tmp_path / "none.json").read_bytes()
    assert caught.value.code == "E_FILE"
    named = [file_error(failed(errno.ENOENT, name)) for name in (b"/a/\xff", "/a/b")]
    assert [str(error).split("`")[1] for error in named] == ["/a/\udcff", "/a/b"]


def test_errors_that_are_not_about_files_stay_unchanged() -> None:
    assert file_error(failed(errno.EBADF)) is None
    assert file_error(failed(errno.ENOENT)) is None
    assert file_error(failed(errno.EINVAL, 7)) is None
    assert file_error(OSError("words of a library")) is None
    with pytest.raises(ConnectionRefusedError), file_errors():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    with pytest.raises(ValueError, match="a mistake"), file_errors("x"):
        raise ValueError("a mistake")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_disk_error_without_a_file_name_is_recognized(number: int) -> None:
    refused = file_error(failed(number))
    assert refused is not None
    assert (refused.code, refused.exit_code) == ("E_DISK", 5)
    assert os.strerror(number) in str(refused)


def test_cause_is_found_below_errors_of_libraries() -> None:
    try:
        try:
            raise failed(errno.EACCES, "/root/x")
        except OSError as inner:
            raise OSError("cannot load the tokenizer") from inner
    except OSError as outer:
        found = file_cause(outer)
    assert found is not None
    assert "/root/x" in str(found)
    assert file_cause(ValueError("no file")) is None


def test_error_for_a_long_name_gives_the_excess_bytes(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        status_of(tmp_path / ("ä" * 130))
    assert "name too long" in str(caught.value)
    assert "5 bytes shorter: the file system takes 255" in (caught.value.hint or "")
    with pytest.raises(InputError) as caught:
        status_of("/".join(["x" * 100] * 50))
    assert "choose a shorter path: it has 5049 bytes, 4095 are allowed" in (caught.value.hint or "")


def test_link_loops_and_dangling_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for look in (status_of, is_directory, resolved):
        for name, hint in (
            ("loop", "leads back to itself"),
            ("dangling", "nowhere`, which does not exist"),
        ):
            with pytest.raises(InputError) as caught:
                look(tmp_path / name)
            assert hint in (caught.value.hint or "")
    assert resolved(tmp_path / "dangling", writing=True) == tmp_path / "nowhere"
    with pytest.raises(ResourceError, match="cannot write"):
        resolved(tmp_path / "loop", writing=True)


def test_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert status_of(tmp_path / "file" / "x") is None
    with pytest.raises(InputError) as caught, file_errors():
        (tmp_path / "file" / "x" / "y").read_bytes()
    assert caught.value.hint == f"`{tmp_path}/file` is not a directory: check the path"


def test_files_below_a_folder_are_found_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in files_below(tmp_path)] == [
        "a/b/z",
        "a/y",
        "x",
    ]
    assert files_below(tmp_path, lambda folder: folder.name != "a") == [tmp_path / "x"]
    with pytest.raises(InputError, match="none"):
        files_below(tmp_path / "none")


@pytest.mark.parametrize(
    ("named", "folders", "meant"),
    [
        ("Qwen3-0.6b", True, "Qwen3-0.6B"),  # which only differs in a capital letter
        ("Demo-Modle", True, "Demo-Model"),
        ("./Demo-Modle", True, "Demo-Model"),
        ("models/smol/instrcut", True, "models/smol/instruct"),
        ("modles/smol/instruct", True, "models/smol/instruct"),
        ("modles/smol/instrcut", True, None),  # two parts are wrong
        ("recpie.yaml", False, "recipe.yaml"),
        ("recpie.yaml", True, None),  # a file is no model
        ("my recpie.yaml", False, "'my recipe.yaml'"),
        ("link-to-nothing", False, None),
        ("nothing-like-it", False, None),
        ("Demo\0Modle", True, "Demo-Model"),
        ("no\0where/Demo-Modle", True, None),
    ],
)
def test_a_misspelt_path_is_told_what_exists_in_its_place(
    named: str, folders: bool, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("Qwen3-0.6B", "Demo-Model", "models/smol/instruct", "models/llama"):
        Path(folder).mkdir(parents=True)
    for file in ("recipe.yaml", "my recipe.yaml"):
        Path(file).touch()
    Path("link-to-nothing").symlink_to("gone")
    expected = None
    if meant is not None:
        expected = f"did you mean {meant}?"
    assert hint_at_near(Path(named), folders=folders) == expected
    if meant is not None:
        absolute = hint_at_near(tmp_path / named, folders=folders)
        assert absolute is not None
        assert shlex.split(absolute)[-1] == f"{tmp_path / shlex.split(meant)[0]}?"


def test_unknown_home_directory_stays_unexpanded() -> None:
    assert expanded("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert expanded("~") == Path.home()
