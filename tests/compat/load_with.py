"""Load GPTQ checkpoints with one consumer, in its own environment, and save their logits.

    python load_with.py CONSUMER < jobs > results

A job is a line of JSON: a `checkpoint` directory, a file of token `ids` (int64 [B, T], .npy) and
the name of a new file for the float32 `logits` [B, T, V] (.npy). The answer is a line of JSON:
`error` (null if it loaded), and the `missing` and `unexpected` tensor names, if the consumer
reports them. An import of a consumer takes many seconds, so one process loads many checkpoints.
This script imports nothing of gptq_cli.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Loaded = tuple[torch.nn.Module, dict[str, list[str]]]


def load_with_transformers(directory: str) -> Loaded:
    from transformers import AutoModelForCausalLM

    return _with_names(
        AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", output_loading_info=True)
    )


def load_with_auto_round(directory: str) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", output_loading_info=True, quantization_config=AutoRoundConfig()
    )
    return _with_names(loaded)


def load_with_gptqmodel(directory: str) -> Loaded:
    from gptqmodel import GPTQModel

    # Its default on a CPU is bfloat16, which would hide smaller differences. It reports no names.
    return GPTQModel.load(directory, device="cpu", dtype=torch.float16).model, {
        "missing": [],
        "unexpected": [],
    }


LOADERS: dict[str, Callable[[str], Loaded]] = {
    "transformers": load_with_transformers,
    "gptqmodel": load_with_gptqmodel,
    "auto-round": load_with_auto_round,
}


def run(load: Callable[[str], Loaded], job: dict[str, str]) -> dict[str, Any]:
    """What became of one job; an exit or an exception of the consumer is a result, not an end."""
    try:
        model, names = load(job["checkpoint"])
        with torch.inference_mode():
            logits = model.eval()(
                input_ids=torch.from_numpy(np.load(job["ids"])), use_cache=False
            ).logits
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the test judges any exception
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    np.save(job["logits"], logits.float().numpy())
    return {"error": None} | names


def main(consumer: str) -> None:
    # Consumers print to stdout whatever they like, and one that calls exit() closes stdin.
    with os.fdopen(os.dup(0)) as jobs, os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in jobs:
            print(json.dumps(run(LOADERS[consumer], json.loads(line))), file=answers, flush=True)


def _with_names(loaded: tuple[torch.nn.Module, dict[str, Any]]) -> Loaded:
    model, info = loaded
    return model, {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }


if __name__ == "__main__":
    main(sys.argv[1])
