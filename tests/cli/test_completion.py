"""Completion of commands, options and values: by the function behind it, and in real shells."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptq_cli.cli.codes import explanations
from gptq_cli.cli.completion import completed_values
from gptq_cli.config.corpora import CORPORA
from gptq_cli.config.layer import FORMATS, PRESETS
from gptq_cli.config.resolve import recipes
from gptq_cli.config.serving import TARGETS
from tests.forked import serving

COMPLETE = """
import os, sys
os.environ.update(_GPTQ_COMPLETE="complete_bash", COMP_WORDS=sys.argv[1], COMP_CWORD=sys.argv[2])
sys.argv = ["gptq"]
from gptq_cli.__main__ import main
try:
    main()
finally:
    print("LOADED", "torch" in sys.modules or "transformers" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("gptq de", "1", "dequantize"),
        ("gptq quantize --gr", "2", "--group-size"),
        ("gptq quantize m --preset bal", "4", "balanced"),
        ("gptq nonsense val", "2", "validate-config"),
        ("gptq help val", "2", "validate-config"),
    ],
)
def test_completion_knows_words_and_loads_no_torch(
    words: str, position: str, expected: str
) -> None:
    command = [sys.executable, "-c", COMPLETE, words, position]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout.splitlines() == [expected, "LOADED False"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "parameter", "expected"),
    [
        ("quantize", "preset", PRESETS),
        ("plan", "config", recipes()),
        ("validate_config", "file", recipes()),
        ("recipes", "name", recipes()),
        ("quantize", "target", TARGETS),
        ("explain", "code", explanations()),
        ("quantize", "bits", ["2", "3", "4", "5", "6", "7", "8"]),
        ("quantize", "group_size", ["auto", "128", "64", "32", "-1"]),
        ("eval_ppl", "dataset", CORPORA),
        ("compare", "text", CORPORA),
        ("convert", "to", FORMATS),
        ("quantize", "format", FORMATS),
        ("quantize", "dtype", ["auto", "bfloat16", "float16", "float32"]),
        ("quantize", "resume", ["auto", "require", "never"]),
        ("quantize", "scale_search", ["none", "mse"]),
        ("schema", "kind", ["config", "output"]),
        ("push", "repo", []),
    ],
)
def test_each_parameter_has_its_values(
    command: str,
    parameter: str,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = completed_values(command, parameter, "")
    assert [value for value, _ in found] == [*expected]
    assert all("\n" not in about for _, about in found)


def test_a_list_of_widths_grows_by_one_that_is_new() -> None:
    found = completed_values("allocate", "allow_bits", "2,4,")
    assert [value for value, _ in found] == ["2,4,3", "2,4,5", "2,4,6", "2,4,7", "2,4,8"]


def test_names_come_before_paths_that_need_no_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "c with a blank", "other.txt", ".chidden"):
        (tmp_path / name).touch()
    (tmp_path / "corpora").mkdir()
    found = [value for value, _ in completed_values("quantize", "dataset", "c")]
    assert found == ["c4", "c4-new", "chats.jsonl", "corpora/"]
    assert completed_values("quantize", "dataset", "oth") == []  # the shell completes the path


def test_work_directories_are_those_of_unfinished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_work(tmp_path / "first")
    make_work(tmp_path / "deep" / "second")
    (tmp_path / ".empty.gptq-work").mkdir()
    assert completed_values("resume", "unfinished", "") == [(".first.gptq-work", "unfinished run")]
    found = completed_values("resume", "unfinished", "./deep/.s")
    assert found == [("./deep/.second.gptq-work", "unfinished run")]
    assert completed_values("verify", "directory", "") == []


def make_work(output: Path) -> None:
    work = output.with_name(f".{output.name}.gptq-work")
    work.mkdir(parents=True)
    (work / "run.json").write_text("{}", encoding="utf-8")


# ---------------------------------------------------------------- real shells

SHELLS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        'source {script}; gptq() {{ echo "GOT $*."; }}',
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        'autoload -Uz compinit; compinit -u -D; source {script}; gptq() {{ echo "GOT $*."; }}',
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        'source {script}; function gptq; echo "GOT $argv."; end',
    ),
}
TYPED = {  # words before the tab key -> words after it
    "quantize m --preset bal": "quantize m --preset balanced",
    "plan m --config cpu": "plan m --config cpu-small",
    "quantize m --target sg": "quantize m --target sglang",
    "explain E_SHAP": "explain E_SHAPE",
    "plan m --allow-bits 3": "plan m --allow-bits 3",
    "eval-ppl m --dataset wiki": "eval-ppl m --dataset wikitext2",
    "resume .fir": "resume .first.gptq-work",
    "validate-config mine": "validate-config mine.yaml",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder with the command `gptq`, which starts at once."""
    folder = tmp_path_factory.mktemp("bin")
    modules = ("gptq_cli.cli.completion", "gptq_cli.cli.plan", "gptq_cli.cli.explain")
    with serving(folder, {}, modules) as words:
        command = folder / "gptq"
        line = shlex.join(["exec", *words])
        command.write_text(f'#!/bin/sh\n{line} "$@"\n', encoding="utf-8")
        command.chmod(0o755)
        yield folder


@pytest.mark.parametrize("name", SHELLS)
def test_the_tab_key_completes_values_in_a_shell(name: str, program: Path, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    make_work(tmp_path / "first")
    (tmp_path / "mine.yaml").write_text("bits: 4\n", encoding="utf-8")
    path = f"{program}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "TERM": "xterm"}
    source = subprocess.run(
        [program / "gptq"],
        env={**environment, "_GPTQ_COMPLETE": f"source_{name}"},
        capture_output=True,
        check=True,
    )
    script = tmp_path / "script"
    script.write_bytes(source.stdout)
    command, setup = SHELLS[name]
    lines = [setup.format(script=script), *(f"gptq {words}\t" for words in TYPED), "exit"]
    said = typed(command, "".join(f"{line}\n" for line in lines), tmp_path, environment)
    found = re.findall(r"GOT ([\w ./,-]+)\.\r", said)
    assert [words.strip() for words in found] == [*TYPED.values()], said


def typed(command: list[str], keys: str, directory: Path, environment: dict[str, str]) -> str:
    """Run a program on a terminal on which `keys` are typed at once; return what it shows."""
    on_a_terminal = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
    done = subprocess.run(
        [*on_a_terminal, *command],
        input=keys.encode(),
        capture_output=True,
        cwd=directory,
        env=environment,
        timeout=120,
        check=False,
    )
    return done.stdout.decode(errors="replace")
