"""The directories that --overwrite replaces; no foreign file is removed with an old output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptq_cli import files
from gptq_cli.errors import ConfigError, ExistsError, GptqError, ResourceError
from gptq_cli.files import is_inside, mounts_below
from gptq_cli.storage import durable, replacing
from gptq_cli.storage.manifest import write_manifest
from gptq_cli.storage.replacing import (
    check_output,
    check_replaceable,
    overwrite_hint,
    remove_replaced,
)
from gptq_cli.storage.work_directory import locked
from tests.disks import Disk, using

MODEL = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "README.md",
    "generation_config.json",
)


def checkpoint(directory: Path, *more: str) -> Path:
    """A directory with the names of a checkpoint's files, and `more`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*MODEL, *more):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def ours(directory: Path, *more: str) -> Path:
    """The same as gptq writes it; `more` are listed in the manifest."""
    write_manifest(checkpoint(directory, *more), {"identity": {}})
    return directory


def refusal(output: Path, model: Path, *, overwrite: bool = True) -> GptqError:
    with pytest.raises(GptqError) as caught:
        check_output(output, model, overwrite=overwrite)
    return caught.value


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["out", "out-v2"])
def test_checkpoints_and_own_outputs_are_replaceable(
    name: str, model: Path, tmp_path: Path
) -> None:
    downloaded = (
        ".gitattributes",
        ".cache/huggingface/download/config.json.metadata",
        "model-00001-of-00002.safetensors",
    )
    check_output(checkpoint(tmp_path / name, *downloaded), model, overwrite=True)
    check_output(
        ours(tmp_path / "ours" / name, "modeling_own.py", "images/a.png"), model, overwrite=True
    )
    check_output(tmp_path / "none", model, overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", model, overwrite=False)


@pytest.mark.parametrize("made", [checkpoint, ours])
@pytest.mark.parametrize(
    "name", ["thesis.tex", "notes/a.txt", "modeling_own.py", "weights.safetensors", ".env"]
)
def test_one_foreign_file_prevents_replacing(
    made: object, name: str, model: Path, tmp_path: Path
) -> None:
    output = (checkpoint if made is checkpoint else ours)(tmp_path / "out")
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    error = refusal(output, model)
    assert (error.code, error.exit_code) == ("E_OUT_FOREIGN", 6)
    assert (
        str(error)
        == f"`{output}` holds files that belong neither to gptq nor to a checkpoint: {name}"
    )
    assert error.hint == "choose another -o, or move these files elsewhere first"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.safetensors"])
def test_weights_outside_the_manifest_are_foreign(name: str, model: Path, tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    check_output(output, model, overwrite=True)
    (output / name).write_text("mine")
    refused = refusal(output, model)
    assert (refused.code, refused.exit_code) == ("E_OUT_FOREIGN", 6)
    assert name in str(refused)
    assert remove_replaced(output) != []
    assert (output / name).read_text() == "mine"


def test_up_to_three_foreign_files_are_named(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "project"
    for name in ("a.py", "b.py", "sub/c.py"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    assert str(refusal(output, model)).endswith(": a.py, b.py, sub/c.py")
    (output / "sub" / "d.py").touch()
    assert str(refusal(output, model)).endswith(": a.py, b.py, sub/c.py and more")


@pytest.mark.parametrize("lacks", ["config.json", "model.safetensors"])
def test_incomplete_checkpoint_is_foreign(lacks: str, model: Path, tmp_path: Path) -> None:
    output = checkpoint(tmp_path / "out")
    (output / lacks).unlink()
    assert refusal(output, model).code == "E_OUT_FOREIGN"
    output = checkpoint(tmp_path / "other")
    (output / "config.json").write_text(json.dumps({"port": 8080}))
    assert refusal(output, model).code == "E_OUT_FOREIGN"


def test_manifest_alone_makes_no_project_replaceable(model: Path, tmp_path: Path) -> None:
    written = ours(tmp_path / "written", "run.py")
    project = tmp_path / "project"
    project.mkdir()
    (project / "gptq_manifest.json").write_bytes((written / "gptq_manifest.json").read_bytes())
    (project / "run.py").write_text("another file under a listed name")
    assert str(refusal(project, model)).endswith(": run.py")
    (written / "gptq_manifest.json").write_text("{}")
    assert str(refusal(written, model)).endswith(": run.py")


@pytest.mark.parametrize("name", ["link", "vocab.json"])
def test_links_are_foreign_and_never_followed(name: str, model: Path, tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (output / name).symlink_to(precious if name == "link" else precious / "file")
    assert str(refusal(output, model)).endswith(f": {name}")
    assert remove_replaced(output) == [f"{name}: gptq has not written it"]
    assert (precious / "file").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_repository_is_never_replaced(kind: str, model: Path, tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    (output / ".git").mkdir() if kind == "folder" else (output / ".git").touch()
    error = refusal(output, model)
    assert (error.code, error.exit_code) == ("E_OUT_FOREIGN", 6)
    assert "is a repository" in str(error)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("above", [0, 1, 2])
def test_current_directory_and_its_parents_are_never_replaced(
    above: int, overwrite: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = checkpoint(tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(here)
    error = refusal(Path("../" * above or "."), model, overwrite=overwrite)
    assert (error.code, error.exit_code) == ("E_OUT_FOREIGN", 6)
    assert "is the current directory or above it" in str(error)
    assert error.hint == "choose a new directory: -o ./NAME"


@pytest.mark.parametrize("whose", ["variable", "list"])
def test_home_directory_is_never_replaced(
    whose: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    if whose == "variable":
        monkeypatch.setenv("HOME", str(home))
    else:
        monkeypatch.setattr(replacing.pwd, "getpwall", lambda: [SimpleNamespace(pw_dir=str(home))])
    for name in ("home", "link"):
        error = refusal(tmp_path / name, model)
        assert (error.code, error.exit_code) == ("E_OUT_FOREIGN", 6)
        assert "is a home directory" in str(error)
        assert error.hint == f"choose a directory inside it: -o {tmp_path / name / 'NAME'}"


def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *mounts: Path) -> None:
    """Let the system list `mounts` as mount points, on the file system that they are on."""
    lines = [
        f"30 23 0:26 /x {str(mount).replace(' ', chr(92) + '040')} rw - ext4 /dev/sda rw"
        for mount in mounts
    ]
    (tmp_path / "mountinfo").write_text("\n".join(lines))
    monkeypatch.setattr(files, "MOUNTS", tmp_path / "mountinfo")


def test_mount_point_and_its_parents_are_never_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ours(tmp_path / "out")
    mount = output / "my data" / "deep"
    mount.mkdir(parents=True)
    listing(tmp_path, monkeypatch, mount)
    assert mounts_below(output) == [mount]
    error = refusal(output, model)
    assert (error.code, error.exit_code) == ("E_OUT_MOUNT", 2)
    assert (
        str(error) == f"`{output}` holds the mount point `{mount}`, therefore it is never replaced"
    )
    assert "unmount it first" in (error.hint or "")
    assert "is a mount point" in str(refusal(mount, model))
    monkeypatch.setattr(files, "MOUNTS", tmp_path / "none")
    assert mounts_below(output) == []


def test_remove_enters_no_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = ours(tmp_path / "out", "data/listed")
    listing(tmp_path, monkeypatch, output / "data")
    assert remove_replaced(output) == ["data is a mount point"]
    with pytest.raises(ResourceError, match="busy"):
        durable.remove(output)
    assert (output / "data" / "listed").exists()


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounts in a namespace of its own"
)
def test_bind_mount_of_the_model_counts_as_the_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    (tmp_path / "around" / "inner").mkdir(parents=True)
    script = f"""
from pathlib import Path
from gptq_cli.storage.replacing import check_output
from gptq_cli.errors import GptqError
for output, model in (("seen", "model"), ("seen/new", "model"), ("around", "around/inner")):
    try:
        folder = Path({str(tmp_path)!r})
        check_output(folder / output, folder / model, overwrite=True)
    except GptqError as error:
        print(error.code)
"""
    mounts = f"mount --bind {model} {tmp_path}/seen && mount --bind {model} {tmp_path}/around/inner"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$0" -c "$1"', sys.executable, script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "mount" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout.split() == ["E_OUT_IS_INPUT"] * 3, done.stderr


def test_directories_are_compared_by_device_and_inode(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(model)
    (tmp_path / "up").symlink_to(tmp_path)
    for name in ("alias", "alias/new/deep", "up/model", "up/alias/.."):
        error = refusal(tmp_path / name, model)
        assert (error.code, error.exit_code) == ("E_OUT_IS_INPUT", 2)
    assert is_inside(tmp_path / "alias" / "none", model)
    assert not is_inside(tmp_path / "model-2", model)


def test_model_mounted_inside_the_output_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MODEL is a bind mount of a folder in OUT: OUT is not above MODEL, but MODEL is inside OUT."""
    output = ours(tmp_path / "out", "inner/listed")
    monkeypatch.setattr(replacing, "at_and_above", lambda _: set())
    monkeypatch.setattr(replacing, "is_inside", lambda *_: False)
    with pytest.raises(ConfigError, match="contains the model") as caught:
        check_replaceable(output, output / "inner")
    assert caught.value.code == "E_OUT_IS_INPUT"


def test_hint_names_overwrite_only_if_it_works(model: Path, tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    assert (
        refusal(output, model, overwrite=False).hint
        == "add --overwrite to replace it, or choose another -o"
    )
    (output / "mine").touch()
    error = refusal(output, model, overwrite=False)
    assert error.code == "E_OUT_EXISTS"
    assert (
        error.hint
        == "choose another -o: --overwrite replaces only a checkpoint with nothing else beside it"
    )
    assert overwrite_hint(output) == error.hint
    file = tmp_path / "file"
    file.touch()
    for overwrite in (False, True):
        assert refusal(file, model, overwrite=overwrite).hint == "choose another -o"


def test_publish_checks_the_old_output_again(model: Path, tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    check_output(output, model, overwrite=True)
    with locked(output) as work:
        checkpoint(work.stage)
        (output / "late").touch()
        with pytest.raises(ExistsError, match="late") as caught:
            work.publish(model, overwrite=True)
    assert caught.value.code == "E_OUT_FOREIGN"
    assert (output / "late").exists()


class NoExchange(Disk):
    """A system that cannot swap two names; it adds `late` to the old output at that moment."""

    def exchange(self, one: Path, other: Path) -> None:
        (other / "late").write_text("mine")
        if self.swaps:
            return super().exchange(one, other)
        raise OSError(38, "not implemented")

    swaps = False


class Exchange(NoExchange):
    swaps = True


@pytest.mark.parametrize("disk", [NoExchange(), Exchange()])
def test_file_added_between_check_and_exchange_is_kept(
    disk: Disk, model: Path, tmp_path: Path
) -> None:
    output = ours(tmp_path / "out")
    with using(disk), locked(output) as work:
        checkpoint(work.stage)
        work.publish(model, overwrite=True)
    assert work.not_removed == ["late: gptq has not written it"]
    assert not (output / "late").exists()
    kept = tmp_path / ".out.gptq-work" / "replaced-0"
    for _ in range(2):  # a later run tries again, and the one after
        assert {path.name for path in kept.iterdir()} == {"late", "gptq_manifest.json"}
        with locked(output) as work:
            pass
        assert work.not_removed == ["late: gptq has not written it"]
    (kept / "late").unlink()
    with locked(output) as work:
        pass
    assert (work.not_removed, sorted(path.name for path in tmp_path.iterdir())) == (
        [],
        ["model", "out"],
    )


def test_undeletable_files_are_listed_and_others_removed(tmp_path: Path) -> None:
    output = ours(tmp_path / "out", "sub/listed", "sub/other")

    class Refusing(Disk):
        def unlink(self, path: Path) -> None:
            if path.name == "listed":
                raise PermissionError(13, "Permission denied")
            super().unlink(path)

    with using(Refusing()):
        assert remove_replaced(output) == ["sub/listed: Permission denied"]
    left = sorted(
        path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()
    )
    assert left == ["gptq_manifest.json", "sub/listed"]
    assert remove_replaced(output) == []
    assert not output.exists()


def test_unwritable_folder_of_an_own_output_is_replaceable(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in it can be removed; only an output that is gptq's own is taken so."""
    for made, refused in ((ours, False), (checkpoint, True)):
        output = made(tmp_path / made.__name__)
        (output / "sub").mkdir()
        (output / "sub" / "f").touch()
        monkeypatch.setattr(replacing.os, "access", lambda path, _: Path(path).name != "sub")
        if refused:
            assert str(refusal(output, model)).endswith(": sub/f")
        else:
            check_output(output, model, overwrite=True)


def test_unmovable_output_is_refused_before_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ours(tmp_path / "out")
    monkeypatch.setattr(replacing.os, "access", lambda *_: False)
    error = refusal(output, model)
    assert (error.code, error.exit_code) == ("E_DISK", 5)
    assert f"cannot write `{output}`: Permission denied" in str(error)
