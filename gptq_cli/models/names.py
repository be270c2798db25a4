"""The tensor of the checkpoint that fills each parameter, by transformers' conversion mapping.

The mapping leads from tensors to parameters; this module reverses it.
If several tensors make one parameter, or experts are slices of one tensor, the source of the
parameter is *derived*: it has a name that no file holds, and an object that reads it (`Fusion`,
`Slice`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from gptq_cli.config.leftovers import OF_ONE_REVISION
from gptq_cli.errors import InputError
from gptq_cli.models.experts import DOWN, GATE, GATE_UP, UP, Slice, StackShape

Read = Callable[[str], Tensor]
_LINEARS_IN = {GATE_UP: (GATE, UP), UP: (UP,), DOWN: (DOWN,)}
_OF_EXPERT = re.compile(r"(?P<path>.+)\.(?P<number>\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, slots=True)
class Fusion:
    """A parameter that transformers makes of several tensors by the rule `converter`.

    `names` are the tensors for each pattern of the rule, in the order in which they are added.
    """

    key: str
    converter: WeightConverter
    names: dict[str, list[str]]
    model: PreTrainedModel

    @property
    def stored(self) -> list[str]:
        """The names of the tensors that are read for it."""
        return [name for names in self.names.values() for name in names]

    def read(self, read: Read) -> Tensor:
        """Return the parameter, made by transformers' own operations."""
        converter: Any = deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names:
                converter.add_tensor(self.key, name, pattern, read(name))
        (made,) = converter.convert(self.key, model=self.model, config=self.model.config).values()
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


@dataclass(frozen=True, slots=True)
class Sources:
    """The name of the tensor that fills each parameter and persistent buffer, by its own name.

    `derived` holds the names among them that are no tensor of the checkpoint, and how to read them.
    """

    names: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Fusion | Slice] = field(default_factory=dict)

    @property
    def slices(self) -> dict[str, Slice]:
        """The derived tensors that are a part of one tensor."""
        found = {}
        for name, source in self.derived.items():
            if isinstance(source, Slice):
                found[name] = source
        return found

    def stored(self, name: str) -> Iterable[str]:
        """Return the tensors of the checkpoint that are read for `name`."""
        found = self.derived.get(name)
        if found is None:
            return (name,)
        return found.stored

    def reader(self, read: Read) -> Read:
        """Return `read`, which reads tensors of the checkpoint, extended to derived ones."""

        def extended(name: str) -> Tensor:
            found = self.derived.get(name)
            if found is None:
                return read(name)
            return found.read(read)

        return extended


def match_names(
    model: PreTrainedModel, names: Iterable[str], stacks: Mapping[str, StackShape]
) -> Sources:
    """Return the sources of the parameters of `model`, whose experts are still stacked in `stacks`.

    `names` are the tensors of the checkpoint; `stacks` are by module. The result names linears of
    experts as `Experts` does: `X.experts.3.up_proj.weight`. Raise InputError E_ARCH if the storage
    of experts is not supported or a tensor is split into several parameters, E_CKPT_INCOMPLETE if
    tensors of experts are missing.
    """
    single, fusions = _match_rules(model, names, stacks)
    found = Sources(single)
    for fusion in fusions:
        _add_fusion(found, fusion, stacks)
    for path, shape in stacks.items():
        for leaf in (GATE_UP, UP, DOWN):
            stack = found.names.pop(f"{path}.{leaf}", None)
            if stack is not None:
                _add_slices(found, path, leaf, shape, stack)
    return found


def _match_rules(
    model: PreTrainedModel, names: Iterable[str], stacks: Mapping[str, StackShape]
) -> tuple[dict[str, str], list[Fusion]]:
    """Return the tensors that fill a parameter alone, by parameter, and fusions for the others."""
    renamings, converters, converter_of = _conversion_rules(model)
    targets = model.state_dict()
    single: dict[str, str] = {}
    fusions: dict[str, Fusion] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, targets
        )
        if key not in targets and name in targets:
            key, pattern = name, None
        if key not in targets and not _is_of_expert(key, stacks):
            continue
        if pattern is None or key not in targets:
            single[key] = name
            continue
        fusion = fusions.setdefault(key, Fusion(key, converter_of[pattern], {}, model))
        fusion.names.setdefault(pattern, []).append(name)
    return single, list(fusions.values())


