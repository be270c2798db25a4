"""A plan: the linear layers with their settings, and the place of each byte of the output.

`plan.py` makes plans. Beside the plan itself this file holds what is derived from a plan and its
configuration: how long a window of text may be, the default name of the output, and in the last
part the warnings that a user should read before the run, above all about engines that would not
serve the output. Needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gptq_cli.checkpoint.decoded import Plain
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import GPTQ, Layout, Packing, Sizes, TensorSpec, packed_specs
from gptq_cli.checkpoint.locate import model_name
from gptq_cli.checkpoint.model_files import Remark
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.layer import (
    GPTQ_FORMATS,
    HEAD,
    LayerChoice,
    LayerConfig,
    Linears,
    Settings,
    expert_part,
    kind_of,
    split_experts,
    split_groups,
)
from gptq_cli.config.leftovers import is_of_adapter
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import (
    LM_HEAD,
    SPLIT_EXPERTS,
    Export,
    Trait,
    Verdict,
    engines_against,
    engines_that_fuse,
    export_of,
    limits,
    target_problems,
    verdicts,
)
from gptq_cli.errors import ConfigError
from gptq_cli.files import expanded, resolved

BEYOND = "of a block that the model does not run"
UNFIT = "does not fit"  # the reason to keep a layer that cannot be packed
MOST_OUTPUTS = 2  # times the inputs; gate_proj and up_proj have more, and gained nearly nothing


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear layer: its settings, or None in `config` if it is kept, and in `why` the reason.

    `transposed` is true if the source stores the weight [I, O], as GPT-2 does; the quantized weight
    is always [O, I]. `stack` is the source tensor that holds `weight` beside those of other
    experts; the output gives the layer tensors of its own. `choice` is what the rules say about
    the layer, None if they were not asked.
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
    choice: LayerChoice | None = None

    @property
    def stored(self) -> tuple[int, int, bool] | None:
        """The settings that readers see: bits, group_size, sym; None if the layer is kept."""
        if self.config is None:
            return None
        return self.config.bits, self.config.group_size, self.config.sym

    @property
    def groups(self) -> int:
        assert self.config is not None
        return self.in_features // self.config.columns_per_group(self.in_features)

    @property
    def is_loss_aware(self) -> bool:
        """True if gradients at its outputs weigh the layer's tokens; experts and head have none."""
        if self.config is None or not self.config.loss_aware:
            return False
        return self.name != HEAD and not expert_part(self.name)

    @property
    def sums_gradients(self) -> bool:
        """True if rounding uses the gradients at the outputs of a loss-aware layer, too.

        A layer with many more outputs than inputs gains nothing by it.
        """
        return self.is_loss_aware and self.out_features <= MOST_OUTPUTS * self.in_features

    @property
    def n_weights(self) -> int:
        return self.out_features * self.in_features

    def packed(self, packing: Packing) -> tuple[TensorSpec, ...]:
        """Return the tensors that replace this layer's weight."""
        assert self.config is not None
        config = self.config
        sizes = Sizes(self.out_features, self.in_features, self.groups, config.bits, sym=config.sym)
        return packed_specs(self.weight.name, sizes, packing)

    def packed_bytes(self, packing: Packing) -> int:
        """Return the bytes of the quantized layer, with all its parts."""
        return sum(spec.nbytes for spec in self.packed(packing))


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Every linear layer of the blocks (and the head, if it is to be quantized), and the layout.

    `plain` has the tensors that `source` stands for: its own, unless it is stored in codes.
    `packing` is how the output stores quantized linears. `unused` are tensors that the model does
    not use, as far as names or the model itself tell; the run copies them. `unknown` are stacks of
    matrices of which only the model will tell whether they hold linear layers.
    """

    source: Checkpoint
    plain: Plain
    blocks: str
    n_blocks: int
    layers: tuple[LayerPlan, ...]
    layout: Layout
    packing: Packing = GPTQ
    unused: tuple[str, ...] = ()
    unknown: tuple[TensorInfo, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def settings(self) -> dict[str, LayerConfig]:
        """The settings of each quantized layer, by name."""
        return {layer.name: layer.config for layer in self.layers if layer.config}

    @property
    def linears(self) -> Linears:
        """The linears of the output; kept ones are those of blocks and all other matrices."""
        in_features = {layer.name: layer.in_features for layer in self.quantized}
        stored = {name: Settings.of(config) for name, config in self.settings.items()}
        kept = dict.fromkeys(layer.name for layer in self.kept)
        for tensor in self.copied:
            if len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
                kept[tensor.name.removesuffix(".weight")] = None
        return Linears(stored, in_features, tuple(kept))

    @property
    def kept(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is None)

    @property
    def head(self) -> LayerPlan | None:
        """The plan of the head; None if the head is not quantized."""
        for layer in self.quantized:
            if layer.name == HEAD:
                return layer
        return None

    @property
    def n_steps(self) -> int:
        """Number of blocks, and one more if the head is quantized."""
        if self.head is None:
            return self.n_blocks
        return self.n_blocks + 1

    @property
    def asymmetric(self) -> bool:
        """True if a layer is calibrated on the inputs of the unquantized model as well."""
        return any(layer.config.follows_original for layer in self.layers if layer.config)

    @property
    def loss_aware(self) -> list[LayerPlan]:
        """The layers for which the gradients at their outputs are needed."""
        return [layer for layer in self.quantized if layer.is_loss_aware]

    @property
    def split_experts(self) -> list[str]:
        """The common names of experts of one layer that readers do not see stored alike."""
        return split_experts({layer.name: layer.stored for layer in self.layers})

    @property
    def copied(self) -> list[TensorInfo]:
        """Tensors that are not quantized: copied as bytes, or `decoded` if stored in codes."""
        # A part of a quantized linear may have the name of its weight.
        replaced = {layer.stack or layer.weight.name for layer in self.quantized}
        return [tensor for name, tensor in self.plain.tensors.items() if name not in replaced]

    @property
    def decoded(self) -> list[TensorInfo]:
        """Those of `copied` that the source stores in codes, which mean nothing in the output."""
        return [tensor for tensor in self.copied if tensor.name in self.plain.parts]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, with all that is stored for it."""
        nbytes = n_weights = 0
        for layer in self.quantized:
            nbytes += layer.packed_bytes(self.packing)
            n_weights += layer.n_weights
        return 8 * nbytes / n_weights


