"""Checkpoints that our writer makes of random codes, without a solver, and their true weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gptq_cli import __version__
from gptq_cli.checkpoint.quantization_config import describe, dialect_of
from gptq_cli.checkpoint.reader import encode
from gptq_cli.checkpoint.writer import CheckpointWriter, write_side_files
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.files import ByteCount
from gptq_cli.planning.plan import plan_run
from gptq_cli.planning.run_plan import RunPlan
from gptq_cli.solver.quantized_linear import QuantizedLinear

HIDDEN, INNER, BLOCKS, VOCABULARY = 64, 128, 2, 96
LINEARS = {
    "self_attn.q_proj": (64, HIDDEN), "self_attn.k_proj": (32, HIDDEN),
           "self_attn.v_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 64), "mlp.gate_proj": (INNER, HIDDEN),
           "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
EXPERTS = {
    f"mlp.experts.{expert}.{name}": shape
    for expert in range(3)
    for name, shape in {
        "gate_proj": (32, HIDDEN),
        "up_proj": (32, HIDDEN),
        "down_proj": (HIDDEN, 32),
    }.items()
}
INPUTS = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 2,
    "up_proj": 2,
    "down_proj": 3,
    "lm_head": 4,
}


@dataclass(frozen=True, slots=True)
class Written:
    """A source, its checkpoint, plan and configuration, and the weights [O, I] for readers."""

    source: Path
    output: Path
    plan: RunPlan
    config: QuantizeConfig
    weights: dict[str, np.ndarray]


def write_source(
    directory: Path, linears: dict[str, tuple[int, int]], blocks: int = BLOCKS
) -> Path:
    """Write a model with biases, norms (which are no linears), and side files."""
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).half()}
    for block in range(blocks):
        for name, shape in linears.items():
            tensors[f"model.layers.{block}.{name}.weight"] = torch.randn(shape).half()
        tensors[f"model.layers.{block}.self_attn.q_proj.bias"] = torch.randn(64).half()
        tensors[f"model.layers.{block}.input_layernorm.weight"] = torch.randn(HIDDEN).half()
    tensors |= {
        "model.norm.weight": torch.ones(HIDDEN).half(),
        "lm_head.weight": torch.randn(VOCABULARY, HIDDEN).half(),
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "rope_theta": 1e4,
    }
    config |= {"num_hidden_layers": blocks, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "modeling_own.py",
    ):
        (directory / name).write_text(f"the {name} of the source")
    return directory


def write_mixture(folder: Path, **settings: object) -> Written:
    """As `write`, with three experts in each block, whose router is kept by rule."""
    attention = {name: shape for name, shape in LINEARS.items() if name.startswith("self_attn")}
    linears = {**attention, **EXPERTS, "mlp.gate": (3, HIDDEN)}
    return write(folder, linears, dynamic={r"-:.*\.mlp\.gate$": {}}, **settings)


def write(
    folder: Path,
    linears: dict[str, tuple[int, int]] = LINEARS,
    blocks: int = BLOCKS,
    **settings: object,
) -> Written:
    """A checkpoint with these settings: plan, encode, describe and write as a run does."""
    source = write_source(folder / "source", linears, blocks)
    config = QuantizeConfig(**{"max_shard_size": "60KB", **settings})
    plan = plan_run(source, config)
    output = folder / "out"
    output.mkdir()
    weights: dict[str, np.ndarray] = {}
    with CheckpointWriter(output, plan.layout) as writer:
        for seed, layer in enumerate(plan.quantized):
            assert layer.config is not None
            linear = random_linear(
                seed, (layer.out_features, layer.in_features), layer.config, layer.name, layer.block
            )
            weights[layer.name] = linear.dequantize().numpy().astype(np.float64)
            for suffix, tensor in encode(linear, plan.packing, sym=layer.config.sym).items():
                writer.write(f"{layer.name}.{suffix}", tensor)
        for tensor in plan.copied:
            writer.copy(tensor, ByteCount())
        writer.finish()
    described, quantize_config = described_output(plan, config)
    write_side_files(plan.source, output, described, quantize_config, untie="lm_head" in weights)
    return Written(source, output, plan, config, weights)


def described_output(
    plan: RunPlan, config: QuantizeConfig
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the entries of config.json, and the content of quantize_config.json."""
    dialect = dialect_of(config.format)
    if dialect is not None:
        return dialect.describe(plan.linears), None
    kept = [layer.name for layer in plan.kept if layer.name != "lm_head"]
    copied = [tensor.name for tensor in plan.copied]
    described = describe(config, plan.settings, kept, copied)
    meta = {"quantizer": [f"gptq_cli:{__version__}"]}
    return {"quantization_config": described}, described | {"meta": meta}


def random_linear(
    seed: int, shape: tuple[int, int], config: LayerConfig, name: str, block: int
) -> QuantizedLinear:
    """Return a linear with random codes on allowed grids; linears of one input share an order."""
    generator = torch.Generator().manual_seed(seed)
    (rows, columns), levels = shape, 2**config.bits
    group_size = config.columns_per_group(columns)
    groups = columns // group_size
    zeros = torch.randint(1, levels, (rows, groups), generator=generator)
    scales = torch.rand(rows, groups, generator=generator) * 0.1 + 0.01
    if config.signed_scales:
        scales *= torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
    order = torch.arange(columns) // group_size
    if config.desc_act and not config.static_groups:
        same = torch.Generator().manual_seed(100 * block + INPUTS[name.rpartition(".")[2]])
        order = order[torch.randperm(columns, generator=same)]
    return QuantizedLinear(
        codes=torch.randint(0, levels, shape, generator=generator, dtype=torch.uint8),
        scales=scales.half(),
        zeros=torch.full_like(zeros, levels // 2) if config.sym else zeros,
        group_of_column=order,
        bits=config.bits,
    )
