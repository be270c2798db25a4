"""Tune MODEL with one of auto-round's recipes and save it as a plain gptq checkpoint.

    python run_autoround.py MODEL OUT IDS.json BITS GROUP_SIZE [default|light]

`bench_peers.py` runs it in an environment that has auto-round.
"""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from auto_round import AutoRound

# what the commands `auto-round` and `auto-round-light` of version 0.16.1 change
RECIPES = {"default": {}, "light": {"iters": 50, "lr": 5e-3}}

model, output, ids, bits, group_size, recipe = [*sys.argv[1:], "default"][:6]
rows = torch.tensor(json.loads(Path(ids).read_text()))
tuned = AutoRound(
    model,
    scheme={
        "bits": int(bits),
        "group_size": int(group_size),
        "sym": True,
        "data_type": "int",
        "act_bits": 16,
    },
    dataset=list(rows.split(8)),  # as its own loader does, with its default batch_size
    seqlen=rows.shape[1],
    nsamples=len(rows),
    device_map="cpu",
    **RECIPES[recipe],
)
tuned.quantize_and_save(output, format="auto_gptq")
(folder,) = Path(output).iterdir()  # named after the model, the bits and the group size
for file in folder.iterdir():
    file.rename(Path(output, file.name))
folder.rmdir()
