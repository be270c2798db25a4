"""No output holds tokens, credentials, files of strangers or control characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptq_cli.cli import validate_config
from gptq_cli.cli.app import app
from gptq_cli.cli.console import visible
from gptq_cli.errors import without_secrets
from tests.families import save_model, texts
from tests.hub import Fault, Reply, serve

CANARY = "hf_" + "CanaryCanary0123456789abcdef"


def small_run(folder: Path) -> list[str]:
    """Options for a quick run on a text that is written into `folder`."""
    (folder / "text.txt").write_text(texts(2_000)[0])
    given = {
        "bits": 4,
        "group-size": 32,
        "preset": "gptq",
        "dataset": folder / "text.txt",
        "nsamples": 2,
        "batch-size": 1,
        "seqlen": 32,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def gptq(
    folder: Path, environment: dict[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_TOKEN": CANARY, **environment}
    command = [sys.executable, "-m", "gptq_cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {CANARY}!", "token hf_***!"),
        (f"{{'authorization': 'Bearer {CANARY}'}}", "{'authorization': 'Bearer hf_***'}"),
        ("authorization: Basic dXNlcjpwYXNz=", "authorization: Basic ***"),
        ("https://user:pass@host/x and http://t@h", "https://***@host/x and http://***@h"),
        ("a" * 1_000_000, "a" * 1_000_000),
        (
            "hf_short, a@b.c, file:///a/b@c, bearer of news",
            "hf_short, a@b.c, file:///a/b@c, bearer of news",
        ),
    ],
)
def test_only_secrets_are_struck_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert visible(text) == text  # results are not touched


@dataclass(frozen=True)
class HubRuns:
    """A run of a model of the Hub, one that the Hub refused, and what the Hub saw."""

    output: Path
    done: subprocess.CompletedProcess[str]
    refused: subprocess.CompletedProcess[str]
    tokens: list[str]
    commit: str


@pytest.fixture(scope="module")
def hub_runs(tmp_path_factory: pytest.TempPathFactory) -> HubRuns:
    folder = tmp_path_factory.mktemp("hub")
    model = save_model(folder / "model", num_hidden_layers=2)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    words = ["quantize", "someone/tiny", *small_run(folder)]
    with serve({"someone/tiny": files}, kind="model") as hub:
        done = gptq(folder, hub.environment(folder / "a"), *words, "-o", "out", "--json")
        assert done.returncode == 0, done.stderr
        answer = {"X-Error-Message": f"Bearer {CANARY} is not allowed"}
        hub.faults.append(Fault("/api/", Reply(401, headers=answer)))
        refused = gptq(folder, hub.environment(folder / "b"), *words, "-o", "no")
    return HubRuns(folder / "out", done, refused, hub.tokens, hub.commit("someone/tiny"))


def test_no_output_of_the_program_holds_a_token(hub_runs: HubRuns) -> None:
    assert f"Bearer {CANARY}" in hub_runs.tokens  # the client does send it
    assert hub_runs.refused.returncode == 3
    for process in (hub_runs.done, hub_runs.refused):
        assert CANARY not in process.stdout + process.stderr
    written = [path for path in hub_runs.output.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(CANARY.encode() in path.read_bytes() for path in written)


def test_manifest_names_the_model_and_commit_of_the_hub(hub_runs: HubRuns) -> None:
    origin = json.loads((hub_runs.output / "gptq_manifest.json").read_text())["origin"]
    assert (origin["model"], origin["commit"]) == ("someone/tiny", hub_runs.commit)
    assert (origin["dataset"], origin["dataset_revision"]) == (None, None)


@pytest.mark.parametrize("option", ["model", "--dataset", "--config", "--device"])
def test_credentials_in_arguments_are_not_repeated(option: str) -> None:
    secret = f"https://user:{CANARY}@huggingface.co/x"
    given = [secret] if option == "model" else ["m", option, secret]
    words = ["quantize", *given, "-b", "4"]
    found = CliRunner().invoke(app, [*words, "--json"])
    assert found.exit_code in (2, 3)
    assert CANARY not in found.stdout + found.stderr


def test_traceback_of_a_bug_holds_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError(f"while sending Bearer {CANARY}")

    monkeypatch.setattr(validate_config, "resolve", fail)
    found = CliRunner().invoke(app, ["validate-config", "x.yaml", "--json"])
    assert found.exit_code == 1
    assert "Traceback" in found.stderr
    assert CANARY not in found.stderr + found.stdout


def test_secrets_are_struck_out_of_errors_and_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"https://user:{CANARY}@mirror/x")
    monkeypatch.setenv("GPTQ_DATASET", CANARY)
    told = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)["variables"]
    assert (told["HF_ENDPOINT"], told["GPTQ_DATASET"]) == ("https://***@mirror/x", "hf_***")
    refused = CliRunner().invoke(app, ["validate-config", f"/none/{CANARY}.yaml", "--json"])
    (problem,) = json.loads(refused.stdout)["problems"]
    assert (
        problem["message"]
        == "cannot read the configuration /none/hf_***.yaml: No such file or directory"
    )
    assert "/none/hf_***.yaml" in refused.stderr


def test_only_files_of_the_model_reach_the_output(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    for name in (
        ".env",
        ".git/config",
        "original/params.json",
        "pytorch_model.bin",
        "notes.md",
        "folder/inside.json",
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    done = CliRunner().invoke(
        app, ["quantize", str(model), "-o", str(tmp_path / "out"), *small_run(tmp_path)]
    )
    assert done.exit_code == 0, done.stderr
    written = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    own = {"model.safetensors", "config.json", "quantize_config.json", "gptq_config.yaml"}
    copied = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "notes.md",
        "folder/inside.json",
    }
    assert written - {"gptq_manifest.json", "gptq_report.json"} == own | copied


def test_model_name_with_escapes_and_markup_is_shown_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "\x1b[31m[red]evil<script>"
    save_model(tmp_path / name, num_hidden_layers=2)
    done = CliRunner().invoke(app, ["quantize", f"./{name}", *small_run(tmp_path)])
    assert done.exit_code == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith("\\x1b[31m[red]evil<script>-GPTQ-Int4-g32\n")
    checked = CliRunner().invoke(app, ["verify", f"{name}-GPTQ-Int4-g32", "--json"])
    assert (checked.exit_code, json.loads(checked.stdout)["modules"]) == (0, 14)
