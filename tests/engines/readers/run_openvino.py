"""Export checkpoints to OpenVINO with optimum-intel, and run them on a CPU."""

from __future__ import annotations

import difflib

import numpy as np
import torch
from answers import serve
from optimum.intel import OVModelForCausalLM

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_NUM_THREADS": "1",  # as all other engines here
}
# If a trace fails, torch spends minutes on a comparison of two graphs for its message.
difflib.ndiff = lambda *_: []


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the logits [B, T, V]; the export reports no names."""
    model = OVModelForCausalLM.from_pretrained(
        directory, export=True, load_in_8bit=False, ov_config=EXACT
    )
    tokens = torch.from_numpy(ids)
    found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return found.logits.float().numpy(), []


if __name__ == "__main__":
    serve(run)
