"""Who loads a checkpoint: the table of the engines, and their judgement of what a run writes.

The table names for each engine the checkpoints that it loads, with source and date. A `Trait` is a
property of checkpoints that not every reader takes. The rules of an engine are tried in order: the
first one whose trait the checkpoint has decides. If there is none, the engine loads the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from gptq_cli.config.layer import LayerConfig, expert_part, split_experts, split_groups
from gptq_cli.errors import Problem

Outcome = Literal["yes", "limited", "wrong", "no"]

MARLIN_GROUPS = {-1, 32, 64, 128}
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj"}
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
    split_fused: bool = False  # q, k and v, or gate and up, of one layer have, or some are kept
    narrow_experts: bool = False  # the hidden size is no multiple of 128
    transposed: bool = False  # the source stores its linears [I, O]

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
    """The outcome if an engine gets a checkpoint with a trait, and the reason."""

    trait: Trait
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Reader:
    """How an engine reads some formats; `source` names the code read or run in the month `date`."""

    formats: frozenset[str]
    source: str
    date: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that loads checkpoints, with its readers of different formats."""

    name: str
    readers: tuple[Reader, ...]

    def rules_for(self, format: str) -> tuple[Rule, ...]:
        """Return the rules for checkpoints in a format; if nothing reads it, the one that says so.

        >>> ENGINES[0].rules_for("awq")[0].reason
        'it does not read awq'
        """
        for reader in self.readers:
            if format in reader.formats:
                return reader.rules
        return (Rule(FORMAT, "no", f"it does not read {format}"),)


GPTQ = frozenset({"gptq", "gptq_v2"})

