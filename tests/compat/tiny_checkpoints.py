"""Small models of several families with random weights, saved as the Hub has them, each with a tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 320
WORDS = (
    "calm",
    "cat",
    "dark",
    "river",
    "stone",
    "sings",
    "under",
    "the",
    "a",
    "old",
    "slowly",
    "walks",
    "and",
    "sees",
)
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GATED = {"intermediate_size": 256, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,  # biases in q, k and v
    "qwen3": GATED | {"head_dim": 32},
    "gemma2": GATED
    | {"head_dim": 32, "sliding_window": 8, "tie_word_embeddings": True},  # layers see unlike masks
    "phi3": GATED,  # q, k and v are one linear, gate and up another
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "gpt_neox": {"intermediate_size": 256},
}


def make_texts(n_texts: int = 40, n_words: int = 80) -> list[str]:
    """Random sentences, the same on every call."""
    choose = random.Random(0)
    return [" ".join(choose.choices(WORDS, k=n_words)) + "." for _ in range(n_texts)]


def make_checkpoint(directory: Path, family: str, dtype: torch.dtype) -> Path:
    """`directory` with a model of `family` in `dtype` and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # large enough that attention and gates are far from their linear range, where mistakes could hide
            parameter.copy_(0.08 * noise if parameter.ndim == 2 else parameter + 0.1 * noise)
    model.to(dtype).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_config(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the words above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
