"""`gptq resume` repeats the call that a work directory describes."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.cli.console import Console
from gptq_cli.cli.progress import Progress
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import Resumed, WorkKept
from gptq_cli.storage.manifest import sealed, write_manifest
from gptq_cli.storage.work_directory import output_of, resume_command, write_run

from .conftest import FakeQuantizer, Run

CONFIG = QuantizeConfig(bits=3, sym=False, dynamic={"-:.*x": {}}, seqlen=64, dataset=["a", "b"])


def begun(beside: Path, **claims: Any) -> Path:
    """Write a work directory into `beside`; `claims` replace values of its run.json."""
    work = beside / ".o.gptq-work"
    work.mkdir(mode=0o700)
    request = {
        "model": "org/m",
        "output": str(beside / "o"),
        "config": CONFIG.model_dump(mode="json"),
        "revision": "abc",
        "overwrite": True,
        "directory": str(beside / "there"),
    }
    write_run(work, {"any": 1}, {**request, **claims})
    return work


def trusting() -> dict[str, Any]:
    """Return the settings of a run that trusts the code of its model."""
    config = QuantizeConfig(bits=3, dataset="c4", trust_remote_code=True)
    return config.model_dump(mode="json")


@pytest.mark.parametrize("config", [None, 7, [], "x"])
def test_resume_command_takes_any_run_file(config: object, tmp_path: Path) -> None:
    work = begun(tmp_path, config=config)
    assert resume_command(work) == f"gptq resume {tmp_path / 'o'}"
    assert resume_command(tmp_path) == f"gptq resume {tmp_path}"


@pytest.mark.parametrize("named", [".o.gptq-work", "o", "./o/", "link"])
@pytest.mark.parametrize(("exists", "directory"), [(False, "."), (True, "there")])
def test_resume_repeats_the_call_in_its_directory(
    exists: bool,
    directory: str,
    named: str,
    gptq: Run,
    quantizer: FakeQuantizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    begun(tmp_path, stream_download=exists)
    (tmp_path / "link").symlink_to("o")
    if exists:
        (tmp_path / "there").mkdir()
    result = gptq("resume", named, "--max-runtime", "2m", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path}/o\n"
    assert Path.cwd() == tmp_path / directory
    (call,) = quantizer.calls
    assert call == {
        "model": "org/m",
        "output": tmp_path / "o",
        "config": CONFIG,
        "revision": "abc",
        "overwrite": True,
        "resume": "auto",
        "max_seconds": 120,
        "allow_network_fs": False,
        "stream_download": exists,
        "spent_seconds": 0.0,
    }


def test_the_next_command_after_resume_works_in_any_folder(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del quantizer
    (tmp_path / "there").mkdir()
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "there/chats.jsonl").write_text(json.dumps(row))
    (tmp_path / "there/chat.jinja").write_text("{{ messages[0].content }}")
    template = {"chat_template": "chat.jinja"}
    config = QuantizeConfig(bits=3, dataset="chats.jsonl", seqlen=64, **template)
    work = begun(tmp_path, config=config.model_dump(mode="json"))
    monkeypatch.chdir("/")
    result = gptq("resume", work)
    assert result.stderr.splitlines()[-2] == (
        f"next: gptq eval-ppl {tmp_path}/o --baseline org/m --dataset FILE --seqlen 64 "
        f"--chat-template {tmp_path}/there/chat.jinja"
    )


SEALED = [
    json.dumps(sealed(run)) for run in ({}, {"identity": {}}, {"identity": {}, "request": []})
]


def test_a_directory_without_a_run_is_refused(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    work = tmp_path / ".o.gptq-work"
    work.mkdir(mode=0o700)
    result = gptq("resume", work)
    assert result.exit_code == 3
    assert result.stderr.startswith(
        f"error[E_RESUME_NOTHING]: `{work}` holds no unfinished run\n\n"
        "hint: give the output of a run that ended early, or the hidden .OUT.gptq-work beside it"
    )
    assert quantizer.calls == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"checksum": "0"}', '{"request": {}, "checksum": 3}', *SEALED],
)
def test_a_damaged_run_file_is_refused(
    content: str, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    work = tmp_path / ".o.gptq-work"
    work.mkdir(mode=0o700)
    (work / "run.json").write_text(content)
    result = gptq("resume", work)
    assert result.exit_code == 3
    assert result.stderr.startswith(
        f"error[E_RESUME_NOTHING]: `{work}/run.json` was not written by this version of gptq\n\n"
        "hint: repeat the command"
    )
    assert quantizer.calls == []


@pytest.mark.parametrize(
    "claims",
    [
        {"config": {"bits": 9}},
        {"config": {"bits": 4, "who": 1}},
        {"config": []},
        {"model": 3},
        {"model": None},
        {"overwrite": "yes"},
        {"directory": 7},
        {"revision": {}},
        {"more": 1, "config": None},
    ],
)
def test_a_run_file_with_wrong_values_is_refused(
    claims: dict[str, Any], gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    result = gptq("resume", begun(tmp_path, **claims))
    assert result.exit_code == 3
    assert "run.json` was not written by this version of gptq" in result.stderr
    assert quantizer.calls == []


@pytest.mark.parametrize("name", [".gptq-work", "..gptq-work", "...gptq-work"])
def test_a_directory_that_belongs_to_no_output_is_refused(
    name: str, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    begun(tmp_path).rename(tmp_path / name)
    result = gptq("resume", tmp_path / name)
    assert result.exit_code == 3
    assert result.stderr.startswith(
        f"error[E_RESUME_NOTHING]: `{tmp_path / name}` holds no unfinished run"
    )
    assert quantizer.calls == []


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("name", ["work", ".o.gptq", "o.gptq-work", "my out"])
def test_an_output_without_an_unfinished_run_is_refused_with_the_place_of_one(
    name: str, exists: bool, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    if exists:
        begun(tmp_path).rename(tmp_path / name)  # a run here is in the wrong place
    result = gptq("resume", tmp_path / name)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[0] == (
        "error[E_RESUME_NOTHING]: there is no unfinished run: "
        f"`{tmp_path}/.{name}.gptq-work` does not exist"
    )
    assert quantizer.calls == []


def test_the_root_directory_is_no_output(gptq: Run, quantizer: FakeQuantizer) -> None:
    result = gptq("resume", "/")
    assert (result.exit_code, "`/` holds no unfinished run" in result.stderr) == (3, True)
    assert quantizer.calls == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755, 0o701])
def test_a_directory_that_others_may_enter_is_refused(
    mode: int, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    work = begun(tmp_path)
    work.chmod(mode)
    result = gptq("resume", work)
    assert result.exit_code == 6
    assert result.stderr.startswith(
        f"error[E_WORK_UNSAFE]: `{work}` is not a directory that you alone own, read and write\n\n"
        "hint: check its"
    )
    assert quantizer.calls == []


@pytest.mark.parametrize("place", ["", "run.json"])
@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give files away")
def test_a_run_of_another_user_is_refused(
    place: str, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    work = begun(tmp_path)
    os.chown(work / place, 65534, 65534)
    result = gptq("resume", work)
    assert (result.exit_code, "error[E_WORK_UNSAFE]" in result.stderr) == (6, True)
    assert quantizer.calls == []


def test_the_output_is_beside_the_work_and_not_in_its_file(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    work = begun(tmp_path, output=str(victim))
    assert gptq("resume", work).exit_code == 0
    assert gptq("resume", work, "--overwrite").exit_code == 0
    assert [(call["output"], call["overwrite"]) for call in quantizer.calls] == [
        (tmp_path / "o", False),
        (tmp_path / "o", True),
    ]


def test_a_moved_run_needs_overwrite_again(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    (moved / "o").mkdir(parents=True)
    (moved / "o" / "file").write_text("of somebody")
    work = begun(tmp_path).rename(moved / ".o.gptq-work")
    result = gptq("resume", work)
    assert (result.exit_code, "error[E_OUT_EXISTS]" in result.stderr) == (6, True)
    assert quantizer.calls == []


def test_a_run_with_remote_code_needs_consent_again(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    work = begun(tmp_path, config=trusting())
    result = gptq("resume", work)
    assert result.exit_code == 3
    first, *_, hint = result.stderr.splitlines()
    needs_code = f"the run in `{work}` needs Python code that comes with `org/m`"
    assert first == f"error[E_REMOTE_CODE]: {needs_code}"
    assert hint == f"hint: read that code, then: gptq resume {tmp_path / 'o'} --trust-remote-code"
    assert quantizer.calls == []
    assert gptq("resume", work, "--trust-remote-code").exit_code == 0
    assert quantizer.calls[0]["config"] == QuantizeConfig(**trusting())


def test_the_resume_command_of_an_output_that_looks_like_work_names_the_work() -> None:
    work = Path("/d/..a.gptq-work.gptq-work")
    assert output_of(work) == Path("/d/.a.gptq-work")
    assert resume_command(work) == f"gptq resume {work}"


@pytest.mark.parametrize("named", ["done", ".done.gptq-work"])
def test_a_complete_output_has_nothing_to_resume(gptq: Run, tmp_path: Path, named: str) -> None:
    (tmp_path / "done").mkdir()
    write_manifest(tmp_path / "done", {"identity": {}})
    result = gptq("resume", tmp_path / named)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.splitlines() == [
        f"error[E_RESUME_NOTHING]: `{tmp_path}/done` is complete, so there is nothing to resume",
        "",
        f"hint: use it as it is; gptq verify {tmp_path}/done checks it",
    ]


def test_the_printed_resume_command_works(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = begun(tmp_path, config=trusting())
    Progress(Console())(WorkKept(work))
    _, _, command = capsys.readouterr().err.partition("resume with: gptq ")
    assert gptq(*shlex.split(command)).exit_code == 0
    assert len(quantizer.calls) == 1


def test_quiet_still_prints_resumed_and_kept_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(Console(quiet=True))
    progress(Resumed(2, 5, Path("/d/.o.gptq-work")))
    progress(WorkKept(Path("/d/.a b.gptq-work")))
    progress(WorkKept(Path("/d/.o.gptq-work"), failed=True))
    progress(WorkKept(Path("/d/.o.gptq-work"), blocks=False))
    assert capsys.readouterr().err == (
        "resuming after 2 of 5 blocks, from /d/.o.gptq-work\n"
        "finished blocks are kept; resume with: gptq resume '/d/a b'\n"
        "finished blocks are kept in /d/.o.gptq-work until a run with other settings begins\n"
        "finished work is kept; resume with: gptq resume /d/o\n"
    )
