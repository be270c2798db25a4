"""The names of experts in checkpoints of MLX, which stores all experts of a layer in one tensor.

Sources are those of `mlx.py`. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.errors import InputError

SWITCH = "switch_mlp"  # the module that holds all experts of a layer
EXPERT_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LETTERS = {name: letter for letter, name in EXPERT_LINEARS.items()}
HOLDER_OF_LETTERS = "block_sparse_moe"  # whose experts have w1, w2 and w3, as in Mixtral
_EXPERT = re.compile(r"(.+)[.]experts[.](\d+)[.]([^.]+)")
_STACKED = re.compile(rf"(.+)[.]{SWITCH}[.]([^.]+)[.](weight|scales|biases)")


def unstacked(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors with one of each expert in place of those that hold all experts.

    Experts get the names that they have in checkpoints for transformers. InputError
    E_CKPT_INCOMPLETE if the tensors of a layer do not hold the same experts, E_CKPT_SHAPE if one
    stacks no matrices, E_CKPT_RULES if an expert is stored twice.
    """
    found = {}
    stacks: dict[str, TensorInfo] = {}  # the first one of each layer
    for name, tensor in tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        holder, linear, part = match.groups()
        _refuse_stack(tensor, stacks.setdefault(holder, tensor))
        if holder.endswith(HOLDER_OF_LETTERS):
            linear = LETTERS.get(linear, linear)
        size = tensor.nbytes // tensor.shape[0]
        for place in range(tensor.shape[0]):
            item = f"{holder}.experts.{place}.{linear}.{part}"
            if item in tensors or item in found:
                message = f"also holds `{item}`, which is stored beside it"
                raise _wrong_stack("E_CKPT_RULES", tensor, message)
            start = tensor.start + place * size
            found[item] = replace(
                tensor,
                name=item,
                shape=tensor.shape[1:],
                start=start,
                end=start + size,
                stack=name,
                place=place,
            )
    return found


def _refuse_stack(tensor: TensorInfo, first: TensorInfo) -> None:
    """Raise InputError unless a tensor stacks matrices, as many as the first one of its layer."""
    if len(tensor.shape) != 3 or tensor.shape[0] == 0:
        message = f"has shape {list(tensor.shape)}, but should stack a matrix of each expert"
        raise _wrong_stack("E_CKPT_SHAPE", tensor, message)
    if tensor.shape[0] != first.shape[0]:
        message = f"holds {tensor.shape[0]} experts, but `{first.name}` holds {first.shape[0]}"
        raise _wrong_stack("E_CKPT_INCOMPLETE", tensor, message)


def _wrong_stack(code: str, tensor: TensorInfo, message: str) -> InputError:
    hint = "download the checkpoint again, or write it again with the tool that wrote it"
    return InputError(code, f"`{tensor.file}`: `{tensor.name}` {message}", hint=hint)


def stack_of(module: str) -> tuple[str, int] | None:
    """Return the module that holds all experts beside the linear `module`, and its place in it.

    >>> stack_of("model.layers.0.mlp.experts.7.up_proj")
    ('model.layers.0.mlp.switch_mlp.up_proj', 7)
    """
    match = _EXPERT.fullmatch(module)
    if match is None:
        return None
    linear = EXPERT_LINEARS.get(match[3], match[3])
    return f"{match[1]}.{SWITCH}.{linear}", int(match[2])


def stored_name(module: str) -> str:
    """Return the name of the module that holds the parts of `module`."""
    stacked = stack_of(module)
    if stacked is None:
        return module
    return stacked[0]
