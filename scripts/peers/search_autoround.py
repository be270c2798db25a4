"""Search widths for the linears of MODEL with auto-round's AutoScheme, without quantizing.

    python search_autoround.py MODEL TEXT OUT.json GROUP_SIZE WIDTHS AVERAGES

`bench_allocation.py` runs it in an environment that has auto-round. WIDTHS and AVERAGES are lists
such as 2,3,4. Writes the bits of each linear for each average (without scales), and `seconds` of
processor time. auto-round weighs each linear alone, with its own number of windows of TEXT.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from auto_round import AutoScheme
from auto_round.auto_scheme.gen_auto_scheme import GenScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS, STEP = 600, 250  # of a piece of text, and from piece to piece

model_path, text, output, group_size, widths, averages = sys.argv[1:]
options = []
for width in widths.split(","):
    options.append(
        QuantizationScheme(
            bits=int(width), group_size=int(group_size), sym=True, data_type="int", act_bits=16
        )
    )
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
linears = []
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and name != "lm_head":
        linears.append(name)
words = Path(text).read_text(encoding="utf-8").split(" ")
with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
    for start in range(0, len(words) - WORDS, STEP):
        piece = " ".join(words[start : start + WORDS])
        file.write(json.dumps({"text": piece}) + "\n")
    file.flush()
    started = time.process_time()
    scheme = AutoScheme(
        avg_bits=[float(average) for average in averages.split(",")],
        options=options,
        ignore_scale_zp_bits=True,
    )
    search = GenScheme(
        scheme,
        model,
        linears,
        {},
        dataset=file.name,
        device_map="cpu",
        tokenizer=AutoTokenizer.from_pretrained(model_path),
    )
    found = {"seconds": 0.0}
    for average, of_average in search.get_layer_config().items():
        found[f"{average:g}"] = {name: layer["bits"] for name, layer in of_average.items()}
    found["seconds"] = time.process_time() - started
Path(output).write_text(json.dumps(found))
