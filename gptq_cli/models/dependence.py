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
from gptq_cli.models.recording import Recorder

Extras = tuple[Any, ...] | None
Run = Callable[[Sequence[Tensor | None], Extras], tuple[list[Recorder], Any]]


def check_chain(run: Run, names: Sequence[str], extras: Extras) -> None:
    """InputError E_ARCH unless the blocks `names` are a chain.

    `run` gets what each block is to return (None: its input) and what all return beside that, of which `extras`, what
    the first block returned, is an example.

    What it cannot see: a block that hides a result in a module or in an object for a later block. Containers that are
    passed to all blocks to be filled (shared keys and values) are passed on, and thus work.
    """
    plain, _ = run([None] * len(names), extras)
    _check_called_once(plain, names)
    generator = torch.Generator().manual_seed(0)

    def outputs() -> list[Tensor]:
        hidden = [recorder.seen[0][0] for recorder in plain]
        return [torch.randn(state.shape, generator=generator).to(state) for state in hidden]

    given, other = outputs(), outputs()
    other[-1] = given[-1]
    first, end = run(given, extras)
    second, other_end = run(other, _changed(extras))
    for before, after in enumerate(range(1, len(names))):
        if not torch.equal(first[after].seen[0][0], given[before]):
            raise InputError("E_ARCH", f"what enters `{names[after]}` is not what `{names[before]}` returns")
    for index, name in enumerate(names):
        call, other_call = first[index].seen[0][1], second[index].seen[0][1]
        if not same((call.args, call.kwargs), (other_call.args, other_call.kwargs)):
            raise InputError("E_ARCH", f"`{name}` is called with more results of earlier blocks than hidden states")
    if not same(_first_tensor(end), _first_tensor(other_end)):
        raise InputError("E_ARCH", f"what follows `{names[-1]}` depends on outputs of the blocks before it")


def same(value: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal, as far as tensors and the containers around them tell."""
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and torch.equal(value.nan_to_num(), other.nan_to_num())
    if isinstance(value, dict):
        return isinstance(other, dict) and value.keys() == other.keys() and all(same(value[k], other[k]) for k in value)
    if isinstance(value, tuple | list):
        return type(other) is type(value) and len(other) == len(value) and all(map(same, value, other))
    return type(other) is type(value)


def _changed(value: Any) -> Any:
    """`value` with other numbers in its tensors."""
    if isinstance(value, Tensor):
        return value + 1 if value.is_floating_point() else value.flip(-1)
    if isinstance(value, tuple):
        return tuple(_changed(item) for item in value)
    return value


def _check_called_once(recorders: Sequence[Recorder], names: Sequence[str]) -> None:
    for recorder, name in zip(recorders, names, strict=True):
        if len(recorder.seen) != 1:
            raise InputError("E_ARCH", f"the model's forward calls `{name}` {len(recorder.seen)} times, not once")


def _first_tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
