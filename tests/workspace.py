"""The files that the examples of the documents name: a tiny model, texts, a recipe, a result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gptq_cli.api import evaluate_perplexity, quantize
from gptq_cli.config.resolve import resolve
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import PausedError
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import BlockFinished, Event
from tests.families import save_model, texts

ROOT = Path(__file__).resolve().parents[1]
MODEL, QUANTIZED = "Qwen3-0.6B", "Qwen3-0.6B-GPTQ-Int4-g128"
FILES = ("calibration.txt", "heldout.txt", "recipe.yaml", "ppl.json", "chats.jsonl", "chat.jinja")
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
SMALL = {"GPTQ_NSAMPLES": "4", "GPTQ_SEQLEN": "64", "GPTQ_BATCH_SIZE": "2", "GPTQ_DEVICE": "cpu"}
SMALL |= {"GPTQ_PRESET": "gptq"}  # which solves fastest
SETTINGS = {
    "preset": "gptq",
    "dataset": "calibration.txt",
    "nsamples": 4,
    "seqlen": 64,
    "batch_size": 2,
    "device": "cpu",
}


def config(**changes: object) -> QuantizeConfig:
    """Return the settings of a run in the current directory."""
    return QuantizeConfig(bits=4, **(SETTINGS | changes))


def make_workspace(directory: Path) -> Path:
    """Write a model of two blocks, texts, a recipe, and the outputs of earlier commands."""
    save_model(
        directory / MODEL, "qwen3", num_hidden_layers=2, hidden_size=128, intermediate_size=128
    )
    for seed, name in enumerate(FILES[:2]):
        (directory / name).write_text(texts(4000, seed)[0], encoding="utf-8")
    (directory / MODEL / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (directory / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    (directory / "chats.jsonl").write_text(chats(40), encoding="utf-8")
    (directory / "recipe.yaml").write_text("bits: 4\n", encoding="utf-8")
    settings = config(dataset=str(directory / FILES[0]))
    quantize(directory / MODEL, settings, directory / "made" / QUANTIZED, report=True)
    request = EvalRequest(dataset=str(directory / FILES[1]), seqlen=64, max_windows=2)
    found = evaluate_perplexity(directory / MODEL, request).to_json()
    (directory / "ppl.json").write_text(json.dumps(found), encoding="utf-8")
    return directory


def chats(number: int) -> str:
    """Return lines of JSON, each a chat of two messages."""
    lines = []
    for index in range(number):
        question = {"role": "user", "content": f"how much is {index} and {index}?"}
        answer = {"role": "assistant", "content": f"{index} and {index} is {2 * index}."}
        lines.append(json.dumps({"messages": [question, answer]}) + "\n")
    return "".join(lines)


def copy_workspace(workspace: Path, directory: Path) -> Path:
    """Copy the files with which a reader begins into `directory`; return it."""
    shutil.copytree(workspace / MODEL, directory / MODEL)
    for name in FILES:
        shutil.copy(workspace / name, directory)
    (directory / "scripts").symlink_to(ROOT / "scripts")
    return directory


def supply(workspace: Path, word: str) -> None:
    """Put the checkpoint or unfinished work that a command expects under the name `word` here."""
    name = word.removeprefix("./")
    if name.startswith(".") and name.endswith(".gptq-work"):
        leave_unfinished(name.removeprefix(".").removesuffix(".gptq-work"))
    elif name in (QUANTIZED, "out"):
        shutil.copytree(workspace / "made" / QUANTIZED, name)


def stop_after_the_first_block(event: Event) -> None:
    if isinstance(event, BlockFinished):
        raise PausedError("E_PAUSED", "one block is enough")


def leave_unfinished(output: str) -> None:
    """Write the work directory of a run into `output` that ended after one of two blocks."""
    shutil.rmtree(output, ignore_errors=True)
    try:
        quantize(
            MODEL, resolve({"bits": 4}, SMALL).config, output, on_event=stop_after_the_first_block
        )
    except PausedError:
        return
    raise AssertionError("the run was not stopped")
