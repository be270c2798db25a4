"""Shapes of known models, and random checkpoints of these shapes for the benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import common  # noqa: F401 -- makes `tests` importable
import torch
from safetensors.torch import save_file

from tests.families import save_tokenizer

BLOCKS_PER_SHARD = 2
MOST_SPARSE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder with gated feed-forwards; blocks with `experts` have a router too."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    vocabulary: int
    experts: int = 0
    experts_per_token: int = 0

    @property
    def inputs(self) -> list[tuple[int, list[int], int]]:
        """Groups of linears with one input in a block: in_features, their out_features, copies."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        copies = self.experts or 1
        return [
            (self.hidden, [q, kv, kv], 1),
            (q, [self.hidden], 1),
            (self.hidden, [self.intermediate] * 2, copies),
            (self.intermediate, [self.hidden], copies),
        ]

    @property
    def attended(self) -> int:
        """Multiplications with an addition of a token and one that it attends to."""
        return 2 * self.heads * self.head_dim

    def config(self, blocks: int) -> dict[str, object]:
        """Return the content of config.json for a model of so many blocks."""
        config: dict[str, object] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attention_bias": False,
        }
        if self.experts:
            config |= {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "num_experts": self.experts,
                "num_experts_per_tok": self.experts_per_token,
                "moe_intermediate_size": self.intermediate,
                "decoder_sparse_step": 1,
                "norm_topk_prob": True,
                "mlp_only_layers": [],
            }
        return config

    def block_tensors(self, block: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of the tensors of a block."""
        prefix = f"model.layers.{block}."
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (self.hidden,)
        for name, rows in {"q_proj": q, "k_proj": kv, "v_proj": kv}.items():
            yield f"{prefix}self_attn.{name}.weight", (rows, self.hidden)
        yield f"{prefix}self_attn.o_proj.weight", (self.hidden, q)
        feed_forwards = ["mlp"]
        if self.experts:
            yield f"{prefix}mlp.gate.weight", (self.experts, self.hidden)
            yield f"{prefix}self_attn.q_norm.weight", (self.head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (self.head_dim,)
            feed_forwards = [f"mlp.experts.{expert}" for expert in range(self.experts)]
        for mlp in feed_forwards:
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}{mlp}.{name}.weight", (self.intermediate, self.hidden)
            yield f"{prefix}{mlp}.down_proj.weight", (self.hidden, self.intermediate)

    def outer_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of embeddings, final norm and head."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)


@dataclass(frozen=True)
class LatentShape(Shape):
    """The shape of a mixture with latent attention and one shared expert, as DeepSeek-V3 is.

    `head_dim` is that of values; queries and keys have as many features and `rotary` more. All
    blocks are mixtures, also the first ones, which are dense in the original.
    """

    query_rank: int = 0
    key_value_rank: int = 0
    rotary: int = 0

    @property
    def inputs(self) -> list[tuple[int, list[int], int]]:
        values = self.heads * self.head_dim
        queries = values + self.heads * self.rotary
        experts = Shape.inputs.fget(self)[2:]  # type: ignore[attr-defined]
        return [
            (self.hidden, [self.query_rank, self.key_value_rank + self.rotary], 1),
            (self.query_rank, [queries], 1),
            (self.key_value_rank, [2 * values], 1),
            (values, [self.hidden], 1),
            *experts,
            (self.hidden, [self.intermediate] * 2, 1),
            (self.intermediate, [self.hidden], 1),
        ]

    @property
    def attended(self) -> int:
        return self.heads * (2 * self.head_dim + self.rotary)

    def config(self, blocks: int) -> dict[str, object]:
        return super().config(blocks) | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": self.heads,
            "head_dim": self.rotary,
            "q_lora_rank": self.query_rank,
            "kv_lora_rank": self.key_value_rank,
            "qk_nope_head_dim": self.head_dim,
            "qk_rope_head_dim": self.rotary,
            "v_head_dim": self.head_dim,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 8,
            "topk_group": 4,
        }

    def block_tensors(self, block: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        prefix = f"model.layers.{block}."
        for name, size in super().block_tensors(block):
            if ".self_attn." not in name:
                yield name, size
        yield f"{prefix}mlp.gate.e_score_correction_bias", (self.experts,)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}mlp.shared_experts.{name}.weight", (self.intermediate, self.hidden)
        yield f"{prefix}mlp.shared_experts.down_proj.weight", (self.hidden, self.intermediate)
        attention = f"{prefix}self_attn."
        values = self.heads * self.head_dim
        yield f"{attention}q_a_layernorm.weight", (self.query_rank,)
        yield f"{attention}kv_a_layernorm.weight", (self.key_value_rank,)
        yield f"{attention}q_a_proj.weight", (self.query_rank, self.hidden)
        queries = values + self.heads * self.rotary
        yield f"{attention}q_b_proj.weight", (queries, self.query_rank)
        latent = self.key_value_rank + self.rotary
        yield f"{attention}kv_a_proj_with_mqa.weight", (latent, self.hidden)
        yield f"{attention}kv_b_proj.weight", (2 * values, self.key_value_rank)
        yield f"{attention}o_proj.weight", (self.hidden, values)


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 8, 128, 32, 128256),
    "llama-3-70b": Shape(8192, 28672, 64, 8, 128, 80, 128256),
    "llama-3-405b": Shape(16384, 53248, 128, 8, 128, 126, 128256),
    "qwen3-30b-a3b": Shape(2048, 768, 32, 4, 128, 48, 151936, experts=128, experts_per_token=8),
    "mixture-1t": Shape(7168, 2048, 56, 12, 128, 60, 163840, experts=384, experts_per_token=8),
    "deepseek-v3": LatentShape(
        7168,
        2048,
        128,
        128,
        128,
        58,
        129280,
        experts=256,
        experts_per_token=8,
        query_rank=1536,
        key_value_rank=512,
        rotary=64,
    ),
    "small": Shape(512, 1536, 8, 4, 64, 4, 512),
    "tiny": Shape(128, 256, 4, 2, 32, 2, 512),
    "tiny-latent": LatentShape(
        128,
        64,
        4,
        4,
        32,
        2,
        512,
        experts=16,
        experts_per_token=4,
        query_rank=64,
        key_value_rank=32,
        rotary=32,
    ),
    "tiny-moe": Shape(128, 64, 4, 2, 32, 2, 512, experts=32, experts_per_token=4),
}


def write_random_model(directory: Path, shape: Shape, blocks: int, device: str) -> int:
    """Write a random bfloat16 checkpoint with a tokenizer of bytes; return the bytes of tensors."""
    directory.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    shards = [list(shape.outer_tensors())]
    for start in range(0, blocks, BLOCKS_PER_SHARD):
        shard = []
        for block in range(start, min(start + BLOCKS_PER_SHARD, blocks)):
            shard += shape.block_tensors(block)
        shards.append(shard)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(size, generator, device) for name, size in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += bytes_of(tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(shape.config(blocks)))
    save_tokenizer(directory)
    return total


def write_sparse_model(directory: Path, shape: Shape, blocks: int) -> None:
    """Write a bfloat16 checkpoint of zeros that take no room on the disk.

    Its files are no larger than those of published models, as a larger one may not be mapped.
    """
    directory.mkdir(parents=True)
    tensors = list(shape.outer_tensors())
    for block in range(blocks):
        tensors += shape.block_tensors(block)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors), 1):
        file = f"model-{number:05}.safetensors"
        _write_sparse_file(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(shape.config(blocks)))
    save_tokenizer(directory)


def _shards(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the shapes of the tensors of each file."""
    shard: dict[str, tuple[int, ...]] = {}
    filled = 0
    for name, size in tensors:
        nbytes = 2 * math.prod(size)
        if shard and filled + nbytes > MOST_SPARSE_BYTES:
            yield shard
            shard, filled = {}, 0
        shard[name] = size
        filled += nbytes
    yield shard


def _write_sparse_file(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in shapes.items():
        end = position + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _random(size: tuple[int, ...], generator: torch.Generator, device: str) -> torch.Tensor:
    if len(size) == 1:  # a norm
        return torch.ones(size, dtype=torch.bfloat16)
    values = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
    return values.mul_(size[1] ** -0.5).cpu()
