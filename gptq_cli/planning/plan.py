"""Make the plan of a run before it starts, from config.json and safetensors headers alone.

`_plan` is the whole of it, in order: find the repeated blocks and their linear layers, choose
settings for each layer, refuse what cannot work, and lay out the output to the byte. A run plans
twice: `plan_checkpoint` from headers, so that mistakes show at once, and `refine_plan` when the
model has been built and tells which tensors are linear layers. Needs no torch.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_cli.checkpoint.claims import check_claims
from gptq_cli.checkpoint.decoded import Plain, plain_view, stores_transposed
from gptq_cli.checkpoint.headers import DTYPES, TensorInfo
from gptq_cli.checkpoint.layout import Layout, Packing, TensorSpec, plan_layout
from gptq_cli.checkpoint.quantization_config import packing_for
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.fields import AUTO
from gptq_cli.config.layer import HEAD, LayerChoice, keeping, kind_of, matches, unmatched_rules
from gptq_cli.config.leftovers import foreign_names, refuse_wrapped
from gptq_cli.config.resolve import settings_export
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import target_problems
from gptq_cli.errors import ConfigError, InputError, Problem
from gptq_cli.planning.run_plan import BEYOND, UNFIT, LayerPlan, RunPlan, check_target

if TYPE_CHECKING:
    from gptq_cli.planning.stacks import Stacked

PACK_MULTIPLE = 32  # 32-bit words hold whole columns and whole rows of zero points
USUAL_GROUP_SIZES = (128, 64, PACK_MULTIPLE)
ROW = -1  # the group size of one group for each row
_IN_LIST = re.compile(r"^(?P<list>.*?)\.\d+\..+\.weight$")


@dataclass(frozen=True, slots=True)
class Structure:
    """The linear layers of a model that has been built, which headers alone cannot tell for sure.

    `linears` has the names of linear modules, and whether each is stored [I, O]. `stacked` has the
    linears that share one tensor with others. `unused` are the tensors that the model does not use.
    """

    linears: Mapping[str, bool]
    stacked: Mapping[str, Stacked]
    unused: Sequence[str]


def plan_run(model_dir: Path, config: QuantizeConfig) -> RunPlan:
    """Return the plan for the checkpoint in `model_dir`; raise what `plan_checkpoint` raises."""
    return plan_checkpoint(open_checkpoint(model_dir), config)


def with_group_size(source: Checkpoint, config: QuantizeConfig) -> QuantizeConfig:
    """Return `config` with a number in place of the group size `auto`.

    It is the largest of USUAL_GROUP_SIZES that divides the inputs of all layers that have no group
    size of their own, as far as headers tell, and that the target loads. Layers that no size fits
    do not count. Of a stack of matrices whose meaning only the model knows, both sides count.
    Raises what `plan_checkpoint` raises before it checks layers.
    """
    if config.group_size != AUTO:
        return config
    found = _read(source, config, None, {})
    alike = []
    for layer in found.layers:
        fits = layer.in_features % PACK_MULTIPLE == layer.out_features % PACK_MULTIPLE == 0
        if layer.config and fits and _rule_with_group_size(layer, config) is None:
            alike.append(layer.in_features)
    for stack in _unknown_stacks(found.plain, found.blocks, found.layers):
        alike += stack.shape[1:]
    width = gcd(*alike)
    for size in USUAL_GROUP_SIZES:
        if width % size == 0 and _target_loads(config, size):
            return config.model_copy(update={"group_size": size})
    return config.model_copy(update={"group_size": PACK_MULTIPLE})


def plan_checkpoint(source: Checkpoint, config: QuantizeConfig) -> RunPlan:
    """Return the plan for `source`, as far as headers and config.json tell.

    Raise ConfigError:

    * E_SHAPE for every layer that cannot be packed
    * E_CFG_NO_MATCH for every rule that matches nothing
    * E_CFG_CONFLICT for rules that keep a part of a tensor
    * E_TARGET for everything that the target cannot load

    and InputError:

    * E_CKPT_QUANTIZED if `plain_view` refuses a quantized source
    * E_CKPT_INCOMPLETE for names that a tool has changed, and for everything that `check_claims`
      refuses
    * E_ARCH for a source without repeated blocks, or with linear layers of blocks elsewhere
    """
    return _plan(source, config, None, {})


def refine_plan(
    plan: RunPlan,
    config: QuantizeConfig,
    linears: Mapping[str, bool],
    stacked: Mapping[str, Stacked],
    unused: Sequence[str],
) -> RunPlan:
    """Return `plan` with the facts of the built model; raise what `plan_checkpoint` raises.

    `linears`, `stacked` and `unused` are those of `Structure`. The rules are not asked again about
    layers that `plan` knows.
    """
    choices = {layer.name: layer.choice for layer in plan.layers if layer.choice}
    model = Structure(linears, stacked, unused)
    return _plan(plan.source, config, model, choices)


def _plan(
    source: Checkpoint,
    config: QuantizeConfig,
    model: Structure | None,
    choices: Mapping[str, LayerChoice],
) -> RunPlan:
    """Make a plan, with or without the built model; `choices` of the rules are known already."""
    found = _read(source, config, model, choices)
    layers = found.layers
    if model is not None:
        _check_found(layers, model.linears)
    if config.lm_head:
        layers.append(found.planner.plan_head(_head_weight(source, found.plain)))
    if config.unfit == "keep":
        layers = list(map(_kept_if_unfit, layers))
    plain = _as_kept(found.plain, layers)

    unknown = []
    if model is None:
        unknown = _unknown_stacks(plain, found.blocks, layers)
    _check_layers(layers, config, names_are_known=not unknown)
    packing = _packing_of(layers, config.format)
    return RunPlan(
        source=source,
        plain=plain,
        blocks=found.blocks,
        n_blocks=found.planner.n_blocks,
        layers=tuple(layers),
        layout=_lay_out(plain, layers, packing, config.max_shard_bytes),
        packing=packing,
        unused=tuple(found.unused),
        unknown=tuple(unknown),
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """What headers, and the model if it has been built, tell about the linear layers."""

    plain: Plain
    unused: Sequence[str]
    blocks: str
    planner: _LayerPlanner
    layers: list[LayerPlan]


def _read(
    source: Checkpoint,
    config: QuantizeConfig,
    model: Structure | None,
    choices: Mapping[str, LayerChoice],
) -> _Read:
    """Find the linear layers of `source` and choose the settings of each, unchecked."""
    plain = plain_view(source, allow_requantize=config.allow_requantize)
    if model is None:
        refuse_wrapped(plain.tensors.keys(), own_code="auto_map" in source.config)
    foreign = _foreign_names(plain, model)
    unused: Iterable[str] = foreign
    if model is not None:
        unused = model.unused
    tensors = [tensor for name, tensor in plain.tensors.items() if name not in foreign]
    blocks, weights = find_block_linears(tensors, model)
    check_claims(source)

    planner = _LayerPlanner(source, plain, blocks, config, model, choices)
    stacked = _find_stacked(tensors, blocks, model)
    layers = planner.plan_layers(weights, stacked, _find_routers(tensors, blocks))
    return _Read(plain, tuple(unused), blocks, planner, layers)


# ---------------------------------------------------------------- blocks and their linear layers


def _foreign_names(plain: Plain, model: Structure | None) -> dict[str, None]:
    """Names of tensors that no model uses, in file order, except those that this model uses."""
    shapes = {name: tensor.shape for name, tensor in plain.tensors.items()}
    foreign = dict.fromkeys(foreign_names(shapes))
    if model is not None:
        for name in model.linears:
            foreign.pop(f"{name}.weight", None)
    return foreign


def find_block_linears(
    tensors: Iterable[TensorInfo], model: Structure | None = None
) -> tuple[str, list[TensorInfo]]:
    """Return the name of the repeated list of blocks ("model.layers") and its 2-D weights.

    The weights are in block order. The decoder is the outermost numbered list with most bytes in
    2-D weights (if `model` is given, in weights of its linears): embeddings are not in lists, and
    vision towers and routers are smaller.
    """
    lists: dict[str, list[TensorInfo]] = defaultdict(list)
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        name = _list_of(tensor)
        if name is not None:
            lists[name].append(tensor)
            if model is None or tensor.name.removesuffix(".weight") in model.linears:
                nbytes[name] += tensor.nbytes
    if not lists:
        raise InputError(
            "E_ARCH", "no repeated blocks with linear layers were found in the checkpoint"
        )
    blocks = max(lists, key=lambda name: nbytes[name])
    lists[blocks].sort(key=lambda tensor: _place_in_blocks(tensor.name, blocks)[0])
    return blocks, lists[blocks]


def _list_of(tensor: TensorInfo) -> str | None:
    """Return the outermost numbered list that holds a 2-D weight of 16 bits or more."""
    match = _IN_LIST.match(tensor.name)
    if match is None or len(tensor.shape) != 2 or DTYPES[tensor.dtype].bits < 16:
        return None
    return match["list"]


def _find_routers(tensors: Sequence[TensorInfo], blocks: str) -> set[str]:
    """Names of the weights that choose or weigh experts.

    They lie beside experts and have one row, or one row for each expert.
    """
    of_expert = re.compile(rf"({re.escape(blocks)}\.\d+(?:\..+)?)\.[^.]+\.(\d+)\.[^.]+\.weight")
    n_experts: dict[str, int] = {}  # by the module that holds the experts
    matrices = []
    for tensor in tensors:
        match = of_expert.fullmatch(tensor.name)
        if match:
            n_experts[match[1]] = max(int(match[2]) + 1, n_experts.get(match[1], 0))
        elif len(tensor.shape) == 2:
            matrices.append(tensor)
        elif len(tensor.shape) == 3 and tensor.shape[1] > 1:  # no convolution of single channels
            holder = tensor.name.removesuffix(".weight").rpartition(".")[0]
            n_experts[holder.removesuffix(".experts")] = tensor.shape[0]
    routers = set()
    for matrix in matrices:
        if _is_router(matrix, n_experts):
            routers.add(matrix.name)
    return routers


def _is_router(tensor: TensorInfo, n_experts: Mapping[str, int]) -> bool:
    parent = tensor.name.rpartition(".")[0]
    while parent:
        if parent in n_experts and tensor.shape[0] in (1, n_experts[parent]):
            return True
        parent = parent.rpartition(".")[0]
    return False


def _find_stacked(
    tensors: Sequence[TensorInfo], blocks: str, model: Structure | None
) -> Mapping[str, Stacked]:
    """Return the linears that share one tensor with others, by the model or by headers."""
    if model is not None:
        return model.stacked
    if all(len(tensor.shape) != 3 for tensor in tensors):
        return {}
    from gptq_cli.planning.stacks import linears_in_stacks

    return linears_in_stacks(tensors, blocks)


def _unknown_stacks(plain: Plain, blocks: str, layers: Iterable[LayerPlan]) -> list[TensorInfo]:
    """Return the stacks of matrices in the blocks that are not known to hold linear layers."""
    if all(len(tensor.shape) != 3 for tensor in plain.tensors.values()):
        return []
    from gptq_cli.planning.stacks import stacks_of

    known = {layer.stack for layer in layers}
    return [stack for stack in stacks_of(plain.tensors.values(), blocks) if stack.name not in known]


def _end_of_blocks(source: Checkpoint, blocks: str, model: Structure | None) -> int:
    """Return the number of blocks that the model runs; a very large one if nothing tells it.

    A checkpoint may hold more blocks than that: some models have blocks that predict further
    tokens, which transformers does not run.
    """
    if model is None:
        if source.n_blocks is None:
            return sys.maxsize
        return source.n_blocks
    end = 0
    for name in model.linears:
        if name.startswith(f"{blocks}."):
            end = max(end, 1 + _place_in_blocks(name, blocks)[0])
    return end


def _place_in_blocks(name: str, blocks: str) -> tuple[int, str]:
    """Return the number of the block of a linear layer, and the name of the layer inside it."""
    index, _, inner = name.removeprefix(f"{blocks}.").partition(".")
    return int(index), inner


# ---------------------------------------------------------------- settings of each layer


class _LayerPlanner:
    """Chooses the settings of each linear layer of one source; asks the rules once for a name."""

    def __init__(
        self,
        source: Checkpoint,
        plain: Plain,
        blocks: str,
        config: QuantizeConfig,
        model: Structure | None,
        choices: Mapping[str, LayerChoice],
    ) -> None:
        self._plain, self._blocks, self._config, self._model = plain, blocks, config, model
        self._choices = choices
        self._transposed = stores_transposed(source.config)
        self._end = _end_of_blocks(source, blocks, model)
        self.n_blocks = 0  # that hold linear layers, known after `plan_layers`

    def plan_layers(
        self, weights: Iterable[TensorInfo], stacked: Mapping[str, Stacked], routers: set[str]
    ) -> list[LayerPlan]:
        """Plan the linear layers with these weights and those that share a tensor, by block."""
        layers = []
        for weight in weights:
            layers.append(self._plan_weight(weight, routers))
        for name, place in stacked.items():
            layers.append(self._plan_stacked(name, place))
        layers.sort(key=lambda layer: layer.block)
        self.n_blocks = len({layer.block for layer in layers if layer.block < self._end})
        return layers

    def plan_head(self, weight: TensorInfo) -> LayerPlan:
        choice = self._choice(HEAD)
        rows, columns = weight.shape
        return LayerPlan(
            HEAD, self.n_blocks, rows, columns, choice.config, choice.why, weight, choice=choice
        )

    def _plan_weight(self, weight: TensorInfo, routers: set[str]) -> LayerPlan:
        name = weight.name.removesuffix(".weight")
        transposed = self._transposed
        if self._model is not None:
            transposed = self._model.linears.get(name, False)
        out_features, in_features = weight.shape
        if transposed and not self._plain.is_packed(weight.name):
            in_features, out_features = weight.shape
        why = None
        if weight.name in routers:
            why = "router of experts"
        elif self._model is not None and name not in self._model.linears:
            why = "not a linear layer"
        layer = self._plan_layer(weight, (out_features, in_features), why)
        return replace(layer, transposed=transposed)

    def _plan_stacked(self, name: str, stacked: Stacked) -> LayerPlan:
        stack, *shape = stacked
        tensor = self._plain.tensors[stack]
        weight = replace(tensor, name=f"{name}.weight", shape=tuple(shape))
        return replace(self._plan_layer(weight, (shape[0], shape[1]), None), stack=stack)

    def _plan_layer(self, weight: TensorInfo, shape: tuple[int, int], why: str | None) -> LayerPlan:
        """Plan one linear of a block; `why` is the reason to keep it, if there is one already."""
        name = weight.name.removesuffix(".weight")
        block, inner = _place_in_blocks(name, self._blocks)
        if block >= self._end:
            why = BEYOND
        elif why is None and not self._config.reaches(inner):
            why = "not in modules_in_block_to_quantize"
        if why is not None:
            return LayerPlan(name, block, *shape, None, why, weight)
        choice = self._choice(name)
        return LayerPlan(name, block, *shape, choice.config, choice.why, weight, choice=choice)

    def _choice(self, name: str) -> LayerChoice:
        return self._choices.get(name) or self._config.choose(name)


def _head_weight(source: Checkpoint, plain: Plain) -> TensorInfo:
    """Return the weight of the head: its own, or the embedding if the two are tied."""
    weight = plain.tensors.get(f"{HEAD}.weight")
    if weight is not None:
        return weight
    if source.config.get("tie_word_embeddings", True):
        rows = source.config.get("vocab_size")
        tables = [t for t in plain.tensors.values() if len(t.shape) == 2 and t.shape[0] == rows]
        if len(tables) == 1:
            return replace(tables[0], name=f"{HEAD}.weight")
    raise InputError(
        "E_ARCH",
        f"`{source.directory}` has no {HEAD}.weight to quantize",
        hint="leave out --lm-head",
    )


def _as_kept(plain: Plain, layers: Iterable[LayerPlan]) -> Plain:
    """Return `plain` with the shapes in which packed weights that are kept will be written.

    The model may store them [I, O], but packed they are [O, I].
    """
    turned = {}
    for layer in layers:
        name = layer.weight.name
        if layer.transposed and layer.config is None and plain.is_packed(name):
            tensor = plain.tensors[name]
            turned[name] = replace(tensor, shape=tensor.shape[::-1])
    if not turned:
        return plain
    return replace(plain, tensors=plain.tensors | turned)


# ---------------------------------------------------------------- refusals


def _check_layers(
    layers: Sequence[LayerPlan], config: QuantizeConfig, *, names_are_known: bool
) -> None:
    """Refuse rules, shapes and settings that cannot work.

    Headers do not tell the names of experts that share a tensor. Until the model does, a rule that
    matches nothing may still match one of them.
    """
    if names_are_known:
        _check_rules(config, layers)
    _check_shapes(layers, config)
    _check_stacks(layers)
    check_target(layers, config)


def _check_found(layers: Iterable[LayerPlan], linears: Mapping[str, bool]) -> None:
    """InputError E_ARCH if the model has linear layers for which no weight was found."""
    missing = set(linears) - {layer.name for layer in layers} - {HEAD}
    if missing:
        raise InputError(
            "E_ARCH",
            f"`{min(missing)}` is a linear layer of the blocks, "
            "but it is not beside the others in the checkpoint",
        )


def _check_rules(config: QuantizeConfig, layers: Sequence[LayerPlan]) -> None:
    """Refuse rules and names that match nothing, and a run that would quantize nothing.

    Raise ConfigError E_CFG_NO_MATCH or E_CFG_NOTHING_TO_DO.
    """
    names = [layer.name for layer in layers]
    problems = []
    for rule in unmatched_rules(config.dynamic, names):
        example = keeping([min(names)], in_all_blocks=True).option
        hint = f"rules match from the start of the full name, for example {example}"
        problems.append(Problem("E_CFG_NO_MATCH", f"rule {rule!r} matches no layer", hint))
    problems = problems or _unmatched_modules(config, names)
    if problems:
        raise ConfigError.of(problems)
    if not any(layer.config for layer in layers):
        raise ConfigError("E_CFG_NOTHING_TO_DO", "the rules leave no layer to quantize")


def _unmatched_modules(config: QuantizeConfig, names: Sequence[str]) -> list[Problem]:
    """E_CFG_NO_MATCH for each of `modules_in_block_to_quantize` with which no name ends."""
    problems = []
    for stage in config.modules_in_block_to_quantize or ():
        for module in stage:
            if not any(name.endswith(module) for name in names):
                example = min(names).rpartition(".")[2]
                hint = f"a name stands for all layers that end with it, for example {example}"
                message = f"modules_in_block_to_quantize has {module!r}, but no layer ends with it"
                problems.append(Problem("E_CFG_NO_MATCH", message, hint))
    return problems


def _check_stacks(layers: Iterable[LayerPlan]) -> None:
    """ConfigError E_CFG_CONFLICT if only some of the experts in one tensor are quantized."""
    is_quantized: dict[str, bool] = {}
    for layer in layers:
        quantized = layer.config is not None
        if layer.stack and is_quantized.setdefault(layer.stack, quantized) != quantized:
            raise ConfigError(
                "E_CFG_CONFLICT",
                f"rules keep a part of `{layer.stack}`, which holds all experts in one tensor",
                hint="quantize all of its experts or none",
            )


def check_shared(plan: RunPlan, shared: Collection[str]) -> None:
    """InputError E_ARCH if a linear layer to be quantized is among those that blocks share."""
    found = [layer for layer in plan.quantized if layer.name in shared]
    if not found:
        return
    kept = "it"
    if len(found) > 1:
        kept = f"all {len(found)} of them"
    raise InputError(
        "E_ARCH",
        f"`{found[0].name}` is shared by several blocks, "
        "each of which would calibrate it for itself",
        hint=f"keep {kept}: --dynamic '-:{_pattern_of_shared(found, plan.quantized)}'",
    )


def _pattern_of_shared(shared: Sequence[LayerPlan], quantized: Iterable[LayerPlan]) -> str:
    """Return a pattern for the shared layers: the module that holds them, or their own names."""
    paths = {}
    for layer in shared:
        kind = kind_of(layer.name)
        paths[kind] = kind.replace(".", "/")
    holder = commonpath(paths.values()).replace("/", ".") + "."
    inside = [layer for layer in quantized if kind_of(layer.name).startswith(holder)]
    if inside == shared:
        return _pattern(holder)
    return f"({'|'.join(map(_pattern, paths))})$"


def _pattern(kind: str) -> str:
    """Return the regular expression for the layers of a kind."""
    return re.sub(r"\.N\.(N\.)*", lambda match: "[.]" + "[0-9]+[.]" * match[0].count("N"), kind)


# ---------------------------------------------------------------- shapes that can be packed


def _check_shapes(layers: Iterable[LayerPlan], config: QuantizeConfig) -> None:
    """ConfigError E_SHAPE with one problem for each reason why layers cannot be packed."""
    quantized, misfits = [], []
    kinds_by_reason: dict[str, Counter[str]] = defaultdict(Counter)
    for layer in layers:
        if layer.config is None:
            continue
        quantized.append(layer)
        reason = _misfit_reason(layer)
        if reason:
            misfits.append(layer)
            kinds_by_reason[reason][kind_of(layer.name)] += 1
    if not misfits:
        return
    advice = [
        _advise_group_size(misfits, quantized, config),
        _advise_keeping(misfits, quantized),
    ]
    hint = "; or ".join(filter(None, advice)) or None
    problems = []
    for reason, kinds in kinds_by_reason.items():
        problems.append(Problem("E_SHAPE", _misfit_message(reason, kinds), hint))
    raise ConfigError.of(problems)


def _misfit_message(reason: str, kinds: Counter[str]) -> str:
    message = f"{reason}: `{'`, `'.join(kinds)}`"
    if kinds.total() == 1:
        return message
    return f"{message} ({kinds.total()} layers)"


def _kept_if_unfit(layer: LayerPlan) -> LayerPlan:
    """Return the layer, kept if it cannot be packed."""
    if layer.config is None:
        return layer
    reason = _misfit_reason(layer)
    if reason is None:
        return layer
    return replace(layer, config=None, why=f"{UNFIT}: {reason}")


def _misfit_reason(layer: LayerPlan) -> str | None:
    """Return the reason why a layer to be quantized cannot be packed; None if it can."""
    if layer.in_features % PACK_MULTIPLE:
        return f"{layer.in_features} input features are no multiple of {PACK_MULTIPLE}"
    if layer.out_features % PACK_MULTIPLE:
        return f"{layer.out_features} output features are no multiple of {PACK_MULTIPLE}"
    assert layer.config is not None
    if layer.in_features % layer.config.columns_per_group(layer.in_features):
        group_size = f"group_size {layer.config.group_size}"
        return f"{group_size} does not divide the {layer.in_features} input features"
    return None


def _advise_group_size(
    misfits: Sequence[LayerPlan], quantized: Iterable[LayerPlan], config: QuantizeConfig
) -> str:
    """Return the advice to choose another group size; empty if no size would do.

    The size has to fit all layers whose group_size stands at the same place, and the target.
    """
    rule = _rule_with_group_size(misfits[0], config)
    if any(map(_is_odd, misfits)):
        return ""
    if any(_rule_with_group_size(layer, config) != rule for layer in misfits):
        return ""
    alike = [layer for layer in quantized if _rule_with_group_size(layer, config) == rule]
    sizes = _sizes_that_divide(alike)
    if rule is not None:
        named = " or ".join(map(str, [*sizes[:1], ROW]))
        return f"use a group_size that fits all layers of rule '{rule}', such as {named}"
    ways = _group_sizes_for_target(sizes, config)
    if not ways:
        return ""
    return f"use {', or '.join(ways)}"


def _is_odd(layer: LayerPlan) -> bool:
    return bool(layer.in_features % PACK_MULTIPLE or layer.out_features % PACK_MULTIPLE)


def _group_sizes_for_target(sizes: Iterable[int], config: QuantizeConfig) -> list[str]:
    """Return the options for group sizes that the target loads, in words."""
    loaded = [size for size in sizes if _target_loads(config, size)]
    ways = []
    if loaded:
        ways.append(f"--group-size {AUTO}, which takes {loaded[0]}")
    if _target_loads(config, ROW):
        ways.append(f"--group-size {ROW}")
    return ways


def _sizes_that_divide(layers: Iterable[LayerPlan]) -> list[int]:
    """Return the usual group sizes that divide the inputs of all layers, the largest first."""
    width = 0  # its divisors are those of the inputs of all layers
    for layer in layers:
        width = gcd(width, layer.in_features)
    return [size for size in USUAL_GROUP_SIZES if width % size == 0]


def _rule_with_group_size(layer: LayerPlan, config: QuantizeConfig) -> str | None:
    """Return the rule that sets the layer's group size; None if it is the default one."""
    for rule, changes in config.dynamic.items():
        if "group_size" in changes and layer.why == f"rule '{rule}'":
            return rule
    return None


