"""Tiny random models of several families, saved as checkpoints with a tokenizer of 512 tokens."""

from __future__ import annotations

import atexit
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, object]] = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 16},
    "qwen2": COMMON | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": COMMON | {"tie_word_embeddings": True},
    "gemma2": COMMON | {"sliding_window": 16, "layer_types": _MIXED},
    "gemma3_text": COMMON | {"sliding_window": 16, "layer_types": _MIXED},
    "phi": COMMON | {"num_key_value_heads": 4},
    "phi3": COMMON,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}
OTHERS: dict[str, dict[str, object]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "granite": COMMON,
    "olmo2": COMMON,
}
MIXTURES: dict[str, dict[str, object]] = {  # five experts, two of them for each token
    "mixtral": COMMON | {"num_hidden_layers": 2, "num_local_experts": 5},
    "qwen3_moe": COMMON
    | {
        "num_hidden_layers": 2,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "gpt_oss": COMMON
    | {"num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 32},
    "llama4_text": COMMON
    | {
        "num_hidden_layers": 2,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size_mlp": 64,
    },
}
_LATE_EXPERTS = {
    "num_hidden_layers": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DRAFTED: dict[str, dict[str, object]] = {  # published with a block that drafts tokens
    "qwen3_5_moe": {
        "text_config": COMMON
        | {
            "num_hidden_layers": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "patch_size": 4,
        },
    },
    "deepseek_v3": COMMON
    | _LATE_EXPERTS
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "glm4_moe": COMMON | _LATE_EXPERTS,
}
TEXT = "the quick brown fox jumps over the lazy dog, and then some; 0 1 2 3 4 5 6 7 8 9. "


def random_model(family: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a float32 model of `family`, its weights as large as those of a trained model."""
    torch.manual_seed(seed)
    settings = (FAMILIES | OTHERS | MIXTURES)[family] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    return with_noise(model)


def with_noise(model: PreTrainedModel) -> PreTrainedModel:
    """Move all parameters of `model` away from their initial values; return it in float32."""
    add_noise(model)
    return model.float().eval()


def add_noise(model: PreTrainedModel) -> None:
    """Move all parameters of `model` away from their initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * spread)


def save_model(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes: object,
) -> Path:
    """Save a random model of `family` in `dtype` with its tokenizer; return `directory`."""
    model = random_model(family, seed=seed, **changes).to(dtype)
    return save(model, directory, max_shard_size=max_shard_size)


def save(model: PreTrainedModel, directory: Path, **options: object) -> Path:
    """Save `model` with a tokenizer; return `directory`."""
    model.save_pretrained(directory, **options)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """Save a byte-level tokenizer: one token for each byte, 512 ids with the unused ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(directory)


def texts(n_characters: int = 20_000, seed: int = 0) -> list[str]:
    """Return calibration text with some variety, as a list of one document."""
    generator = torch.Generator().manual_seed(seed)
    words = TEXT.split(" ")
    picked = torch.randint(len(words), (n_characters // 4,), generator=generator)
    return [" ".join(words[index] for index in picked)[:n_characters]]


def save_drafted(directory: Path, family: str) -> Path:
    """Save a model of DRAFTED with a block that drafts tokens, which transformers does not know.

    Qwen3.5 calls it mtp.layers.0; in the other families it is numbered behind the other blocks.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **DRAFTED[family])
    last, draft = "model.layers.1.", "model.layers.2."
    if "vision_config" in DRAFTED[family]:
        model = AutoModelForImageTextToText.from_config(config)
        last, draft = "model.language_model.layers.1.", "mtp.layers.0."
    else:
        model = AutoModelForCausalLM.from_config(config)
    save(with_noise(model), directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        if name.startswith(last):
            tensors[draft + name.removeprefix(last)] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@cache
def text_file(n_characters: int = 20_000, seed: int = 0) -> str:
    """Return the path of a file that holds one of `texts`, which lasts as long as this process."""
    return written(texts(n_characters, seed)[0])


@cache
def written(text: str) -> str:
    """Return the path of a file that holds `text`, which lasts as long as this process."""
    file = _folder() / f"{sha256(text.encode()).hexdigest()[:16]}.txt"
    file.write_text(text, encoding="utf-8")
    return str(file)


@cache
def _folder() -> Path:
    folder = Path(mkdtemp(prefix="gptq-texts-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    return folder
