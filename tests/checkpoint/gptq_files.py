"""GPTQ checkpoints written number by number, as any tool could: the slow truth of the format."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHAPES = {
    "self_attn.q_proj": (32, 64),
    "self_attn.k_proj": (32, 64),
    "mlp.down_proj": (64, 128),
}  # [O, I]
HIDDEN, VOCABULARY, BLOCKS = 64, 48, 2
MODULES = tuple(f"model.layers.{block}.{name}" for block in range(BLOCKS) for name in SHAPES)


@dataclass
class Files:
    """A checkpoint before it is written; tests change it first."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    quantize_config: dict[str, Any] | None = None
    shards: int = 2
    extra: dict[str, bytes] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    def write(self, directory: Path) -> Path:
        """The directory; the second shard holds the second block and the head."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        if self.quantize_config is not None:
            (directory / "quantize_config.json").write_text(json.dumps(self.quantize_config))
        weight_map = {name: SHARDS["layers.1" in name or "head" in name] for name in self.tensors}
        if self.shards == 1:
            save_file(self.tensors, directory / "model.safetensors", metadata={"format": "pt"})
        else:
            for shard in SHARDS:
                content = {
                    name: array for name, array in self.tensors.items() if weight_map[name] == shard
                }
                save_file(content, directory / shard, metadata={"format": "pt"})
            (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name, content in self.extra.items():
            (directory / name).write_bytes(content)
        return directory


def words(values: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of a stream in which each value takes `bits` bits, lowest first."""
    stream = sum(value << (bits * position) for position, value in enumerate(values))
    count = len(values) * bits // 32
    unsigned = [(stream >> (32 * position)) % 2**32 for position in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def module(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    sym: bool,
    format: str,
    desc_act: bool,
    seed: int,
):
    """The four tensors of a linear with random codes."""
    choose = random.Random(seed)
    out_features, in_features = shape
    groups = 1 if group_size == -1 else in_features // group_size
    codes = [[choose.randrange(2**bits) for _ in range(in_features)] for _ in range(out_features)]
    zeros = [
        [2 ** (bits - 1) if sym else choose.randrange(1, 2**bits) for _ in range(out_features)]
        for _ in range(groups)
    ]
    stored = [[zero - (format == "gptq") for zero in row] for row in zeros]
    g_idx = [column * groups // in_features for column in range(in_features)]
    if desc_act:
        choose.shuffle(g_idx)
    return {
        "qweight": np.array([words(row, bits) for row in codes], np.int32).T.copy(),
        "qzeros": np.array([words(row, bits) for row in stored], np.int32),
        "scales": np.array(
            [[choose.uniform(0.01, 0.1) for _ in range(out_features)] for _ in range(groups)],
            np.float16,
        ),
        "g_idx": np.array(g_idx, np.int32),
    }


def gptq_files(
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    format: str = "gptq",
    desc_act: bool = False,
) -> Files:
    """A sound checkpoint of two blocks with three linears each, in two shards."""
    tensors = {
        f"{name}.{part}": array
        for seed, name in enumerate(MODULES)
        for part, array in module(
            SHAPES[name.split(".", 3)[3]], bits, group_size, sym, format, desc_act, seed
        ).items()
    }
    generator = np.random.default_rng(0)
    for name, shape in {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
    }.items():
        tensors[f"{name}.weight"] = generator.normal(size=shape).astype(np.float16)
    for block in range(BLOCKS):
        tensors[f"model.layers.{block}.norm.weight"] = np.ones(HIDDEN, np.float16)
        tensors[f"model.layers.{block}.mlp.gate.weight"] = np.ones((4, HIDDEN), np.float16)
    quantization = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym,
                    "desc_act": desc_act,
        "checkpoint_format": format, "format": format, "lm_head": False,
    }  # fmt: skip
    return Files(
        {"model_type": "llama", "num_hidden_layers": BLOCKS, "quantization_config": quantization},
        tensors,
    )
