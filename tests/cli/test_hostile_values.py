"""Odd values in a checkpoint and logs that cannot be written get a code, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_cli.storage.manifest import MANIFEST, read_manifest, sealed
from tests.families import save_model, texts

from .conftest import Run


@pytest.fixture
def words(tmp_path: Path) -> list[str | Path]:
    """Return the words of a quantization that succeeds; its model is in `tmp_path / "m"`."""
    text = tmp_path / "text.txt"
    text.write_text(texts(2_000)[0])
    model = save_model(tmp_path / "m", num_hidden_layers=2)
    sizes = ["--nsamples=4", "--seqlen=32", "--batch-size=1", "--device=cpu"]
    return ["quantize", model, "-b4", "-g32", "-o", tmp_path / "o", "--dataset", text, *sizes]


@pytest.mark.parametrize(
    ("file", "values", "code"),
    [
        ("config.json", {"model_type": ["llama"]}, "E_ARCH"),
        ("config.json", {"hidden_size": 0}, "E_"),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "E_TOKENIZER"),
    ],
)
def test_odd_values_in_a_model_are_refused_with_a_code(
    file: str,
    values: dict[str, object],
    code: str,
    words: list[str | Path],
    gptq: Run,
    tmp_path: Path,
) -> None:
    path = tmp_path / "m" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    result = gptq(*words)
    assert result.exit_code == 3, result.stderr
    assert f"error[{code}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("identity", [[1], "x", None])
def test_a_sealed_manifest_without_an_identity_is_not_ours(
    identity: object, tmp_path: Path
) -> None:
    content = sealed({"schema": 1, "files": {}, "identity": identity})
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST).write_text(json.dumps(sealed({**content, "identity": {}})))
    assert read_manifest(tmp_path) is not None


@pytest.mark.parametrize("command", ["env", "quantize"])
def test_an_unwritable_log_does_not_change_the_exit_code(
    command: str, words: list[str | Path], gptq: Run, tmp_path: Path
) -> None:
    asked = words if command == "quantize" else ["env"]
    result = gptq(*asked, "--log-file", "/dev/full")
    assert result.exit_code == 0, result.stderr
    warning = "warning[W_LOG_FILE]: cannot write the log file `/dev/full`: No space left"
    assert result.stderr.count(warning) == 1
    assert "Traceback" not in result.stderr
    assert (tmp_path / "o").exists() == (command == "quantize")


def test_one_path_for_page_and_picture_is_refused(
    words: list[str | Path], gptq: Run, tmp_path: Path
) -> None:
    assert gptq(*words, "--report").exit_code == 0
    result = gptq("report", tmp_path / "o", "-o", tmp_path / "x", "--png", tmp_path / "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_CFG_CONFLICT]" in result.stderr
    assert "choose another --png" in result.stderr
    assert not (tmp_path / "x").exists()
