"""What goes from block to block: a state for each batch, on the device if they fit there easily, else on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_cli.models.block_calls import State
from gptq_cli.planning.estimate import DEVICE_SHARE
from gptq_cli.runtime.memory import Memory


class HiddenStates:
    """A list of states, each tensors of one batch, that are handed out on the device, wherever they are kept.

    Of `n_all` batches these are the ones from number `first` on; all of them if nothing is said.
    """

    def __init__(
        self, states: Iterable[State], memory: Memory, first: int = 0, n_all: int | None = None
    ) -> None:
        self._states = list(states)
        self.first, self.n_all = first, len(self._states) if n_all is None else n_all
        self._memory, self._device = memory, memory.device
        if self._device.type == "cuda" and (
            memory.spared or self.nbytes * DEVICE_SHARE > memory.free() + self.nbytes
        ):
            self._states = [
                _each(state, lambda tensor: _pinned(tensor.cpu())) for state in self._states
            ]

    def copy(self) -> HiddenStates:
        """The same states, to go another way from here."""
        other = HiddenStates((), self._memory, self.first, self.n_all)
        other._states = [_each(state, self._copied) for state in self._states]
        return other

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tree_leaves(self._states) if tensor is not None)

    @property
    def stored(self) -> tuple[State, ...]:
        """The states where they are kept."""
        return tuple(self._states)

    def restore(self, states: Iterable[State]) -> None:
        """Put other `states` of as many batches in place of these, kept where these were."""
        self._states = [
            _moved(state, _hidden(kept).device)
            for state, kept in zip(states, self._states, strict=True)
        ]
        if self._device.type == "cuda":
            self._states = [_each(state, _pinned) for state in self._states]

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, batch: int) -> State:
        return _each(self._states[batch], lambda tensor: tensor.to(self._device, non_blocking=True))

    def __setitem__(self, batch: int, state: State) -> None:
        kept = _hidden(self._states[batch])
        if kept.device == _hidden(state).device:
            self._states[batch] = state
        elif isinstance(state, tuple):
            self._states[batch] = (kept.copy_(state[0]), *_moved(state[1:], kept.device))
        else:
            self._states[batch] = kept.copy_(state)

    def __iter__(self) -> Iterator[State]:
        return (self[batch] for batch in range(len(self)))

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device:
            return tensor
        return torch.empty_like(tensor, pin_memory=True).copy_(
            tensor
        )  # on the host, and written into: see __setitem__


def _pinned(tensor: Tensor) -> Tensor:
    """`tensor` where copies to a device go on by themselves, if it is on the host."""
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def _hidden(state: State) -> Tensor:
    hidden: Tensor = state[0] if isinstance(state, tuple) else state
    return hidden


def _moved(state: State, device: torch.device) -> State:
    return _each(state, lambda tensor: tensor.to(device))


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    changed: State = tree_map_only(Tensor, change, state)
    return changed
