"""Which layers a configuration reaches, with the meaning GPTQModel and Optimum give to their fields.

A `dynamic` rule is a regular expression in the dialect of Python's `re`, as GPTQModel and vLLM read it. It is matched
from the start of the full module name, behind `+:` (or nothing) for other settings or `-:` for "keep in full
precision". All `-:` rules are asked first, then the others in the order in which they were written; the first match
decides alone.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.strict_yaml import parse_scalar
from gptq_cli.errors import ConfigError

SECONDS = 1.0  # of computing; a pattern that anybody means takes microseconds
SECONDS_OF_CHILD = 20.0  # a busy machine takes its time to start one
MOST_CHOICES, MOST_GROUPS = 3, 2
_CHOICE = re.compile(r"[*+{]|(?<!\()\?")
_OTHERS = re.compile(r"\)[*+{]|\\[1-9]|\(\?[A-Za-z-]")  # repeated groups, references, flags
_CHILD = "import json, re, sys; sys.exit(re.match(*json.load(sys.stdin)) is None)"


def matches_in_time(pattern: str, text: str) -> bool:
    """Whether the pattern matches from the start of the text, as `re.match` does; TimeoutError if that takes long."""
    if _is_plain(pattern):
        return re.match(pattern, text) is not None
    if current_thread() is main_thread() and hasattr(signal, "setitimer"):
        return _match_here(pattern, text)
    command, question = (
        [sys.executable, "-I", "-S", "-c", _CHILD],
        json.dumps([pattern, text]).encode(),
    )
    try:
        return (
            subprocess.run(
                command, input=question, timeout=SECONDS_OF_CHILD, check=False
            ).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _is_plain(pattern: str) -> bool:
    """Whether matching takes at most about the cube of the text's length, by what the pattern looks like."""
    few = len(_CHOICE.findall(pattern)) <= MOST_CHOICES and pattern.count("(") <= MOST_GROUPS
    return few and not _OTHERS.search(pattern)


def _match_here(pattern: str, text: str) -> bool:
    usual = signal.signal(signal.SIGVTALRM, _late)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return re.match(pattern, text) is not None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, usual)