FORMAT = Trait(lambda _: True, "format {format}", "--format gptq")
ODD_BITS = Trait(lambda e: not e.bits <= {4, 8}, "{bits} bits", "--bits 4 or 8")
NOT_4_BITS = Trait(lambda e: e.bits != {4}, "{bits} bits", "--bits 4")
BITS_3 = Trait(lambda e: 3 in e.bits, "3 bits", "--bits 2, 4 or 8")
BITS_8 = Trait(lambda e: 8 in e.bits, "8 bits", "--bits 4")
ASYM = Trait(lambda e: e.asym, "asymmetric grids", "--sym")
ASYM_V1 = Trait(
    lambda e: e.asym and e.format == "gptq",
    "asymmetric grids in format gptq",
    "--format gptq_v2 or --sym",
)
V2 = Trait(lambda e: e.format == "gptq_v2", "format gptq_v2", "--format gptq")
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
GROUPS = Trait(
    lambda e: not e.group_sizes <= MARLIN_GROUPS,
    "group_size {group_sizes}",
    "--group-size -1, 32, 64 or 128",
)
TORCH_GROUP = Trait(
    lambda e: not e.group_sizes <= TORCH_GROUPS,
    "group_size {group_sizes}",
    "--group-size -1, 32, 64, 128 or 256",
)
GROUPS_OF_16 = Trait(
    lambda e: 4 in e.bits and 16 in e.group_sizes, "4 bits with group_size 16", "--group-size 32"
)
NO_POWER = Trait(
    lambda e: any(size & (size - 1) for size in e.group_sizes if size > 0),
    "group_size {group_sizes}",
    "a power of two as --group-size",
)
G_IDX = Trait(
    lambda e: e.real_g_idx, "desc_act", "--static-groups or --act-group-aware instead of --desc-act"
)
MIXED = Trait(lambda e: e.mixed, "layers with different settings", "no `+:` rules of --dynamic")
SPLIT_FUSED = Trait(
    lambda e: e.split_fused,
    "q, k and v (or gate and up) of one layer with different settings, or some of them kept",
    "rules that match all of a fused group or none of it",
)
LM_HEAD = Trait(lambda e: e.lm_head, "a quantized lm_head", "--no-lm-head")
EXPERTS = Trait(lambda e: bool(e.experts), "quantized experts", "an engine that serves mixtures")
SPLIT_EXPERTS = Trait(
    lambda e: e.split_experts,
    "experts of one layer with different settings",
    "rules that match all experts alike",
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
NARROW_G_IDX = Trait(
    lambda e: e.narrow_experts and e.real_g_idx,
    "experts of this width with desc_act",
    "--static-groups",
)
NARROW_8_BITS = Trait(
    lambda e: e.narrow_experts and 8 in e.bits and e.group_sizes != {-1},
    "experts of this width in 8 bits",
    "--bits 4 or --group-size -1",
)
NARROW = Trait(lambda e: e.narrow_experts, "experts of this width", "another model")
TRANSPOSED = Trait(lambda e: e.transposed, "a model of Conv1D layers", "another engine")

ENGINES: tuple[Engine, ...] = (
    Engine(
        "vllm",
        (
            Reader(
                GPTQ,
                "vllm-project/vllm, layers/quantization/auto_gptq.py and gptq_utils.py, "
                "fused_moe/oracle/int_wna16.py, read",
                "2026-06",
                (
                    Rule(ODD_BITS, "no", "it serves 4 and 8 bits only"),
                    Rule(ASYM, "no", "it serves symmetric checkpoints only"),
                    Rule(GROUPS, "no", "group_size must be -1, 32, 64 or 128"),
                    Rule(SPLIT_EXPERTS, "no", "the experts of a layer must share their settings"),
                    Rule(
                        SPLIT_FUSED,
                        "no",
                        "layers it fuses (q, k, v; gate, up) must share their settings",
                    ),
                    Rule(
                        NARROW_G_IDX, "wrong", "the kernel for experts of this width ignores g_idx"
                    ),
                    Rule(
                        NARROW_8_BITS,
                        "no",
                        "its kernel for experts of this width has 8 bits with one group a row only",
                    ),
                    Rule(G_IDX, "limited", "desc_act is slow, and refused from 0.30 on"),
                    Rule(
                        MIXED,
                        "limited",
                        "layers it fuses (q, k, v; gate, up) must share their settings",
                    ),
                    Rule(BITS_8, "limited", "8 bits on GPU only"),
                    Rule(
                        NARROW,
                        "limited",
                        "a slower kernel for experts whose hidden size is no multiple of 128",
                    ),
                ),
            ),
        ),
    ),
    Engine(
        "sglang",
        (
            Reader(
                GPTQ,
                "sgl-project/sglang, layers/quantization/gptq, read",
                "2026-06",
                (
                    Rule(PLAIN_EXPERTS, "no", "it serves experts in 4 and 8 bits, symmetric, only"),
                    Rule(V2_PLAIN, "wrong", "its kernel for these settings reads v2 zeros as v1"),
                    Rule(GROUPS, "no", "group_size must be -1, 32, 64 or 128"),
                    Rule(SPLIT_EXPERTS, "no", "the experts of a layer must share their settings"),
                    Rule(
                        SPLIT_FUSED,
                        "no",
                        "it asks rules for the fused name (qkv_proj, gate_up_proj) only",
                    ),
                    Rule(PLAIN, "limited", "without Marlin: plain float16 kernel"),
                    Rule(
                        MIXED,
                        "limited",
                        "layers it fuses (q, k, v; gate, up) must share their settings",
                    ),
                ),
            ),
        ),
    ),
    Engine(
        "transformers",
        (
            Reader(
                GPTQ,
                "transformers 5.23 with optimum 2.3 and gptqmodel 7.7, run on CPU",
                "2026-11",
                (
                    Rule(EXPERTS, "wrong", "it leaves quantized experts random"),
                    Rule(LM_HEAD, "wrong", "it ignores a quantized lm_head"),
                    Rule(MIXED, "no", "it ignores `dynamic`, all layers must share their settings"),
                    Rule(TRANSPOSED, "no", "its loading of quantized Conv1D layers fails"),
                    Rule(TORCH_GROUP, "no", "gptqmodel has no kernel for this group_size"),
                    Rule(GROUPS_OF_16, "limited", "group_size 16 not on CPU"),
                ),
            ),
        ),
    ),
    Engine(
        "gptqmodel",
        (
            Reader(
                GPTQ,
                "gptqmodel 7.7, run on CPU",
                "2026-11",
                (
                    Rule(OTHER_EXPERTS, "no", "it knows experts as gate_proj, up_proj, down_proj"),
                    Rule(
                        ASYM_V1, "no", "it takes asymmetric v1 from itself only: use format gptq_v2"
                    ),
                    Rule(TORCH_GROUP, "no", "no kernel for this group_size"),
                    Rule(GROUPS_OF_16, "limited", "group_size 16 not on CPU"),
                ),
            ),
        ),
    ),
    Engine(
        "llama.cpp",
        (
            Reader(
                GPTQ,
                "ggml-org/llama.cpp, conversion/base.py (converts to GGUF), read",
                "2026-06",
                (
                    Rule(BITS_3, "no", "its converter has no 3 bits"),
                    Rule(MIXED, "no", "its converter knows one setting for all layers"),
                    Rule(
                        TRANSPOSED,
                        "wrong",
                        "its converter transposes quantized Conv1D layers twice",
                    ),
                ),
            ),
        ),
    ),
    Engine(
        "exllamav2",
        (
            Reader(
                GPTQ,
                "turboderp-org/exllamav2, exllamav2/config.py, read",
                "2026-06",
                (
                    Rule(NOT_4_BITS, "no", "it runs 4 bits only"),
                    Rule(MIXED, "no", "all layers must share their settings"),
                    Rule(NO_POWER, "no", "group_size must be a power of two"),
                ),
            ),
        ),
    ),
    Engine(
        "tgi",
        (
            Reader(
                GPTQ,
                "huggingface/text-generation-inference, server/utils/quantization.py, read",
                "2026-06",
                (
                    Rule(BITS_3, "no", "it has no 3 bits"),
                    Rule(MIXED, "no", "it ignores `dynamic`, all layers must share their settings"),
                    Rule(V2_PLAIN, "wrong", "it reads v2 zeros as v1"),
                    Rule(LM_HEAD, "limited", "a quantized lm_head was not tried"),
                    Rule(PLAIN, "limited", "without Marlin: exllama or Triton kernel"),
                ),
            ),
        ),
    ),
    Engine(
        "auto-round",
        (
            Reader(
                GPTQ,
                "auto-round 0.15.1, its CPU loader, run",
                "2026-11",
                (
                    Rule(OTHER_EXPERTS, "wrong", "it knows no such names of experts"),
                    Rule(ASYM, "no", "its CPU loader takes symmetric checkpoints only"),
                    Rule(V2, "wrong", "it reads v2 zeros as v1"),
                    Rule(LM_HEAD, "wrong", "it ignores a quantized lm_head"),
                    Rule(G_IDX, "no", "it refuses desc_act without static_groups"),
                ),
            ),
        ),
    ),
)

ANY = "any"  # every engine of the table
TARGETS = (*(engine.name for engine in ENGINES), ANY)


LOADS: tuple[Outcome, ...] = ("yes", "limited")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of an engine; `wrong` is the worst: it loads, but computes something else."""

    engine: str
    outcome: Outcome
    reason: str


class _Stored(NamedTuple):
    """The settings of a linear that readers see."""

    bits: int
    group_size: int
    sym: bool


def export_of(
    layers: Mapping[str, LayerConfig | None],
    format: str,
    *,
    lm_head: bool,
    narrow_experts: bool = False,
    transposed: bool = False,
) -> Export:
    """Return the export of linears with these settings by name, None for a linear that is kept."""
    quantized = {name: config for name, config in layers.items() if config is not None}
    stored: dict[str, _Stored | None] = dict.fromkeys(layers)
    for name, config in quantized.items():
        stored[name] = _Stored(config.bits, config.group_size, config.sym)
    kinds = {stored[name] for name in quantized}
    configs = quantized.values()
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
        split_fused=bool(split_groups(_outside_experts(stored))),
        narrow_experts=narrow_experts,
        transposed=transposed,
    )


def _expert_linears(names: Iterable[str]) -> frozenset[str]:
    """Return the last names of the linears of experts."""
    parts = map(expert_part, names)
    return frozenset(part[1] for part in parts if part is not None)


def _outside_experts(stored: Mapping[str, _Stored | None]) -> dict[str, _Stored | None]:
    return {name: kind for name, kind in stored.items() if expert_part(name) is None}


def verdicts(export: Export) -> tuple[Verdict, ...]:
    """Return the judgement of each engine on such a checkpoint."""
    return tuple(_judge(engine, export) for engine in ENGINES)


def _judge(engine: Engine, export: Export) -> Verdict:
    for rule in engine.rules_for(export.format):
        if rule.trait.has(export):
            return Verdict(engine.name, rule.outcome, rule.reason)
    return Verdict(engine.name, "yes", "")


def target_problems(export: Export, target: str | None) -> list[Problem]:
    """Return E_TARGET for each trait that keeps `target` from loading the checkpoint.

    An engine with limits loads it; an engine that would compute something else does not. Without a
    target there is no problem.
    """
    asked = [engine for engine in ENGINES if target in (engine.name, ANY)]
    found: dict[Trait, list[str]] = {}
    for engine in asked:
        for rule in engine.rules_for(export.format):
            if rule.outcome not in LOADS and rule.trait.has(export):
                words = _refusal(engine, rule, export)
                if len(asked) == 1:
                    words += f": {rule.reason}"
                found.setdefault(rule.trait, []).append(words)
    others = _what_loads(export)
    problems = []
    for trait, refusals in found.items():
        hint = f"what would load: {trait.instead}{others}"
        problems.append(Problem("E_TARGET", "; ".join(refusals), hint))
    return problems


def _refusal(engine: Engine, rule: Rule, export: Export) -> str:
    verb = "does not load" if rule.outcome == "no" else "would misread"
    return f"{engine.name} {verb} {_named(rule.trait, export)}"


def _what_loads(export: Export) -> str:
    """Return the end of a hint: the engines that load the checkpoint unchanged."""
    loads = [verdict.engine for verdict in verdicts(export) if verdict.outcome in LOADS]
    if not loads:
        return ""
    return f"; as it is, it loads in {', '.join(loads)}"


def limits(export: Export, target: str | None) -> list[str]:
    """Return the reasons why a `target` that loads the checkpoint does not always or well do so."""
    found = []
    for verdict in verdicts(export):
        if verdict.outcome == "limited" and target in (verdict.engine, ANY):
            found.append(f"{verdict.engine}: {verdict.reason}")
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
