"""Any causal language model of transformers, tiny and random, before and after quantization.

`try_type` builds a model from its config class alone, quantizes it, reads the result back, and
compares the logits of our stream with those of transformers over the dequantized weights.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gptq_cli.checkpoint.reader import DequantizingReader, TensorReader
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import GptqError
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from gptq_cli.runtime.open_model import open_stream
from tests.families import save, text_file, with_noise

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CPU = torch.device("cpu")
MAX_HINTS = 3  # that are followed
BITS = (4, 8)
TOLERANCE = 1e-5  # of the largest logit: both sides compute in float32, most agree bit for bit
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # encoders and decoders
    "encoder_layers": 2,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "ffn_dim": 128,
    "d_inner": 128,
    "embedding_size": 64,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    # low-rank attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    # recurrences
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_dt_rank": 32,
    "mamba_chunk_size": 16,
    "ssm_state_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # inputs of each layer
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 512,
    "num_kv_shared_layers": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TWEAKS: dict[
    str, dict[str, Any]
] = {  # by model type, of parts too: what the sizes above do not settle
    "axk2": {"num_key_value_heads": 4},
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "cpmant": {"dim_ff": 128, "dim_head": 32},
    "ctrl": {"dff": 128},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": {}},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4_unified_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "glm_moe_dsa": {
        "num_key_value_heads": 4,
        "index_topk": 16,
        "indexer_types": ["full", "shared"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 16},
    "helium": {"head_dim": 16},
    "hy_v4": {"index_topk": 16, "indexer_types": ["full", "shared"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {
        "head_dim": 16,
        "num_key_value_heads": 4,
        "num_layers": 2,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": {"indexer_budget": 32, "indexer_compress_ratio": 4},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # transformers zeroes the row of this token when it loads
    "zamba": {"num_hidden_layers": 76},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model type: `status` is worked, refused, wrong, crashed or not built."""

    model_type: str
    status: str
    why: str = ""
    quantized: int = 0
    kept: int = 0
    share: float = 0.0  # of the blocks' parameters that are quantized
    differences: Sequence[
        float
    ] = ()  # of logits, relative to the largest, at each of the bit widths


def try_type(model_type: str, folder: Path, built: Callable[[], None] = lambda: None) -> Outcome:
    """Build, save, quantize, read back and compare one model type; call `built` after the build."""
    try:
        model = build(model_type)
        source = save(model, folder / "source")
        expected = own_logits(source)
        built()
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the finding
        return Outcome(model_type, "not built", first_line(error))
    try:
        streams = relative(streamed_logits(source), expected)
        outcomes = [
            quantize_and_compare(model_type, model, source, folder / f"{bits}", bits)
            for bits in BITS
        ]
    except GptqError as error:
        return Outcome(
            model_type, "refused", f"{error.problems[0].code}: {error.problems[0].message}"
        )
    except Exception as error:  # noqa: BLE001 - a crash is a finding too
        return Outcome(model_type, "crashed", first_line(error))
    differences = [max(streams, *outcome.differences) for outcome in outcomes]
    last = dataclasses.replace(outcomes[-1], differences=differences)
    if max(differences) <= TOLERANCE:
        return last
    return dataclasses.replace(last, status="wrong", why=f"logits differ by {max(differences):.1e}")


def auto_class(model_type: str) -> Any:
    """Return transformers' class for text alone, or that for images and text if it has no other."""
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def build(model_type: str) -> PreTrainedModel:
    """Return a random float32 model with small sizes in all usual fields of its config."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**small(config_class))
    model = auto_class(model_type).from_config(config, dtype=torch.float32)
    return with_noise(model)


def small(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments that make a config tiny: SIZES for the fields it has, in its parts as well."""
    default = config_class()
    known = {field.name for field in dataclasses.fields(config_class)}
    settings: dict[str, Any] = {}
    for name, size in SIZES.items():
        field = next(
            (f for f in (config_class.attribute_map.get(name, name), name) if f in known), None
        )
        if field is not None:
            listed = isinstance(default.__dict__.get(field), list)
            settings[field] = [size] * SIZES["num_hidden_layers"] if listed else size
    for part in config_class.sub_configs:
        inner = getattr(default, part, None)
        if inner is not None:
            settings[part] = {"model_type": inner.model_type} | small(type(inner))
    return settings | TWEAKS.get(config_class.model_type, {})


def token_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (size, 40), generator=generator) for size in (2, 1)]