# ---------------------------------------------------------------- windows, and a name


def bounded(config: QuantizeConfig, checkpoint: Checkpoint) -> QuantizeConfig:
    """Return `config` with windows that fit the model; raise what `bounded_seqlen` raises."""
    explicit = "seqlen" in config.model_fields_set
    seqlen = bounded_seqlen(config.seqlen, explicit=explicit, checkpoint=checkpoint)
    return config.model_copy(update={"seqlen": seqlen})


def positions(checkpoint: Checkpoint) -> int | None:
    """Return the number of positions of the model; None if config.json names none."""
    declared = checkpoint.text_config
    limit = declared.get("max_position_embeddings") or declared.get("n_positions")
    if isinstance(limit, int):
        return limit
    return None


def bounded_seqlen(seqlen: int, *, explicit: bool, checkpoint: Checkpoint) -> int:
    """Return `seqlen`, or the number of positions of the model if that is smaller.

    Raise ConfigError E_CFG_SEQLEN if the user asked for a larger `seqlen`, which is `explicit`.
    """
    limit = positions(checkpoint)
    if limit is None or seqlen <= limit:
        return seqlen
    if explicit:
        raise ConfigError(
            "E_CFG_SEQLEN",
            f"seqlen {seqlen} is more than the model's {limit} positions",
            hint=f"use --seqlen {limit}",
        )
    return limit


def default_name(model: str, config: QuantizeConfig) -> str:
    """Return the usual name of such a published checkpoint: Qwen3-0.6B-GPTQ-Int4-g128."""
    path = expanded(model)
    if path.name in ("", ".."):  # any other path keeps its own name, even if it is a link
        path = resolved(path)
    group = f"g{config.group_size}"
    if config.group_size == -1:
        group = "channel"
    bits = f"{config.bits:g}"
    if config.target_size is not None or config.target_kl is not None:
        bits = "Mixed"
    name = f"{model_name(path.name)}-GPTQ-Int{bits}-{group}"
    if config.format not in GPTQ_FORMATS:
        name += f"-{config.format}"
    return name


# ---------------------------------------------------------------- engines, and warnings


def export_of_layers(layers: Sequence[LayerPlan], config: QuantizeConfig) -> Export:
    """Return what engines will see of these layers."""
    settings, shapes, transposed = {}, {}, False
    for layer in layers:
        if layer.why == BEYOND:
            continue  # engines load such a block apart from the model, if at all
        settings[layer.name] = layer.config
        if layer.config:
            shapes[layer.name] = (layer.out_features, layer.in_features)
        if layer.transposed:
            transposed = True
    return export_of(
        settings,
        config.format,
        lm_head=HEAD in shapes,
        shapes=shapes,
        transposed=transposed,
    )


def check_target(layers: Sequence[LayerPlan], config: QuantizeConfig) -> None:
    """ConfigError E_TARGET with each reason why the target could not load these layers."""
    problems = target_problems(export_of_layers(layers, config), config.target)
    if problems:
        raise ConfigError.of(problems)


