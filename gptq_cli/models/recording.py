"""What each block is called with, learnt by running the model's own forward once with recorders in place of the blocks.

Nothing is rebuilt by hand: masks, position embeddings and whatever else a family passes come from its own code.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Container = MutableMapping[Any, Any] | MutableSequence[Any]


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for `hidden` [batch, seqlen, features]."""
        output = (
            block(hidden, *self.args, **self.kwargs) if self.positional else block(hidden_states=hidden, **self.kwargs)
        )
        return output if isinstance(output, Tensor) else output[0]


class Recorder(nn.Module):
    """Stands in for a block: lends its attributes, notes its call, passes hidden states on in the block's shape.

    `extras` is what the block returns beside hidden states, None if it returns these alone.
    """

    def __init__(self, block: nn.Module, extras: tuple[Any, ...] | None) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its parameters stay out of sight
        self.extras = extras
        self.inject: Tensor | None = None
        self.seen: list[tuple[Tensor, Call]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        self.seen.append((hidden, Call(args[1:], rest, bool(args))))
        passed = hidden if self.inject is None else self.inject
        return passed if self.extras is None else (passed, *self.extras)


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


def with_own(value: Any, own: Mapping[int, Container]) -> Any:
    """`value` with the containers of `own`, by the id of those they stand for, in their place."""
    if id(value) in own:
        return own[id(value)]
    if isinstance(value, Call):
        return Call(with_own(value.args, own), with_own(value.kwargs, own), value.positional)
    if type(value) is dict:
        return {key: with_own(item, own) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(with_own(item, own) for item in value)
    return value