def _target_loads(config: QuantizeConfig, group_size: int) -> bool:
    changed = config.model_copy(update={"group_size": group_size})
    return not target_problems(settings_export(changed), config.target)


def _advise_keeping(misfits: Sequence[LayerPlan], quantized: Iterable[LayerPlan]) -> str:
    """Return the advice to keep layers that do not fit; empty if it would keep all layers."""
    rule, option = keeping([layer.name for layer in misfits], in_all_blocks=True)
    others = {layer.name for layer in quantized} - {layer.name for layer in misfits}
    fused = [name for name in others if matches(rule, name)]
    if len(fused) == len(others):
        return ""
    if fused:
        return f"keep what does not fit, and what engines fuse with it: {option}"
    return "keep what does not fit: --unfit keep"


# ---------------------------------------------------------------- the output


def _packing_of(layers: Iterable[LayerPlan], format: str) -> Packing:
    """Return how the output stores the layers to be quantized."""
    sym = all(layer.config.sym for layer in layers if layer.config)
    return packing_for(format, sym=sym)


def _lay_out(
    plain: Plain, layers: Iterable[LayerPlan], packing: Packing, max_shard_bytes: int
) -> Layout:
    """Lay out the output in the order of the source; quantized layers take their weight's place."""
    packed: dict[str, list[tuple[TensorSpec, ...]]] = defaultdict(list)
    for layer in layers:
        if layer.config:
            packed[layer.stack or layer.weight.name].append(layer.packed(packing))
    units = []
    for tensor in plain.tensors.values():
        unchanged = (TensorSpec(tensor.name, tensor.dtype, tensor.shape),)
        units += packed.pop(tensor.name, [unchanged])
    for tied_head in packed.values():  # has no tensor of its own in the source
        units += tied_head
    return plan_layout(units, max_shard_bytes)
