"""`gptq eval` with tasks as lm-eval publishes them, on made-up rows that a local Hub serves.

The names and definitions are those that users type. Only the rows are not the published ones.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub import serve

DEMO = Path(__file__).parents[2] / "scripts" / "demo" / "model"
ENDINGS = ("the old bridge", "a lamp [step] in the window", "rain", "three letters from home")
Row = dict[str, Any]


def arc_row(number: int) -> Row:
    """Return a question in the schema of allenai/ai2_arc, whose labels are letters or digits."""
    labels = ["1234", "ABCD"][number % 2]
    texts = [f"{ending} {number}" for ending in ENDINGS]
    return {
        "id": f"q{number}",
        "question": f"What did the {number} children find?",
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": labels[number % 4],
    }


def hellaswag_row(number: int) -> Row:
    """Return a question in the schema of Rowan/hellaswag, with its brackets."""
    return {
        "ind": number,
        "activity_label": "Walking home",
        "ctx_a": f"[header] The {number} children  leave.",
        "ctx_b": "they see",
        "ctx": "",
        "endings": list(ENDINGS),
        "source_id": f"made-up~{number}",
        "split": "train",
        "split_type": "indomain",
        "label": str(number % 4),
    }


def lambada_row(number: int) -> Row:
    return {"text": f"The {number} children saw the rain and went back to the house"}


def parquet(rows: list[Row]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target.getvalue()


def repository(config: str, rows: list[Row]) -> dict[str, bytes]:
    """Return a dataset with one configuration and the same rows in each of three splits."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    files = {}
    for split in ("train", "validation", "test"):
        path = f"{config}/{split}-00000-of-00001.parquet"
        lines += [f"  - split: {split}", f"    path: {path}"]
        files[path] = parquet(rows)
    return {**files, "README.md": "\n".join([*lines, "---", ""]).encode()}


def repositories() -> dict[str, dict[str, bytes]]:
    numbers = range(9)
    return {
        "allenai/ai2_arc": repository("ARC-Easy", [arc_row(each) for each in numbers]),
        "Rowan/hellaswag": repository("default", [hellaswag_row(each) for each in numbers]),
        "EleutherAI/lambada_openai": repository("default", [lambada_row(each) for each in numbers]),
    }


def accuracies(questions: list[tuple[str, list[str], int]]) -> tuple[float, float]:
    """Return acc and acc_norm by one forward for each answer, its score divided by its length."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    plain = by_length = 0
    for prompt, answers, right in questions:
        sums = []
        for answer in answers:
            ids = torch.tensor([tokenizer(f"{prompt} {answer}").input_ids])
            n_prompt = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                rows = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            chosen = rows.gather(-1, ids[0, 1:, None])[:, 0]
            sums.append(float(chosen[n_prompt - 1 :].sum()))
        means = [total / len(answer) for total, answer in zip(sums, answers, strict=True)]
        plain += sums.index(max(sums)) == right
        by_length += means.index(max(means)) == right
    return plain / len(questions), by_length / len(questions)


@pytest.mark.slow
def test_published_tasks_give_the_scores_of_slow_forwards(tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    names = "arc_easy,hellaswag,lambada_openai"
    words = ["eval", DEMO, "--tasks", names, "--dtype", "float32", "--device", "cpu"]
    with serve(repositories()) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "gptq_cli", *map(str, words), "--json", "-q"],
            env={**os.environ, **hub.environment(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    found = {}
    for score in json.loads(done.stdout)["scores"]:
        found[score["task"], score["metric"]] = score["value"]
    arc, swag = [], []
    cleaned = [ending.replace(" [step]", "").replace("[step] ", "") for ending in ENDINGS]
    for number in range(9):
        row = arc_row(number)
        arc.append((f"Question: {row['question']}\nAnswer:", row["choices"]["text"], number % 4))
        swag.append((f"Walking home: The {number} children leave. They see", cleaned, number % 4))
    assert (found["arc_easy", "acc"], found["arc_easy", "acc_norm"]) == accuracies(arc)
    assert (found["hellaswag", "acc"], found["hellaswag", "acc_norm"]) == accuracies(swag)
    assert found["lambada_openai", "perplexity"] > 1
