"""What a run will do, decided before it starts, from config.json and safetensors headers alone. Needs no torch."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from os.path import commonpath
from pathlib import Path

from gptq_cli.checkpoint.claims import check_claims
from gptq_cli.checkpoint.decoded import Plain, plain_view, stores_transposed
from gptq_cli.checkpoint.headers import BITS_OF_DTYPE, TensorInfo
from gptq_cli.checkpoint.layout import Layout, TensorSpec, plan_layout
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.leftovers import foreign_names, refuse_wrapped
from gptq_cli.config.rules import keeping, matches, unmatched_rules
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import settings_export, target_problems
from gptq_cli.errors import ConfigError, InputError, Problem
from gptq_cli.planning.run_plan import HEAD, LayerPlan, RunPlan, check_target

PACK_MULTIPLE = 32  # 32-bit words hold whole columns and whole rows of zero points
USUAL_GROUP_SIZES = (128, 64, PACK_MULTIPLE)
BEYOND = "of a block that the model does not run"
_IN_LIST = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<inner>.+)\.weight$")


Stacked = tuple[str, int, int]  # the tensor that holds a linear, out_features, in_features


def plan_run(model_dir: Path, config: QuantizeConfig) -> RunPlan:
    """The plan for the checkpoint in `model_dir`, as far as headers tell; raises as `plan_checkpoint` does."""
    return plan_checkpoint(open_checkpoint(model_dir), config)


def plan_checkpoint(source: Checkpoint, config: QuantizeConfig) -> RunPlan:
    """Plan what becomes of each tensor of `source`, as far as headers and config.json tell.

    ConfigError E_SHAPE lists every layer that cannot be packed, E_CFG_NO_MATCH every rule that matches nothing,
    E_CFG_CONFLICT rules that keep a part of a tensor, E_TARGET what the target cannot load; InputError E_CKPT_QUANTIZED
    as `plain_view` refuses quantized sources, E_CKPT_INCOMPLETE for names that a tool has put others before, what
    `check_claims` refuses, E_ARCH one without repeated blocks or with linears of blocks elsewhere.
    """
    return _plan(source, config, None, None, None)


def refine_plan(
    plan: RunPlan,
    config: QuantizeConfig,
    linears: Mapping[str, bool],
    stacked: Mapping[str, Stacked],
    unused: Sequence[str],
) -> RunPlan:
    """Return `plan` with what the model itself tells; raises as `plan_checkpoint` does.

    `linears`, the names of the model's linear modules and whether each is stored [I, O], tells 2-D tensors that are no
    linears apart, `stacked` where those are that share a tensor, and `unused` what the model has no place for.
    """
    return _plan(plan.source, config, linears, stacked, unused)


def _plan(
    source: Checkpoint,
    config: QuantizeConfig,
    linears: Mapping[str, bool] | None,
    stacked: Mapping[str, Stacked] | None,
    unused: Sequence[str] | None,
) -> RunPlan:
    plain = plain_view(source, allow_requantize=config.allow_requantize)
    if linears is None:
        refuse_wrapped(plain.tensors.keys(), own_code="auto_map" in source.config)
    known = {f"{name}.weight" for name in linears or ()}
    shapes = {name: tensor.shape for name, tensor in plain.tensors.items()}
    foreign = [name for name in foreign_names(shapes) if name not in known]
    others = set(foreign)
    asked_for = [tensor for name, tensor in plain.tensors.items() if name not in others]
    blocks, found = find_block_linears(asked_for, linears)
    check_claims(source)
    routers = find_routers(asked_for, blocks)
    layers = [_choose(source, plain, blocks, tensor, config, linears, routers) for tensor in found]
    layers += [
        _choose_stacked(source, plain, blocks, config, name, place)
        for name, place in (stacked or {}).items()
    ]
    end = _end_of_blocks(source, blocks, linears)
    layers = [
        replace(layer, config=None, why=BEYOND) if layer.block >= end else layer for layer in layers
    ]
    layers.sort(key=lambda layer: layer.block)
    n_blocks = len({layer.block for layer in layers if layer.block < end})
    plain = _as_kept(plain, layers)
    _check_found(layers, linears or {})
    if config.lm_head:
        layers.append(_head(source, plain, config, n_blocks))
    if linears is not None or not _has_stacks(plain, blocks):
        _check_rules(config, layers)
    _check_shapes(layers, config)
    _check_stacks(layers)
    check_target(layers, config)
    return RunPlan(
        source=source,
        plain=plain,
        blocks=blocks,
        n_blocks=n_blocks,
        layers=tuple(layers),
        layout=_lay_out(plain, layers, config.max_shard_bytes),
        unused=tuple(foreign if unused is None else unused),
    )


def _end_of_blocks(source: Checkpoint, blocks: str, linears: Mapping[str, bool] | None) -> int:
    """The number behind that of the model's last block; a checkpoint may hold more, that predict several tokens."""
    if linears is None:
        return sys.maxsize if source.n_blocks is None else source.n_blocks
    numbers = (
        name.removeprefix(f"{blocks}.").partition(".")[0]
        for name in linears
        if name.startswith(f"{blocks}.")
    )
    return 1 + max(map(int, numbers), default=-1)


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


