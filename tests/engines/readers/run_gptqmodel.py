"""Load checkpoints with GPTQModel."""

from __future__ import annotations

import numpy as np
import torch
from answers import serve
from gptqmodel import GPTQModel
from run_transformers import logits_of


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the logits [B, T, V]; GPTQModel reports no names."""
    # Its default on a CPU is bfloat16, which would hide smaller differences.
    model = GPTQModel.load(directory, device="cpu", dtype=torch.float16).model
    return logits_of(model, ids), []


if __name__ == "__main__":
    serve(run)
