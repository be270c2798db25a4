"""The settings of one linear layer, the presets, and the rules that give layers other settings.

A `dynamic` rule is a regular expression of Python's `re`, as for GPTQModel and vLLM. It is matched
from the start of the full module name. Its prefix is `+:` (or nothing) for other settings, `-:` for
"keep in full precision". All `-:` rules are tried first, then the others in the order in which they
are written; the first match decides alone. At the end are the settings of linears in a checkpoint.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, Literal, NamedTuple, get_args

from gptq_cli.config.strict_yaml import parse_scalar
from gptq_cli.errors import ConfigError, one_of

BitWidth = Literal[2, 3, 4, 5, 6, 7, 8]
Format = Literal["gptq", "gptq_v2", "compressed-tensors", "mlx", "auto-round"]
ScaleSearch = Literal["none", "mse"]
DampMode = Literal["mean", "diagonal"]
Uncovered = Literal["error", "rtn", "all-tokens"]
OnFault = Literal["error", "rtn"]
Strength = float | Literal["auto"]  # of asymmetric calibration

BITS: tuple[int, ...] = get_args(BitWidth)
FORMATS: tuple[str, ...] = get_args(Format)
GPTQ_FORMATS = ("gptq", "gptq_v2")


class Holds(NamedTuple):
    """What a format can store.

    A group has a multiple of `columns` columns, or it is a whole row. With `g_idx` the columns of a
    group need not follow one another.
    """

    bits: tuple[int, ...] = BITS
    columns: int = 1
    g_idx: bool = False


HOLDS = {
    "gptq": Holds(bits=(2, 3, 4, 8), g_idx=True),
    "gptq_v2": Holds(bits=(2, 3, 4, 8), g_idx=True),
    "compressed-tensors": Holds(),
    "mlx": Holds(bits=(2, 3, 4, 5, 6, 8), columns=32),
    "auto-round": Holds(),
}


def misfits(format: str, bits: int, group_size: int, *, g_idx: bool) -> dict[str, str]:
    """Return the settings of a layer that a format cannot store, with the reason.

    `g_idx` tells whether columns of a group need not follow one another, which desc_act asks for.

    >>> misfits("mlx", 7, 48, g_idx=False)["bits"]
    'mlx stores 2, 3, 4, 5, 6 or 8 bits'
    """
    holds, found = HOLDS[format], {}
    if bits not in holds.bits:
        found["bits"] = f"{format} stores {one_of(holds.bits)} bits"
    if group_size != -1 and group_size % holds.columns:
        found["group_size"] = f"{format} stores groups of a multiple of {holds.columns} columns"
    if g_idx and not holds.g_idx:
        found["desc_act"] = f"{format} stores no g_idx, the group of each column"
    return found


def formats_for(bits: int, group_size: int, *, g_idx: bool) -> list[str]:
    """Return the formats that can store a layer with these settings."""
    return [name for name in FORMATS if not misfits(name, bits, group_size, g_idx=g_idx)]


@dataclass(frozen=True, slots=True)
class Preset:
    """A named starting point: its `settings` fill only the fields that the user left open.

    `advice` tells in a few words when to take it.
    """

    advice: str
    description: str
    settings: Mapping[str, Any]


DEFAULT_PRESET = "balanced"
BALANCED: dict[str, Any] = {
    "static_groups": True,
    "signed_scales": True,
    "scale_search": "mse",
    "refine_sweeps": 4,
    "damp_mode": "diagonal",
    "damp_percent": 0.05,
    "limit_massive_tokens": True,
}

# docs/accuracy.md has the effect of each on the divergence from the original model.
PRESETS: dict[str, Preset] = {
    "gptq": Preset(
        "as published",
        "the published algorithm with the defaults of Optimum's GPTQQuantizer: group-aware order, "
        "min/max scales, mean damping of 0.1",
        {},
    ),
    "act-order": Preset(
        "in activation order",
        "`gptq` with static groups: columns in activation order, but g_idx stays trivial",
        {"static_groups": True},
    ),
    "balanced": Preset(
        "for most models",
        "static groups in activation order, signed scales with a search, diagonal damping, "
        "limited massive tokens, four rounds of refinement",
        BALANCED,
    ),
    "fast": Preset(
        "first try",
        "`balanced` without search and refinement",
        BALANCED | {"scale_search": "none", "refine_sweeps": 0},
    ),
    "best": Preset(
        "better in twice the time",
        "`balanced` and asymmetric calibration: the unquantized model runs beside the quantized "
        "one, block by block",
        BALANCED | {"asymmetric_calibration": "auto"},
    ),
    "max": Preset(
        "most accurate, slowest",
        "`best` and loss-aware rounding: a pass before the first block takes the gradients of the "
        "model's loss at the outputs of layers",
        BALANCED | {"asymmetric_calibration": "auto", "loss_aware": True},
    ),
}


def preset_advice() -> str:
    """Return the presets with the advice for each, as `--help` shows them."""
    return ", ".join(f"{name} = {preset.advice}" for name, preset in PRESETS.items())


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    """The treatment of layers with unusable numbers, and of experts without tokens."""

    on_numeric_fault: OnFault = "error"
    moe_uncovered: Uncovered = "error"


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Quantization settings of one linear layer; `group_size` -1 means one group per row."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_group_aware: bool = True
    static_groups: bool = False
    signed_scales: bool = False
    scale_search: ScaleSearch = "none"
    refine_sweeps: int = 0
    asymmetric_calibration: Strength = 0.0
    loss_aware: bool = False
    damp_mode: DampMode = "mean"
    damp_percent: float = 0.1

    @property
    def has_trivial_g_idx(self) -> bool:
        """True if the columns of each group follow one another: readers need no g_idx."""
        return self.static_groups or not self.desc_act

    @property
    def follows_original(self) -> bool:
        """True if weights are corrected so that outputs follow those of the unquantized model."""
        return self.asymmetric_calibration != 0

    def columns_per_group(self, in_features: int) -> int:
        """Return the number of input columns that share one scale."""
        if self.group_size == -1:
            return in_features
        return self.group_size


SECONDS = 1.0  # of computing time; a sensible pattern takes microseconds
SECONDS_OF_CHILD = 20.0  # a busy machine needs some to start a process
MOST_CHOICES, MOST_GROUPS = 3, 2
_CHOICE = re.compile(r"[*+{]|(?<!\()\?")
_OTHERS = re.compile(r"\)[*+{]|\\[1-9]|\(\?[A-Za-z-]")  # repeated groups, references, flags
_CHILD = "import json, re, sys; sys.exit(re.match(*json.load(sys.stdin)) is None)"


def matches_in_time(pattern: str, text: str) -> bool:
    """Return whether the pattern matches from the start of the text, as with `re.match`.

    Raises TimeoutError if that takes long: `re` cannot be interrupted otherwise, so the match runs
    under a timer in the main thread, and in a process of its own elsewhere.
    """
    if _is_plain(pattern):
        return re.match(pattern, text) is not None
    if current_thread() is main_thread() and hasattr(signal, "setitimer"):
        return _match_here(pattern, text)
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    question = json.dumps([pattern, text]).encode()
    try:
        done = subprocess.run(command, input=question, timeout=SECONDS_OF_CHILD, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    return done.returncode == 0


def _is_plain(pattern: str) -> bool:
    """Return whether a pattern is so simple that matching takes the cube of the length at most."""
    few = len(_CHOICE.findall(pattern)) <= MOST_CHOICES and pattern.count("(") <= MOST_GROUPS
    return few and not _OTHERS.search(pattern)


def _match_here(pattern: str, text: str) -> bool:
    usual = signal.signal(signal.SIGVTALRM, _raise_timeout)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return re.match(pattern, text) is not None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, usual)


def _raise_timeout(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError


KEEP, CHANGE = "-:", "+:"
NUMBER, DOT = "[0-9]+", "[.]"  # in patterns for module names


class Stored(NamedTuple):
    """The settings of a linear that readers see."""

    bits: int
    group_size: int
    sym: bool


class Fused(NamedTuple):
    """Linears of one module that engines compute as one, and their names for it.

    Engines look up rules by such a name, and need all of a group alike. `always` is false if only
    some models fuse these linears: others have linears of these names that are separate.
    """

    parts: frozenset[str]
    names: tuple[str, ...]
    always: bool = True


def _fused(parts: str, *names: str, always: bool = True) -> Fused:
    return Fused(frozenset(parts.split()), names, always)


# Sources, read in November 2026: packed_modules_mapping and the stacked names of the models of
# vllm 0.33.0 and sglang 0.5.23. Their vision towers are left out, because nothing quantizes them.
FUSED = (
    _fused("q_proj k_proj v_proj", "qkv_proj"),
    _fused("gate_proj up_proj", "gate_up_proj"),
    _fused("query key value", "qkv_proj"),  # BERT, TeleChat2
    _fused("c_fc_0 c_fc_1", "gate_up_proj"),  # EXAONE
    _fused("w1 w3", "w13", "gate_up_proj"),  # LFM2, InternLM2
    _fused("fc1 fc3", "fc13", "gate_up_proj", always=False),  # Voxtral
    _fused("in_proj_qkv in_proj_z", "in_proj_qkvz"),  # Qwen3.5
    _fused("in_proj_b in_proj_a", "in_proj_ba"),
    _fused("q_a_proj kv_a_proj_with_mqa", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    _fused("wk weights_proj", "wk_weights_proj"),  # the indexer of DeepSeek V3.2
    _fused("wq_a wkv", "fused_wqa_wkv"),  # DeepSeek V4
    _fused("wkv wgate", "fused_wkv_wgate"),  # its compressor
    _fused("index_q_proj index_k_proj", "index_qkv_proj"),  # MiniMax M3
    _fused("wq_du wk_dv wv_dv wr_du", "qkvr"),  # Inkling
    _fused("q_proj k_proj", "qk_proj", always=False),  # K2 Horizon
    _fused("k_proj v_proj", "kv_proj", always=False),  # attention to an encoder
    _fused("q_proj k_proj v_proj b_proj", "qkvb_proj", always=False),  # linear attention
    _fused("q_proj k_proj v_proj g_proj", "in_proj_qkvg", "fused_qkvg_proj", always=False),
    _fused("q_proj k_proj v_proj b_proj f_a_proj", "in_proj_qkvgfab", always=False),
    _fused("q_proj k_proj v_proj b_proj f_a_proj g_a_proj", "fused_qkvbfg_a_proj", always=False),
    _fused("b_proj f_a_proj g_a_proj", "fused_bfg_a_proj", always=False),
    _fused("f_b_proj g_b_proj", "fused_fg_b_proj", always=False),
    _fused("q_proj k_proj v_proj a_proj b_proj g_proj", "qkvabz_proj", always=False),
)
# The prefix of a text model beside a vision tower, and vLLM's for it (hf_to_vllm_mapper of its
# models). vLLM asks rules by its own names.
RUNTIME_PREFIXES = {
    "model.language_model.model.": "language_model.model.",
    "model.language_model.": "language_model.model.",
    "thinker.model.": "language_model.model.",
    "language_model.layers.": "language_model.model.layers.",
}
HEAD = "lm_head"
RUNTIME_HEAD = "language_model.lm_head"  # the head of such a model in vLLM
_OF_EXPERT = re.compile(r"(.+\.\d+\..+)\.\d+\.([^.]+)")


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The settings of one layer and the reason; `config` None means full precision."""

    config: LayerConfig | None
    why: str


