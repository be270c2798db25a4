"""A run of a tiny model with usual settings, and its output: hashes, weights, events."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint.reader import DequantizingReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import Event, Warned, ignore
from gptq_cli.quantization import run
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from gptq_cli.storage.manifest import REPORT_DATA
from tests.families import text_file

CPU = torch.device("cpu")


def config(**changes: object) -> QuantizeConfig:
    """Return the settings of a run of half a second on a CPU, with `changes`.

    The preset is that which solves fastest. Tests that need another one name it.
    """
    settings = {
        "preset": "gptq",
        "bits": 4,
        "group_size": 32,
        "dataset": text_file(),
        "seqlen": 64,
        "nsamples": 6,
        "batch_size": 4,
    }
    return QuantizeConfig(**(settings | {"device": "cpu"} | changes))


def quantize(tmp_path: Path, model: Path, **changes: object) -> tuple[Path, QuantizeResult]:
    """Quantize `model` into a new directory of `tmp_path`; return the directory and the result."""
    output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    return output, quantize_checkpoint(str(model), output, config(**changes))


def quantize_with_events(
    model: Path, output: Path, **changes: object
) -> tuple[QuantizeResult, list[Event]]:
    """Quantize `model` into `output`; return the result and the events in their order."""
    events: list[Event] = []
    result = quantize_checkpoint(str(model), output, config(**changes), report=events.append)
    return result, events


def messages(events: list[Event], code: str) -> list[str]:
    """Return the messages of the warnings with `code`, in their order."""
    return [event.message for event in events if isinstance(event, Warned) and event.code == code]


def digest(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below `directory` by its relative path.

    The data about the run holds times, so it is left out.
    """
    hashes: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != REPORT_DATA:
            hashes[str(path.relative_to(directory))] = sha256(path.read_bytes()).hexdigest()
    return hashes


def reader(directory: Path) -> DequantizingReader:
    """Return a reader of the weights of a quantized checkpoint as plain tensors."""
    return DequantizingReader(open_checkpoint(directory), CPU, "torch")


def calibration_ids(model: Path, settings: QuantizeConfig) -> Tensor:
    """Return the windows [nsamples, seqlen] on which a run of `model` is calibrated."""
    return run.calibrate(open_checkpoint(model), settings, ignore, SINGLE_PROCESS).windows.ids


def be_rank(rank: int, size: int, port: int) -> None:
    """Make this process one of `size` that torchrun started, with their store at `port`."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
