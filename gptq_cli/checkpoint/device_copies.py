"""Copies of finished tensors from a CUDA device to the host, beside the work of the device."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceCopies:
    """Copies the bytes of tensors through pinned memory, on a stream of its own.

    The device does its other work meanwhile. One thread makes the tensors and calls
    `finished`; another one calls `to_host`, for one tensor after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def finished(tensor: Tensor) -> torch.cuda.Event:
        """Return the moment at which the device has done all that was asked of it so far.

        A tensor that was just made is complete then.
        """
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        return event

    @torch.inference_mode()
    def to_host(self, tensor: Tensor, finished: torch.cuda.Event) -> Tensor:
        """Return the bytes of a tensor, uint8 [n], once it is `finished` on the device.

        The next call overwrites them. The caller holds the tensor until this call returns, so
        nothing else gets its memory before the copy is complete.
        """
        if self._pinned.numel() < tensor.nbytes:
            self._pinned = _pinned(tensor.nbytes)
        copied = self._pinned[: tensor.nbytes]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(finished)
            copied.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)
        self._stream.synchronize()
        return copied


def _pinned(n_bytes: int) -> Tensor:
    """Return uint8 [n_bytes] in pinned memory, or in other memory if the system pins no more."""
    memory = torch.empty(n_bytes, dtype=torch.uint8)
    try:
        return memory.pin_memory()
    except RuntimeError:
        return memory
