"""Load checkpoints with auto-round's loader, which it hangs into transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from answers import serve
from run_transformers import run as run_transformers
from transformers import AutoRoundConfig


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray | None, list[str]]:
    """Return the logits [B, T, V] and the unknown names."""
    options = {}
    if "quantization_config" in json.loads((Path(directory) / "config.json").read_text()):
        options["quantization_config"] = AutoRoundConfig()
    logits, unknown = run_transformers(directory, ids, **options)
    # auto-round wants no g_idx where it is trivial, and says so
    return logits, [name for name in unknown if not name.endswith(".g_idx")]


if __name__ == "__main__":
    serve(run)
