"""The verdicts of `serving_table` on a checkpoint, and the refusal of one that a target cannot load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import expert_part, keeps, split_experts, split_groups
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving_table import ANY, ENGINES, Engine, Export, Outcome, Trait
from gptq_cli.errors import Problem

LOADS: tuple[Outcome, ...] = ("yes", "limited")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong` is the worst: the engine loads the checkpoint and computes something else."""

    engine: str
    outcome: Outcome
    reason: str


def export_of(
    layers: Mapping[str, LayerConfig | None],
    format: str,
    *,
    lm_head: bool,
    narrow_experts: bool = False,
    transposed: bool = False,
) -> Export:
    """What readers see of linears with these settings by name, None for one that is kept.

    static_groups make g_idx trivial whatever desc_act says.
    """
    quantized = {name: config for name, config in layers.items() if config}
    stored = {
        name: config and (config.bits, config.group_size, config.sym)
        for name, config in layers.items()
    }
    parts = {name: part[1] for name in layers if (part := expert_part(name))}
    return Export(
        bits=frozenset(config.bits for config in quantized.values()),
        group_sizes=frozenset(config.group_size for config in quantized.values()),
        asym=any(not config.sym for config in quantized.values()),
        real_g_idx=any(
            config.desc_act and not config.static_groups for config in quantized.values()
        ),
        mixed=len({stored[name] for name in quantized}) > 1,
        v2=format == "gptq_v2",
        lm_head=lm_head,
        experts=frozenset(parts[name] for name in quantized if name in parts),
        split_experts=bool(split_experts(stored)),
        split_fused=bool(
            split_groups({name: found for name, found in stored.items() if name not in parts})
        ),
        narrow_experts=narrow_experts,
        transposed=transposed,
    )


def settings_export(config: QuantizeConfig) -> Export:
    """What a configuration says by itself, whatever the model, about a checkpoint that is made with it."""
    layers = {rule: config.changed_by(rule) for rule in config.dynamic if not keeps(rule)}
    return export_of({"": config.base, **layers}, config.format, lm_head=config.lm_head)


def verdicts(export: Export) -> tuple[Verdict, ...]:
    """For each engine, whether it loads such a checkpoint and why not."""
    return tuple(_judge(engine, export) for engine in ENGINES)


def _judge(engine: Engine, export: Export) -> Verdict:
    for rule in engine.rules:
        if rule.trait.has(export):
            return Verdict(engine.name, rule.outcome, rule.reason)
    return Verdict(engine.name, "yes", "")


def target_problems(export: Export, target: str | None) -> list[Problem]:
    """E_TARGET for each trait of the checkpoint that keeps `target` from loading it; nothing if target is None.

    An engine with limits loads; one that would compute something else does not.
    """
    found: dict[Trait, list[str]] = {}
    asked = [engine for engine in ENGINES if target in (engine.name, ANY)]
    for engine in asked:
        for rule in engine.rules:
            if rule.outcome not in LOADS and rule.trait.has(export):
                verb = "does not load" if rule.outcome == "no" else "would misread"
                reason = f": {rule.reason}" if len(asked) == 1 else ""
                found.setdefault(rule.trait, []).append(
                    f"{engine.name} {verb} {_named(rule.trait, export)}{reason}"
                )
    loads = [verdict.engine for verdict in verdicts(export) if verdict.outcome in LOADS]
    others = f"; as it is, it loads in {', '.join(loads)}" if loads else ""
    return [
        Problem("E_TARGET", "; ".join(said), f"what would load: {trait.instead}{others}")
        for trait, said in found.items()
    ]


def limits(export: Export, target: str | None) -> list[str]:
    """What the user should know about a `target` that loads the checkpoint, but not always or not well."""
    return [
        f"{verdict.engine}: {verdict.reason}"
        for verdict in verdicts(export)
        if verdict.outcome == "limited" and target in (verdict.engine, ANY)
    ]


def engine_data(judged: Sequence[Verdict]) -> dict[str, dict[str, str]]:
    """What each engine makes of a checkpoint, as plain JSON values."""
    return {
        verdict.engine: {"outcome": verdict.outcome, "reason": verdict.reason} for verdict in judged
    }


def _named(trait: Trait, export: Export) -> str:
    values = {field.name: getattr(export, field.name) for field in fields(export)}
    listed = {
        name: ", ".join(map(str, sorted(value)))
        for name, value in values.items()
        if isinstance(value, frozenset)
    }
    return trait.called.format(**listed)
