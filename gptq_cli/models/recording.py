"""What each block is called with, learnt by running the model's own forward once with recorders in place of the blocks.

Nothing is rebuilt by hand: masks, position embeddings and whatever else a family passes come from its own code.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Container = MutableMapping[Any, Any] | MutableSequence[Any]
Extras = tuple[Any, ...]  # what a block returns beside hidden states
# What goes from block to block: hidden states [batch, seqlen, features]; in a tuple, with the extras of the block
# before, where blocks hand these on (none before the first block).
State = Tensor | tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Handed:
    """Stands in an argument's place for what the block before returned there: its extra number `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of one block, without the hidden states; some may be `Handed`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool

    def run(self, block: nn.Module, state: State) -> State:
        """What the block makes of `state`: hidden states alone, or with extras if `state` is a tuple."""
        hidden, *extras = state if isinstance(state, tuple) else (state,)
        args = [_given(value, extras) for value in self.args]
        kwargs = {key: _given(value, extras) for key, value in self.kwargs.items()}
        output = block(hidden, *args, **kwargs) if self.positional else block(hidden_states=hidden, **kwargs)
        if isinstance(state, tuple):
            return tuple(output)
        return output if isinstance(output, Tensor) else output[0]

    def handed(self, extras: Extras) -> Call:
        """This call with the tensors among its arguments that are one of `extras` marked as handed on."""
        marks = {id(value): Handed(index) for index, value in enumerate(extras) if isinstance(value, Tensor)}
        args = tuple(marks.get(id(value), value) for value in self.args)
        return Call(args, {key: marks.get(id(value), value) for key, value in self.kwargs.items()}, self.positional)

    @property
    def takes_extras(self) -> bool:
        """Whether some argument is handed on by the block before."""
        return any(isinstance(value, Handed) for value in (*self.args, *self.kwargs.values()))


def _given(value: Any, extras: Sequence[Any]) -> Any:
    return extras[value.index] if isinstance(value, Handed) else value


class Recorder(nn.Module):
    """Stands in for a block: lends its attributes, notes its call, passes hidden states on in the block's shape.

    `extras` is what it returns beside hidden states, None if it returns these alone; `inject` is returned in place of
    its input, in a tuple also in place of `extras`. `before`, the recorder of the block before, tells which arguments
    that one hands on.
    """

    def __init__(self, block: nn.Module, extras: Extras | None, before: Recorder | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its parameters stay out of sight
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
        return passed if self.extras is None or isinstance(passed, tuple) else (passed, *self.extras)


def share(value: Any, like: Any) -> Any:
    """`value` with each tensor replaced by the equal one in `like`, so that masks are kept once for all batches."""
    if isinstance(value, Tensor):
        same = isinstance(like, Tensor) and value.dtype == like.dtype and torch.equal(value, like)
        return like if same else value
    if isinstance(value, dict | list) and not value:
        return value  # to be filled by one block and read by another
    if isinstance(value, Call) and isinstance(like, Call):
        return Call(share(value.args, like.args), share(value.kwargs, like.kwargs), value.positional)
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: share(item, like.get(key)) for key, item in value.items()}
    if type(value) in (tuple, list) and type(like) is type(value) and len(like) == len(value):
        return type(value)(share(item, other) for item, other in zip(value, like, strict=True))
    return value


def unfilled(value: Any) -> list[Container]:
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


def apart(value: Any, copies: dict[int, Container]) -> Any:
    """`value` with empty containers of its own: `copies`, by the id of the one that each takes the place of."""
    if isinstance(value, MutableMapping | MutableSequence) and not value:
        return copies.setdefault(id(value), type(value)())
    if isinstance(value, Call):
        return Call(apart(value.args, copies), apart(value.kwargs, copies), value.positional)
    if isinstance(value, dict):
        return {key: apart(item, copies) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(apart(item, copies) for item in value)
    return value