def expert_part(name: str) -> tuple[str, str] | None:
    """Return the name that the experts of a layer share and a linear's own, None for other linears.

    >>> expert_part("model.layers.0.mlp.experts.7.up_proj")
    ('model.layers.0.mlp.experts', 'up_proj')
    """
    match = _OF_EXPERT.fullmatch(name)
    return (match[1], match[2]) if match else None


def fused_name(name: str) -> str:
    """Return the usual name of what engines make of a linear and others; its own if nothing.

    >>> fused_name("layers.0.q_proj"), fused_name("layers.0.o_proj")
    ('layers.0.qkv_proj', 'layers.0.o_proj')
    """
    parent, _, leaf = name.rpartition(".")
    for fused in FUSED:
        if fused.always and leaf in fused.parts:
            return f"{parent}.{fused.names[0]}"
    return name


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Return linears that an engine may compute as one, by each name that it may have for them.

    >>> fused_groups(["layers.0.q_proj", "layers.0.k_proj", "layers.0.o_proj"])["layers.0.qkv_proj"]
    ['layers.0.q_proj', 'layers.0.k_proj']
    """
    leaves: dict[str, dict[str, None]] = defaultdict(dict)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        leaves[parent][leaf] = None
    found: dict[str, list[str]] = {}
    for parent, present in leaves.items():
        for fused in FUSED:
            parts = [f"{parent}.{leaf}" for leaf in present if leaf in fused.parts]
            if len(parts) == len(fused.parts) or (fused.always and len(parts) > 1):
                for alias in fused.names:
                    found.setdefault(f"{parent}.{alias}", parts)
    return found


def runtime_names(name: str) -> list[str]:
    """Return the names by which engines ask rules about a module: its own, and vLLM's for it.

    >>> runtime_names("model.language_model.layers.0.mlp.up_proj")[1]
    'language_model.model.layers.0.mlp.up_proj'
    """
    for prefix, runtime in RUNTIME_PREFIXES.items():
        if name.startswith(prefix):
            return [name, runtime + name.removeprefix(prefix)]
    return [name]


def split_groups(settings: Mapping[str, object]) -> list[str]:
    """Return the fused names of linears that engines fuse but whose `settings`, by name, differ.

    >>> split_groups({"layers.0.q_proj": 4, "layers.0.k_proj": 8, "layers.1.q_proj": 8})
    ['layers.0.qkv_proj']
    """
    groups: dict[str, set[object]] = defaultdict(set)
    for name, stored in settings.items():
        groups[fused_name(name)].add(stored)
    return _with_several(groups)


def split_experts(settings: Mapping[str, object]) -> list[str]:
    """Return the shared names of experts of one layer whose `settings`, by linear, differ."""
    groups: dict[str, set[object]] = defaultdict(set)
    for name, stored in settings.items():
        part = expert_part(name)
        if part is not None:
            groups[part[0]].add(stored)
    return _with_several(groups)


def _with_several(groups: Mapping[str, set[object]]) -> list[str]:
    return [name for name, stored in groups.items() if len(stored) > 1]


def keeps(rule: str) -> bool:
    """Return whether a `dynamic` rule keeps its layers in full precision."""
    return rule.startswith(KEEP)


def pattern_of(rule: str) -> str:
    """Return the regular expression of a `dynamic` rule without its prefix."""
    for prefix in (KEEP, CHANGE):
        if rule.startswith(prefix):
            return rule.removeprefix(prefix)
    return rule


class KeepRule(NamedTuple):
    """A `-:` rule, and the command-line option that gives it."""

    rule: str
    option: str


def keeping(names: Iterable[str], *, in_all_blocks: bool = False) -> KeepRule:
    """Return a rule that keeps layers and those that engines fuse with them, and its option.

    With `in_all_blocks` each number inside the names stands for all numbers.

    >>> keeping(["model.layers.3.mlp.down_proj"]).option
    "--dynamic '-:model[.]layers[.]3[.]mlp[.]down_proj$'"
    >>> keeping(["m.0.k_proj", "m.1.k_proj"], in_all_blocks=True).rule
    '-:m[.][0-9]+[.](k_proj|q_proj|v_proj)$'
    """
    patterns = [_pattern_for(name, in_all_blocks=in_all_blocks) for name in names]
    rule = f"{KEEP}{_any_of(dict.fromkeys(patterns))}$"
    return KeepRule(rule, f"--dynamic {shlex.quote(rule)}")


def _pattern_for(name: str, *, in_all_blocks: bool) -> str:
    """Return the pattern of a linear and of those that engines fuse with it."""
    *holders, leaf = name.split(".")
    leaves = {leaf}
    for fused in FUSED:
        if fused.always and leaf in fused.parts:
            leaves |= fused.parts
    words = []
    for holder in holders:
        is_number = in_all_blocks and holder.isdecimal()
        words.append(NUMBER if is_number else re.escape(holder))
    words.append(_any_of(map(re.escape, sorted(leaves))))
    return DOT.join(words)


def _any_of(patterns: Iterable[str]) -> str:
    patterns = list(patterns)
    if len(patterns) == 1:
        return patterns[0]
    return f"({'|'.join(patterns)})"


def flaw_of(rule: str) -> str | None:
    """Return the reason why a `dynamic` rule is no regular expression, None if it is one."""
    try:
        with warnings.catch_warnings():
            # A pattern such as [[a] may change its meaning with the next Python.
            warnings.simplefilter("error")
            re.compile(pattern_of(rule))
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        return str(error)
    return None


def matches(rule: str, name: str) -> bool:
    """Return whether a rule matches a layer's name; ConfigError E_CFG_REGEX if that takes long."""
    try:
        return matches_in_time(pattern_of(rule), name)
    except TimeoutError:
        raise ConfigError(
            "E_CFG_REGEX",
            f"rule {rule!r} takes more than {SECONDS:g} s to tell whether it matches `{name}`",
            hint="write it without a repetition of a repetition, such as (a+)+",
        ) from None


