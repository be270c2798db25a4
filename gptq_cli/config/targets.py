"""Who will load a checkpoint with given settings: what each engine's reader accepts, as data.

For each engine the rules are asked in order and the first that applies decides; without one the engine loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import expert_part

Outcome = Literal["yes", "limited", "wrong", "no"]

MARLIN_GROUPS = {-1, 32, 64, 128}
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj"}
TORCH_GROUPS = {-1, 16, 32, 64, 128, 256, 512, 1024}


@dataclass(frozen=True, slots=True)
class Export:
    """What a reader sees of a checkpoint: the settings that occur in it."""

    bits: frozenset[int]
    group_sizes: frozenset[int]
    asym: bool
    real_g_idx: bool
    mixed: bool
    v2: bool
    lm_head: bool
    experts: frozenset[str]  # what the linears of experts are called, gate_proj or w1
    split_experts: bool  # experts of one layer have different settings

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerConfig],
        format: str,
        lm_head: bool,
        *,
        names: Iterable[str] = (),
        split_experts: bool = False,
    ) -> Export:
        """The export of these quantized layers, `names`; static_groups make g_idx trivial whatever desc_act says."""
        layers = set(layers)
        return cls(
            bits=frozenset(layer.bits for layer in layers),
            group_sizes=frozenset(layer.group_size for layer in layers),
            asym=any(not layer.sym for layer in layers),
            real_g_idx=any(layer.desc_act and not layer.static_groups for layer in layers),
            mixed=len({(layer.bits, layer.group_size, layer.sym) for layer in layers}) > 1,
            v2=format == "gptq_v2",
            lm_head=lm_head,
            experts=frozenset(part[1] for name in names if (part := expert_part(name))),
            split_experts=split_experts,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong` is the worst: the engine loads the checkpoint and computes something else."""

    engine: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class _Rule:
    applies: Callable[[Export], bool]
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class _Engine:
    name: str
    source: str
    rules: tuple[_Rule, ...]


def _marlin(export: Export) -> bool:
    return export.bits <= {4, 8} and not export.asym and export.group_sizes <= MARLIN_GROUPS


def _odd_groups(export: Export) -> bool:
    return not export.group_sizes <= MARLIN_GROUPS


