"""Print the tokens that MLX-LM writes greedily on a CPU: generate_mlx.py CHECKPOINT IDS TOKENS.

IDS are the tokens of a prompt, a JSON list as the one that is printed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))
model.set_dtype(mx.float32)  # its kernels add up in the dtype of the model
steps = generate_step(mx.array(json.loads(sys.argv[2])), model, max_tokens=int(sys.argv[3]))
sys.stdout.write(json.dumps([int(token) for token, _ in steps]))
