"""Datasets that the real Hub client downloads from a server on the loopback."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from gptq_cli.calibration import loading
from gptq_cli.errors import InputError
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.storage.work_directory import WorkDirectory, write_run
from tests.calibration.rows import json_lines, parquet_bytes
from tests.families import save_model
from tests.hub import Hub, serve
from tests.runs import config
from tests.tiny import SMALL

READ = """
import json, sys
from gptq_cli.calibration.corpus import DatasetSource, load_documents
from gptq_cli.errors import GptqError

for source in json.loads(sys.argv[1]):
    try:
        documents = load_documents(DatasetSource(**source))
        found = {"texts": list(documents.texts), "revision": documents.revision}
    except GptqError as error:
        found = {"code": error.code, "message": str(error), "hint": error.hint}
    print(json.dumps(found))
"""


def as_parquet(texts: list[str]) -> bytes:
    return parquet_bytes(pyarrow.table({"text": texts}))


def as_json_gz(texts: list[str]) -> bytes:
    lines = json_lines({"text": text, "url": "x"} for text in texts)
    return gzip.compress(lines.encode())


CHAT = [{"role": "user", "content": "a question"}]
WIKITEXT_CARD = b"""---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: test, path: wikitext-2-raw-v1/test-*}
- config_name: wikitext-103-v1
  data_files:
  - {split: train, path: wikitext-103-v1/train-*}
