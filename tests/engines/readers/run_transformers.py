"""Load checkpoints with transformers: GPTQ through optimum and gptqmodel, others by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from answers import serve
from transformers import AutoModelForCausalLM


def run(directory: str, ids: np.ndarray, **options: object) -> tuple[np.ndarray | None, list[str]]:
    """Return the logits [B, T, V] and the names that transformers reports as unknown.

    If a tensor is missing, there may be no logits.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", output_loading_info=True, **options
    )
    unknown = unknown_names(info)
    try:
        return logits_of(model, ids), unknown
    except IndexError:
        if not unknown:
            raise
        return None, unknown  # memory without weights: a router may choose an expert number -1


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """Return the logits [B, T, V] of a model of transformers."""
    with torch.inference_mode():
        found = model.eval()(input_ids=torch.from_numpy(ids), use_cache=False)
    return found.logits.float().numpy()


def unknown_names(info: dict[str, Any]) -> list[str]:
    """Return the names of tensors that are missing in a checkpoint or that nothing reads."""
    return sorted([*info["missing_keys"], *info["unexpected_keys"]])


if __name__ == "__main__":
    serve(run)
