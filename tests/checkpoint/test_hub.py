"""MODEL as a Hub id: the real client against a server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_cli.checkpoint.hub import locate_model
from gptq_cli.errors import InputError
from tests.families import save_model
from tests.hub import serve

LOCATE = """
import json, sys
from gptq_cli.checkpoint.hub import locate_model
from gptq_cli.errors import GptqError
try:
    found = locate_model(sys.argv[1], sys.argv[2] or None)
    print(json.dumps({"directory": str(found.directory), "name": found.name, "commit": found.commit}))
except GptqError as error:
    print(json.dumps({"code": error.code, "exit": error.exit_code, "message": str(error), "hint": error.hint}))
"""


def locate(model: str, environment: dict[str, str], revision: str = "") -> dict[str, str]:
    command = [sys.executable, "-c", LOCATE, model, revision]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    model = save_model(tmp_path_factory.mktemp("hub") / "model", num_hidden_layers=2)
    return {path.name: path.read_bytes() for path in model.iterdir()} | {"pytorch_model.bin": b"a pickle"}


def test_a_hub_id_is_downloaded_at_one_commit_without_pickles(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve({"someone/tiny": files}, kind="model") as hub:
        found = locate("someone/tiny", hub.environment(tmp_path))
        assert found["commit"] == hub.commit("someone/tiny")
        assert found["name"] == "someone/tiny"
        again = locate("hf://someone/tiny", hub.environment(tmp_path, offline=True), revision=found["commit"])
        assert again == found  # from the cache
    downloaded = {path.name for path in Path(found["directory"]).iterdir()}
    assert downloaded == set(files) - {"pytorch_model.bin"}
    assert (Path(found["directory"]) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_the_hubs_refusals_have_codes_and_hints(files: dict[str, bytes], tmp_path: Path) -> None:
    with serve(
        {"someone/tiny": files, "someone/gated": files}, kind="model", gated=frozenset({"someone/gated"})
    ) as hub:
        environment = hub.environment(tmp_path)
        unknown = locate("someone/nothing", environment)
        revision = locate("someone/tiny", environment, revision="v9")
        gated = locate("someone/gated", environment)
    assert (unknown["code"], unknown["exit"]) == ("E_MODEL_NOT_FOUND", 3)
    assert "no model on the Hub" in unknown["message"]
    assert revision["code"] == "E_MODEL_HUB"
    assert "no revision 'v9'" in revision["message"]
    assert gated["code"] == "E_MODEL_HUB"
    assert "hf auth login" in gated["hint"]


def test_a_hub_that_cannot_be_reached_is_an_input_error(tmp_path: Path) -> None:
    with serve({}, kind="model") as hub:
        gone = hub.environment(tmp_path)
    found = locate("someone/tiny", gone)
    assert found["code"] == "E_MODEL_HUB"
    assert "HF_ENDPOINT" in found["hint"]
    assert locate("someone/tiny", {**gone, "HF_HUB_OFFLINE": "1"})["code"] == "E_MODEL_HUB"


@pytest.mark.parametrize("model", ["./nothing", "/nothing/here", "~/nothing-here", "a b", "x/y/z", "file.txt"])
def test_what_looks_like_a_path_is_never_sent_to_the_hub(
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


def test_a_revision_of_a_local_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no revision 'main'"):
        locate_model(str(tmp_path), "main")
