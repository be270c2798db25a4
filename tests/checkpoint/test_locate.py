"""A model on the Hub, which the real client downloads from a server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_cli.checkpoint.locate import _cached, locate_model
from gptq_cli.errors import InputError
from tests.families import save_model
from tests.hub import Fault, Reply, serve

# files that no part of the program reads
NOT_WANTED = (
    "pytorch_model.bin",
    "original/consolidated.safetensors",
    "onnx/model.onnx",
    "runs/events.safetensors",
    "checkpoint-500/model.safetensors",
    "wandb/run.json",
)

SCRIPT = """
import json, sys
from gptq_cli.checkpoint.locate import locate_model, peek_model
from gptq_cli.errors import GptqError

command, model, revision = sys.argv[1], sys.argv[2], sys.argv[3] or None
try:
    if command == "locate":
        source = locate_model(model, revision)
        found = {"directory": str(source.directory)}
    else:
        source, checkpoint = peek_model(model, revision)
        found = {"tensors": sorted(checkpoint.tensors)}
    found |= {"name": source.name, "commit": source.commit}
except GptqError as error:
    found = {"code": error.code, "exit": error.exit_code}
    found |= {"message": str(error), "hint": error.hint}
print(json.dumps(found))
"""

ENTRY = Reply(404, headers={"X-Error-Code": "EntryNotFound"})


def locate(model: str, environment: dict[str, str], revision: str = "") -> dict[str, str]:
    return run("locate", model, environment, revision)


def peek(model: str, environment: dict[str, str], revision: str = "") -> dict[str, str]:
    return run("peek", model, environment, revision)


def run(command: str, model: str, environment: dict[str, str], revision: str) -> dict[str, str]:
    """Return the result or the error that a fresh process finds for `model`."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, model, revision],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    model = save_model(tmp_path_factory.mktemp("hub") / "model", num_hidden_layers=2)
    contents = {path.name: path.read_bytes() for path in model.iterdir()}
    return contents | dict.fromkeys(NOT_WANTED, b"of no use")


def assert_weights(found: dict[str, str], files: dict[str, bytes]) -> None:
    weights = Path(found["directory"]) / "model.safetensors"
    assert weights.read_bytes() == files["model.safetensors"]


