"""`gptq env`: the facts about a machine that a bug report needs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gptq_cli.cli.console import Console, aligned
from gptq_cli.cli.options import AsJson, Quiet
from gptq_cli.errors import __version__, without_secrets

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets",
    "pydantic", "typer", "rich", "numpy",
)  # fmt: skip
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
    "USE_HUB_KERNELS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "THP_MEM_ALLOC_ENABLE", "TMPDIR", "CI", "NO_COLOR", "TERM", "COLUMNS",
)  # fmt: skip
SECRET = ("HF_TOKEN",)
ASK_NVIDIA = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


def env(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Print versions, devices and variables for a bug report.

    No large package is imported. A token is never shown, only whether it
    is set.

    Example: gptq env --json
    """
    data = {
        "gptq_cli": __version__,
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": _machine(),
        "devices": _devices(),
        "variables": _variables(),
    }
    Console(as_json, quiet).result(data, "\n".join(_lines(data)), __version__)


def _lines(data: dict[str, Any]) -> list[str]:
    cells = [("gptq_cli", data["gptq_cli"])]
    for name, found in data["versions"].items():
        cells.append((name, found or "-"))
    for key, value in data["machine"].items():
        cells.append((key, str(value)))
    cells += data["variables"].items()
    for device in data["devices"] or ["no NVIDIA GPU"]:
        cells.append(("device", device))
    return aligned(cells)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    memory, cpus = None, os.cpu_count()
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": cpus,
        "memory_bytes": memory,
        "encoding": sys.getfilesystemencoding(),
    }


def _devices() -> list[str]:
    """Return name, memory and driver of each NVIDIA GPU, as nvidia-smi prints them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, *ASK_NVIDIA]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ["nvidia-smi does not answer"]
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def _variables() -> dict[str, str]:
    """Return the variables that matter, without secrets: people paste them into public pages."""
    ours = sorted(name for name in os.environ if name.startswith("GPTQ_"))
    found = {}
    for name in (*VARIABLES, *ours):
        if name in os.environ:
            found[name] = without_secrets(os.environ[name])
    for name in SECRET:
        found[name] = "set" if os.environ.get(name) else "not set"
    return found
