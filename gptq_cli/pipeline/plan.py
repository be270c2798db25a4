"""What a run will do, decided before it starts, from config.json and safetensors headers alone. Needs no torch."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path

from gptq_cli.checkpoint.headers import BITS_OF_DTYPE, TensorInfo
from gptq_cli.checkpoint.layout import Layout, TensorSpec, packed_specs, plan_layout
from gptq_cli.checkpoint.orientation import stores_transposed
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import expert_part, unmatched_rules
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, InputError, Problem

PACK_MULTIPLE = 32  # 32-bit words hold whole columns and whole rows of zero points
HEAD = "lm_head"
_IN_LIST = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<inner>.+)\.weight$")


Stacked = tuple[str, int, int]  # the tensor that holds a linear, out_features, in_features


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
    def groups(self) -> int:
        assert self.config is not None
        return self.in_features // self.config.columns_per_group(self.in_features)

    def packed(self) -> tuple[TensorSpec, ...]:
        """The tensors that replace this layer's weight."""
        assert self.config is not None
        return packed_specs(self.weight.name, self.out_features, self.in_features, self.groups, self.config.bits)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Every linear of the blocks (and the head, if it is to be quantized), and where each output byte will go."""

    source: Checkpoint
    blocks: str
    n_blocks: int
    layers: tuple[LayerPlan, ...]
    layout: Layout

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def kept(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is None)

    @property
    def asymmetric(self) -> bool:
        """Whether some layer is calibrated on what the unquantized model does as well."""
        return any(layer.config and layer.config.asymmetric_calibration > 0 for layer in self.layers)

    @property
    def split_experts(self) -> list[str]:
        """Experts of one layer, by the name they share, that do not all have the same settings."""
        settings: dict[str, set[LayerConfig | None]] = defaultdict(set)
        for layer in self.layers:
            if part := expert_part(layer.name):
                settings[part[0]].add(layer.config)
        return [name for name, found in settings.items() if len(found) > 1]

    @property
    def copied(self) -> list[TensorInfo]:
        """Source tensors that reach the output unchanged."""
        return [tensor for name, tensor in self.source.tensors.items() if name in self.layout.specs]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears, scales and zero points included, per weight."""
        stored = sum(spec.nbytes for layer in self.quantized for spec in layer.packed())
        return 8 * stored / sum(layer.out_features * layer.in_features for layer in self.quantized)


def plan_run(model_dir: Path, config: QuantizeConfig) -> RunPlan:
    """The plan for the checkpoint in `model_dir`, as far as headers tell; raises as `plan_checkpoint` does."""
    return plan_checkpoint(open_checkpoint(model_dir), config)


def plan_checkpoint(
    source: Checkpoint,
    config: QuantizeConfig,
    linears: Mapping[str, bool] | None = None,
    stacked: Mapping[str, Stacked] | None = None,
) -> RunPlan:
    """What becomes of each tensor of `source`.

    `linears`, the names of the model's linear modules and whether each is stored [I, O], tells 2-D tensors that are no
    linears apart when the model is at hand, and `stacked` where those are that share a tensor. ConfigError E_SHAPE
    lists every layer that cannot be packed, E_CFG_NO_MATCH every rule that matches nothing, E_CFG_CONFLICT rules
    that keep a part of a tensor; InputError E_CKPT_QUANTIZED refuses a quantized source, E_ARCH one without repeated
    blocks or with linears of blocks elsewhere.
    """
    if source.quantization is not None:
        method = source.quantization.get("quant_method", "gptq")
        raise InputError(
            "E_CKPT_QUANTIZED", f"`{source.directory}` is already quantized ({method})",
            hint="start from the full-precision model it was made from",
        )  # fmt: skip
    blocks, found = find_block_linears(source.tensors.values(), linears)
    routers = find_routers(source.tensors.values(), blocks)
    layers = [_choose(source, blocks, tensor, config, linears, routers) for tensor in found]
    layers += [_choose_stacked(blocks, source, config, name, place) for name, place in (stacked or {}).items()]
    layers.sort(key=lambda layer: layer.block)
    _check_found(layers, linears or {})
    if config.lm_head:
        layers.append(_head(source, config, len({layer.block for layer in layers})))
    if linears is not None or not _has_stacks(source, blocks):
        _check_rules(config, layers)
    _check_shapes(layers)
    _check_stacks(layers)
    return RunPlan(
        source=source,
        blocks=blocks,
        n_blocks=len({layer.block for layer in layers if layer.name != HEAD}),
        layers=tuple(layers),
        layout=_lay_out(source, layers, config.max_shard_bytes),
    )