def test_locate_downloads_the_needed_files_at_one_commit(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        found = locate("someone/tiny", hub.environment(tmp_path))
        assert found["commit"] == hub.commit("someone/tiny")
        assert found["name"] == "someone/tiny"
        offline = hub.environment(tmp_path, offline=True)
        again = locate("hf://someone/tiny", offline, revision=found["commit"])
        assert again == found  # from the cache
    downloaded = {path.name for path in Path(found["directory"]).iterdir()}
    assert downloaded == set(files) - set(NOT_WANTED)
    assert_weights(found, files)


def test_refusals_of_the_hub_have_codes_and_hints(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(
        {"someone/tiny": files, "someone/gated": files},
        kind="model",
        gated=frozenset({"someone/gated"}),
    ) as hub:
        environment = hub.environment(tmp_path)
        unknown = locate("someone/nothing", environment)
        revision = locate("someone/tiny", environment, revision="v9")
        gated = locate("someone/gated", environment)
    assert (unknown["code"], unknown["exit"]) == ("E_HUB_NOT_FOUND", 3)
    assert "is not on the Hub" in unknown["message"]
    assert revision["code"] == "E_HUB_NOT_FOUND"
    assert "no revision 'v9'" in revision["message"]
    assert gated["code"] == "E_HUB_GATED"
    assert "hf auth login" in gated["hint"]


def test_an_unreachable_hub_is_an_input_error(tmp_path: Path) -> None:
    with serve({}, kind="model") as hub:
        gone = hub.environment(tmp_path)
    found = locate("someone/tiny", gone)
    assert found["code"] == "E_HUB_NETWORK"
    assert "HF_ENDPOINT" in found["hint"]
    assert found["hint"].startswith("there is no directory of that name; ")
    assert locate("someone/tiny", {**gone, "HF_HUB_OFFLINE": "1"})["code"] == "E_HUB_OFFLINE"


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_misspelt_directory_that_could_be_an_id_is_told_the_directory(
    offline: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve({}, kind="model") as hub:
        gone = hub.environment(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("models/SmolLM2").mkdir(parents=True)
    found = locate("models/SmoLLM2", {**gone, **offline})
    said = "did you mean models/SmolLM2? there is no directory of that name; "
    assert (found["exit"], found["hint"].startswith(said)) == (3, True), found


@pytest.mark.parametrize(
    "model", ["./nothing", "/nothing/here", "~/nothing-here", "a b", "x/y/z", "file.txt"]
)
def test_a_name_that_looks_like_a_path_is_not_sent_to_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("no model")

    def download(*_: object, **__: object) -> None:
        raise AssertionError("sent to the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError) as caught:
        locate_model(model)
    assert caught.value.code == "E_MODEL_NOT_FOUND"
    is_file = model == "file.txt"
    assert ("a safetensors checkpoint" in (caught.value.hint or "")) == is_file


def test_a_revision_of_a_local_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no revision 'main'"):
        locate_model(str(tmp_path), "main")


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (
            Fault("/api/", Reply(401, headers={"X-Error-Code": "RepoNotFound"})),
            "E_HUB_NOT_FOUND",
            "not on the Hub",
        ),
        (
            Fault("/api/", Reply(401)),
            "E_HUB_AUTH",
            "the Hub does not let you read model `someone/tiny`",
        ),
        (
            Fault("/resolve/", Reply(403)),
            "E_HUB_AUTH",
            "the Hub does not let you read model `someone/tiny`",
        ),
        (Fault("/api/", Reply(429)), "E_HUB_NETWORK", "429 Too Many"),
        (Fault("/api/", Reply(500)), "E_HUB_NETWORK", "500 Internal"),
        (Fault("/resolve/.*/config.json", ENTRY), "E_HUB_NOT_FOUND", "lacks a file: 404"),
    ],
)
def test_a_fault_of_the_hub_has_a_code_and_a_hint(
    fault: Fault, code: str, message: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        hub.faults.append(fault)
        found = locate("someone/tiny", hub.environment(tmp_path))
    assert (found["code"], found["exit"]) == (code, 3)
    assert message in found["message"]
    assert "`someone/tiny`" in found["message"]
    assert found["hint"]
    assert "\n" not in found["message"]


def test_the_same_command_resumes_a_broken_download(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        hub.faults.append(Fault("GET .*/resolve/.*/model.safetensors", Reply(500), times=20))
        broken = locate("someone/tiny", hub.environment(tmp_path))
        n_before = len(hub.requests)
        hub.faults.clear()
        found = locate("someone/tiny", hub.environment(tmp_path))
        downloads = set()
        for request in hub.requests[n_before:]:
            if request.startswith("GET") and "/resolve/" in request:
                downloads.add(request.rpartition("/")[2])
    assert broken["code"] == "E_HUB_NETWORK"
    assert "run again" in broken["hint"]
    assert_weights(found, files)
    assert downloads == {"model.safetensors"}


def test_the_client_resumes_a_cut_connection(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        hub.faults.append(Fault("GET .*/resolve/.*/model.safetensors", None, times=1))
        found = locate("someone/tiny", hub.environment(tmp_path))
    assert_weights(found, files)


@pytest.mark.parametrize("revision", ["", "main"])
def test_peek_reads_headers_from_the_cache_without_network(
    revision: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        environment = hub.environment(tmp_path)
        locate("someone/tiny", environment)
        online = peek("someone/tiny", environment, revision)
    assert len(online["tensors"]) > 10
    assert peek("someone/tiny", environment, revision) == online
    assert peek("someone/tiny", {**environment, "HF_HUB_OFFLINE": "1"}, revision) == online


def test_peek_without_network_refuses_an_uncached_revision(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        environment = hub.environment(tmp_path)
        locate("someone/tiny", environment)
    assert peek("someone/tiny", environment, "v9")["code"] == "E_HUB_NETWORK"
    assert peek("someone/other", environment)["code"] == "E_HUB_NETWORK"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/api/", Reply(500)),
        Fault("/api/", Reply(401)),
        Fault("/api/", Reply(401, headers={"X-Error-Code": "RepoNotFound"})),
        Fault("/api/", Reply(403, headers={"X-Error-Code": "GatedRepo"})),
    ],
)
def test_plan_and_quantize_use_the_same_cached_snapshot(
    fault: Fault, files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        environment = hub.environment(tmp_path)
        cached = locate("someone/tiny", environment)
        hub.faults.append(fault)
        assert locate("someone/tiny", environment) == cached
        n_before = len(hub.requests)
        peeked = peek("someone/tiny", environment)
        assert (peeked["commit"], peeked["name"]) == (cached["commit"], "someone/tiny")
        assert not any("safetensors" in request for request in hub.requests[n_before:])


def test_the_cache_does_not_replace_an_unknown_revision(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        environment = hub.environment(tmp_path)
        locate("someone/tiny", environment)
        hub.faults.append(Fault("/api/", Reply(404, headers={"X-Error-Code": "RevisionNotFound"})))
        assert peek("someone/tiny", environment, "main")["code"] == "E_HUB_NOT_FOUND"


def test_a_partial_snapshot_in_the_cache_is_not_the_model(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        environment = hub.environment(tmp_path)
        peek("someone/tiny", environment)  # fetches config.json alone
    found = peek("someone/tiny", environment)
    assert (found["code"], found["exit"]) == ("E_HUB_NETWORK", 3)
    assert "check the network" in found["hint"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_snapshot_without_weights_is_not_the_model(
    name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(files[name])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert _cached("someone/tiny", None) is None
