"""Linear layers of experts that share a tensor, as far as headers tell. Needs no torch.

The built model tells them for sure (`models/experts.py`). Here names and shapes do: a tensor with
the first matrices of all experts, and beside it one with the second matrices, which fit each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gptq_cli.checkpoint.headers import DTYPES, TensorInfo

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"

Matrix = tuple[int, ...]
Stacked = tuple[str, int, int]  # the tensor that holds a linear, out_features, in_features


class Form(NamedTuple):
    """How the names of two stacks of one layer of experts end, and where their linears belong.

    The linears of expert N are named `HOLDER` + `experts` + `.N.`.
    """

    first: str
    second: str
    gated: bool
    experts: str = ""


# The last three are renamed by transformers' conversion mapping; a test plans models of each form.
FORMS = (
    Form(".gate_up_proj", ".down_proj", gated=True),
    Form(".up_proj", ".down_proj", gated=False),
    Form(".w13_weight", ".w2_weight", gated=True),
    Form(".fc1.weight", ".fc2.weight", gated=True),
    Form(
        ".block_sparse_moe.input_linear.weight",
        ".block_sparse_moe.output_linear.weight",
        gated=True,
        experts=".block_sparse_moe.experts",
    ),
)


def linears_in_stacks(tensors: Iterable[TensorInfo], blocks: str) -> dict[str, Stacked]:
    """Return the linears of experts that share a tensor of `blocks`, by name, in file order."""
    stacks = {tensor.name: tensor for tensor in stacks_of(tensors, blocks)}
    found: dict[str, Stacked] = {}
    for name in stacks:
        for form in FORMS:
            holder = name.removesuffix(form.first)
            second = stacks.get(holder + form.second)
            # Where gates are a third stack, transformers has no module that takes experts apart.
            if holder == name or second is None or f"{holder}.{GATE}" in stacks:
                continue
            found |= _linears(stacks[name], second, form)
    return found


def stacks_of(tensors: Iterable[TensorInfo], blocks: str) -> list[TensorInfo]:
    """Return the tensors of `blocks` that are stacks of matrices, not of vectors."""
    found = []
    for tensor in tensors:
        is_stack = len(tensor.shape) == 3 and min(tensor.shape[1:]) > 1
        if is_stack and DTYPES[tensor.dtype].bits >= 16 and tensor.name.startswith(f"{blocks}."):
            found.append(tensor)
    return found


def _linears(first: TensorInfo, second: TensorInfo, form: Form) -> dict[str, Stacked]:
    """Return the linears of all experts in two stacks; none if these do not fit each other."""
    n_experts, *down = second.shape
    sizes = _sizes(first.shape[1:], tuple(down), 1 + form.gated)
    if sizes is None or first.shape[0] < n_experts:
        return {}
    intermediate, hidden = sizes
    holder = first.name.removesuffix(form.first) + form.experts
    found: dict[str, Stacked] = {}
    for number in range(n_experts):
        if form.gated:
            found[f"{holder}.{number}.{GATE}"] = (first.name, intermediate, hidden)
        found[f"{holder}.{number}.{UP}"] = (first.name, intermediate, hidden)
        found[f"{holder}.{number}.{DOWN}"] = (second.name, hidden, intermediate)
    return found


def _sizes(first: Matrix, second: Matrix, factor: int) -> tuple[int, int] | None:
    """Return intermediate and hidden size of matrices [O, I], or all [I, O]; None if neither.

    The first matrix has `factor` x intermediate outputs.
    """
    for matrix, down in ((first, second), (first[::-1], second[::-1])):
        wide, hidden = matrix
        intermediate, rest = divmod(wide, factor)
        if rest == 0 and down == (hidden, intermediate):
            return intermediate, hidden
    return None
