"""Load compressed-tensors with transformers, which decodes the weights while it loads them."""

from __future__ import annotations

import numpy as np
from answers import serve
from run_transformers import run as run_transformers
from transformers import CompressedTensorsConfig


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray | None, list[str]]:
    """Return the logits [B, T, V] and the unknown names."""
    decoded = CompressedTensorsConfig(dequantize=True)
    return run_transformers(directory, ids, quantization_config=decoded)


if __name__ == "__main__":
    serve(run)
