"""The driver asks each engine in the engine's own words; stand-ins take the place of engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq_cli.evaluation import engine_driver
from tests.families import save_model

PREFIXES = [[5], [5, 6, 7], [8, 9]]
VOCABULARY = 4


def job(tmp_path: Path, engine: str, **changes: object) -> dict[str, Any]:
    return {
        "engine": engine,
        "checkpoint": "m",
        "converter": None,
        "trust_remote_code": False,
        "prefixes": PREFIXES,
        "vocabulary": VOCABULARY,
        "rows": str(tmp_path / "rows.npy"),
        "answer": str(tmp_path / "answer.json"),
        **changes,
    }


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def numbers(ids: list[int]) -> dict[int, float]:
    """Return what the stand-ins answer: token 1 is missing, token 4 is beyond the vocabulary."""
    return {0: -float(len(ids)), 2: -float(ids[-1]), 3: -1000.0, 4: -0.5}


EXPECTED = [[-1, -100, -5, -100], [-3, -100, -7, -100], [-2, -100, -9, -100]]


def test_transformers_gives_the_logits_of_the_last_token(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    asked = job(tmp_path, "transformers", checkpoint=str(model), vocabulary=512)
    assert engine_driver.run(asked) == {}
    whole = AutoModelForCausalLM.from_pretrained(model)
    rows = np.load(asked["rows"])
    assert (rows.shape, rows.dtype) == ((3, 512), np.float32)
    for ids, row in zip(PREFIXES, rows, strict=True):
        with torch.no_grad():
            expected = whole(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_vllm_is_asked_for_all_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Engine:
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def generate(self, prompts: list[Any], wanted: Any, use_tqdm: bool) -> list[Any]:
            assert (wanted.logprobs, wanted.max_tokens, use_tqdm) == (-1, 1, False)
            found = numbers(prompts[0]["prompt_token_ids"])
            entries = {token: SimpleNamespace(logprob=value) for token, value in found.items()}
            return [SimpleNamespace(outputs=[SimpleNamespace(logprobs=[entries])])]

    stand_in(monkeypatch, "vllm", LLM=Engine, SamplingParams=SimpleNamespace)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    asked = job(tmp_path, "vllm")
    assert engine_driver.run(asked) == {}
    np.testing.assert_array_equal(np.load(asked["rows"]), EXPECTED)
    assert (made[0]["model"], made[0]["trust_remote_code"]) == ("m", False)
    assert (made[0]["max_model_len"], made[0]["max_logprobs"]) == (4, -1)


@pytest.mark.parametrize("as_text", [False, True])
def test_llama_cpp_serves_the_file_of_its_converter(
    as_text: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter = tmp_path / "convert.py"
    converter.write_text("import sys\nopen(sys.argv[3], 'w').write(sys.argv[1])\n")

    class Server:
        def __init__(self, settings: Any) -> None:
            assert Path(settings.model.path).read_text() == "m"

        def handle_completions(self, request: dict[str, Any]) -> Any:
            assert (request["n_predict"], request["n_probs"]) == (1, VOCABULARY)
            found = numbers(request["prompt"])
            entries = [{"id": token, "logprob": value} for token, value in found.items()]
            first = [{"top_logprobs": entries}]
            if as_text:
                return json.dumps({"choices": [{"logprobs": {"content": first}}]})
            return {"completion_probabilities": first}

    settings = SimpleNamespace(model=SimpleNamespace())
    stand_in(monkeypatch, "xllamacpp", CommonParams=lambda: settings, Server=Server)
    asked = job(tmp_path, "llama.cpp", converter=str(converter))
    assert engine_driver.run(asked) == {}
    np.testing.assert_array_equal(np.load(asked["rows"]), EXPECTED)


def test_a_converter_that_fails_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "xllamacpp")
    converter = tmp_path / "convert.py"
    converter.write_text("raise SystemExit('3 bits are not read')\n")
    found = engine_driver.run(job(tmp_path, "llama.cpp", converter=str(converter)))
    reason = "the converter ended with exit code 1: 3 bits are not read"
    assert found == {"failed": f"RuntimeError: {reason}"}
    assert "3 bits are not read\n" in capfd.readouterr().err


def test_mlx_gives_the_logits_of_the_last_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(ids: np.ndarray) -> np.ndarray:
        return ids[..., None] * np.arange(6.0)

    stand_in(monkeypatch, "mlx")
    stand_in(monkeypatch, "mlx.core", array=np.array, float32=np.float32)
    vars(sys.modules["mlx"])["core"] = sys.modules["mlx.core"]
    stand_in(monkeypatch, "mlx_lm")
    stand_in(monkeypatch, "mlx_lm.utils", load_model=lambda folder: (model, folder))
    asked = job(tmp_path, "mlx")
    assert engine_driver.run(asked) == {}
    expected = [[0, 5, 10, 15], [0, 7, 14, 21], [0, 9, 18, 27]]
    np.testing.assert_array_equal(np.load(asked["rows"]), expected)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (ImportError("no such library"), {"missing": "no such library"}),
        (ValueError("3 bits"), {"failed": "ValueError: 3 bits"}),
        (SystemExit(-1), {"failed": "SystemExit: -1"}),
    ],
)
def test_the_answer_tells_why_there_are_no_rows(
    error: BaseException,
    answer: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> engine_driver.NextToken:
        raise error

    ended: list[int] = []
    monkeypatch.setitem(engine_driver.ENGINES, "transformers", fail)
    monkeypatch.setattr(engine_driver.os, "_exit", ended.append)
    asked = job(tmp_path, "transformers")
    (tmp_path / "job.json").write_text(json.dumps(asked))
    engine_driver.main(str(tmp_path / "job.json"))
    found = json.loads(Path(asked["answer"]).read_text())
    assert set(found.pop("versions")) == {"transformers"}
    assert (found, ended) == (answer, [0])
    assert "Traceback" in capfd.readouterr().err
    assert not Path(asked["rows"]).exists()


@pytest.mark.parametrize(
    ("engine", "module"),
    [("vllm", "vllm"), ("llama.cpp", "xllamacpp"), ("mlx", "mlx_lm"), ("transformers", None)],
)
def test_a_job_without_prefixes_asks_whether_an_engine_is_here(
    engine: str, module: str | None, tmp_path: Path
) -> None:
    answer = tmp_path / "answer.json"
    job = {"engine": engine, "method": "fp8", "answer": str(answer)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, engine_driver.__file__, str(tmp_path / "job.json")]
    subprocess.run(command, check=True)
    found = json.loads(answer.read_text())
    assert found.get("missing") == (module and f"No module named '{module}'")
    assert set(found["versions"]) == ({"transformers"} if module is None else set())
