"""The files that examples in documents speak of, tiny: what a reader has before typing the first command."""

from __future__ import annotations

import shutil
from pathlib import Path

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import PausedError
from gptq_cli.pipeline.events import BlockFinished, Event
from gptq_cli.pipeline.run import quantize
from tests.families import save_model, texts

MODEL, QUANTIZED, UNFINISHED = "Qwen3-0.6B", "Qwen3-0.6B-GPTQ-Int4-g128", ".Qwen3-0.6B-GPTQ-Int4-g128.gptq-work"
SETTINGS = {"dataset": "calibration.txt", "nsamples": 4, "seqlen": 64, "batch_size": 2, "device": "cpu"}


def make_workspace(directory: Path) -> Path:
    """A model with two blocks and texts, in `directory`."""
    save_model(directory / MODEL, "qwen3", num_hidden_layers=2, hidden_size=128, intermediate_size=128)
    for seed, name in enumerate(("calibration.txt", "heldout.txt")):
        (directory / name).write_text(texts(4000, seed)[0], encoding="utf-8")
    return directory


def copy_workspace(workspace: Path, directory: Path) -> Path:
    """The same files in another, empty directory."""
    return shutil.copytree(workspace, directory)


def stop_after_the_first_block(event: Event) -> None:
    if isinstance(event, BlockFinished):
        raise PausedError("E_PAUSED", "one block is enough")


def leave_unfinished(output: str = QUANTIZED) -> None:
    """A work directory here, as a run leaves it that ended after one of two blocks."""
    try:
        quantize(MODEL, QuantizeConfig(bits=4, **SETTINGS), output, on_event=stop_after_the_first_block)
    except PausedError:
        return
    raise AssertionError("the run was not stopped")
