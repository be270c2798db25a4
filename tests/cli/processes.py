"""The program in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys

GPTQ = [sys.executable, "-m", "gptq_cli"]
HEAVY = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub", "triton")
SCRIPT = """
import sys
from gptq_cli.__main__ import main
sys.argv = ["gptq", *{words!r}]
try:
    main()
except SystemExit:
    print("LOADED", *sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
    raise
"""


def run_process(words: list[str], environment: dict[str, str]) -> tuple[int, str, str, list[str]]:
    """Run the program; return exit code, stdout, stderr and the loaded packages of HEAVY."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(words=words, heavy=HEAVY)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    *stderr, loaded = found.stderr.splitlines()
    return found.returncode, found.stdout, "\n".join(stderr), loaded.split()[1:]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `$GPTQ` is the program."""
    env = {**os.environ, "GPTQ": " ".join(GPTQ), **environment}
    for variable in ("GITHUB_ACTIONS", "FORCE_COLOR", "NO_COLOR"):
        if variable not in environment:
            env.pop(variable, None)
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=env, check=False
    )
