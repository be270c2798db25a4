"""Outputs for unchanged settings keep their bytes from one version to the next.

`tests/same_bytes.json` holds hashes of weights that an earlier version wrote, for each processor:
the last bits of sums differ between processors. On another processor, run
`python -m tests.test_same_bytes` with a version that is known to be good, then compare.
"""

from __future__ import annotations

import json
import platform
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers

from gptq_cli import QuantizeConfig, quantize
from tests.families import save_model

DEMO = Path(__file__).parents[1] / "scripts" / "demo"
CPU_INFO = Path("/proc/cpuinfo")
KNOWN = Path(__file__).with_name("same_bytes.json")
COMMON = {
    "dataset": str(DEMO / "calibration.txt"),
    "group_size": 32,
    "nsamples": 6,
    "seqlen": 64,
    "batch_size": 4,
    "device": "cpu",
}
IN_FULL = {"limit_massive_tokens": False}
CASES: dict[str, dict[str, Any]] = {
    "4 bits, gptq": {"bits": 4, "preset": "gptq"},
    "3 bits, balanced": {"bits": 3, "preset": "balanced"},
    "3 bits, balanced, all of massive tokens": {"bits": 3, "preset": "balanced"} | IN_FULL,
    "2 bits, best": {"bits": 2, "preset": "best"},
    "8 bits, fast, gptq_v2": {"bits": 8, "preset": "fast", "format": "gptq_v2"} | IN_FULL,
    "4 bits, desc_act": {"bits": 4, "desc_act": True} | IN_FULL,
    "4 bits, asymmetric grid and head": {"bits": 4, "sym": False, "lm_head": True} | IN_FULL,
    "4 bits, bfloat16, not true_sequential": {
        "bits": 4,
        "dtype": "bfloat16",
        "true_sequential": False,
        **IN_FULL,
    },
}
MIXTURE = "4 bits, a mixture of experts"


def platform_name() -> str:
    """Name what the last bits of an output depend on besides the code."""
    return f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}"


def processor() -> str:
    """Name the processor's model on Linux: math libraries choose their kernels by it."""
    capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if not CPU_INFO.exists():
        return capability
    first = CPU_INFO.read_text().split("\n\n")[0]
    fields = {}
    for line in first.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    wanted = ("vendor_id", "cpu family", "model")
    return " ".join([capability, *(fields.get(key, "") for key in wanted)])


def weights_hash(model: Path, output: Path, settings: dict[str, Any]) -> str:
    quantize(model, QuantizeConfig(**COMMON | settings), output)
    digest = sha256()
    for shard in sorted(output.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return digest.hexdigest()


def case_hash(name: str, directory: Path) -> str:
    if name == MIXTURE:
        model = save_model(directory / "mixture", "qwen3_moe")
        return weights_hash(model, directory / "out", {"bits": 4})
    return weights_hash(DEMO / "model", directory / "out", CASES[name])


@pytest.mark.parametrize("name", [*CASES, MIXTURE])
def test_unchanged_settings_give_unchanged_bytes(name: str, tmp_path: Path) -> None:
    known = json.loads(KNOWN.read_text()).get(platform_name())
    if known is None:
        pytest.skip(f"no hashes were taken on {platform_name()}")
    if name not in known:
        pytest.skip(f"no hash of this case was taken on {platform_name()}")
    assert case_hash(name, tmp_path) == known[name]


def take() -> None:
    """Add the hashes of this platform to the file."""
    torch.set_num_threads(1)
    hashes = {}
    for name in [*CASES, MIXTURE]:
        with TemporaryDirectory() as directory:
            hashes[name] = case_hash(name, Path(directory))
    known = {}
    if KNOWN.exists():
        known = json.loads(KNOWN.read_text())
    known[platform_name()] = hashes
    KNOWN.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    take()
