"""Proof that a model is a chain: each block needs the hidden states of the block before it and nothing else of it.

The model's own forward runs with recorders in place of its blocks, twice, with random tensors as the blocks' outputs.
What enters the next block must be that very output; whatever else a block is called with must not change from run to
run; and what follows the blocks must depend on the last output alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_cli.errors import InputError
from gptq_cli.models.recording import Extras, Handed, Recorder, State

Run = Callable[[Sequence[State | None]], tuple[list[Recorder], Any]]


def check_chain(run: Run, names: Sequence[str], extras: Extras | None) -> bool:
    """Whether the blocks `names` hand on more than hidden states; InputError E_ARCH unless they are a chain.

    `run` gets what each block is to return (None: its input); `extras`, what the first block returned beside hidden
    states, is an example of what all return. A block may be called with extras of the block before it, as they are.

    What it cannot see: a block that hides a result in a module or in an object for a later block. Containers that are
    passed to all blocks to be filled (shared keys and values) are passed on, and thus work.
    """
    plain, _ = run([None] * len(names))
    _check_called_once(plain, names)
    generator = torch.Generator().manual_seed(0)

    def state(hidden: Tensor, extras: Extras | None) -> State:
        random = torch.randn(hidden.shape, generator=generator).to(hidden)
        return random if extras is None else (random, *extras)

    given = [state(recorder.seen[0][0], _changed(extras, torch.clone)) for recorder in plain]
    other = [state(recorder.seen[0][0], _changed(extras, _different)) for recorder in plain]
    first, end = run(given)
    handed_on = any(recorder.seen[0][1].takes_extras for recorder in first)
    other[-1] = given[-1] if handed_on else _with_hidden_of(given[-1], other[-1])
    second, other_end = run(other)
    for before, after in enumerate(range(1, len(names))):
        if not torch.equal(first[after].seen[0][0], _first_tensor(given[before])):
            raise InputError("E_ARCH", f"what enters `{names[after]}` is not what `{names[before]}` returns")
    for index, name in enumerate(names):
        call, other_call = first[index].seen[0][1], second[index].seen[0][1]
        if not same((call.args, call.kwargs), (other_call.args, other_call.kwargs)):
            raise InputError("E_ARCH", f"`{name}` is called with results of blocks that are not handed on as they are")
    if not same(_first_tensor(end), _first_tensor(other_end)):
        raise InputError("E_ARCH", f"what follows `{names[-1]}` depends on outputs of the blocks before it")
    return handed_on


def same(value: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal, as far as tensors and the containers around them tell."""
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and torch.equal(value.nan_to_num(), other.nan_to_num())
    if isinstance(value, Handed):
        return isinstance(other, Handed) and value.index == other.index
    if isinstance(value, dict):
        return isinstance(other, dict) and value.keys() == other.keys() and all(same(value[k], other[k]) for k in value)
    if isinstance(value, tuple | list):
        return type(other) is type(value) and len(other) == len(value) and all(map(same, value, other))
    return type(other) is type(value)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` made to each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(item, change) for item in value)
    return value


def _different(tensor: Tensor) -> Tensor:
    return tensor + 1 if tensor.is_floating_point() else tensor.flip(-1)


def _with_hidden_of(state: State, other: State) -> State:
    return (state[0], *other[1:]) if isinstance(state, tuple) and isinstance(other, tuple) else state


def _check_called_once(recorders: Sequence[Recorder], names: Sequence[str]) -> None:
    for recorder, name in zip(recorders, names, strict=True):
        if len(recorder.seen) != 1:
            raise InputError("E_ARCH", f"the model's forward calls `{name}` {len(recorder.seen)} times, not once")


def _first_tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
