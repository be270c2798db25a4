"""Recorders in place of a model's blocks: what each block is called with, and the proof that the
blocks are a chain.

Nothing is rebuilt by hand: masks, position embeddings and whatever else a family passes come from
its own code. A chain means that each block needs the hidden states of the block before it and
nothing else of it. For the proof the model's own forward runs twice, with random tensors as the
blocks' outputs: what enters the next block must be that very output; whatever else a block is
called with must not change from run to run; and what follows the blocks must depend on the last
output alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.errors import InputError

Container = MutableMapping[Any, Any] | MutableSequence[Any]
Extras = tuple[Any, ...]  # what a block returns beside hidden states
# What goes from block to block: hidden states [batch, seqlen, features]; in a tuple, with the extras of the block
# before, where blocks hand these on (none before the first block).
State = Tensor | tuple[Any, ...]


class Recorder(nn.Module):
    """Stands in for a block: lends its attributes, notes its call, passes hidden states on in the block's shape.

    `extras` is what it returns beside hidden states, None if it returns these alone; `inject` is returned in place of
    its input, in a tuple also in place of `extras`. `before`, the recorder of the block before, tells which arguments
    that one hands on.
    """

    def __init__(
        self, block: nn.Module, extras: Extras | None, before: Recorder | None = None
    ) -> None:
        super().__init__()
        object.__setattr__(
            self, "_block", block
        )  # not a submodule: its parameters stay out of sight
        object.__setattr__(self, "_before", before)
        self.extras = extras
        self.inject: State | None = None
        self.seen: list[tuple[Tensor, Call]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    @property
    def returned(self) -> Extras:
        """What it returns beside hidden states."""
        return self.inject[1:] if isinstance(self.inject, tuple) else self.extras or ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        before = self._before
        call = Call(args[1:], rest, bool(args))
        self.seen.append((hidden, call.handed(before.returned) if before is not None else call))
        passed = hidden if self.inject is None else self.inject
        return (
            passed if self.extras is None or isinstance(passed, tuple) else (passed, *self.extras)
        )


Run = Callable[[Sequence[State | None]], tuple[list[Recorder], Any]]


@dataclass(frozen=True, slots=True)
class FromPreviousBlock:
    """Stands in an argument's place for what the block before returned there: its extra number `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of one block, without the hidden states; some may be `FromPreviousBlock`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool

    def run(self, block: nn.Module, state: State) -> State:
        """What the block makes of `state`: hidden states alone, or with extras if `state` is a tuple."""
        hidden, *extras = state if isinstance(state, tuple) else (state,)
        args = [_given(value, extras) for value in self.args]
        kwargs = {key: _given(value, extras) for key, value in self.kwargs.items()}
        output = (
            block(hidden, *args, **kwargs)
            if self.positional
            else block(hidden_states=hidden, **kwargs)
        )
        if isinstance(state, tuple):
            return tuple(output)
        return output if isinstance(output, Tensor) else output[0]

    def handed(self, extras: Extras) -> Call:
        """This call with the tensors among its arguments that are one of `extras` marked as handed on."""
        marks = {
            id(value): FromPreviousBlock(index)
            for index, value in enumerate(extras)
            if isinstance(value, Tensor)
        }
        args = tuple(marks.get(id(value), value) for value in self.args)
        return Call(
            args,
            {key: marks.get(id(value), value) for key, value in self.kwargs.items()},
            self.positional,
        )

    @property
    def takes_extras(self) -> bool:
        """Whether some argument is handed on by the block before."""
        return any(
            isinstance(value, FromPreviousBlock) for value in (*self.args, *self.kwargs.values())
        )


def _given(value: Any, extras: Sequence[Any]) -> Any:
    return extras[value.index] if isinstance(value, FromPreviousBlock) else value


def reuse_equal_tensors(value: Any, like: Any) -> Any:
    """`value` with each tensor replaced by the equal one in `like`, so that masks are kept once for all batches."""
    if isinstance(value, Tensor):
        same = isinstance(like, Tensor) and value.dtype == like.dtype and torch.equal(value, like)
        return like if same else value
    if isinstance(value, dict | list) and not value:
        return value  # to be filled by one block and read by another
    if isinstance(value, Call) and isinstance(like, Call):
        return Call(
            reuse_equal_tensors(value.args, like.args),
            reuse_equal_tensors(value.kwargs, like.kwargs),
            value.positional,
        )
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: reuse_equal_tensors(item, like.get(key)) for key, item in value.items()}
    if type(value) in (tuple, list) and type(like) is type(value) and len(like) == len(value):
        return type(value)(
            reuse_equal_tensors(item, other) for item, other in zip(value, like, strict=True)
        )
    return value


def empty_containers(value: Any) -> list[Container]:
    """The empty dicts and lists in `value`, each once: blocks put there what later blocks need (keys and values)."""
    found: dict[int, Container] = {}

    def visit(item: Any) -> None:
        if isinstance(item, MutableMapping | MutableSequence) and not item:
            found[id(item)] = item
        elif isinstance(item, Call):
            visit((item.args, item.kwargs))
        elif isinstance(item, Mapping):
            visit(tuple(item.values()))
        elif isinstance(item, list | tuple):
            for part in item:
                visit(part)

    visit(value)
    return list(found.values())


def with_own_containers(value: Any, copies: dict[int, Container]) -> Any:
    """`value` with empty containers of its own: `copies`, by the id of the one that each takes the place of."""
    if isinstance(value, MutableMapping | MutableSequence) and not value:
        return copies.setdefault(id(value), type(value)())
    if isinstance(value, Call):
        return Call(
            with_own_containers(value.args, copies),
            with_own_containers(value.kwargs, copies),
            value.positional,
        )
    if isinstance(value, dict):
        return {key: with_own_containers(item, copies) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(with_own_containers(item, copies) for item in value)
    return value


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
            raise InputError(
                "E_ARCH", f"what enters `{names[after]}` is not what `{names[before]}` returns"
            )
    for index, name in enumerate(names):
        call, other_call = first[index].seen[0][1], second[index].seen[0][1]
        if not same((call.args, call.kwargs), (other_call.args, other_call.kwargs)):
            raise InputError(
                "E_ARCH",
                f"`{name}` is called with results of blocks that are not handed on as they are",
            )
    if not same(_first_tensor(end), _first_tensor(other_end)):
        raise InputError(
            "E_ARCH", f"what follows `{names[-1]}` depends on outputs of the blocks before it"
        )
    return handed_on


def same(value: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal, as far as tensors and the containers around them tell."""
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and torch.equal(value.nan_to_num(), other.nan_to_num())
    if isinstance(value, FromPreviousBlock):
        return isinstance(other, FromPreviousBlock) and value.index == other.index
    if isinstance(value, dict):
        return (
            isinstance(other, dict)
            and value.keys() == other.keys()
            and all(same(value[k], other[k]) for k in value)
        )
    if isinstance(value, tuple | list):
        return (
            type(other) is type(value) and len(other) == len(value) and all(map(same, value, other))
        )
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
    return (
        (state[0], *other[1:]) if isinstance(state, tuple) and isinstance(other, tuple) else state
    )


def _check_called_once(recorders: Sequence[Recorder], names: Sequence[str]) -> None:
    for recorder, name in zip(recorders, names, strict=True):
        if len(recorder.seen) != 1:
            raise InputError(
                "E_ARCH", f"the model's forward calls `{name}` {len(recorder.seen)} times, not once"
            )


def _first_tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
