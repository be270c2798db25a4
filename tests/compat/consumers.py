"""The programs that load GPTQ checkpoints, each in its own environment, and their limits."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VENV_OF = {"transformers": "gptqmodel", "gptqmodel": "gptqmodel", "auto-round": "auto-round"}
# GPTQModel compiles a kernel for minutes the first time.
ANSWER_SECONDS = 900


class Consumer:
    """One consumer that waits for checkpoints; it starts with the first one: many seconds."""

    def __init__(self, name: str, venvs: Path, scratch: Path) -> None:
        self._name = name
        self._log = scratch / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    venvs / VENV_OF[name] / "bin/python",
                    Path(__file__).with_name("load_with.py"),
                    name,
                ],
                env=os.environ | _environment(venvs, scratch),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def load(self, checkpoint: Path, ids: Path, logits: Path) -> dict[str, Any]:
        """Return the answer of load_with.py; if it has no `error`, `logits` holds the logits.

        Raise RuntimeError if the consumer dies or is silent for too long; then it is unusable.
        """
        job = {"checkpoint": str(checkpoint), "ids": str(ids), "logits": str(logits)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        answer = self._process.stdout.readline() if ready else b""
        if not answer:
            self._process.kill()
            self.close()
            raise RuntimeError(f"{self._name} gave no answer:\n{self._log.read_text()[-2000:]}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _environment(venvs: Path, scratch: Path) -> dict[str, str]:
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "GPTQMODEL_CPU_WORKERS": "2",
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(venvs / "torch_extensions"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),  # GPTQModel leaves directories behind
        "TORCHDYNAMO_DISABLE": "1",
    }


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint to write: a model and what differs from the settings that all cases share."""

    id: str
    settings: dict[str, Any]
    family: str = "llama"
    dtype: str = "float16"

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The settings of layers: of those that no rule matches, then of each rule's."""
        return [
            self.settings,
            *(self.settings | rule for rule in self.settings.get("dynamic", {}).values()),
        ]

    @property
    def sym(self) -> bool:
        return all(layer.get("sym", True) for layer in self.layers)

    @property
    def format(self) -> str:
        return self.settings.get("format", "gptq" if self.sym else "gptq_v2")

    @property
    def real_g_idx(self) -> bool:
        return any(
            layer.get("desc_act", False) and not layer.get("static_groups", False)
            for layer in self.layers
        )

    @property
    def mixed_shapes(self) -> bool:
        return len({(layer["bits"], layer.get("group_size")) for layer in self.layers}) > 1

    @property
    def quantized_head(self) -> bool:
        return self.settings.get("lm_head", False) and "-:lm_head" not in self.settings.get(
            "dynamic", {}
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """Checkpoints that a consumer refuses in `words`, or that it misreads, if `words` is None."""

    consumer: str
    what: str
    hits: Callable[[Case], bool]
    words: str | None


LIMITS = (
    Limit(
        "transformers",
        "layers of unlike shapes",
        lambda case: case.mixed_shapes,
        "ignore_mismatched_sizes",
    ),
    Limit("transformers", "a quantized head", lambda case: case.quantized_head, None),
    Limit(
        "gptqmodel",
        "asymmetric v1",
        lambda case: not case.sym and case.format == "gptq",
        "sym=False",
    ),
    Limit(
        "gptqmodel",
        "fused linears",
        lambda case: case.family == "phi3",
        "Missing required quantized weights",
    ),
    Limit("gptqmodel", "a head named embed_out", lambda case: case.family == "gpt_neox", None),
    Limit("auto-round", "a real g_idx", lambda case: case.real_g_idx, "g_idx"),
    Limit(
        "auto-round",
        "asymmetric, 3 bits",
        lambda case: not case.sym and case.settings["bits"] == 3,
        "No compatible",
    ),
    Limit("auto-round", "asymmetric", lambda case: not case.sym, "SystemExit: -1"),
    Limit("auto-round", "v2, read as v1", lambda case: case.format == "gptq_v2", None),
    Limit("auto-round", "a quantized head", lambda case: case.quantized_head, None),
)


def limit_of(consumer: str, case: Case) -> Limit | None:
    """The first limit of `consumer` that `case` runs into."""
    return next(
        (limit for limit in LIMITS if limit.consumer == consumer and limit.hits(case)), None
    )