def judge_plan(plan: RunPlan, config: QuantizeConfig) -> tuple[Verdict, ...]:
    """Return the verdict of each engine on the output of `plan`."""
    return verdicts(export_of_layers(plan.layers, config))


def remarks(plan: RunPlan, config: QuantizeConfig) -> list[Remark]:
    """Return warnings about the source, the choice of layers and the settings."""
    found = [*plan.source.remarks, *about_unused(plan.unused)]
    for text in limits(export_of_layers(plan.layers, config), config.target):
        found.append(("W_TARGET", text))
    found += _about_unfit(plan)
    return found + _about_codes(plan) + _about_engines(plan, config)


def about_unused(names: Sequence[str]) -> list[Remark]:
    """Return a warning about tensors that the model does not use, if there are any."""
    if not names:
        return []
    text = f"the model does not use {_and_others(names[0], len(names))}: transformers ignores "
    if len(names) == 1:
        text += "it"
    else:
        text += "them"
    if any(map(is_of_adapter, names)):
        text += ", an adapter that is not merged"
    return [("W_CKPT_UNUSED", text)]


def _about_unfit(plan: RunPlan) -> list[Remark]:
    """Return a warning with the names and the number of layers kept since they do not fit."""
    kinds: Counter[str] = Counter()
    for layer in plan.kept:
        if layer.why.startswith(UNFIT):
            kinds[kind_of(layer.name)] += 1
    if not kinds:
        return []
    named = ", ".join(f"{count} x `{kind}`" for kind, count in kinds.items())
    return [("W_CFG_UNFIT", f"kept because they cannot be packed: {named}")]


def _about_codes(plan: RunPlan) -> list[Remark]:
    """Warn that weights stored in codes are rounded twice, or take more bytes if they are kept."""
    found = []
    how = plan.plain.how
    if plan.plain.rounded:
        text = f"the source is quantized ({how}): its rounded weights are rounded a second time"
        found.append(("W_CKPT_REQUANTIZED", text))
    decoded = plan.decoded
    if decoded and how is not None:
        more = 0
        for tensor in decoded:
            more += tensor.nbytes
            for part in plan.plain.parts[tensor.name]:
                more -= plan.source.tensors[part].nbytes
        text = f"kept weights that are stored as {how} become {decoded[0].dtype}"
        names = _and_others(decoded[0].name, len(decoded))
        found.append(("W_CKPT_DECODED", f"{text}, {more / 1e6:.3g} MB more: {names}"))
    left_out = plan.plain.left_out
    if left_out:
        text = "scales of activations and caches mean nothing beside decoded weights"
        names = _and_others(left_out[0], len(left_out))
        found.append(("W_CKPT_DECODED", f"{text}, and are left out: {names}"))
    return found


def _about_engines(plan: RunPlan, config: QuantizeConfig) -> list[Remark]:
    """Warn about layers that engines hold as one but whose settings differ, and about the head.

    If an engine does not load the output for another reason, what it fuses does not matter.
    """
    format = config.format
    found = []
    experts = plan.split_experts
    if experts:
        text = f"the experts of `{experts[0]}` differ in settings"
        against = _engines_against(SPLIT_EXPERTS, format)
        found.append(("W_CFG_EXPERTS", f"{text}: {against}"))
    settings = {layer.name: layer.stored for layer in plan.layers if not expert_part(layer.name)}
    fused = split_groups(settings)
    fusing = engines_that_fuse(export_of_layers(plan.layers, config))
    if fused and fusing:
        text = f"the layers that engines fuse to `{fused[0]}` differ in settings"
        found.append(("W_CFG_FUSED", f"{text}: not loaded by {', '.join(fusing)}"))
    if plan.head is not None:
        found.append(_about_head(plan, plan.head, format))
    return found


def _about_head(plan: RunPlan, head: LayerPlan, format: str) -> Remark:
    """Warn about engines that do not load a quantized head, and about its bytes."""
    how = "is untied from the embeddings and stored beside them"
    if f"{HEAD}.weight" in plan.plain.tensors:
        how = "is quantized"
    megabytes = head.packed_bytes(plan.packing) / 1e6
    text = f"{HEAD} {how}, {megabytes:.3g} MB: {_engines_against(LM_HEAD, format)}"
    return "W_CFG_HEAD", text


def _and_others(first: str, count: int) -> str:
    """Name the first of `count` tensors, and the number of the others."""
    if count == 1:
        return f"`{first}`"
    return f"`{first}` and {count - 1} more"


def _engines_against(trait: Trait, format: str) -> str:
    """List the engines that do not load a checkpoint of this trait and format, or misread it."""
    words = {"no": "not loaded by", "wrong": "misread by", "limited": "loaded with limits by"}
    found = engines_against(trait, format)
    return "; ".join(f"{words[outcome]} {', '.join(names)}" for outcome, names in found.items())
