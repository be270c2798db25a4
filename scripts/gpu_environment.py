#!/usr/bin/env python3
"""Print what decides whether the GPU code can run here: driver, compilers, packages.

    python scripts/gpu_environment.py

Needs nothing but Python; a package that is absent is named as absent. The exit code is 1 if torch
is absent.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "huggingface-hub",
)
PACKAGES += ("pydantic", "datasets", "pytest", "pyyaml", "rich", "typer")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "HOME")


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def device() -> str:
    """Return what torch tells about the first GPU."""
    import torch

    built = f"torch for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return f"{built}, which sees no GPU"
    found = torch.cuda.get_device_properties(0)
    memory = f"{found.total_memory / 1e9:.0f} GB, {found.multi_processor_count} multiprocessors"
    return f"{built}: {found.name}, sm_{found.major}{found.minor}, {memory}"


def main() -> int:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = shutil.which("gcc") or shutil.which("clang") or "none"
    print(
        f"python {platform.python_version()}, Python.h {'found' if header.exists() else 'absent'}"
    )
    print(f"compiler {compiler}, {os.cpu_count()} processors")
    print(", ".join(f"{package} {version(package)}" for package in PACKAGES))
    print(", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES))
    has_torch = find_spec("torch") is not None
    if has_torch:
        print(device())
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,clocks.max.sm,power.limit,memory.used"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], check=False)
    print(f"disk {shutil.disk_usage('/tmp').free / 1e9:.0f} GB free")
    if not has_torch:
        message = f"error: {sys.executable} has no torch; set PYTHON to a Python that has it"
        print(message, file=sys.stderr)
    return int(not has_torch)


if __name__ == "__main__":
    sys.exit(main())
