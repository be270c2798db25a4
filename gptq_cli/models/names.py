"""Which tensor of the checkpoint fills which parameter: transformers' own conversion mapping, read backwards.

Where several tensors make one parameter, or experts are slices of one tensor, the parameter's source is *derived*: a
name that no file holds, and how it is read.
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
_OF_EXPERT = re.compile(r"(?P<path>.+)\.(?P<number>\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, slots=True)
class Fusion:
    """A parameter that transformers' loading makes of several tensors, in their order for each pattern of its rule."""

    key: str
    converter: WeightConverter
    names: Mapping[str, list[str]]
    model: PreTrainedModel

    @property
    def stored(self) -> list[str]:
        """The tensors that are read for it."""
        return [name for names in self.names.values() for name in names]

    def read(self, read: Read) -> Tensor:
        """The parameter, made by transformers' own operations."""
        converter: Any = deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names:
                converter.add_tensor(self.key, name, pattern, read(name))
        (made,) = converter.convert(self.key, model=self.model, config=self.model.config).values()
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


@dataclass(frozen=True, slots=True)
class Sources:
    """For each parameter and persistent buffer the name of what fills it, `derived` telling how some are read."""

    names: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Fusion | Slice] = field(default_factory=dict)

    @property
    def slices(self) -> dict[str, Slice]:
        """The derived tensors that are a part of one tensor."""
        return {name: found for name, found in self.derived.items() if isinstance(found, Slice)}

    def stored(self, name: str) -> Iterable[str]:
        """The tensors of the checkpoint that are read for `name`."""
        found = self.derived.get(name)
        return found.stored if found else (name,)

    def reader(self, read: Read) -> Read:
        """`read` for the tensors of the checkpoint, extended to derived ones."""

        def extended(name: str) -> Tensor:
            return self.derived[name].read(read) if name in self.derived else read(name)

        return extended


def match_names(
    model: PreTrainedModel, names: Iterable[str], stacks: Mapping[str, StackShape]
) -> Sources:
    """The source of each parameter of `model`, in which the experts of `stacks`, by module, are still stacked.

    Linears of experts are named in the result as `Experts` names them: `X.experts.3.up_proj.weight`. InputError E_ARCH
    if experts are stored in a way that is not understood, or a tensor is split into several parameters.
    """
    found = Sources()
    fused = _pair(model, names, stacks, found.names)
    for key, (converter, parts) in fused.items():
        if len(converter.target_patterns) > 1:
            first = next(iter(parts.values()))[0]
            raise InputError(
                "E_ARCH", f"`{first}` is split into `{key}` and others, which is not supported"
            )
        path, _, leaf = key.rpartition(".")
        stacked = path in stacks and leaf in (GATE_UP, UP, DOWN)
        if stacked and _stacks_linears(converter):
            found.names.update(_single(path, leaf, stacks[path], converter, parts))
        elif stacked and _interleaves(converter, stacks[path]):
            (stored,) = next(iter(parts.values()))
            _slice(found, path, leaf, stacks[path], stored, interleaved=True)
        else:
            found.names[key] = key
            found.derived[key] = Fusion(key, converter, parts, model)
    for path, shape in stacks.items():
        for leaf in (GATE_UP, UP, DOWN):
            if (stack := found.names.pop(f"{path}.{leaf}", None)) is not None:
                _slice(found, path, leaf, shape, stack)
    return found


def _pair(
    model: PreTrainedModel,
    names: Iterable[str],
    stacks: Mapping[str, StackShape],
    single: dict[str, str],
) -> dict[str, tuple[WeightConverter, dict[str, list[str]]]]:
    """Note in `single` what fills a parameter alone; of the others, the rule that makes each and names by pattern."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    targets = model.state_dict()
    fused: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, targets
        )
        if key not in targets and name in targets:
            key, pattern = name, None
        if key in targets and pattern is not None:
            _, parts = fused.setdefault(key, (by_pattern[pattern], {}))
            parts.setdefault(pattern, []).append(name)
        elif key in targets or _is_of_expert(key, stacks):
            single[key] = name
    return fused


def _is_of_expert(key: str, stacks: Mapping[str, StackShape]) -> bool:
    match = _OF_EXPERT.fullmatch(key)
    return (
        match is not None
        and match["path"] in stacks
        and int(match["number"]) < stacks[match["path"]].n_experts
    )


def _stacks_linears(converter: WeightConverter) -> bool:
    """Whether a rule stacks matrices [O, I] of experts, those of gate and up above one another."""
    operations = [
        (type(operation), getattr(operation, "dim", None)) for operation in converter.operations
    ]
    stacked = [(MergeModulelist, 0), (Concatenate, 1)]
    return operations == stacked[: len(converter.source_patterns)]


def _interleaves(converter: WeightConverter, shape: StackShape) -> bool:
    """Whether a rule brings the outputs of gate and up, which take turns in one tensor, one after the other."""
    (operation, *others) = converter.operations
    outputs = 2 if shape.turned else 1
    taking_turns = (
        isinstance(operation, Interleave) and not operation.inverse and operation.dim == outputs
    )
    return taking_turns and not others and not shape.interleaved


def _single(
    path: str,
    leaf: str,
    shape: StackShape,
    converter: WeightConverter,
    parts: Mapping[str, list[str]],
) -> dict[str, str]:
    names: dict[str, str] = {}
    linears = (GATE, UP) if leaf == GATE_UP else (leaf,)
    for linear, pattern in zip(linears, converter.source_patterns, strict=True):
        stored = parts.get(pattern, [])
        if len(stored) not in (
            shape.n_experts,
            shape.n_choices,
        ):  # choices that are no expert may have tensors, too
            raise InputError(
                "E_CKPT_INCOMPLETE",
                f"the checkpoint has {len(stored)} tensors for {linear} of `{path}`, not {shape.n_experts}",
                hint=OF_ONE_REVISION,
            )
        names |= {
            f"{path}.{number}.{linear}.weight": name
            for number, name in enumerate(stored[: shape.n_experts])
        }
    return names


def _slice(
    found: Sources,
    path: str,
    leaf: str,
    shape: StackShape,
    stack: str,
    *,
    interleaved: bool | None = None,
) -> None:
    """Name each expert's part of the tensor `stack`, as engines do when experts are stored one by one."""
    holder, _, last = stack.rpartition(".")
    whole = stack not in found.derived
    if whole and (last == leaf or holder.rpartition(".")[2] == path.rpartition(".")[2]):
        prefix = holder
    elif whole and stack.startswith(f"{path.rpartition('.')[0]}."):
        prefix = path
    else:
        fused = found.derived.get(stack)
        stored = next(iter(fused.stored)) if fused else stack
        raise InputError(
            "E_ARCH", f"the experts of `{path}` are stored as `{stored}`, in an order of their own"
        )
    for number, part, piece in shape.slices(leaf, stack, interleaved=interleaved):
        name = f"{prefix}.{number}.{part}.weight"
        found.names[f"{path}.{number}.{part}.weight"] = name
        found.derived[name] = piece
