"""Hidden states between two blocks: one tensor a batch, on the device if they fit there easily, else on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gptq_cli.pipeline.memory import Memory

DEVICE_SHARE = 4  # hidden states may fill a quarter of the free memory of an accelerator


class HiddenStates:
    """A list of tensors [batch, seqlen, features] that are handed out on the device, wherever they are kept.

    Of `n_all` batches these are the ones from number `first` on; all of them if nothing is said.
    """

    def __init__(self, states: Iterable[Tensor], memory: Memory, first: int = 0, n_all: int | None = None) -> None:
        self._states = list(states)
        self.first, self.n_all = first, len(self._states) if n_all is None else n_all
        self._memory, self._device = memory, memory.device
        if self._device.type == "cuda" and self.nbytes * DEVICE_SHARE > memory.free() + self.nbytes:
            self._states = [state.cpu().pin_memory() for state in self._states]

    def copy(self) -> HiddenStates:
        """The same states, to go another way from here."""
        other = HiddenStates((), self._memory, self.first, self.n_all)
        for state in self._states:
            kept = state.device != self._device  # on the host, and written into: see __setitem__
            other._states.append(torch.empty_like(state, pin_memory=True).copy_(state) if kept else state)
        return other

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._states)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors where they are kept."""
        return tuple(self._states)

    def restore(self, states: Iterable[Tensor]) -> None:
        """Put other `states` of as many batches in place of these, kept where these were."""
        self._states = [state.to(kept.device) for state, kept in zip(states, self._states, strict=True)]

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, batch: int) -> Tensor:
        return self._states[batch].to(self._device, non_blocking=True)

    def __setitem__(self, batch: int, state: Tensor) -> None:
        kept = self._states[batch]
        self._states[batch] = state if kept.device == state.device else kept.copy_(state)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))