def find_routers(tensors: Iterable[TensorInfo], blocks: str) -> set[str]:
    """Names of the weights that choose or weigh experts: beside experts, with one row, or with one for each of them."""
    single = re.compile(rf"({re.escape(blocks)}\.\d+(?:\..+)?)\.[^.]+\.(\d+)\.[^.]+\.weight")
    n_experts: dict[str, int] = {}
    others = []
    for tensor in tensors:
        if match := single.fullmatch(tensor.name):
            n_experts[match[1]] = max(int(match[2]) + 1, n_experts.get(match[1], 0))
        elif len(tensor.shape) == 2:
            others.append(tensor)
        elif len(tensor.shape) == 3 and tensor.shape[1] > 1:  # no convolution of single channels
            holder = tensor.name.removesuffix(".weight").rpartition(".")[0]
            n_experts[holder.removesuffix(".experts")] = tensor.shape[0]
    return {
        tensor.name
        for parent, count in n_experts.items()
        for tensor in others
        if tensor.shape[0] in (1, count) and tensor.name.startswith(f"{parent}.")
    }


def _has_stacks(source: Checkpoint, blocks: str) -> bool:
    return any(len(tensor.shape) == 3 and name.startswith(f"{blocks}.") for name, tensor in source.tensors.items())


def find_block_linears(
    tensors: Iterable[TensorInfo], linears: Mapping[str, bool] | None = None
) -> tuple[str, list[TensorInfo]]:
    """The name of the repeated list of blocks ("model.layers") and its 2-D weights, in block order.

    Of all outermost numbered lists the one with most bytes in 2-D weights (of `linears`, if given) is the decoder:
    embeddings are not in lists, vision towers and routers are smaller.
    """
    lists: dict[str, list[tuple[int, TensorInfo]]] = defaultdict(list)
    for tensor in tensors:
        match = _IN_LIST.match(tensor.name)
        if match and len(tensor.shape) == 2 and BITS_OF_DTYPE[tensor.dtype] >= 16:
            lists[match["list"]].append((int(match["index"]), tensor))
    if not lists:
        raise InputError("E_ARCH", "no repeated blocks with linear layers were found in the checkpoint")

    def weigh(key: str) -> int:
        return sum(t.nbytes for _, t in lists[key] if linears is None or t.name.removesuffix(".weight") in linears)

    name = max(lists, key=weigh)
    return name, [tensor for _, tensor in sorted(lists[name], key=lambda item: item[0])]


def _choose(
    source: Checkpoint,
    blocks: str,
    tensor: TensorInfo,
    config: QuantizeConfig,
    linears: Mapping[str, bool] | None,
    routers: set[str],
) -> LayerPlan:
    name = tensor.name.removesuffix(".weight")
    index, _, inner = name.removeprefix(f"{blocks}.").partition(".")
    transposed = stores_transposed(source.config) if linears is None else linears.get(name, False)
    out_features, in_features = reversed(tensor.shape) if transposed else tensor.shape
    if tensor.name in routers:
        chosen, why = None, "router of experts"
    elif linears is not None and name not in linears:
        chosen, why = None, "not a linear layer"
    elif not config.reaches(inner):
        chosen, why = None, "not in modules_in_block_to_quantize"
    else:
        choice = config.choose(name)
        chosen, why = choice.config, choice.why
    return LayerPlan(name, int(index), out_features, in_features, chosen, why, tensor, transposed)


def _choose_stacked(blocks: str, source: Checkpoint, config: QuantizeConfig, name: str, place: Stacked) -> LayerPlan:
    stack, out_features, in_features = place
    weight = replace(source.tensors[stack], name=f"{name}.weight", shape=(out_features, in_features))
    layer = _choose(source, blocks, weight, config, {name: False}, set())
    return replace(layer, stack=stack)


def _check_stacks(layers: list[LayerPlan]) -> None:
    quantized: dict[str, set[bool]] = defaultdict(set)
    for layer in layers:
        if layer.stack:
            quantized[layer.stack].add(layer.config is not None)
    split = [stack for stack, found in quantized.items() if len(found) > 1]
    if split:
        raise ConfigError(
            "E_CFG_CONFLICT", f"rules keep a part of `{split[0]}`, which holds all experts in one tensor",
            hint="quantize all of its experts or none",
        )  # fmt: skip


