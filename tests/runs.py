"""Quantizing a tiny model for a test, and looking at what came out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint.reader import DequantizingReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import ignore
from gptq_cli.quantization import run
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from tests.families import texts

CPU = torch.device("cpu")


def config(**changes: object) -> QuantizeConfig:
    settings = {
        "bits": 4,
        "group_size": 32,
        "dataset": texts(),
        "seqlen": 64,
        "nsamples": 6,
        "batch_size": 4,
    }
    return QuantizeConfig(**(settings | {"device": "cpu"} | changes))


def quantize(tmp_path: Path, model: Path, **changes: object) -> tuple[Path, QuantizeResult]:
    output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    return output, quantize_checkpoint(str(model), output, config(**changes))


def digest(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def reader(directory: Path) -> DequantizingReader:
    return DequantizingReader(open_checkpoint(directory), CPU, "torch")


def calibration_ids(model: Path, settings: QuantizeConfig) -> Tensor:
    """The windows [nsamples, seqlen] that a run of `model` would be calibrated on."""
    return run._calibrate(open_checkpoint(model), settings, ignore, SINGLE_PROCESS).windows.ids
