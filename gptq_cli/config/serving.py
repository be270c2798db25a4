"""The judgement of each engine on a checkpoint, and the refusal of one for its target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from gptq_cli.config.layer import LayerConfig, expert_part, keeps, split_experts, split_groups
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import ANY, ENGINES, Engine, Export, Outcome, Rule, Trait
from gptq_cli.errors import Problem

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
        v2=format == "gptq_v2",
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


def settings_export(config: QuantizeConfig) -> Export:
    """Return the export that a configuration implies by itself, whatever the model."""
    layers: dict[str, LayerConfig | None] = {"": config.base}
    for rule in config.dynamic:
        if not keeps(rule):
            layers[rule] = config.changed_by(rule)
    return export_of(layers, config.format, lm_head=config.lm_head)


def verdicts(export: Export) -> tuple[Verdict, ...]:
    """Return the judgement of each engine on such a checkpoint."""
    return tuple(_judge(engine, export) for engine in ENGINES)


def _judge(engine: Engine, export: Export) -> Verdict:
    for rule in engine.rules:
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
        for rule in engine.rules:
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
    return trait.called.format(**words)
