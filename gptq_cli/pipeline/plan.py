"""What a run will do, decided before it starts, from config.json and safetensors headers alone. Needs no torch."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gptq_cli.checkpoint.headers import BITS_OF_DTYPE, TensorInfo
from gptq_cli.checkpoint.layout import Layout, TensorSpec, packed_specs, plan_layout
from gptq_cli.checkpoint.orientation import stores_transposed
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import unmatched_rules
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, InputError, Problem

PACK_MULTIPLE = 32  # 32-bit words hold whole columns and whole rows of zero points
HEAD = "lm_head"
_IN_LIST = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<inner>.+)\.weight$")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear layer: `config` None means that it stays as it is, and `why` says for what reason.

    `transposed`: the source stores its weight [I, O], as GPT-2 does; quantized it is [O, I] as every other.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    config: LayerConfig | None
    why: str
    weight: TensorInfo
    transposed: bool = False

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


def plan_checkpoint(source: Checkpoint, config: QuantizeConfig, linears: Mapping[str, bool] | None = None) -> RunPlan:
    """What becomes of each tensor of `source`.

    `linears`, the names of the model's linear modules and whether each is stored [I, O], tells 2-D tensors that are no
    linears apart when the model is at hand. ConfigError E_SHAPE lists every layer that cannot be packed, E_CFG_NO_MATCH
    every rule that matches nothing; InputError E_CKPT_QUANTIZED refuses a quantized source, E_ARCH one without repeated
    blocks or with linears of blocks elsewhere.
    """
    if source.quantization is not None:
        method = source.quantization.get("quant_method", "gptq")
        raise InputError(
            "E_CKPT_QUANTIZED", f"`{source.directory}` is already quantized ({method})",
            hint="start from the full-precision model it was made from",
        )  # fmt: skip
    blocks, found = find_block_linears(source.tensors.values(), linears)
    layers = [_choose(source, blocks, tensor, config, linears) for tensor in found]
    _check_found(layers, linears or {})
    if config.lm_head:
        layers.append(_head(source, config, len({layer.block for layer in layers})))
    _check_rules(config, layers)
    _check_shapes(layers)
    return RunPlan(
        source=source,
        blocks=blocks,
        n_blocks=len({layer.block for layer in layers if layer.name != HEAD}),
        layers=tuple(layers),
        layout=_lay_out(source, layers, config.max_shard_bytes),
    )


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
    source: Checkpoint, blocks: str, tensor: TensorInfo, config: QuantizeConfig, linears: Mapping[str, bool] | None
) -> LayerPlan:
    name = tensor.name.removesuffix(".weight")
    index, _, inner = name.removeprefix(f"{blocks}.").partition(".")
    transposed = stores_transposed(source.config) if linears is None else linears.get(name, False)
    out_features, in_features = reversed(tensor.shape) if transposed else tensor.shape
    if linears is not None and name not in linears:
        chosen, why = None, "not a linear layer"
    elif not config.reaches(inner):
        chosen, why = None, "not in modules_in_block_to_quantize"
    else:
        choice = config.choose(name)
        chosen, why = choice.config, choice.why
    return LayerPlan(name, int(index), out_features, in_features, chosen, why, tensor, transposed)


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


def _check_shapes(layers: list[LayerPlan]) -> None:
    wrong = [(layer, why) for layer in layers if layer.config and (why := _unfit(layer, layer.config))]
    kinds = Counter((_kind(layer), why) for layer, why in wrong)
    if kinds:
        raise ConfigError.of(
            [
                Problem(
                    "E_SHAPE",
                    f"{why}: `{name}`" + (f" ({count} layers)" if count > 1 else ""),
                    f"choose another group_size, or keep it: --dynamic '-:{name.replace('.N.', '[.][0-9]+[.]')}$'",
                )
                for (name, why), count in kinds.items()
            ]
        )


def _kind(layer: LayerPlan) -> str:
    """The name that the same layer of every block shares."""
    return re.sub(r"\.\d+\.", ".N.", layer.name, count=1)


def _unfit(layer: LayerPlan, config: LayerConfig) -> str | None:
    if layer.in_features % config.columns_per_group(layer.in_features):
        return f"group_size {config.group_size} does not divide the {layer.in_features} input features"
    if layer.in_features % PACK_MULTIPLE:
        return f"{layer.in_features} input features are no multiple of {PACK_MULTIPLE}"
    if layer.out_features % PACK_MULTIPLE:
        return f"{layer.out_features} output features are no multiple of {PACK_MULTIPLE}"
    return None


def _lay_out(source: Checkpoint, layers: list[LayerPlan], max_shard_bytes: int) -> Layout:
    packed = {layer.weight.name: layer.packed() for layer in layers if layer.config}
    units = [
        packed.pop(tensor.name, (TensorSpec(tensor.name, tensor.dtype, tensor.shape),))
        for tensor in source.tensors.values()
    ]
    return plan_layout(units + list(packed.values()), max_shard_bytes)  # what is left: a head that was tied