def first_match(rules: Iterable[str], name: str) -> str | None:
    """Return the rule that decides about the layer `name`, as in GPTQModel; None without one."""
    keeping_first = sorted(rules, key=lambda rule: not keeps(rule))
    for rule in keeping_first:
        if matches(rule, name):
            return rule
    return None


def is_listed(modules: Sequence[Sequence[str]] | None, name_in_block: str) -> bool:
    """Return whether `modules_in_block_to_quantize` reaches a linear.

    It does if the name ends with a listed one, as in Optimum, or if there is no list.
    """
    if modules is None:
        return True
    listed = tuple(item for stage in modules for item in stage)
    return name_in_block.endswith(listed)


def parse_rule(text: str) -> tuple[str, Any]:
    """Return rule and settings of `-:regex` or `+:regex={"bits": 8}`, the words for --dynamic."""
    match = re.fullmatch(r"(.*)=(\{.*\})", text, re.DOTALL)
    if match is None:
        return text, {}
    return match[1], parse_scalar(match[2])


def unmatched_rules(rules: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Return the rules that match none of `names`, often because matching starts at the front."""
    names = list(names)
    return [rule for rule in rules if not _matches_any(rule, names)]


def _matches_any(rule: str, names: Iterable[str]) -> bool:
    return any(matches(rule, name) for name in names)


_ITEM = re.compile(r"(?P<list_name>.*?)\.(?P<number>\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.)")
_NUMBER_OR_LAST = re.compile(r"\.\d+(?=\.|$)")


class ListItem(NamedTuple):
    """An item of the outermost numbered list in a name; `inner` is the name inside the item."""

    list_name: str
    number: str
    inner: str


def list_item(name: str) -> ListItem | None:
    """Return the item of the outermost numbered list that holds a module; None outside of lists.

    >>> list_item("model.layers.3.mlp.experts.7.up_proj")
    ListItem(list_name='model.layers', number='3', inner='mlp.experts.7.up_proj')
    """
    match = _ITEM.match(name)
    if match is None:
        return None
    return ListItem(match["list_name"], match["number"], name[match.end() :])


def kind_of(name: str, *, last_too: bool = False) -> str:
    """Return the name that the same module of every block shares: each number in it becomes N.

    A number at the end stays, because it tells modules of one block apart, unless `last_too`.

    >>> kind_of("model.layers.3.mlp.experts.7.up_proj")
    'model.layers.N.mlp.experts.N.up_proj'
    """
    if last_too:
        return _NUMBER_OR_LAST.sub(".N", name)
    return _NUMBER.sub(".N", name)


# ---------------------------------------------------------------- stored


@dataclass(frozen=True, slots=True)
class Settings:
    """How one module is stored; `group_size` -1 is one group a row."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @classmethod
    def of(cls, layer: LayerConfig) -> Settings:
        """Return how a layer with this configuration is stored."""
        return cls(layer.bits, layer.group_size, layer.sym, not layer.has_trivial_g_idx)


@dataclass(frozen=True, slots=True)
class Linears:
    """The linears of a checkpoint by name: settings and inputs of quantized ones, and kept ones."""

    quantized: Mapping[str, Settings]
    in_features: Mapping[str, int]
    kept: Sequence[str]

    @property
    def sym(self) -> bool:
        """Whether all quantized linears are symmetric."""
        return all(settings.sym for settings in self.quantized.values())

    def kept_in_blocks(self) -> list[str]:
        """Return the kept linears that are beside quantized ones in a list of blocks."""
        blocks = {item.list_name for item in map(list_item, self.quantized) if item}
        kept = []
        for name in self.kept:
            item = list_item(name)
            if item and item.list_name in blocks:
                kept.append(name)
        return kept

    def usual(self) -> tuple[Settings, dict[str, Settings]]:
        """Return the settings of most linears, and those of the others, sorted by name."""
        base = Counter(self.quantized.values()).most_common(1)[0][0]
        others = {}
        for name, settings in sorted(self.quantized.items()):
            if settings != base:
                others[name] = settings
        return base, others


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """A `quantization_config` whose values have the right types.

    `listed` is `modules_in_block_to_quantize` as one list, None if there is none.
    """

    base: Settings
    format: str
    lm_head: bool
    dynamic: Mapping[str, Mapping[str, Any]]
    listed: tuple[str, ...] | None

    def settings(self, module: str) -> Settings:
        """Return the settings of a quantized module: the base with the changes of its rule."""
        rule = first_match([rule for rule in self.dynamic if not keeps(rule)], module)
        if not rule:
            return self.base
        changes = {}
        for name, value in self.dynamic[rule].items():
            if name in Settings.__slots__:
                changes[name] = value
        return replace(self.base, **changes)

    def skip_rule(self, module: str) -> str | None:
        """Return the `-:` rule that excludes `module` from quantization."""
        return first_match([rule for rule in self.dynamic if keeps(rule)], module)

    def is_listed(self, module: str) -> bool:
        """Return whether `modules_in_block_to_quantize`, if there is one, names the module.

        A name in it is a suffix, as in Optimum.
        """
        return self.listed is None or module.endswith(self.listed)