def _check_found(layers: list[LayerPlan], linears: Mapping[str, bool]) -> None:
    lost = sorted(set(linears) - {layer.name for layer in layers} - {HEAD})
    if lost:
        raise InputError(
            "E_ARCH", f"`{lost[0]}` is a linear layer of the blocks, but not beside the others in the checkpoint"
        )


def _head(source: Checkpoint, config: QuantizeConfig, block: int) -> LayerPlan:
    weight = source.tensors.get(f"{HEAD}.weight")
    if weight is None and source.config.get("tie_word_embeddings", True):
        rows = source.config.get("vocab_size")
        tables = [t for t in source.tensors.values() if len(t.shape) == 2 and t.shape[0] == rows]
        weight = replace(tables[0], name=f"{HEAD}.weight") if len(tables) == 1 else None
    if weight is None:
        raise InputError("E_ARCH", f"`{source.directory}` has no {HEAD}.weight to quantize", hint="leave out --lm-head")
    choice = config.choose(HEAD)
    return LayerPlan(HEAD, block, weight.shape[0], weight.shape[1], choice.config, choice.why, weight)


def _check_rules(config: QuantizeConfig, layers: list[LayerPlan]) -> None:
    unused = unmatched_rules(config.dynamic, [layer.name for layer in layers])
    if unused:
        known = sorted({_kind(layer) for layer in layers})
        hint = f"rules match from the start of the full name, for example {known[0]}"
        raise ConfigError.of([Problem("E_CFG_NO_MATCH", f"rule {rule!r} matches no layer", hint) for rule in unused])
    if not any(layer.config for layer in layers):
        raise ConfigError("E_CFG_NOTHING_TO_DO", "the rules leave no layer to quantize")


def check_shared(plan: RunPlan, shared: Collection[str]) -> None:
    """InputError E_ARCH if a linear among those that several blocks share is to be quantized."""
    found = [layer for layer in plan.quantized if layer.name in shared]
    if found:
        kinds = list(dict.fromkeys(map(_kind, found)))
        holder = f"{commonpath([kind.replace('.', '/') for kind in kinds]).replace('/', '.')}."
        inside = [layer for layer in plan.quantized if _kind(layer).startswith(holder)]
        rule = _rule(holder) if inside == found else f"({'|'.join(map(_rule, kinds))})$"
        raise InputError(
            "E_ARCH",
            f"`{found[0].name}` is shared by several blocks, each of which would calibrate it for itself",
            hint=f"keep {'it' if len(found) == 1 else f'all {len(found)} of them'}: --dynamic '-:{rule}'",
        )


def _check_shapes(layers: list[LayerPlan]) -> None:
    wrong = [(layer, why) for layer in layers if layer.config and (why := _unfit(layer, layer.config))]
    kinds = Counter((_kind(layer), why) for layer, why in wrong)
    if kinds:
        raise ConfigError.of(
            [
                Problem(
                    "E_SHAPE",
                    f"{why}: `{name}`" + (f" ({count} layers)" if count > 1 else ""),
                    f"choose another group_size, or keep it: --dynamic '-:{_rule(name)}$'",
                )
                for (name, why), count in kinds.items()
            ]
        )


def _kind(layer: LayerPlan) -> str:
    """The name that the same layer of every block shares."""
    return re.sub(r"\.\d+(?=\.)", ".N", layer.name)


def _rule(kind: str) -> str:
    return kind.replace(".N.", "[.][0-9]+[.]")


def _unfit(layer: LayerPlan, config: LayerConfig) -> str | None:
    if layer.in_features % config.columns_per_group(layer.in_features):
        return f"group_size {config.group_size} does not divide the {layer.in_features} input features"
    if layer.in_features % PACK_MULTIPLE:
        return f"{layer.in_features} input features are no multiple of {PACK_MULTIPLE}"
    if layer.out_features % PACK_MULTIPLE:
        return f"{layer.out_features} output features are no multiple of {PACK_MULTIPLE}"
    return None


def _lay_out(source: Checkpoint, layers: list[LayerPlan], max_shard_bytes: int) -> Layout:
    packed: dict[str, list[tuple[TensorSpec, ...]]] = defaultdict(list)
    for layer in layers:
        if layer.config:
            packed[layer.stack or layer.weight.name].append(layer.packed())
    units = []
    for tensor in source.tensors.values():
        units += packed.pop(tensor.name, [(TensorSpec(tensor.name, tensor.dtype, tensor.shape),)])
    for tied_head in packed.values():
        units += tied_head
    return plan_layout(units, max_shard_bytes)