ENGINES: tuple[_Engine, ...] = (
    _Engine(
        "vllm",
        "vllm-project/vllm, layers/quantization/auto_gptq.py and gptq_utils.py, read in mid 2026",
        (
            _Rule(lambda e: not e.bits <= {4, 8}, "no", "it serves 4 and 8 bits only"),
            _Rule(lambda e: e.asym, "no", "it serves symmetric checkpoints only"),
            _Rule(_odd_groups, "no", "group_size must be -1, 32, 64 or 128"),
            _Rule(lambda e: e.split_experts, "no", "the experts of a layer must share their settings"),
            _Rule(lambda e: e.real_g_idx, "limited", "desc_act is slow, and refused from 0.30 on"),
            _Rule(lambda e: e.mixed, "limited", "layers it fuses (q, k, v; gate, up) must share their settings"),
            _Rule(lambda e: 8 in e.bits, "limited", "8 bits on GPU only"),
        ),
    ),
    _Engine(
        "sglang",
        "sgl-project/sglang, layers/quantization/gptq, read in mid 2026",
        (
            _Rule(lambda e: e.v2 and not _marlin(e), "wrong", "its kernel for these settings reads v2 zeros as v1"),
            _Rule(_odd_groups, "no", "group_size must be -1, 32, 64 or 128"),
            _Rule(lambda e: e.split_experts, "no", "the experts of a layer must share their settings"),
            _Rule(lambda e: not _marlin(e), "limited", "without Marlin: plain float16 kernel"),
            _Rule(lambda e: e.mixed, "limited", "layers it fuses (q, k, v; gate, up) must share their settings"),
        ),
    ),
    _Engine(
        "transformers",
        "transformers 5.23 with optimum 2.3 and gptqmodel 7.7, run on CPU in November 2026",
        (
            _Rule(lambda e: bool(e.experts), "wrong", "it leaves quantized experts random"),
            _Rule(lambda e: e.lm_head, "wrong", "it ignores a quantized lm_head"),
            _Rule(lambda e: e.mixed, "no", "it ignores `dynamic`, all layers must share their settings"),
            _Rule(lambda e: not e.group_sizes <= TORCH_GROUPS, "no", "gptqmodel has no kernel for this group_size"),
            _Rule(lambda e: 4 in e.bits and 16 in e.group_sizes, "limited", "group_size 16 not on CPU"),
        ),
    ),
    _Engine(
        "gptqmodel",
        "gptqmodel 7.7, run on CPU in November 2026",
        (
            _Rule(lambda e: not e.experts <= EXPERT_NAMES, "no", "it knows experts as gate_proj, up_proj, down_proj"),
            _Rule(lambda e: e.asym and not e.v2, "no", "it takes asymmetric v1 from itself only: use format gptq_v2"),
            _Rule(lambda e: not e.group_sizes <= TORCH_GROUPS, "no", "no kernel for this group_size"),
            _Rule(lambda e: 4 in e.bits and 16 in e.group_sizes, "limited", "group_size 16 not on CPU"),
        ),
    ),
    _Engine(
        "llama.cpp",
        "ggml-org/llama.cpp, conversion/base.py (converts to GGUF), read in mid 2026",
        (
            _Rule(lambda e: 3 in e.bits, "no", "its converter has no 3 bits"),
            _Rule(lambda e: e.mixed, "no", "its converter knows one setting for all layers"),
        ),
    ),
    _Engine(
        "exllamav2",
        "turboderp-org/exllamav2, exllamav2/config.py, read in mid 2026",
        (
            _Rule(lambda e: e.bits != {4}, "no", "it runs 4 bits only"),
            _Rule(lambda e: e.mixed, "no", "all layers must share their settings"),
            _Rule(lambda e: any(size & (size - 1) for size in e.group_sizes if size > 0), "no",
                  "group_size must be a power of two"),
        ),
    ),
    _Engine(
        "tgi",
        "huggingface/text-generation-inference, server/utils/quantization.py, read in mid 2026",
        (
            _Rule(lambda e: 3 in e.bits, "no", "it has no 3 bits"),
            _Rule(lambda e: e.mixed, "no", "it ignores `dynamic`, all layers must share their settings"),
            _Rule(lambda e: e.v2 and not _marlin(e), "wrong", "it reads v2 zeros as v1"),
            _Rule(lambda e: e.lm_head, "limited", "a quantized lm_head was not tried"),
            _Rule(lambda e: not _marlin(e), "limited", "without Marlin: exllama or Triton kernel"),
        ),
    ),
    _Engine(
        "auto-round",
        "auto-round 0.15.1, its CPU loader, run in November 2026",
        (
            _Rule(lambda e: not e.experts <= EXPERT_NAMES, "wrong", "it knows no such names of experts"),
            _Rule(lambda e: e.asym, "no", "its CPU loader takes symmetric checkpoints only"),
            _Rule(lambda e: e.v2, "wrong", "it reads v2 zeros as v1"),
            _Rule(lambda e: e.lm_head, "wrong", "it ignores a quantized lm_head"),
            _Rule(lambda e: e.real_g_idx, "no", "it refuses desc_act without static_groups"),
        ),
    ),
)  # fmt: skip


def verdicts(export: Export) -> tuple[Verdict, ...]:
    """For each engine, whether it loads such a checkpoint and why not."""
    return tuple(_judge(engine, export) for engine in ENGINES)


def _judge(engine: _Engine, export: Export) -> Verdict:
    for rule in engine.rules:
        if rule.applies(export):
            return Verdict(engine.name, rule.outcome, rule.reason)
    return Verdict(engine.name, "yes", "")
