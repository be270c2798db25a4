"""`gptq push`: the real client of the Hub against a server on loopback that keeps the uploads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.events import Warned
from gptq_cli.publish.push import _settings
from gptq_cli.storage.manifest import sealed
from tests.families import save_model, texts
from tests.hub import Fault, Hub, Reply, serve
from tests.hub_uploads import Uploads, blob_id, refusal
from tests.runs import digest, quantize

from .conftest import Run, validate_output

CANARY = "hf_" + "CanaryCanary0123456789abcdef"
SOURCE_CARD = """---
license: other
license_name: ours
license_link: LICENSE
language: [en, no]
base_model: a/b
---
# Source
"""
# The client reads its endpoint when it is imported, so one process serves all tests:
# it reads a line of arguments and writes a line with the result.
CLIENT = """
import json, sys
from typer.testing import CliRunner
from gptq_cli.cli.app import app
for line in sys.stdin:
    done = CliRunner().invoke(app, ["push", *json.loads(line)])
    heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    print(json.dumps([done.exit_code, done.stdout, done.stderr, heavy]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str


Push = Callable[..., Done]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantize a model that has a card and a licence."""
    folder = tmp_path_factory.mktemp("push")
    model = save_model(folder / "model", num_hidden_layers=2)
    (model / "README.md").write_text(SOURCE_CARD)
    (model / "LICENSE").write_text("be kind")
    (folder / "text.txt").write_text(texts()[0])
    made, _ = quantize(folder, model, dataset=str(folder / "text.txt"), max_shard_size="150KB")
    (made / "gptq_report.json").write_text('{"command": "gptq quantize /secret/path"}')
    return made


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, subprocess.Popen[str]]]:
    """Start the server and the process of the client."""
    with serve({}, kind="model") as hub:
        environment = hub.environment(tmp_path_factory.mktemp("home")) | {"HF_TOKEN": CANARY}
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        yield hub, process
        process.communicate(timeout=30)


def emptied(hub: Hub) -> Hub:
    """Remove the repositories, requests, faults and tokens of the server; return it."""
    hub.repos, hub.uploads = {}, Uploads()
    hub.requests.clear()
    hub.faults.clear()
    hub.tokens.clear()
    return hub


@pytest.fixture
def hub(client: tuple[Hub, subprocess.Popen[str]]) -> Hub:
    """Return the server without repositories."""
    return emptied(client[0])


def send(process: subprocess.Popen[str], *words: object) -> Done:
    """Let the client push with the arguments `words`."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
    process.stdin.flush()
    code, stdout, stderr, heavy = json.loads(process.stdout.readline())
    assert heavy == []
    assert CANARY not in stdout + stderr
    return Done(code, stdout, stderr)


@pytest.fixture
def push(client: tuple[Hub, subprocess.Popen[str]], output: Path, hub: Hub) -> Push:
    """Return a function that pushes `output` to the empty server."""
    process = client[1]
    assert hub.repos == {}

    def run(*words: object, directory: Path = output, base: str | None = "org/tiny") -> Done:
        named = ["--base-model", base] if base else []
        return send(process, directory, "me/tiny", *named, *words)

    return run


def front_matter(card: bytes | str) -> dict[str, Any]:
    """Return the metadata of a model card."""
    text = card.decode() if isinstance(card, bytes) else card
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@dataclass(frozen=True)
class Pushed:
    """A push of `output` to an empty server: the answer and the state of the server after it."""

    done: Done
    before: dict[str, str]  # hash of each file of `output` before the push
    files: dict[str, bytes]
    private: set[str]
    commit: str
    tokens: list[str]


@pytest.fixture(scope="module")
def pushed(client: tuple[Hub, subprocess.Popen[str]], output: Path) -> Pushed:
    """Push `output` once for all tests of its result."""
    hub, process = client
    emptied(hub)
    before = digest(output)
    done = send(process, output, "me/tiny", "--base-model", "org/tiny", "--json")
    files = dict(hub.repos["me/tiny"])
    del files[".gitattributes"]
    private, tokens = set(hub.uploads.private), list(hub.tokens)
    return Pushed(done, before, files, private, hub.commit("me/tiny"), tokens)


def test_a_push_makes_a_private_repository_and_reports_it(pushed: Pushed) -> None:
    assert pushed.done.exit_code == 0, pushed.done.stderr
    assert "error" not in pushed.done.stderr
    data = json.loads(pushed.done.stdout)
    validate_output(data, "push")
    assert pushed.private == {"me/tiny"}
    assert data["commit"] == pushed.commit
    assert {path: len(content) for path, content in pushed.files.items()} == data["files"]


def test_a_push_changes_only_card_and_manifest(pushed: Pushed, output: Path) -> None:
    same: set[str] = set()
    for path in pushed.before:
        if pushed.files.get(path) == (output / path).read_bytes():
            same.add(path)
    changed, omitted = {"README.md", "gptq_manifest.json"}, {"gptq_report.json"}
    assert same == set(pushed.before) - changed - omitted
    assert digest(output) == pushed.before


def test_a_pushed_model_verifies_after_a_download(pushed: Pushed, tmp_path: Path) -> None:
    assert len([path for path in pushed.files if path.endswith(".safetensors")]) >= 2
    for path, content in pushed.files.items():
        (tmp_path / path).write_bytes(content)
    assert verify_checkpoint(tmp_path, full=True).ok


def test_a_push_uploads_no_token_and_no_path(pushed: Pushed) -> None:
    assert f"Bearer {CANARY}" in pushed.tokens  # the client does send it
    for content in pushed.files.values():
        assert b"/secret/path" not in content
        assert CANARY.encode() not in content


def test_all_files_are_sent_in_one_commit_to_main(push: Push, hub: Hub) -> None:
    assert push().exit_code == 0
    commits = [request for request in hub.requests if "/commit/" in request]
    assert [request.split("/")[-1].split("?")[0] for request in commits] == ["main"]


def test_a_push_is_refused_after_a_rival_commit(push: Push, hub: Hub) -> None:
    hub.uploads.rival = {"theirs.txt": b"new"}
    done = push()
    assert (done.exit_code, done.stdout) == (3, "")
    assert "error[E_PUSH]" in done.stderr
    assert "run the same command again" in done.stderr
    assert set(hub.repos["me/tiny"]) == {".gitattributes", "theirs.txt"}


def test_a_repeated_push_sends_nothing(push: Push, hub: Hub) -> None:
    assert push().exit_code == 0
    state, asked = hub.commit("me/tiny"), len(hub.requests)
    again = json.loads(push("--json").stdout)
    assert (again["already_there"], again["commit"]) == (True, state)
    assert not [request for request in hub.requests[asked:] if not request.startswith("GET ")]


def test_a_repeated_upload_sends_only_the_missing_files(push: Push, hub: Hub, output: Path) -> None:
    *_, shard = sorted(output.glob("*.safetensors"))
    last = hashlib.sha256(shard.read_bytes()).hexdigest()
    hub.faults.append(Fault(f"PUT /lfs/{last}", Reply(403)))
    broken = push()
    assert (broken.exit_code, "error[E_PUSH]" in broken.stderr) == (3, True)
    assert set(hub.repos["me/tiny"]) == {".gitattributes"}
    hub.faults.clear()
    hub.requests.clear()
    assert push().exit_code == 0
    sent = [request for request in hub.requests if request.startswith("PUT")]
    assert sent == [f"PUT /lfs/{last}"]


def test_a_push_fails_if_the_hub_corrupts_a_file(push: Push, hub: Hub) -> None:
    hub.uploads.corrupt = "config.json"
    done = push()
    assert (done.exit_code, done.stdout) == (3, "")
    assert "error[E_PUSH]: commit" in done.stderr
    assert "of model `me/tiny` does not hold the files that were sent" in done.stderr


def test_overwrite_replaces_a_model_and_deletes_its_weights(push: Push, hub: Hub) -> None:
    old = {
        "model.safetensors": b"old",
        "config.json": b"{}",
        "picture.png": b"!",
        ".gitattributes": b"",
    }
    hub.repos = {"me/tiny": dict(old)}
    hub.uploads.private.add("me/tiny")
    refused = push()
    assert (refused.exit_code, refused.stdout) == (6, "")
    assert (
        "error[E_OUT_EXISTS]: model `me/tiny` holds other files already: config.json, model"
        in refused.stderr
    )
    assert "--overwrite" in refused.stderr
    assert hub.repos["me/tiny"] == old
    done = push("--overwrite", "--json")
    assert json.loads(done.stdout)["deleted"] == ["model.safetensors"]
    assert hub.repos["me/tiny"]["picture.png"] == b"!"
    assert "model.safetensors" not in hub.repos["me/tiny"]


def test_a_push_obeys_or_refuses_the_requested_privacy(push: Push, hub: Hub) -> None:
    hub.repos = {"me/tiny": {".gitattributes": b""}}
    assert "is public already" in push().stderr
    assert hub.repos["me/tiny"] == {".gitattributes": b""}
    assert push("--public").exit_code == 0
    hub.repos, hub.uploads.private = {}, set()
    assert push("--public").exit_code == 0
    assert hub.uploads.private == set()
    hub.uploads.private.add("me/tiny")
    refused = push("--public")
    assert (refused.exit_code, "omit --public" in refused.stderr) == (3, True)


@pytest.mark.parametrize(
    ("fault", "code", "message", "hint"),
    [
        (
            Fault("/api/repos/create", Reply(401)),
            "E_HUB_AUTH",
            "not logged in to the Hub",
            "hf auth login",
        ),
        (
            Fault("/api/repos/create", Reply(403)),
            "E_PUSH",
            "the Hub refused the upload to",
            "may write there",
        ),
        (Fault("POST .*/commit/", Reply(413)), "E_PUSH", "refused", "unchanged"),
        (
            Fault("/commit/", Reply(409, b'{"error": "conflict"}')),
            "E_PUSH",
            "conflict",
            "same command again",
        ),
        (
            Fault("GET /api/models/me/tiny$", refusal(403, "GatedRepo")),
            "E_HUB_GATED",
            "is gated",
            "accept its terms",
        ),
        (
            Fault("/commit/", refusal(404, "RepoNotFound")),
            "E_HUB_NOT_FOUND",
            "is not on the Hub",
            "spelling",
        ),
        (Fault("/commit/", Reply(429)), "E_HUB_NETWORK", "429", "only what is missing"),
    ],
)
def test_a_refusal_of_the_hub_has_its_code_hint_and_exit_code(
    fault: Fault, code: str, message: str, hint: str, push: Push, hub: Hub
) -> None:
    hub.faults.append(fault)
    done = push()
    assert (done.exit_code, done.stdout) == (3, "")
    lines = done.stderr.splitlines()
    error = next(line for line in lines if line.startswith(f"error[{code}]: "))
    assert message in error
    assert "`me/tiny`" in error
    assert hint in lines[-1]


def test_a_damaged_checkpoint_is_not_sent(
    push: Push, hub: Hub, output: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(output, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    done = push(directory=broken)
    assert (done.exit_code, hub.requests) == (4, [])
    assert "error[E_VERIFY]" in done.stderr
    assert "gptq verify" in done.stderr


MEASURED = {
    "perplexity": 12.3456,
    "baseline_perplexity": 11.5,
    "kl": 0.0123,
    "top1_agreement": 0.987,
    "dataset": "wikitext2",
    "dataset_config": "wikitext-2-raw-v1",
    "dataset_split": "test",
    "dataset_revision": "a" * 40,
    "windows": 3,
    "seqlen": 64,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def card(
    client: tuple[Hub, subprocess.Popen[str]],
    output: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Push `output` with an evaluation; return the card."""
    hub, process = client
    emptied(hub)
    measured = tmp_path_factory.mktemp("card") / "ppl.json"
    measured.write_text(json.dumps(MEASURED))
    words = ["--base-model", "org/tiny", "--evaluation", measured]
    assert send(process, output, "me/tiny", *words).exit_code == 0
    return hub.repos["me/tiny"]["README.md"].decode()


def test_the_card_has_the_base_model_and_its_licence(card: str) -> None:
    data = front_matter(card)
    assert (data["base_model"], data["base_model_relation"]) == ("org/tiny", "quantized")
    assert (data["license"], data["license_name"]) == ("other", "ours")
    assert data["license_link"] == "LICENSE"
    assert (data["language"], data["pipeline_tag"]) == (["en", "no"], "text-generation")
    assert "datasets" not in data


def test_the_card_has_the_evaluation(card: str) -> None:
    result = front_matter(card)["model-index"][0]["results"][0]
    assert result["dataset"]["type"] == "Salesforce/wikitext"
    assert result["metrics"] == [{"type": "perplexity", "value": 12.3456}]
    for words in (
        "| this checkpoint | 12.3456 |",
        "| before | 11.5000 |",
        "0.0123 nats",
        "98.70 %",
        "3 windows of 64",
    ):
        assert words in card


def test_the_card_names_the_worst_layer(card: str, output: Path) -> None:
    manifest = json.loads((output / "gptq_manifest.json").read_text())
    worst = max(manifest["layers"], key=lambda layer: layer["relative_error"])
    assert f"| `{worst['name']}` | 4 | {worst['relative_error']:.2e} |" in card


def test_card_and_manifest_name_no_local_path(card: str, output: Path) -> None:
    manifest = json.loads((output / "gptq_manifest.json").read_text())
    assert set(manifest["origin"].values()) == {None}  # the model and the text are local
    assert str(output.parent) not in card


@pytest.mark.parametrize(
    "change",
    [
        {"origin": 3, "identity": [], "layers": {}},
        {"layers": [1, {}, {"name": "x"}], "experts": [{"uncovered": None}]},
    ],
)
def test_a_manifest_without_useful_values_shortens_the_card(
    change: dict[str, Any], push: Push, output: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    manifest = json.loads((copy / "gptq_manifest.json").read_text()) | change
    (copy / "gptq_manifest.json").write_text(json.dumps(sealed(manifest)))
    done = push("--dry-run", directory=copy)
    assert done.exit_code == 0, done.stderr
    assert "Worst layers" not in done.stdout
    assert "gptq quantize org/tiny" in done.stdout


def test_the_base_model_of_the_manifest_needs_no_flag(
    push: Push, hub: Hub, output: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    manifest = json.loads((copy / "gptq_manifest.json").read_text())
    manifest["origin"] = {
        "model": "org/source",
        "commit": "b" * 40,
        "dataset": "wikitext2",
        "dataset_revision": "c",
    }
    (copy / "gptq_manifest.json").write_text(json.dumps(sealed(manifest)))
    assert push(directory=copy, base=None).exit_code == 0
    card = hub.repos["me/tiny"]["README.md"].decode()
    assert front_matter(card)["base_model"] == "org/source"
    assert front_matter(card)["datasets"] == ["Salesforce/wikitext"]
    assert f"gptq quantize org/source --revision {'b' * 40} --config gptq_config.yaml" in card


def test_a_card_leaves_out_the_folder_of_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "gptq_config.yaml").write_text("bits: 4\nchat_template: /secret/chat.jinja\n")
    warned: list[object] = []
    settings = _settings(tmp_path, warned.append)
    assert settings["chat_template"] == "chat.jinja"
    [warning] = warned
    assert isinstance(warning, Warned)
    assert warning.code == "W_PUSH_PATH"
    assert warning.message.endswith("the local path of the chat template: /secret/chat.jinja")


def test_a_dry_run_prints_a_card_that_push_accepts(push: Push, hub: Hub, tmp_path: Path) -> None:
    printed = push("--dry-run")
    assert (printed.exit_code, hub.requests) == (0, [])
    assert "warning[W_PUSH_PATH]" in printed.stderr
    (tmp_path / "card.md").write_text(printed.stdout + "\nMine.\n")
    assert push("--card", tmp_path / "card.md").exit_code == 0
    assert blob_id(hub.repos["me/tiny"]["README.md"]) == blob_id(
        (tmp_path / "card.md").read_bytes()
    )


def test_a_checkpoint_of_another_tool_gets_a_short_card(
    push: Push, hub: Hub, output: Path, tmp_path: Path
) -> None:
    foreign = Path(shutil.copytree(output, tmp_path / "foreign"))
    for name in ("gptq_manifest.json", "gptq_config.yaml", "README.md", "gptq_report.json"):
        (foreign / name).unlink()
    assert push(directory=foreign).exit_code == 0
    card = hub.repos["me/tiny"]["README.md"].decode()
    assert "org/tiny, quantized to 4 bits with GPTQ." in card
    assert "| format | gptq, 4 bits, group size 32, symmetric |" in card
    for words in ("gptq quantize", "Worst layers", "Versions", "license"):
        assert words not in card


def test_push_is_refused_in_offline_mode(gptq: Run, output: Path) -> None:
    # tests/conftest.py sets offline mode in this process
    done = gptq("push", output, "me/tiny", "--base-model", "org/tiny")
    assert (done.exit_code, done.stdout) == (3, "")
    expected = "error[E_HUB_OFFLINE]: model `me/tiny` cannot be reached: offline mode is on"
    assert expected in done.stderr
    assert "unset HF_HUB_OFFLINE" in done.stderr


@pytest.mark.parametrize(
    ("words", "base", "exit_code", "message", "hint"),
    [
        ([], None, 2, "error[E_CFG_MISSING]", "--base-model Qwen/Qwen3-0.6B"),
        (
            [],
            "./model",
            2,
            "--base-model must be the id of a Hub model, got './model'",
            "its name on the Hub",
        ),
        ([], "/abs/path", 2, "error[E_CFG_RANGE]", "its name on the Hub"),
        (
            ["--card", "none.md"],
            "org/tiny",
            2,
            "error[E_CFG_FILE]: cannot read the card `none.md`: No such file",
            "",
        ),
        (
            ["--evaluation", "none.json"],
            "org/tiny",
            3,
            "error[E_REPORT]: there is no file `none.json`",
            "eval-ppl",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_any_request(
    words: list[str],
    base: str | None,
    exit_code: int,
    message: str,
    hint: str,
    push: Push,
    hub: Hub,
) -> None:
    done = push(*words, base=base)
    assert (done.exit_code, done.stdout, hub.requests) == (exit_code, "", [])
    assert message in done.stderr
    assert hint in done.stderr
    assert len(done.stderr.splitlines()) <= 4
