"""Who will load what a plan makes, and what a user should hear about it before the work begins. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gptq_cli.config.leftovers import is_of_adapter
from gptq_cli.config.rules import expert_part, split_groups
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Verdict, export_of, limits, target_problems, verdicts
from gptq_cli.config.serving_table import (
    ENGINES,
    LM_HEAD,
    SPLIT_EXPERTS,
    SPLIT_FUSED,
    Export,
    Trait,
)
from gptq_cli.errors import ConfigError
from gptq_cli.planning.run_plan import HEAD, LayerPlan, RunPlan

MARLIN_WIDTH = 128  # of which the hidden size must be a multiple for the kernels that serve experts
INTO_HIDDEN = {"down_proj", "w2"}  # linears of an expert whose outputs are hidden states


def export_of_layers(layers: Sequence[LayerPlan], config: QuantizeConfig) -> Export:
    """What readers see of these layers."""
    return export_of(
        {layer.name: layer.config for layer in layers},
        config.format,
        lm_head=any(layer.name == HEAD and layer.config for layer in layers),
        narrow_experts=has_narrow_experts(
            {layer.name: layer.out_features for layer in layers if layer.config}
        ),
        transposed=any(layer.transposed for layer in layers),
    )


def has_narrow_experts(out_features: Mapping[str, int]) -> bool:
    """Whether one of these quantized linears is of an expert whose hidden states are no multiple of 128 wide."""
    parts = {name: part[1] for name in out_features if (part := expert_part(name))}
    return any(
        out_features[name] % MARLIN_WIDTH for name, part in parts.items() if part in INTO_HIDDEN
    )


def check_target(layers: Sequence[LayerPlan], config: QuantizeConfig) -> None:
    """ConfigError E_TARGET with each reason why the configuration's target could not load these layers."""
    if problems := target_problems(export_of_layers(layers, config), config.target):
        raise ConfigError.of(problems)


def judge_plan(plan: RunPlan, config: QuantizeConfig) -> tuple[Verdict, ...]:
    """Who will load what `plan` makes."""
    return verdicts(export_of_layers(plan.layers, config))


def remarks(plan: RunPlan, config: QuantizeConfig) -> list[tuple[str, str]]:
    """Codes and texts of warnings about the source, the choice of layers and settings."""
    found = [*plan.source.remarks, *about_unused(plan.unused)]
    found += [
        ("W_TARGET", text) for text in limits(export_of_layers(plan.layers, config), config.target)
    ]
    found += _about_codes(plan)
    if split := plan.split_experts:
        found.append(
            (
                "W_CFG_EXPERTS",
                f"the experts of `{split[0]}` differ in settings: {_against(SPLIT_EXPERTS)}",
            )
        )
    settings = {layer.name: layer.stored for layer in plan.layers if not expert_part(layer.name)}
    if fused := split_groups(settings):
        text = f"the layers that engines fuse to `{fused[0]}` differ in settings: {_against(SPLIT_FUSED)}"
        found.append(("W_CFG_FUSED", text))
    head = next((layer for layer in plan.quantized if layer.name == HEAD), None)
    if head is not None:
        tied = f"{HEAD}.weight" not in plan.plain.tensors
        how = "is untied from the embeddings and stored beside them" if tied else "is quantized"
        size = sum(spec.nbytes for spec in head.packed())
        found.append(("W_CFG_HEAD", f"{HEAD} {how}, {size / 1e6:.3g} MB: {_against(LM_HEAD)}"))
    return found


def about_unused(names: Sequence[str]) -> list[tuple[str, str]]:
    """A warning of tensors that the model does not ask for, if there are any."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    text = f"the model has no place for `{names[0]}`{more}: without effect in transformers"
    if any(is_of_adapter(name) for name in names):
        text += ", an adapter that is not merged"
    return [("W_CKPT_UNUSED", text)]


def _about_codes(plan: RunPlan) -> list[tuple[str, str]]:
    """Of a source that is stored in codes: that it is rounded twice, and what becomes of weights that stay."""
    found, decoded = [], plan.decoded
    if plan.source.method == "gptq":
        text = f"the source is quantized ({plan.plain.how}): its rounded weights are rounded a second time"
        found.append(("W_CKPT_REQUANTIZED", text))
    if decoded:
        parts = [
            plan.source.tensors[part]
            for tensor in decoded
            for part in plan.plain.parts[tensor.name]
        ]
        more = sum(tensor.nbytes for tensor in decoded) - sum(part.nbytes for part in parts)
        text = f"kept weights that are stored as {plan.plain.how} become {decoded[0].dtype}, {more / 1e6:.3g} MB more"
        found.append(("W_CKPT_DECODED", f"{text}: {len(decoded)}, first `{decoded[0].name}`"))
    return found


def _against(trait: Trait) -> str:
    """Which engines do not load a checkpoint of this trait, or misread it."""
    words = {"no": "not loaded by", "wrong": "misread by", "limited": "loaded with limits by"}
    found: dict[str, list[str]] = {}
    for engine in ENGINES:
        for rule in engine.rules:
            if rule.trait is trait:
                found.setdefault(words[rule.outcome], []).append(engine.name)
    return "; ".join(f"{how} {', '.join(names)}" for how, names in found.items())
