#!/usr/bin/env python3
"""Check that a device quantizes as well as the CPU does, and repeats its bytes.

    python scripts/check_gpu_quality.py --json FILE [--device cuda] [--tiny]

Runs the demo model and a tiny mixture on both. Codes may differ between devices, because sums are
rounded in another order, but errors and KL may not: relative errors must agree within 1 %, KL
within 5 %. On the device itself two runs, and runs with other use of its memory, must write the
same bytes. Prints a line for each check; the exit code is 1 if one fails.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import DEMO, argument_parser, write_json

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import Event, Warned
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from gptq_cli.runtime import memory, open_model
from tests.families import MIXTURES, save
from tests.families import random_model as random_mixture
from tests.runs import digest

PRESETS = ("gptq", "balanced", "best")
ERRORS_AGREE, KL_AGREES = 0.01, 0.05
DEVICE_MEMORY = {
    "every batch repeats the block": (
        memory,
        "WAITING_SHARE",
        dict.fromkeys(memory.WAITING_SHARE, 0.0),
    ),
    "states stay on the host": (open_model, "DEVICE_SHARE", 10**9),
}


class Quality:
    """The checks on one device, in a folder for outputs; `model` is the dense model."""

    def __init__(
        self, device: str, folder: Path, *, tiny: bool, model: Path = DEMO / "model"
    ) -> None:
        self.device, self.folder, self.model = device, folder, model
        self.nsamples, self.seqlen, self.windows = 64, 512, 16
        if tiny:
            self.nsamples, self.seqlen, self.windows = 16, 64, 2
        self.figures: dict[str, Any] = {}
        self.failed: list[str] = []

    def check(self, name: str, holds: bool, **figures: Any) -> None:
        """Note and print whether a check holds."""
        self.figures[name] = {"holds": holds, **figures}
        if not holds:
            self.failed.append(name)
        print(name, "holds" if holds else "FAILS", figures, flush=True)

    def run(self, model: Path, name: str, device: str, **changes: Any) -> QuantizeResult:
        """Quantize `model` on `device`; its warnings are printed."""
        settings = {
            "bits": 4,
            "group_size": 128,
            "dataset": str(DEMO / "calibration.txt"),
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "device": device,
            "moe_uncovered": "rtn",
        }
        config = QuantizeConfig(**(settings | changes))
        return quantize_checkpoint(str(model), self.folder / name, config, report=_print_warnings)

    def kl(self, output: Path, model: Path, device: str, backend: str | None = None) -> float:
        """Return the KL of an output to its model."""
        request = EvalRequest(
            dataset=str(DEMO / "heldout.txt"),
            seqlen=self.seqlen,
            batch_size=4,
            max_windows=self.windows,
            baseline=str(model),
            device=device,
            dtype="float32",
            backend=backend,
        )
        found = evaluate_perplexity(str(output), request).kl
        assert found is not None
        return found

    def presets(self) -> None:
        """Compare errors and KL of each preset with those of the CPU."""
        model = self.model
        for preset in PRESETS:
            started = time.perf_counter()
            here = self.run(model, f"{preset}-here", self.device, preset=preset)
            seconds = time.perf_counter() - started
            there = self.run(model, f"{preset}-cpu", "cpu", preset=preset)
            errors = (_error(here), _error(there))
            kls = (self.kl(here.output, model, "cpu"), self.kl(there.output, model, "cpu"))
            close = abs(errors[0] / errors[1] - 1) < ERRORS_AGREE
            close = close and abs(kls[0] / kls[1] - 1) < KL_AGREES
            self.check(f"preset {preset}", close, errors=errors, kls=kls, seconds=seconds)

    def repeated_bytes(self) -> None:
        """Run again, and with other use of memory, and compare the bytes."""
        model, expected = self.model, self._bytes("balanced-here")
        self.run(model, "again", self.device, preset="balanced")
        self.check("two runs write the same bytes", self._bytes("again") == expected)
        for name, (module, constant, value) in DEVICE_MEMORY.items():
            with patch.object(module, constant, value):
                self.run(model, name.replace(" ", "-"), self.device, preset="balanced")
            self.check(f"{name}: same bytes", self._bytes(name.replace(" ", "-")) == expected)

    def mixture(self) -> None:
        """Compare the errors of a tiny mixture of experts with those of the CPU."""
        model = self.folder / "mixture"
        save(random_mixture("qwen3_moe", **MIXTURES["qwen3_moe"]).bfloat16(), model)
        changes = {"group_size": 32, "seqlen": 64, "nsamples": 16, "preset": "balanced"}
        here = self.run(model, "mixture-here", self.device, **changes)
        there = self.run(model, "mixture-cpu", "cpu", **changes)
        errors = (_error(here), _error(there))
        close = abs(errors[0] / errors[1] - 1) < 0.05  # few tokens for each expert
        self.check("mixture of experts", close, errors=errors)

    def evaluation(self) -> None:
        """Compare the KL of weights that are decoded on the device and by torch."""
        if self.device == "cpu":
            return
        output, model = self.folder / "balanced-here", self.model
        decoded = self.kl(output, model, self.device, "triton")
        by_torch = self.kl(output, model, self.device, "torch")
        self.check("decoding on the device", abs(decoded / by_torch - 1) < 1e-3, kl=decoded)

    def _bytes(self, name: str) -> dict[str, str]:
        hashes = digest(self.folder / name)
        return {file: found for file, found in hashes.items() if file.endswith(".safetensors")}


def _error(result: QuantizeResult) -> float:
    return statistics.mean(layer.relative_error for layer in result.layers)


def _print_warnings(event: Event) -> None:
    if isinstance(event, Warned):
        print(f"{event.code}: {event.message}", flush=True)


@contextmanager
def _noting(quality: Quality, name: str) -> Iterator[None]:
    """Turn an error of a check into a check that fails, so that the others still run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        quality.check(name, False, error=f"{type(error).__name__}: {error}"[:500])


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="less text, for a CPU")
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quality = Quality(arguments.device, Path(folder), tiny=arguments.tiny)
        steps: list[Callable[[], None]] = [
            quality.presets,
            quality.repeated_bytes,
            quality.mixture,
            quality.evaluation,
        ]
        for step in steps:
            with _noting(quality, step.__name__):
                step()
            write_json(arguments.json, quality.figures)
    if torch.cuda.is_available():
        print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    return int(bool(quality.failed))


if __name__ == "__main__":
    sys.exit(main())
