"""Load checkpoints with auto-round's loader, which it hangs into transformers."""

from __future__ import annotations

import numpy as np
from answers import serve
from run_transformers import run as run_transformers
from transformers import AutoRoundConfig


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the logits [B, T, V] and the unknown names."""
    logits, unknown = run_transformers(directory, ids, quantization_config=AutoRoundConfig())
    # auto-round wants no g_idx where it is trivial, and says so
    return logits, [name for name in unknown if not name.endswith(".g_idx")]


if __name__ == "__main__":
    serve(run)