def _has_stacks(plain: Plain, blocks: str) -> bool:
    return any(
        len(tensor.shape) == 3 and name.startswith(f"{blocks}.")
        for name, tensor in plain.tensors.items()
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
        raise InputError(
            "E_ARCH", "no repeated blocks with linear layers were found in the checkpoint"
        )

    def weigh(key: str) -> int:
        return sum(
            t.nbytes
            for _, t in lists[key]
            if linears is None or t.name.removesuffix(".weight") in linears
        )

    name = max(lists, key=weigh)
    return name, [tensor for _, tensor in sorted(lists[name], key=lambda item: item[0])]


def _choose(
    source: Checkpoint,
    plain: Plain,
    blocks: str,
    tensor: TensorInfo,
    config: QuantizeConfig,
    linears: Mapping[str, bool] | None,
    routers: set[str],
) -> LayerPlan:
    name = tensor.name.removesuffix(".weight")
    index, _, inner = name.removeprefix(f"{blocks}.").partition(".")
    transposed = stores_transposed(source.config) if linears is None else linears.get(name, False)
    turned = transposed and not plain.is_packed(tensor.name)
    out_features, in_features = reversed(tensor.shape) if turned else tensor.shape
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


def _as_kept(plain: Plain, layers: list[LayerPlan]) -> Plain:
    """`plain` with packed weights that are kept as the model stores them, which may be [I, O]."""
    kept = {layer.weight.name for layer in layers if layer.transposed and layer.config is None}
    turned = {
        name: replace(plain.tensors[name], shape=plain.tensors[name].shape[::-1])
        for name in kept
        if plain.is_packed(name)
    }
    return replace(plain, tensors=plain.tensors | turned) if turned else plain


def _choose_stacked(
    source: Checkpoint, plain: Plain, blocks: str, config: QuantizeConfig, name: str, place: Stacked
) -> LayerPlan:
    stack, out_features, in_features = place
    weight = replace(plain.tensors[stack], name=f"{name}.weight", shape=(out_features, in_features))
    layer = _choose(source, plain, blocks, weight, config, {name: False}, set())
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
            "E_ARCH",
            f"`{lost[0]}` is a linear layer of the blocks, but not beside the others in the checkpoint",
        )


def _head(source: Checkpoint, plain: Plain, config: QuantizeConfig, block: int) -> LayerPlan:
    weight = plain.tensors.get(f"{HEAD}.weight")
    if weight is None and source.config.get("tie_word_embeddings", True):
        rows = source.config.get("vocab_size")
        tables = [t for t in plain.tensors.values() if len(t.shape) == 2 and t.shape[0] == rows]
        weight = replace(tables[0], name=f"{HEAD}.weight") if len(tables) == 1 else None
    if weight is None:
        raise InputError(
            "E_ARCH",
            f"`{source.directory}` has no {HEAD}.weight to quantize",
            hint="leave out --lm-head",
        )
    choice = config.choose(HEAD)
    return LayerPlan(
        HEAD, block, weight.shape[0], weight.shape[1], choice.config, choice.why, weight
    )


def _check_rules(config: QuantizeConfig, layers: list[LayerPlan]) -> None:
    unused = unmatched_rules(config.dynamic, [layer.name for layer in layers])
    if unused:
        _, example = keeping([min(layer.name for layer in layers)], in_all_blocks=True)
        hint = f"rules match from the start of the full name, for example {example}"
        raise ConfigError.of(
            [Problem("E_CFG_NO_MATCH", f"rule {rule!r} matches no layer", hint) for rule in unused]
        )
    listed = [item for stage in config.modules_in_block_to_quantize or () for item in stage]
    absent = [item for item in listed if not any(layer.name.endswith(item) for layer in layers)]
    if absent:
        known = min(layer.name for layer in layers).rpartition(".")[2]
        hint = f"a name stands for all layers that end with it, for example {known}"
        said = "modules_in_block_to_quantize names {!r}, and no layer ends so"
        raise ConfigError.of(
            [Problem("E_CFG_NO_MATCH", said.format(item), hint) for item in absent]
        )
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