---
"""
REPOS = {
    "Salesforce/wikitext": {
        "README.md": WIKITEXT_CARD,
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": as_parquet(["", " = A = \n", "words \n"]),
        "wikitext-2-raw-v1/test-00000-of-00001.parquet": as_parquet(["", " = Test = \n"]),
        "wikitext-103-v1/train-00000-of-00001.parquet": as_parquet(["another configuration"]),
    },
    "allenai/c4": {
        "en/c4-train.00000-of-01024.json.gz": as_json_gz(["first shard", "of c4"]),
        "en/c4-train.00001-of-01024.json.gz": as_json_gz(["second shard"]),
        "en/c4-validation.00000-of-00008.json.gz": as_json_gz(
            [f"page {index}" for index in range(1200)]
        ),
    },
    "someone/texts": {
        "README.md": b"texts",
        "data/train-00000.parquet": as_parquet(["one", "two"]),
        "data/test-00000.parquet": as_parquet(["three"]),
    },
    "someone/scripted": {"scripted.py": b"print('never run')"},
    "someone/gated": {"train.jsonl": b'{"text": "secret"}\n'},
    "someone/card": {"README.md": b"no data"},
    "someone/broken": {"train.jsonl": b'{"text": "a"}\n{"te'},
    "someone/ragged": {"train.csv": b"text\na\nb,c,d\n"},
    "someone/latin": {"train.jsonl": '{"text": "na\xefve"}\n'.encode("latin1")},
    "someone/chats": {
        "data/train-00000.parquet": parquet_bytes(pyarrow.table({"messages": [CHAT]}))
    },
    "someone/configs": {
        "README.md": b"---\nconfigs:\n"
        b"- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n",
        "a.jsonl": b'{"text": "in a"}\n',
        "b.jsonl": b'{"text": "in b"}\n',
    },
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve(REPOS, gated=frozenset({"someone/gated"})) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


def read(
    hub: Hub, home: Path, sources: Sequence[dict[str, Any]], *, offline: bool = False
) -> list[dict[str, Any]]:
    """Return the texts or the error that a fresh process finds for each source."""
    process = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(list(sources))],
        env={**os.environ, **hub.environment(home, offline=offline)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return [json.loads(line) for line in process.stdout.splitlines()]


SOURCES: list[dict[str, Any]] = [
    {"dataset": None},
    {"dataset": "wikitext2", "purpose": "evaluation"},
    {"dataset": "c4"},
    {"dataset": "c4", "purpose": "evaluation"},
    {"dataset": "someone/texts"},
    {"dataset": "someone/texts", "purpose": "evaluation"},
    {"dataset": "someone/configs", "config": "b"},
]


@pytest.fixture(scope="module")
def found(hub: Hub, home: Path) -> list[dict[str, Any]]:
    return read(hub, home, SOURCES)


def test_hub_datasets_have_texts_and_a_commit(hub: Hub, found: list[dict[str, Any]]) -> None:
    assert [one["texts"] for one in found] == [
        ["", " = A = \n", "words \n"],
        ["", " = Test = \n"],
        ["first shard", "of c4"],
        [f"page {index}" for index in range(1100)],
        ["one", "two"],
        ["three"],
        ["in b"],
    ]
    revisions = [one["revision"] for one in found]
    assert revisions[0:2] == [hub.commit("Salesforce/wikitext")] * 2
    assert revisions[2:4] == [hub.commit("allenai/c4")] * 2
    assert revisions[4:6] == [hub.commit("someone/texts")] * 2
    assert revisions[6:] == [hub.commit("someone/configs")]


@pytest.mark.usefixtures("found")
def test_c4_downloads_one_shard_only(hub: Hub) -> None:
    downloads = [request for request in hub.requests if request.startswith("GET")]
    shards = [request for request in downloads if "c4-train" in request]
    assert shards
    assert all("c4-train.00000-of-01024" in request for request in shards)


def test_offline_mode_reads_the_cache_and_refuses_streams(
    hub: Hub, home: Path, found: list[dict[str, Any]]
) -> None:
    requests_before = len(hub.requests)
    cached, stream, unknown = read(
        hub,
        home,
        [{"dataset": "wikitext2"}, {"dataset": "someone/texts"}, {"dataset": "never/seen"}],
        offline=True,
    )
    assert cached == found[0]
    assert (stream["code"], unknown["code"]) == ("E_HUB_OFFLINE", "E_HUB_OFFLINE")
    assert "offline mode is on" in unknown["message"]
    assert "HF_HUB_OFFLINE" in unknown["hint"]
    assert len(hub.requests) == requests_before


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"dataset": "someone/missing"}, "E_DATA_NOT_FOUND", "`someone/missing` is not on the Hub"),
    ({"dataset": "wikitext"}, "E_DATA_NOT_FOUND", "`wikitext` is not on the Hub"),
    ({"dataset": "someone/card"}, "E_DATA_NOT_FOUND", "has no files of text"),
    ({"dataset": "someone/scripted"}, "E_DATA_SCRIPT", "needs a loading script"),
    ({"dataset": "someone/gated"}, "E_HUB_GATED", "is gated on the Hub"),
    ({"dataset": "someone/configs"}, "E_DATA_CONFIG", "available configs: ['a', 'b']"),
    ({"dataset": "someone/configs", "config": "c"}, "E_DATA_CONFIG", "Available: ['a', 'b']"),
    (
        {"dataset": "someone/texts", "split": "dev"},
        "E_DATA_SPLIT",
        "Available splits: ['train', 'test']",
    ),
    ({"dataset": "someone/broken"}, "E_DATA_FORMAT", "dataset `someone/broken` cannot be read: "),
    ({"dataset": "someone/ragged"}, "E_DATA_FORMAT", "dataset `someone/ragged` cannot be read: "),
    ({"dataset": "someone/latin"}, "E_DATA_ENCODING", "is not UTF-8: byte 0xef"),
    ({"dataset": "someone/chats"}, "E_DATA_TEMPLATE", "the model has no chat template"),
    (
        {"dataset": "someone/chats", "text_column": "messages"},
        "E_DATA_TEMPLATE",
        "row 1 of dataset `someone/chats` holds a chat",
    ),
    (
        {"dataset": "someone/texts", "text_column": "body"},
        "E_DATA_COLUMN",
        "has no column `body`; it has `text`",
    ),
]


def test_refusals_of_the_hub_have_one_line_and_a_hint(hub: Hub, home: Path) -> None:
    errors = read(hub, home, [source for source, _, _ in REFUSALS])
    for (source, code, message), error in zip(REFUSALS, errors, strict=True):
        assert error["code"] == code, (source, error)
        assert message in error["message"]
        assert error["hint"]
        assert "\n" not in error["message"]
    assert errors[1]["hint"] == "did you mean `wikitext2`?"


def test_an_unreachable_hub_is_an_error_without_a_wait(tmp_path: Path) -> None:
    with serve({}) as stopped:
        environment = stopped.environment(tmp_path)
    begin = "import time\nnaps = []\ntime.sleep = naps.append\n"
    script = begin + READ + "\nprint(json.dumps(naps))"
    sources = json.dumps([{"dataset": "wikitext2"}, {"dataset": "someone/texts"}])
    done = subprocess.run(
        [sys.executable, "-c", script, sources],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    *found, naps = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["code"], one["message"].split(":")[0]) for one in found] == [
        ("E_HUB_NETWORK", "dataset `wikitext2` could not be fetched from the Hub"),
        ("E_HUB_NETWORK", "dataset `someone/texts` could not be fetched from the Hub"),
    ]
    assert all("HF_HUB_OFFLINE=1" in one["hint"] for one in found)
    assert all(one["hint"].startswith("give text of this machine (--dataset ") for one in found)
    assert (naps, done.stderr) == ([], "")


def test_a_hub_that_keeps_silent_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    end = threading.Event()

    def hang(*_: object) -> None:
        asked.set()
        end.wait(60)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "_ask_hub", hang)
    monkeypatch.setattr(loading, "REACH_SECONDS", 0.1)
    model = save_model(tmp_path / "model", **SMALL)
    with pytest.raises(
        InputError, match=r"fetched from the Hub: no answer in 0\.1 seconds"
    ) as caught:
        prepare_run(str(model), tmp_path / "out", config(dataset="c4"), RunOptions())
    end.set()
    assert asked.is_set()
    assert (caught.value.code, caught.value.exit_code) == ("E_HUB_NETWORK", 3)
    assert (caught.value.hint or "").startswith("give text of this machine (--dataset ")


OFF = "huggingface_hub.constants.HF_HUB_OFFLINE"


def refuse_to_answer(_: str, failures: list[Exception]) -> None:
    failures.append(ConnectionError("no route to host"))


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_own_text_calibrates(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OFF, offline)
    monkeypatch.setattr(loading, "_ask_hub", refuse_to_answer)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, out = save_model(tmp_path / "model", **SMALL), tmp_path / "out"
    prepared = prepare_run(str(model), out, config(dataset=None), RunOptions())
    assert prepared.config.dataset == "english"
    [(code, text)] = prepared.warnings
    assert code == "W_DATA_BUILT_IN"
    assert "the run calibrates on `english`" in text
    assert text.endswith("wikitext2 or your own text is better: --dataset FILE")


def test_a_cached_default_text_is_read_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OFF, True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "Salesforce___wikitext").mkdir()
    model = save_model(tmp_path / "model", **SMALL)
    prepared = prepare_run(str(model), tmp_path / "out", config(dataset=None), RunOptions())
    assert (prepared.config.dataset, prepared.warnings) == (None, ())


@pytest.mark.parametrize("begun", [None, "english"])
def test_a_begun_run_keeps_its_text(
    begun: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Exception] = [ConnectionError("no route to host")]
    monkeypatch.setattr(OFF, False)
    monkeypatch.setattr(loading, "_ask_hub", lambda _, failures: failures.extend(answers))
    model, out = save_model(tmp_path / "model", **SMALL), tmp_path / "out"
    work = WorkDirectory(out).path
    work.mkdir()
    write_run(work, {}, {"config": {"dataset": begun}})
    asked = config(dataset=None)
    if begun is None:
        with pytest.raises(InputError) as caught:
            prepare_run(str(model), out, asked, RunOptions())
        assert (caught.value.code, caught.value.exit_code) == ("E_HUB_NETWORK", 3)
        again = prepare_run(str(model), out, asked, RunOptions(resume="never"))
        assert again.config.dataset == "english"
        return
    answers.clear()  # the network is back
    assert prepare_run(str(model), out, asked, RunOptions()).config.dataset == "english"
    again = prepare_run(str(model), out, asked, RunOptions(resume="never"))
    assert again.config.dataset is None


def test_a_server_that_is_not_the_hub_is_an_unreachable_one() -> None:
    text = "Couldn't find 'a/b' on the Hugging Face Hub either: LocalEntryNotFoundError: An error"
    found = loading.refusal(FileNotFoundError(text), "a/b")
    assert found is not None
    assert (found.code, found.exit_code) == ("E_HUB_NETWORK", 3)
    assert str(found) == "dataset `a/b` could not be fetched from the Hub: no usable answer"
