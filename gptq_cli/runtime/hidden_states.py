"""Hidden states between two blocks: one state for each batch of calibration windows.

They lie on the device if they take little of its memory, else on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_cli.models.block_calls import State
from gptq_cli.planning.estimate import DEVICE_SHARE
from gptq_cli.runtime.memory import Memory


class HiddenStates:
    """A list of states, each with the tensors of one batch; an item is given on the device.

    Of `n_all` batches these are the ones from number `first` on; by default they are all batches.
    """

    def __init__(
        self, states: Iterable[State], memory: Memory, first: int = 0, n_all: int | None = None
    ) -> None:
        self._states = list(states)
        self._memory, self._device = memory, memory.device
        if n_all is None:
            n_all = len(self._states)
        self.first, self.n_all = first, n_all
        if self._device.type == "cuda" and not self._may_stay_on_device():
            self._change(lambda tensor: _pinned(tensor.cpu()))

    def _may_stay_on_device(self) -> bool:
        if self._memory.states_on_host:
            return False
        nbytes = self.nbytes
        return nbytes * DEVICE_SHARE <= self._memory.free() + nbytes

    def copy(self) -> HiddenStates:
        """Return the same states for a second stream, which replaces them independently."""
        other = HiddenStates((), self._memory, self.first, self.n_all)
        other._states = list(self._states)
        other._change(self._copied)
        return other

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tree_leaves(self._states) if tensor is not None)

    @property
    def stored(self) -> tuple[State, ...]:
        """The states where they lie, on the device or the host."""
        return tuple(self._states)

    def restore(self, states: Iterable[State]) -> None:
        """Replace all states; each new one lies where the old one was."""
        for batch, (state, old) in enumerate(zip(states, self._states, strict=True)):
            self._states[batch] = _moved(state, _hidden(old).device)
        if self._device.type == "cuda":
            self._change(_pinned)

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
        for batch in range(len(self)):
            yield self[batch]

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for batch, state in enumerate(self._states):
            self._states[batch] = _each(state, change)

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device:
            return tensor
        # `__setitem__` writes into tensors on the host, so each stream needs its own.
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)


def _pinned(tensor: Tensor) -> Tensor:
    """Return a tensor of the host in memory from which copies to a device need no waiting."""
    if tensor.device.type == "cpu":
        return tensor.pin_memory()
    return tensor


def _hidden(state: State) -> Tensor:
    """Return the hidden states of a state, which may have other tensors beside them."""
    if isinstance(state, tuple):
        hidden: Tensor = state[0]
        return hidden
    return state


def _moved(state: State, device: torch.device) -> State:
    return _each(state, lambda tensor: tensor.to(device))


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    changed: State = tree_map_only(Tensor, change, state)
    return changed
