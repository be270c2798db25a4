"""The checkpoints that engines must load or refuse: random models of two blocks, quantized."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SIZES: dict[str, object] = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
# No window is shorter than the prompts, because not every engine knows windows.
WINDOW: dict[str, object] = {"sliding_window": 128}
GEMMA: dict[str, object] = WINDOW | {
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
CHANGES: dict[str, dict[str, object]] = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 8},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "mistral": WINDOW,
    "qwen2": WINDOW,
    "phi": {"num_key_value_heads": 8},
    "qwen3_moe": {"moe_intermediate_size": 256, "norm_topk_prob": True},
}
SHARED = {"group_size": 128, "seqlen": 64, "nsamples": 16, "device": "cpu"}
GROUPED = re.compile(r"[^a-z0-9.-]+")


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint to write: its row in the table, a model, and what differs from SHARED."""

    section: str
    title: str
    settings: dict[str, Any] = field(hash=False)
    family: str = "llama"
    dtype: str = "float16"

    @property
    def id(self) -> str:
        return GROUPED.sub("-", f"{self.section} {self.title}".lower()).strip("-")


def _grids() -> Iterator[Case]:
    for bits, sym, format in itertools.product((2, 3, 4, 8), (True, False), ("gptq", "gptq_v2")):
        yield _grid(bits, sym=sym, format=format)
    for bits in (2, 3, 4, 8):
        yield _grid(bits, sym=True, format="gptq", desc_act=True)
    yield _grid(4, sym=False, format="gptq_v2", desc_act=True)


def _grid(bits: int, *, sym: bool, format: str, desc_act: bool = False) -> Case:
    words = [f"{bits} bits", "sym", f"`{format}`"]
    if not sym:
        words[1] = "asym"
    if desc_act:
        words.append("desc_act")
    settings = {"bits": bits, "sym": sym, "format": format, "desc_act": desc_act}
    return Case("bits, grid, order", ", ".join(words), settings | {"preset": "gptq"})


def _groups() -> Iterator[Case]:
    for bits, size in itertools.product((3, 4), (-1, 16, 32, 64, 256)):
        settings = {"bits": bits, "group_size": size}
        yield Case("groups and order", f"group size {size}, {bits} bits", settings)
    rows = {"group_size": -1, "desc_act": True}
    yield Case("groups and order", "group size -1, desc_act, 4 bits", {"bits": 4} | rows)
    plain = {"act_group_aware": False, "preset": "gptq"}
    yield Case("groups and order", "columns in their natural order, 4 bits", {"bits": 4} | plain)
    static = {"desc_act": True, "static_groups": True, "preset": "gptq"}
    yield Case("groups and order", "static groups, 4 bits", {"bits": 4} | static)


def _presets() -> Iterator[Case]:
    for preset, bits in itertools.product(("balanced", "best"), (2, 3, 4, 8)):
        settings = {"bits": bits, "preset": preset}
        yield Case("presets (signed scales)", f"`{preset}`, {bits} bits", settings)
    signed = {"bits": 4, "desc_act": True}
    yield Case("presets (signed scales)", "`balanced`, desc_act, 4 bits", signed)


def _rule(section: str, title: str, *rules: str, family: str = "llama", **changes: Any) -> Case:
    """Return a case with rules such as "-:PATTERN" or "+:PATTERN=SETTING=VALUE"."""
    dynamic: dict[str, dict[str, object]] = {}
    for rule in rules:
        pattern, *change = rule.split("=")
        dynamic[pattern] = {}
        if change:
            dynamic[pattern] = {change[0]: json.loads(change[1])}
    return Case(section, title, {"bits": 4, "dynamic": dynamic} | changes, family)


