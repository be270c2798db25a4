"""Quantize MODEL with GPTQModel.

    python run_gptqmodel.py MODEL OUT IDS.json BITS GROUP_SIZE

`bench_peers.py` runs it in an environment that has GPTQModel.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}

from gptqmodel import GPTQModel, QuantizeConfig

model, output, ids, bits, group_size = sys.argv[1:]
rows = json.loads(Path(ids).read_text())
loaded = GPTQModel.load(
    model, QuantizeConfig(bits=int(bits), group_size=int(group_size)), device="cpu"
)
windows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
loaded.quantize(windows, batch_size=1)
loaded.save(output)
