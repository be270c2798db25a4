"""Results on stdout are exact: JSON of any letters, paths byte for byte, texts unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_cli.cli.console import Console, as_json_text, visible
from gptq_cli.errors import shell_word, shell_words
from tests.families import save_model, texts
from tests.forked import serving

from .conftest import FakeQuantizer, Run
from .processes import GPTQ

NAMES = [
    "mes\u00a0mod\u00e8les-\u200d",
    "soft\u00adhyphen \u3000",
    "\x1b[31m\x7f\x85",
    "emoji \U0001f600\U000e0001",
    "\udcff\udc80 é",
    "a\nb\tc\r",
    'it\'s \\ "quoted"',
]
SECRETS = [
    "The basic principles of thermodynamics.",
    "the bearer certificate was lost",
    "hf_" + "a1B2" * 8,
    "see ftp://me:you@host/x",
]


def gptq_bytes(
    folder: Path, *words: str, program: list[str] = GPTQ, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run `program` in `folder` as a process of its own."""
    env = {**os.environ, **environment}
    return subprocess.run([*program, *words], capture_output=True, env=env, cwd=folder, check=False)


def dataset_of(folder: Path, recipe: str, **environment: str) -> object:
    """Return the dataset that `validate-config --json` reads from a recipe."""
    done = gptq_bytes(folder, "validate-config", recipe, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["config"]["dataset"]


@pytest.mark.parametrize("name", NAMES)
def test_json_is_json_for_every_name(name: str) -> None:
    text = as_json_text({"output": name, name: [name]})
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text) == {"output": name, name: [name]}


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-8", NAMES[5]), ("latin-1", NAMES[2]), ("ascii", NAMES[0])]
)
def test_plan_prints_json_of_odd_paths_in_any_locale(
    encoding: str, name: str, tmp_path: Path
) -> None:
    save_model(tmp_path / name, num_hidden_layers=2)
    words = ["plan", f"./{name}", "-b", "4", "-g", "32", "-o", f"out {name}", "--json"]
    done = gptq_bytes(tmp_path, *words, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == f"out {name}"
    assert json.loads(done.stdout)["model"] == name
    missing = gptq_bytes(tmp_path, "verify", "none\udcff", "--json", PYTHONIOENCODING=encoding)
    assert missing.returncode == 3
    assert json.loads(missing.stdout)["problems"][0]["message"] == "`none\udcff` is not a directory"


@pytest.mark.parametrize("name", NAMES)
def test_quiet_prints_the_path_byte_for_byte(
    name: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    Console(quiet=True).result({}, "human", Path(name))
    assert capfdbinary.readouterr().out == os.fsencode(name) + b"\n"


def test_a_terminal_gets_no_control_from_a_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Console(quiet=True).result({}, "human", Path("a\x1b[31m\u202eé"))
    Console().document({}, "b\x1b[31m\u202eé")
    assert capsys.readouterr().out == "a\\x1b[31m\\u202eé\nb\\x1b[31m\\u202eé\n"
    assert visible("\r\x85\U000e0001 \udcff") == "\\r\\x85\\U000e0001 \\udcff"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_print_config_keeps_texts_in_any_locale(encoding: str, tmp_path: Path) -> None:
    asked = [*SECRETS, "é\u00a0\u200d\U0001f600", "\x1b[31m"]
    words = ["quantize", "m", "-b", "4"]
    for text in asked:
        words += ["--dataset", text]
    shown = gptq_bytes(tmp_path, *words, "--print-config", PYTHONIOENCODING=encoding)
    (tmp_path / "c.yaml").write_bytes(shown.stdout)
    assert dataset_of(tmp_path, "c.yaml", PYTHONIOENCODING=encoding) == asked
    words = ["validate-config", "c.yaml", "--print-config"]
    again = gptq_bytes(tmp_path, *words, PYTHONIOENCODING=encoding)
    (tmp_path / "d.yaml").write_bytes(again.stdout)
    assert dataset_of(tmp_path, "d.yaml") == asked


def test_results_keep_texts_that_look_like_secrets(gptq: Run) -> None:
    for text in SECRETS:
        datasets = ["--dataset", text, "--dataset", "x"]
        result = gptq("quantize", "m", "-b", "4", *datasets, "--print-config", "--json")
        assert json.loads(result.stdout)["config"]["dataset"] == [text, "x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_word_survives_the_shell(name: str) -> None:
    assert shell_word(name).isprintable()
    done = subprocess.run(
        ["bash", "-c", f"printf %s {shell_words([name, ''])}"], capture_output=True, check=True
    )
    assert done.stdout == os.fsencode(name)


def test_an_output_may_have_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    save_model(tmp_path / "model", num_hidden_layers=2)
    (tmp_path / "text\udcff.txt").write_text(texts(2_000)[0])
    sizes = ["-b4", "-g32", "--preset=gptq", "--nsamples=2", "--batch-size=1", "--seqlen=32"]
    paths = ["model", "-o", "out\udcff", "--dataset", "text\udcff.txt"]
    words = ["quantize", *paths, "--report", *sizes]
    with serving(tmp_path, {}) as program:
        done = gptq_bytes(tmp_path, *words, "--quiet", program=program)
        again = gptq_bytes(tmp_path, *words, "--json", program=program)
        verified = gptq_bytes(tmp_path, "verify", "out\udcff", "--full", program=program)
        page = gptq_bytes(tmp_path, "report", "out\udcff", "--quiet", program=program)
    assert (done.returncode, done.stdout) == (0, b"out\xff\n"), done.stderr
    assert json.loads(again.stdout)["already_done"] is True
    assert verified.returncode == 0
    assert page.stdout == b"out\xff/gptq_report.html\n"
    run = json.loads((tmp_path / "out\udcff" / "gptq_report.json").read_bytes())
    assert run["command"] == "gptq " + shell_words([*words, "--quiet"])
    assert dataset_of(tmp_path, "out\udcff/gptq_config.yaml") == "text\udcff.txt"


def test_words_after_two_dashes_are_arguments(gptq: Run) -> None:
    assert "`--my_model` is not a directory" in gptq("verify", "--", "--my_model").stderr


def test_the_data_of_a_run_holds_the_exact_command(
    gptq: Run, quantizer: FakeQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in SECRETS:
        monkeypatch.setattr(sys, "argv", ["gptq", "quantize", "m", "--dataset", text])
        gptq("quantize", "m", "-b", "4")
    words = ["gptq", "quantize", "m", "--dataset"]
    assert [run[2] for run in quantizer.runs] == [shell_words([*words, text]) for text in SECRETS]