def own_logits(directory: Path) -> list[Tensor]:
    """Return logits by transformers alone; raise ValueError if a tensor of the model is missing."""
    model_type = AutoConfig.from_pretrained(directory).model_type
    model, loading = auto_class(model_type).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[0]
        raise ValueError(f"transformers does not load what it saved: {missing} is missing")
    with torch.inference_mode():
        logits = [model.eval()(input_ids=ids, use_cache=False).logits for ids in token_batches()]
    if not all(x.isfinite().all() for x in logits):
        raise ValueError("the random model's logits are not finite")
    return logits


def streamed_logits(directory: Path) -> list[Tensor]:
    """Logits of the checkpoint, quantized or not, by our stream."""
    batches = token_batches()
    with torch.inference_mode():
        stream = open_stream(
            open_checkpoint(directory), device=CPU, dtype="float32", trust_remote_code=False
        )
        hidden = stream.embed(batches)
        for index in range(stream.n_blocks):
            with stream.block(index) as block:
                hidden = [block.run(batch, state) for batch, state in enumerate(hidden)]
        with stream.head() as head:
            return [head(ids, state) for ids, state in zip(batches, hidden, strict=True)]


def quantize_and_compare(
    model_type: str, model: PreTrainedModel, source: Path, folder: Path, bits: int
) -> Outcome:
    """What became of one bit width, called worked whatever the logits are."""
    result, rules = quantize(source, folder / "quantized", bits)
    checkpoint = open_checkpoint(result.output)
    plain = dequantize(checkpoint, source, folder / "plain")
    sizes = {name: tensor.shape.numel() for name, tensor in model.state_dict().items()}
    in_blocks = sum(size for name, size in sizes.items() if re.search(r"\.\d+\.", name))
    quantized = sum(read.numel() for _, read in dequantized(checkpoint))
    return Outcome(
        model_type=model_type,
        status="worked",
        why="kept by rule: " + ", ".join(f"`{rule}`" for rule in rules) if rules else "",
        quantized=len(result.layers),
        kept=len(result.kept),
        share=quantized / in_blocks,
        differences=[relative(streamed_logits(result.output), own_logits(plain))],
    )


def quantize(source: Path, output: Path, bits: int) -> tuple[QuantizeResult, list[str]]:
    """Quantize in groups of 32; keep unsupported layers by the rules in the hints of errors."""
    settings = {"bits": bits, "group_size": 32, "dataset": text_file(4000), "nsamples": 4,
                "seqlen": 64,
                "batch_size": 2,
                "moe_uncovered": "rtn"}  # fmt: skip
    config = QuantizeConfig(**settings, device="cpu")
    kept: list[str] = []
    for _ in range(MAX_HINTS):
        try:
            return quantize_checkpoint(str(source), output, config), kept
        except GptqError as error:
            hints = [
                re.search(r"--dynamic '(.*)'", problem.hint or "") for problem in error.problems
            ]
            kept += [hint[1] for hint in hints if hint and hint[1] not in kept]
            if not all(hints):
                raise
        config = config.model_copy(update={"dynamic": {rule: {} for rule in kept}})
    return quantize_checkpoint(str(source), output, config), kept


def dequantized(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    reader = DequantizingReader(checkpoint, CPU, "torch")
    return [(name, reader.read(name)) for name in reader.names() if name not in checkpoint.tensors]


def dequantize(checkpoint: Checkpoint, source: Path, directory: Path) -> Path:
    """The source checkpoint with the dequantized weights in place of its own."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    original = open_checkpoint(source)
    tensors = {name: TensorReader(original).read(name) for name in original.tensors}
    for name, weight in dequantized(checkpoint):
        if name not in tensors:
            restack(tensors, name, weight)
            continue
        tensors[name] = min((w for w in (weight, weight.T) if w.shape == tensors[name].shape),
                            key=lambda w: (w - tensors[name]).norm().item())  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              directory / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return directory


def restack(tensors: dict[str, Tensor], name: str, weight: Tensor) -> None:
    """Put the weight of one expert in place of the nearest part of the stacks beside it."""
    holder, number = re.fullmatch(r"(.+)\.[^.]+\.(\d+)\.\w+\.weight", name).groups()
    stacks = [
        stack for key, stack in tensors.items() if key.startswith(f"{holder}.") and stack.dim() == 3
    ]
    mine = [stack[int(number)] for stack in stacks if int(number) < len(stack)]
    matrices = [way for matrix in mine for way in (matrix, matrix.T)]
    rows = len(weight)
    ways = (slice(rows), slice(-rows, None), slice(0, None, 2), slice(1, None, 2))
    places = [
        part for matrix in matrices for way in ways if (part := matrix[way]).shape == weight.shape
    ]
    min(places, key=lambda part: (part - weight).norm().item()).copy_(weight)


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return difference / max(b.abs().max().item() for b in theirs)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
