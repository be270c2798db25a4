"""`gptq env`: what a bug report needs to say about the machine."""

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

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets", "pydantic",
            "typer", "rich", "numpy")  # fmt: skip
VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "USE_HUB_KERNELS",
             "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "TMPDIR", "CI",
             "NO_COLOR", "TERM", "COLUMNS")  # fmt: skip
SECRET = ("HF_TOKEN",)
ASK_NVIDIA = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


def env(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Print versions, devices and variables for a bug report.

    Nothing heavy is loaded. Of a token it is said only whether it is set.

    Example: gptq env --json
    """
    versions, machine, devices, variables = _versions(), _machine(), _devices(), _variables()
    told = {"gptq_cli": __version__} | {name: found or "-" for name, found in versions.items()}
    told |= {key: str(value) for key, value in machine.items()} | variables
    lines = aligned(
        [*told.items(), *(("device", device) for device in devices or ["no NVIDIA GPU"])]
    )
    data = {"versions": versions, "machine": machine, "devices": devices, "variables": variables}
    Console(as_json, quiet).result({"gptq_cli": __version__, **data}, "\n".join(lines), __version__)


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    memory = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": memory,
        "encoding": sys.getfilesystemencoding(),
    }


def _devices() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, as its driver's own tool says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        found = subprocess.run(
            [tool, *ASK_NVIDIA], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ["nvidia-smi does not answer"]
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def _variables() -> dict[str, str]:
    said = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    said |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("GPTQ_")}
    said = {
        name: without_secrets(value) for name, value in said.items()
    }  # people paste them into public pages
    return said | {name: "set" if os.environ.get(name) else "not set" for name in SECRET}
