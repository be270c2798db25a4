"""`gptq resume`: the call of a work directory, once more."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_cli.checkpoint.run_file import write_run
from gptq_cli.cli.console import Console
from gptq_cli.cli.progress import Progress
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.pipeline.events import Resumed, WorkKept

from .conftest import FakeQuantizer, Run


def begun(directory: Path) -> QuantizeConfig:
    config = QuantizeConfig(bits=3, sym=False, dynamic={"-:.*x": {}}, seqlen=64, dataset=["a", "b"])
    request = {"model": "org/m", "output": str(directory / "o"), "config": config.model_dump(mode="json")}
    rest = {"revision": "abc", "overwrite": True, "directory": str(directory / "there")}
    write_run(directory, {"any": 1}, {**request, **rest})
    return config


@pytest.mark.parametrize("there", [False, True])
def test_the_call_is_repeated_where_it_was_made_with_all_it_was_given(
    there: bool, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = begun(tmp_path)
    if there:
        (tmp_path / "there").mkdir()
    result = gptq("resume", tmp_path, "--max-runtime", "2m", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path}/o\n"
    assert Path.cwd() == (tmp_path / "there" if there else tmp_path)
    (call,) = quantizer.calls
    del call["report"], call["place"]
    assert call == {
        "model": "org/m", "output": tmp_path / "o", "config": config, "revision": "abc", "overwrite": True,
        "resume": "auto", "max_seconds": 120, "allow_network_fs": False,
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, "", "{", "[]", "7", '{"checksum": "0"}', '{"request": {}, "checksum": 3}'])
def test_a_directory_that_holds_no_run_is_refused(
    content: str | None, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    result = gptq("resume", tmp_path)
    assert result.exit_code == 3
    expected = f"error[E_RESUME_NOTHING]: `{tmp_path}` holds no unfinished run\n\nhint: give the hidden directory"
    assert result.stderr.startswith(expected)
    assert quantizer.calls == []


def test_the_output_instead_of_the_work_beside_it_is_recognised(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    work = tmp_path / ".my out.gptq-work"
    work.mkdir()
    begun(work)
    result = gptq("resume", tmp_path / "my out")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (3, f"hint: did you mean gptq resume '{work}'?")
    assert quantizer.calls == []


def test_resuming_and_what_is_kept_are_said_even_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Console(quiet=True))
    progress(Resumed(2, 5, Path("/d/.o.gptq-work")))
    progress(WorkKept(Path("/d/.a b.gptq-work")))
    assert capsys.readouterr().err == (
        "resuming after 2 of 5 blocks, from /d/.o.gptq-work\n"
        "finished blocks are kept; go on with: gptq resume '/d/.a b.gptq-work'\n"
    )