def _late(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError


KEEP, CHANGE = "-:", "+:"


# Engines that hold these linears as one ask rules for the fused name, and want all of a group stored alike.
FUSED_ALIASES = {
    frozenset({"q_proj", "k_proj", "v_proj"}): "qkv_proj",
    frozenset({"gate_proj", "up_proj"}): "gate_up_proj",
}
_OF_EXPERT = re.compile(r"(.+\.\d+\..+)\.\d+\.([^.]+)")


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What happens to one layer and which rule says so; `config` None means it keeps its full precision."""

    config: LayerConfig | None
    why: str


def expert_part(name: str) -> tuple[str, str] | None:
    """For a linear of an expert of a block what its layer's experts share and its own last name, else None.

    >>> expert_part("model.layers.0.mlp.experts.7.up_proj")
    ('model.layers.0.mlp.experts', 'up_proj')
    """
    match = _OF_EXPERT.fullmatch(name)
    return (match[1], match[2]) if match else None


def split_groups(settings: Mapping[str, object]) -> list[str]:
    """Fused names of linears that engines hold as one and that do not all have the same of `settings`, by name.

    >>> split_groups({"layers.0.q_proj": 4, "layers.0.k_proj": 8, "layers.1.q_proj": 8, "layers.1.k_proj": 8})
    ['layers.0.qkv_proj']
    """
    found: dict[str, set[object]] = defaultdict(set)
    for name, stored in settings.items():
        parent, _, leaf = name.rpartition(".")
        for parts, alias in FUSED_ALIASES.items():
            if leaf in parts:
                found[f"{parent}.{alias}"].add(stored)
    return [name for name, stored in found.items() if len(stored) > 1]


def split_experts(settings: Mapping[str, object]) -> list[str]:
    """Experts of one layer, by the name they share, that do not all have the same of `settings`, by name of linears."""
    found: dict[str, set[object]] = defaultdict(set)
    for name, stored in settings.items():
        if part := expert_part(name):
            found[part[0]].add(stored)
    return [name for name, stored in found.items() if len(stored) > 1]


def keeps(rule: str) -> bool:
    """Whether a `dynamic` rule keeps its layers in full precision."""
    return rule.startswith(KEEP)


def pattern_of(rule: str) -> str:
    """The regular expression of a `dynamic` rule without its prefix."""
    return rule[2:] if rule.startswith((KEEP, CHANGE)) else rule


def keeping(names: Iterable[str], *, in_all_blocks: bool = False) -> tuple[str, str]:
    """A rule that keeps layers, and with each one those that engines hold as one with it; and the option that says so.

    With `in_all_blocks` numbers inside the names stand for all numbers.

    >>> keeping(["model.layers.3.mlp.down_proj"])[1]
    "--dynamic '-:model[.]layers[.]3[.]mlp[.]down_proj$'"
    >>> keeping(["m.0.k_proj", "m.1.k_proj"], in_all_blocks=True)[0]
    '-:m[.][0-9]+[.](k_proj|q_proj|v_proj)$'
    """
    patterns = list(
        dict.fromkeys(_pattern_for(name, in_all_blocks=in_all_blocks) for name in names)
    )
    pattern = patterns[0] if len(patterns) == 1 else f"({'|'.join(patterns)})"
    rule = f"{KEEP}{pattern}$"
    return rule, f"--dynamic {shlex.quote(rule)}"


def _pattern_for(name: str, *, in_all_blocks: bool) -> str:
    *holders, leaf = name.split(".")
    fused = next((sorted(parts) for parts in FUSED_ALIASES if leaf in parts), [leaf])
    leaves = "|".join(map(re.escape, fused))
    words = [
        "[0-9]+" if in_all_blocks and word.isdecimal() else re.escape(word) for word in holders
    ]
    return "[.]".join([*words, leaves if len(fused) == 1 else f"({leaves})"])


def flaw_of(rule: str) -> str | None:
    """Why the pattern of a `dynamic` rule is no regular expression; None if it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what may come to mean something else, such as [[a]
            re.compile(pattern_of(rule))
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        return str(error)
    return None


def matches(rule: str, name: str) -> bool:
    """Whether a `dynamic` rule matches a layer's name; ConfigError E_CFG_REGEX if that takes for ever to tell."""
    try:
        return matches_in_time(pattern_of(rule), name)
    except TimeoutError:
        raise ConfigError(
            "E_CFG_REGEX", f"rule {rule!r} takes more than {SECONDS:g} s to tell whether it matches `{name}`",
            hint="write it without a repetition of a repetition, such as (a+)+",
        ) from None  # fmt: skip


def first_match(rules: Iterable[str], name: str) -> str | None:
    """The rule that decides about the layer `name`: `-:` rules first, then in order (GPTQModel, `dynamic`)."""
    ordered = sorted(rules, key=lambda rule: not keeps(rule))
    return next((rule for rule in ordered if matches(rule, name)), None)


def is_listed(modules: Sequence[Sequence[str]] | None, name_in_block: str) -> bool:
    """Whether `modules_in_block_to_quantize` reaches a linear: its name ends with a listed one (as in Optimum)."""
    return modules is None or any(
        name_in_block.endswith(item) for stage in modules for item in stage
    )


def parse_rule(text: str) -> tuple[str, Any]:
    """The rule and settings in `-:regex` or `+:regex={"bits": 8}`, as the command line writes an entry of `dynamic`."""
    match = re.fullmatch(r"(.*)=(\{.*\})", text, re.DOTALL)
    return (match[1], parse_scalar(match[2])) if match else (text, {})


def unmatched_rules(rules: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Rules that match none of `names`: most often a pattern that forgot that matching starts at the first letter."""
    names = list(names)
    return [rule for rule in rules if not any(matches(rule, name) for name in names)]
