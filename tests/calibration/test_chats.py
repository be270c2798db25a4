"""Chats and folders of save_to_disk are refused with a hint that leads to text."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from gptq_cli.calibration.corpus import DatasetSource, load_documents
from gptq_cli.errors import InputError
from tests.calibration.rows import json_lines, parquet_bytes

OPENAI = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
SHAREGPT = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]


def refused(dataset: str | Path, column: str = "text") -> InputError:
    with pytest.raises(InputError) as caught:
        list(load_documents(DatasetSource(str(dataset), text_column=column)).texts)
    return caught.value


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write `rows` in the format of the suffix; return `path`."""
    if path.suffix == ".parquet":
        path.write_bytes(parquet_bytes(pyarrow.Table.from_pylist(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(json_lines(rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("column", "chat"), [("messages", OPENAI), ("conversations", SHAREGPT), ("turns", OPENAI)]
)
def test_a_column_of_chats_is_refused_with_a_remedy(
    suffix: str, column: str, chat: list[Any], tmp_path: Path
) -> None:
    file = written(tmp_path / f"x{suffix}", [{"id": "1", column: chat}, {"id": "2", column: chat}])
    error = refused(file, column)
    assert error.code == "E_DATA_COLUMN"
    assert "a list of chat messages" in str(error)
    assert "apply_chat_template" in (error.hint or "")
    assert "--text-column" not in (error.hint or "")


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "chat"])
def test_hint_names_a_column_that_may_hold_chats(column: str, tmp_path: Path) -> None:
    error = refused(written(tmp_path / "x.jsonl", [{"id": "1", column: OPENAI}]))
    assert str(error).endswith(f"has no column `text`; it has `id`, `{column}`")
    words = f"if `{column}` holds chats: chat messages have to become text first"
    assert words in (error.hint or "")


def test_a_text_column_beside_chats_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "x.jsonl", [{"messages": OPENAI, "text": "rendered"}])
    assert list(load_documents(DatasetSource(str(file))).texts) == ["rendered"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_list_without_messages_is_called_a_list(suffix: str, tmp_path: Path) -> None:
    error = refused(written(tmp_path / f"x{suffix}", [{"text": ["a", "b"], "body": "c"}]))
    assert "holds a list" in str(error)
    assert "chat" not in str(error)
    assert error.hint == "fix it, or name another with --text-column: `body`"


@pytest.mark.parametrize("split", [None, "train", "other"])
def test_hint_converts_a_folder_of_save_to_disk(
    split: str | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = datasets.Dataset.from_dict({"text": ["one", "two"]})
    folder = tmp_path / "it's saved"
    if split is None:
        saved.save_to_disk(folder)
    else:
        datasets.DatasetDict({split: saved}).save_to_disk(folder)
    error = refused(folder)
    assert error.code == "E_DATA_FORMAT"
    assert "was written by save_to_disk of datasets" in str(error)
    program, *words = shlex.split((error.hint or "").partition(": ")[2])
    assert program == "python"
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    assert list(load_documents(DatasetSource(f"{folder}.jsonl")).texts) == ["one", "two"]
    capfd.readouterr()
    monkeypatch.chdir(folder)
    assert refused(".").hint == error.hint
