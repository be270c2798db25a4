"""Quantize MODEL with llm-compressor's GPTQ and save the dequantized weights as a checkpoint.

    python run_llmcompressor.py MODEL OUT IDS.json BITS GROUP_SIZE

`bench_peers.py` runs it in an environment that has llm-compressor.
"""

import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

model, output, ids, bits, group_size = sys.argv[1:]
rows = json.loads(Path(ids).read_text())
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
weights = QuantizationArgs(
    num_bits=int(bits),
    type="int",
    symmetric=True,
    strategy="group",
    group_size=int(group_size),
    actorder="static",
)
recipe = GPTQModifier(
    config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
    ignore=["lm_head"],
)
masks = [[1] * len(row) for row in rows]
oneshot(
    model=loaded,
    dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": masks}),
    recipe=recipe,
    max_seq_length=len(rows[0]),
    num_calibration_samples=len(rows),
)
loaded.save_pretrained(output, save_compressed=False)
AutoTokenizer.from_pretrained(model).save_pretrained(output)
config = Path(output) / "config.json"
content = json.loads(config.read_text())
content.pop("quantization_config")  # the weights are dense and already on the grid
config.write_text(json.dumps(content))