def _check_shapes(layers: list[LayerPlan], config: QuantizeConfig) -> None:
    quantized = [layer for layer in layers if layer.config]
    wrong = [(layer, why) for layer in quantized if (why := _unfit(layer))]
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for layer, why in wrong:
        kinds[why][_kind(layer)] += 1
    if not kinds:
        return
    misfits = [layer for layer, _ in wrong]
    remedies = [_other_groups(misfits, quantized, config), _keeping(misfits, quantized)]
    hint = ", or ".join(remedy for remedy in remedies if remedy) or None
    raise ConfigError.of([_misfit(why, names, hint) for why, names in kinds.items()])


def _misfit(why: str, kinds: Counter[str], hint: str | None) -> Problem:
    """One problem for all kinds of layers that do not fit for the same reason."""
    named, count = ", ".join(f"`{name}`" for name in kinds), kinds.total()
    return Problem("E_SHAPE", f"{why}: {named}" + (f" ({count} layers)" if count > 1 else ""), hint)


def _other_groups(
    misfits: list[LayerPlan], quantized: list[LayerPlan], config: QuantizeConfig
) -> str:
    """The advice to choose another group size; empty if there is none that all layers and the target take."""
    if any(not _packs(layer) for layer in misfits):
        return ""
    origins = {_rule_of_size(layer, config) for layer in misfits}
    if len(origins) > 1:
        return ""
    (origin,) = origins
    alike = [layer for layer in quantized if _rule_of_size(layer, config) == origin]
    fitting = [
        size for size in USUAL_GROUP_SIZES if all(layer.in_features % size == 0 for layer in alike)
    ]
    loaded = [str(size) for size in (*fitting[:1], -1) if origin or _loads(config, size)]
    where = f"all layers of rule '{origin}'" if origin else "all layers"
    return f"use a group_size that fits {where}, such as {' or '.join(loaded)}" if loaded else ""


def _rule_of_size(layer: LayerPlan, config: QuantizeConfig) -> str | None:
    """The rule that says the layer's group size, if one does."""
    rules = [rule for rule, changes in config.dynamic.items() if "group_size" in changes]
    return next((rule for rule in rules if layer.why == f"rule '{rule}'"), None)


def _loads(config: QuantizeConfig, group_size: int) -> bool:
    changed = config.model_copy(update={"group_size": group_size})
    return not target_problems(settings_export(changed), config.target)


def _keeping(misfits: list[LayerPlan], quantized: list[LayerPlan]) -> str:
    """The advice to keep layers that do not fit; empty if no layer would be left to quantize."""
    rule, option = keeping([layer.name for layer in misfits], in_all_blocks=True)
    if all(matches(rule, layer.name) for layer in quantized):
        return ""
    return f"keep {'it' if len(misfits) == 1 else 'them'}: {option}"


def _kind(layer: LayerPlan) -> str:
    """The name that the same layer of every block shares."""
    return re.sub(r"\.\d+(?=\.)", ".N", layer.name)


def _rule(kind: str) -> str:
    return re.sub(r"\.N\.(N\.)*", lambda numbers: "[.]" + "[0-9]+[.]" * numbers[0].count("N"), kind)


def _packs(layer: LayerPlan) -> bool:
    return layer.in_features % PACK_MULTIPLE == layer.out_features % PACK_MULTIPLE == 0


def _unfit(layer: LayerPlan) -> str | None:
    """Why a layer that is to be quantized does not fit."""
    if layer.in_features % PACK_MULTIPLE:
        return f"{layer.in_features} input features are no multiple of {PACK_MULTIPLE}"
    if layer.out_features % PACK_MULTIPLE:
        return f"{layer.out_features} output features are no multiple of {PACK_MULTIPLE}"
    assert layer.config is not None
    if layer.in_features % layer.config.columns_per_group(layer.in_features):
        return f"group_size {layer.config.group_size} does not divide the {layer.in_features} input features"
    return None


def _lay_out(plain: Plain, layers: list[LayerPlan], max_shard_bytes: int) -> Layout:
    packed: dict[str, list[tuple[TensorSpec, ...]]] = defaultdict(list)
    for layer in layers:
        if layer.config:
            packed[layer.stack or layer.weight.name].append(layer.packed())
    units = []
    for tensor in plain.tensors.values():
        units += packed.pop(tensor.name, [(TensorSpec(tensor.name, tensor.dtype, tensor.shape),)])
    for tied_head in packed.values():
        units += tied_head
    return plan_layout(units, max_shard_bytes)