RULES = (
    _rule("rules", "o_proj of a block kept", r"-:model\.layers\.1\.self_attn\.o_proj$"),
    _rule("rules", "down_proj kept", r"-:.*\.down_proj"),
    _rule("rules", "q, k and v of a block kept", r"-:.*\.1\.self_attn\.[qkv]_proj"),
    _rule("rules", "q_proj alone kept", r"-:.*\.q_proj"),
    _rule("rules", "a block kept", r"-:model\.layers\.0\."),
    Case(
        "rules",
        "down_proj kept by modules_in_block_to_quantize",
        {
            "bits": 4,
            "modules_in_block_to_quantize": [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
            ],
        },
    ),
    _rule("rules", "down_proj in 8 bits", r"+:.*\.down_proj=bits=8"),
    _rule("rules", "down_proj in 2 bits", r"+:.*\.down_proj=bits=2"),
    _rule(
        "rules",
        "down_proj in 8 bits, o_proj of a block kept",
        r"-:model\.layers\.1\.self_attn\.o_proj$",
        r"+:.*\.down_proj=bits=8",
    ),
    _rule("rules", "down_proj in groups of 32", r"+:.*\.down_proj=group_size=32"),
    _rule("rules", "a block in groups of 32", r"+:.*layers\.0\..*=group_size=32"),
    _rule("rules", "q, k and v in groups of 32", r"+:.*\.[qkv]_proj=group_size=32"),
    _rule("rules", "q, k and v in 8 bits", r"+:.*\.[qkv]_proj=bits=8"),
    _rule("rules", "gate and up in groups of 32", r"+:.*\.(gate|up)_proj=group_size=32"),
    _rule("rules", "q_proj alone in groups of 32", r"+:.*\.q_proj=group_size=32"),
    _rule("rules", "down_proj with desc_act", r"+:.*\.down_proj=desc_act=true"),
    _rule("rules", "down_proj asymmetric", r"+:.*\.down_proj=sym=false"),
)
HEADS = (
    Case("heads and files", "quantized lm_head", {"bits": 4, "lm_head": True}),
    Case(
        "heads and files",
        "quantized lm_head of a tied model",
        {"bits": 4, "lm_head": True},
        "qwen3",
    ),
    Case("heads and files", "tied lm_head", {"bits": 4}, "qwen3"),
    _rule("heads and files", "lm_head kept by a rule", "-:lm_head", lm_head=True),
    Case("heads and files", "many shards", {"bits": 4, "max_shard_size": "400KB"}),
    Case("heads and files", "bfloat16 model, 4 bits", {"bits": 4}, dtype="bfloat16"),
    Case("heads and files", "bfloat16 model, 8 bits", {"bits": 8}, dtype="bfloat16"),
)
NAMES = {
    "mistral": "Mistral",
    "qwen2": "Qwen2 (with biases)",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "phi": "Phi",
    "phi3": "Phi-3 (q, k, v in one linear)",
    "opt": "OPT",
    "gpt_neox": "GPT-NeoX",
    "gpt2": "GPT-2 (Conv1D)",
    "olmo2": "OLMo 2",
    "granite": "Granite",
}


def _families() -> Iterator[Case]:
    for family, name in NAMES.items():
        yield Case("families", f"{name}, 4 bits", {"bits": 4}, family)
    for family in ("qwen2", "phi3"):
        yield Case("families", f"{NAMES[family]}, 8 bits", {"bits": 8}, family)


MIXTURES = (
    Case("mixtures", "Qwen3-MoE, 4 bits", {"bits": 4}, "qwen3_moe"),
    Case("mixtures", "Qwen3-MoE, 8 bits", {"bits": 8}, "qwen3_moe"),
    _rule("mixtures", "Qwen3-MoE, attention kept", r"-:.*self_attn.*", family="qwen3_moe"),
    _rule("mixtures", "Qwen3-MoE, experts kept", r"-:.*experts.*", family="qwen3_moe"),
    _rule(
        "mixtures",
        "Qwen3-MoE, experts of a block kept",
        r"-:model\.layers\.0\.mlp\..*",
        family="qwen3_moe",
    ),
    Case("mixtures", "Mixtral (w1, w2, w3), 4 bits", {"bits": 4}, "mixtral"),
)
GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # bits, symmetric and asymmetric
    "compressed-tensors": ((2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 8)),
    "mlx": ((2, 3, 4, 5, 6, 8), (2, 3, 4, 8)),
    "auto-round": ((2, 3, 4, 8), (4,)),
}
VARIANTS: dict[str, Case] = {
    "group size 32": Case("", "", {"group_size": 32}),
    "group size -1": Case("", "", {"group_size": -1}),
    "`best`": Case("", "", {"preset": "best"}),
    "a block kept": _rule("", "", r"-:model\.layers\.0\."),
    "down_proj in 8 bits": _rule("", "", r"+:.*\.down_proj=bits=8"),
    "q, k and v in groups of 32": _rule("", "", r"+:.*\.[qkv]_proj=group_size=32"),
    "quantized lm_head": Case("", "", {"lm_head": True}),
    "tied lm_head": Case("", "", {}, "qwen3"),
    "Qwen2 (with biases)": Case("", "", {}, "qwen2"),
    "Qwen3-MoE": Case("", "", {}, "qwen3_moe"),
}


def _formats() -> Iterator[Case]:
    for format, (symmetric, asymmetric) in GRIDS.items():
        section = f"`{format}`"
        for bits in symmetric:
            yield Case(section, f"{bits} bits, sym", {"bits": bits, "format": format})
        for bits in asymmetric:
            settings = {"bits": bits, "format": format, "sym": False}
            yield Case(section, f"{bits} bits, asym", settings)
        for title, case in VARIANTS.items():
            settings = {"bits": 4} | case.settings | {"format": format}
            yield Case(section, f"4 bits, {title}", settings, case.family)


CASES = (
    *_grids(),
    *_groups(),
    *_presets(),
    *RULES,
    *HEADS,
    *_families(),
    *MIXTURES,
    *_formats(),
)
