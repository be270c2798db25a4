"""The content of a plan: linears with their settings, where each byte of the output goes, how long
a window of text may be, and the default name of the output. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptq_cli.checkpoint.decoded import Plain
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import Layout, TensorSpec, packed_specs
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.leftovers import is_of_adapter
from gptq_cli.config.rules import expert_part, split_experts, split_groups
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
from gptq_cli.files import expanded, resolved
from gptq_cli.hub_errors import plain_name

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear layer: `config` None means that it stays as it is, and `why` says for what reason.

    `transposed`: the source stores its weight [I, O], as GPT-2 does; quantized it is [O, I] as every other. `stack` is
    the source tensor that holds `weight` beside those of other experts; a tensor of its own it becomes here.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    config: LayerConfig | None
    why: str
    weight: TensorInfo
    transposed: bool = False
    stack: str | None = None

    @property
    def stored(self) -> tuple[int, int, bool] | None:
        """What readers see of the settings: bits, group_size, sym; None if the layer stays as it is."""
        return (self.config.bits, self.config.group_size, self.config.sym) if self.config else None

    @property
    def groups(self) -> int:
        assert self.config is not None
        return self.in_features // self.config.columns_per_group(self.in_features)

    def packed(self) -> tuple[TensorSpec, ...]:
        """The tensors that replace this layer's weight."""
        assert self.config is not None
        return packed_specs(
            self.weight.name, self.out_features, self.in_features, self.groups, self.config.bits
        )


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Every linear of the blocks (and the head, if it is to be quantized), and where each output byte will go.

    `plain` are the tensors that `source` stands for, which are its own unless it is stored in codes. `unused` are those
    that the model does not ask for, as far as names tell or the model is at hand: they are copied.
    """

    source: Checkpoint
    plain: Plain
    blocks: str
    n_blocks: int
    layers: tuple[LayerPlan, ...]
    layout: Layout
    unused: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def kept(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is None)

    @property
    def n_steps(self) -> int:
        """Blocks, and the head if it is quantized."""
        return self.n_blocks + any(layer.name == HEAD for layer in self.quantized)

    @property
    def asymmetric(self) -> bool:
        """Whether some layer is calibrated on what the unquantized model does as well."""
        return any(
            layer.config and layer.config.asymmetric_calibration > 0 for layer in self.layers
        )

    @property
    def split_experts(self) -> list[str]:
        """Experts of one layer, by the name they share, that readers do not see stored alike."""
        return split_experts({layer.name: layer.stored for layer in self.layers})

    @property
    def copied(self) -> list[TensorInfo]:
        """Tensors that are not quantized: bytes of the source, or weights `decoded` from what it stores."""
        return [tensor for name, tensor in self.plain.tensors.items() if name in self.layout.specs]

    @property
    def decoded(self) -> list[TensorInfo]:
        """Of `copied` those that the source stores in codes, which mean nothing in the output."""
        return [tensor for tensor in self.copied if tensor.name in self.plain.parts]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears, scales and zero points included, per weight."""
        stored = sum(spec.nbytes for layer in self.quantized for spec in layer.packed())
        return 8 * stored / sum(layer.out_features * layer.in_features for layer in self.quantized)


def bounded(config: QuantizeConfig, checkpoint: Checkpoint) -> QuantizeConfig:
    """`config` with windows for which the model has positions; ConfigError as `bounded_seqlen`."""
    seqlen = bounded_seqlen(
        config.seqlen, said="seqlen" in config.model_fields_set, checkpoint=checkpoint
    )
    return config.model_copy(update={"seqlen": seqlen})


def bounded_seqlen(seqlen: int, *, said: bool, checkpoint: Checkpoint) -> int:
    """`seqlen`, or the model's positions if they are fewer; ConfigError E_CFG_SEQLEN if the user said more."""
    declared = checkpoint.text_config
    limit = declared.get("max_position_embeddings") or declared.get("n_positions")
    if not isinstance(limit, int) or seqlen <= limit:
        return seqlen
    if said:
        raise ConfigError(
            "E_CFG_SEQLEN",
            f"seqlen {seqlen} is more than the model's {limit} positions",
            hint=f"use --seqlen {limit}",
        )
    return limit


def default_name(model: str, config: QuantizeConfig) -> str:
    """The output's name as published checkpoints are called: Qwen3-0.6B-GPTQ-Int4-g128."""
    path = expanded(model)
    name = (
        path.name if path.name not in ("", "..") else resolved(path).name
    )  # a link is called as its owner calls it
    name = plain_name(name)
    group = f"g{config.group_size}" if config.group_size > 0 else "channel"
    return f"{name}-GPTQ-Int{config.bits}-{group}"


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
