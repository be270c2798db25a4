"""Recorders in place of a model's blocks: they note the arguments of each block.

Masks, position embeddings and all other arguments come from the model's own code; nothing is
rebuilt by hand. `check_chain` proves that the blocks form a chain: each block needs the output of
the block before it and nothing else of that block. It runs the model's own forward twice, with
random tensors as the outputs of the blocks. The input of the next block must be that very output,
all other arguments of a block must be equal in both runs, and the part of the model behind the
blocks must depend on the last output alone. `stream` runs the blocks with the recorded arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.errors import InputError

Container = MutableMapping[Any, Any] | MutableSequence[Any]
Extras = tuple[Any, ...]  # the outputs of a block beside hidden states
# The data that goes from block to block: hidden states [batch, seqlen, features]. If blocks hand on
# more, it is a tuple of hidden states and the extras of the block before (none before the first).
State = Tensor | tuple[Any, ...]


class Recorder(nn.Module):
    """Stand-in for a block: it records its calls and returns its input in the block's structure.

    It lends the attributes of the block to the model's code. `extras` are the values that it
    returns beside hidden states, None if it returns hidden states alone. `inject` is returned in
    place of its input; if `inject` is a tuple, it replaces `extras` too. With `zero` it returns
    zeros. `before` is the recorder of the block before; it tells which arguments that block hands
    on.
    """

    def __init__(
        self, block: nn.Module, extras: Extras | None, before: Recorder | None = None
    ) -> None:
        super().__init__()
        # Not submodules: the parameters of the block stay out of sight.
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_before", before)
        self.extras = extras
        self.inject: State | None = None
        self.zero = False
        self.seen: list[tuple[Tensor, Call]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    @property
    def returned(self) -> Extras:
        """The values that it returns beside hidden states."""
        if isinstance(self.inject, tuple):
            return self.inject[1:]
        return self.extras or ()

    @property
    def first_hidden(self) -> Tensor:
        """The hidden states [batch, seqlen, features] of its first call."""
        return self.seen[0][0]

    @property
    def first_call(self) -> Call:
        """The other arguments of its first call."""
        return self.seen[0][1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        positional = bool(args)
        if positional:
            hidden, *others = args
        else:
            hidden, others = kwargs["hidden_states"], []
        kwargs.pop("hidden_states", None)
        call = Call(tuple(others), kwargs, positional)
        if self._before is not None:
            call = call.handed(self._before.returned)
        self.seen.append((hidden, call))
        output = hidden if self.inject is None else self.inject
        if self.zero:
            output = torch.zeros_like(hidden)
        if self.extras is None or isinstance(output, tuple):
            return output
        return (output, *self.extras)


Run = Callable[[Sequence[State | None]], tuple[list[Recorder], Any]]


@dataclass(frozen=True, slots=True)
class FromPreviousBlock:
    """Stand-in for an argument that the block before returned as its extra number `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of a block, without hidden states; some may be `FromPreviousBlock`.

    `added` are features of images that the model adds to the hidden states before the block.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool  # hidden states are the first positional argument
    added: Tensor | None = None

    def run(self, block: nn.Module, state: State) -> State:
        """Return the output of `block` for `state`: a tuple with extras if `state` is a tuple."""
        if not isinstance(state, tuple):
            return _first_tensor(self._output(block, state, ()))
        hidden, *extras = state
        return tuple(self._output(block, hidden, extras))

    def _output(self, block: nn.Module, hidden: Tensor, extras: Sequence[Any]) -> Any:
        def fill(value: Any) -> Any:
            if isinstance(value, FromPreviousBlock):
                return extras[value.index]
            return value

        call = self._with_each(fill)
        hidden = plus(hidden, self.added)
        if self.positional:
            return block(hidden, *call.args, **call.kwargs)
        return block(hidden_states=hidden, **call.kwargs)

    def handed(self, extras: Extras) -> Call:
        """Return this call with a mark in place of each tensor that is one of `extras`."""
        marks = {}
        for index, value in enumerate(extras):
            if isinstance(value, Tensor):
                marks[id(value)] = FromPreviousBlock(index)
        return self._with_each(lambda value: marks.get(id(value), value))

    @property
    def takes_extras(self) -> bool:
        """True if the block before hands on one of the arguments."""
        values = (*self.args, *self.kwargs.values())
        return any(isinstance(value, FromPreviousBlock) for value in values)

    def _with_each(self, change: Callable[[Any], Any]) -> Call:
        """Return this call with `change` applied to each argument."""
        args = tuple([change(value) for value in self.args])
        kwargs = {key: change(value) for key, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)


def plus(hidden: Tensor, added: Tensor | None) -> Tensor:
    """Return hidden states with what the model adds to them, if there is something."""
    if added is None:
        return hidden
    return hidden + added


def added_before_blocks(recorders: Sequence[Recorder]) -> list[Tensor | None]:
    """Return what the model adds to the hidden states before each block.

    The `recorders` have returned zeros. Qwen3-VL adds features of images before its first blocks.
    """
    added: list[Tensor | None] = [None]
    for recorder in recorders[1:]:
        features = recorder.first_hidden
        added.append(features if bool(features.any()) else None)
    return added


def reuse_equal_tensors(value: Any, like: Any) -> Any:
    """Return `value` with each tensor replaced by the equal tensor in `like`.

    Thus equal masks are kept once for all batches.
    """
    if isinstance(value, Tensor):
        return _equal_tensor(value, like)
    # A block fills an empty container and another reads it: it must stay the same object.
    if _is_empty_container(value) or type(like) is not type(value):
        return value
    if isinstance(value, Call):
        args = reuse_equal_tensors(value.args, like.args)
        return replace(value, args=args, kwargs=reuse_equal_tensors(value.kwargs, like.kwargs))
    if isinstance(value, dict):
        return {key: reuse_equal_tensors(item, like.get(key)) for key, item in value.items()}
    if type(value) in (tuple, list) and len(like) == len(value):
        return type(value)(map(reuse_equal_tensors, value, like))
    return value


def _equal_tensor(tensor: Tensor, like: Any) -> Tensor:
    """Return `like` if it is a tensor equal to `tensor`, else `tensor`."""
    if isinstance(like, Tensor) and tensor.dtype == like.dtype and torch.equal(tensor, like):
        return like
    return tensor


def empty_containers(value: Any) -> list[Container]:
    """Return the empty dicts and lists in `value`, each once.

    Blocks store there the values that later blocks need (keys and values of attention).
    """
    found: dict[int, Container] = {}

    def visit(item: Any) -> None:
        if _is_empty_container(item):
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
    """Return `value` with new empty containers in place of its empty containers.

    `copies` collects the new containers by the id of the container that each replaces.
    """
    if _is_empty_container(value):
        return copies.setdefault(id(value), type(value)())
    change = partial(with_own_containers, copies=copies)
    if isinstance(value, Call):
        return replace(value, args=change(value.args), kwargs=change(value.kwargs))
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(change, value))
    return value


def _is_empty_container(value: Any) -> bool:
    return isinstance(value, MutableMapping | MutableSequence) and not value


def check_chain(
    run: Run,
    names: Sequence[str],
    extras: Extras | None,
    added: Sequence[Tensor | None] | None = None,
) -> bool:
    """Return whether the blocks `names` hand on more than hidden states.

    `run` takes the output of each block (None: the block's input) and runs the model's forward.
    `extras` are the values that the first block returned beside hidden states, as an example for
    all blocks. A block may take extras of the block before it unchanged. `added` is what the model
    adds to the hidden states before each block, None if it adds nothing.

    Raise InputError E_ARCH if the blocks are not a chain. One case is not detected: a block that
    hides a result in a module or in an object for a later block. Containers that all blocks are
    given to fill (shared keys and values) are handed on, and thus work.
    """
    plain, _ = run([None] * len(names))
    _check_called_once(plain, names)
    entered = [recorder.first_hidden for recorder in plain]
    generator = torch.Generator().manual_seed(0)
    # Extras are copied for each block: the identity of a tensor tells which block returned it.
    outputs, others = [], []
    for hidden in entered:
        outputs.append(_random_output(hidden, _changed(extras, torch.clone), generator))
    for hidden in entered:
        others.append(_random_output(hidden, _changed(extras, _different), generator))
    first, end = run(outputs)
    handed_on = any(recorder.first_call.takes_extras for recorder in first)
    # The last output is equal in both runs: what follows the blocks may depend on it.
    if handed_on:
        others[-1] = outputs[-1]
    else:
        others[-1] = _with_hidden_of(outputs[-1], others[-1])
    second, other_end = run(others)
    _check_inputs(first, outputs, names, added or [None] * len(names))
    _check_equal_calls(first, second, names)
    if not same(_first_tensor(end), _first_tensor(other_end)):
        raise InputError(
            "E_ARCH", f"the model behind `{names[-1]}` depends on outputs of the blocks before it"
        )
    return handed_on


def _random_output(hidden: Tensor, extras: Extras | None, generator: torch.Generator) -> State:
    """Return random hidden states of the shape of `hidden`, with `extras` if there are any."""
    random = torch.randn(hidden.shape, generator=generator).to(hidden)
    if extras is None:
        return random
    return (random, *extras)


def _check_called_once(recorders: Sequence[Recorder], names: Sequence[str]) -> None:
    for recorder, name in zip(recorders, names, strict=True):
        times = len(recorder.seen)
        if times != 1:
            message = f"the model's forward calls `{name}` {times} times, not once"
            raise InputError("E_ARCH", message)


def _check_inputs(
    recorders: Sequence[Recorder],
    outputs: Sequence[State],
    names: Sequence[str],
    added: Sequence[Tensor | None],
) -> None:
    """Raise InputError E_ARCH if the input of a block is not the output of the block before."""
    for before, after in enumerate(range(1, len(names))):
        expected = plus(_first_tensor(outputs[before]), added[after])
        if not torch.equal(recorders[after].first_hidden, expected):
            message = f"the input of `{names[after]}` is not the output of `{names[before]}`"
            raise InputError("E_ARCH", message)


def _check_equal_calls(
    recorders: Sequence[Recorder], others: Sequence[Recorder], names: Sequence[str]
) -> None:
    """Raise InputError E_ARCH if other arguments of a block differ between two runs."""
    for recorder, other, name in zip(recorders, others, names, strict=True):
        call, other_call = recorder.first_call, other.first_call
        if not same((call.args, call.kwargs), (other_call.args, other_call.kwargs)):
            raise InputError(
                "E_ARCH",
                f"`{name}` is called with results of blocks that are not handed on unchanged",
            )


def same(value: Any, other: Any) -> bool:
    """Return whether two arguments of a block are equal.

    Tensors and the containers around them are compared; of other values only the types.
    """
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and torch.equal(value.nan_to_num(), other.nan_to_num())
    if type(other) is not type(value):
        return False
    if isinstance(value, FromPreviousBlock):
        return bool(value.index == other.index)
    if isinstance(value, dict):
        return _same_items(value, other)
    if isinstance(value, tuple | list):
        return len(other) == len(value) and all(map(same, value, other))
    return True


def _same_items(value: dict[Any, Any], other: dict[Any, Any]) -> bool:
    if value.keys() != other.keys():
        return False
    return all(same(item, other[key]) for key, item in value.items())


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `change` applied to each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple([_changed(item, change) for item in value])
    return value


def _different(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor + 1
    return tensor.flip(-1)


def _with_hidden_of(state: State, other: State) -> State:
    """Return `other` with the hidden states of `state`."""
    if isinstance(state, tuple) and isinstance(other, tuple):
        return (state[0], *other[1:])
    return state


def _first_tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