def _conversion_rules(
    model: PreTrainedModel,
) -> tuple[list[WeightRenaming], list[WeightConverter], dict[str, WeightConverter]]:
    """Return the rules that rename, the rules that convert, and the latter by source pattern."""
    renamings, converters, by_pattern = [], [], {}
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightRenaming):
            renamings.append(rule)
        elif isinstance(rule, WeightConverter):
            converters.append(rule)
            by_pattern.update(dict.fromkeys(rule.source_patterns, rule))
    return renamings, converters, by_pattern


def _is_of_expert(key: str, stacks: Mapping[str, StackShape]) -> bool:
    match = _OF_EXPERT.fullmatch(key)
    if match is None or match["path"] not in stacks:
        return False
    return int(match["number"]) < stacks[match["path"]].n_experts


def _add_fusion(found: Sources, fusion: Fusion, stacks: Mapping[str, StackShape]) -> None:
    """Add a fused parameter to `found`; stacked experts are taken apart if the rule allows it."""
    key, converter = fusion.key, fusion.converter
    if len(converter.target_patterns) > 1:
        message = f"`{fusion.stored[0]}` is split into `{key}` and others, which is not supported"
        raise InputError("E_ARCH", message)
    path, _, leaf = key.rpartition(".")
    stacked = path in stacks and leaf in (GATE_UP, UP, DOWN)
    if stacked and _stacks_linears(converter):
        _add_separate_linears(found, path, leaf, stacks[path], fusion)
    elif stacked and _interleaves(converter, stacks[path]):
        (stored,) = next(iter(fusion.names.values()))
        _add_slices(found, path, leaf, stacks[path], stored, interleaved=True)
    else:
        found.names[key] = key
        found.derived[key] = fusion


def _stacks_linears(converter: WeightConverter) -> bool:
    """Return whether a rule stacks matrices [O, I] of experts, with gate above up."""
    operations = []
    for operation in converter.operations:
        operations.append((type(operation), getattr(operation, "dim", None)))
    stacked = [(MergeModulelist, 0), (Concatenate, 1)]
    return operations == stacked[: len(converter.source_patterns)]


def _interleaves(converter: WeightConverter, shape: StackShape) -> bool:
    """Return whether a rule turns alternating outputs of gate and up into one after the other."""
    (operation, *others) = converter.operations
    if others or shape.interleaved or not isinstance(operation, Interleave):
        return False
    outputs = 2 if shape.turned else 1
    return not operation.inverse and operation.dim == outputs


def _add_separate_linears(
    found: Sources, path: str, leaf: str, shape: StackShape, fusion: Fusion
) -> None:
    """Add the tensors of linears that the checkpoint stores one by one for each expert."""
    for linear, pattern in zip(_LINEARS_IN[leaf], fusion.converter.source_patterns, strict=True):
        stored = fusion.names.get(pattern, [])
        # Choices that are no expert may have tensors too.
        if len(stored) not in (shape.n_experts, shape.n_choices):
            raise InputError(
                "E_CKPT_INCOMPLETE",
                f"the checkpoint has {len(stored)} tensors for {linear} of `{path}`, "
                f"not {shape.n_experts}",
                hint=OF_ONE_REVISION,
            )
        for number, name in enumerate(stored[: shape.n_experts]):
            found.names[f"{path}.{number}.{linear}.weight"] = name


def _add_slices(
    found: Sources,
    path: str,
    leaf: str,
    shape: StackShape,
    stack: str,
    *,
    interleaved: bool | None = None,
) -> None:
    """Add each expert's part of the tensor `stack`.

    Its name is the one that engines use if experts are stored one by one.
    """
    prefix = _prefix_of_experts(found, path, leaf, stack)
    for number, part, piece in shape.slices(leaf, stack, interleaved=interleaved):
        name = f"{prefix}.{number}.{part}.weight"
        found.names[f"{path}.{number}.{part}.weight"] = name
        found.derived[name] = piece


def _prefix_of_experts(found: Sources, path: str, leaf: str, stack: str) -> str:
    """Return the prefix of the names of experts whose matrices are stored as `stack`.

    Raise InputError E_ARCH if the checkpoint does not store them as one tensor in the usual order.
    """
    stored = stack
    fused = found.derived.get(stack)
    if fused is not None:
        stored = next(iter(fused.stored))
    else:
        holder, _, last = stack.rpartition(".")
        parent, _, module = path.rpartition(".")
        if last == leaf or holder.rpartition(".")[2] == module:
            return holder
        if stack.startswith(f"{parent}."):
            return path
    raise InputError(
        "E_ARCH",
        f"the experts of `{path}` are stored as `{stored}`, in an order that is not supported",
    )
