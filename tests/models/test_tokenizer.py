"""A tokenizer that is code of its own runs only when that is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.calibration.windows import load_encoder
from gptq_cli.errors import InputError
from tests.families import save_model

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path(r"{mark}").touch()

class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = save_model(tmp_path / "model [1]*", num_hidden_layers=2)
    file = directory / "tokenizer_config.json"
    said: dict[str, Any] = json.loads(file.read_text())
    auto_map = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    file.write_text(json.dumps({**said, "tokenizer_class": "Own", "auto_map": auto_map}))
    (directory / "tokenization_own.py").write_text(CODE.format(mark=tmp_path / "it ran"))
    return directory


def test_tokenizer_code_is_refused_and_does_not_run(model: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_encoder(model, trust_remote_code=False)
    assert (caught.value.code, caught.value.exit_code) == ("E_REMOTE_CODE", 3)
    assert (
        str(caught.value)
        == f"the tokenizer of `{model}` needs its own Python code to run: tokenization_own.py"
    )
    assert caught.value.hint == "read that code, then add --trust-remote-code"
    assert not (model.parent / "it ran").exists()


def test_trusted_tokenizer_code_runs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(model.parent / "modules")
    )
    encoder = load_encoder(model, trust_remote_code=True)
    assert len(encoder("some text", False)) > 1
    assert (model.parent / "it ran").exists()
