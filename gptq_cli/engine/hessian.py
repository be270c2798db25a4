"""The Hessian of a layer's output error, H = Σ x xᵀ over all calibration tokens x, accumulated batch by batch.

GPTQ does not change when H is scaled, so it stays a plain sum. H is symmetric: only the blocks on and above the
diagonal are multiplied out, a little over half of the work, and mirrored when H is asked for.

With the inputs x₀ that the unquantized model has in their place, the shift C = Σ (x₀ - x) xᵀ is summed beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TOKENS_PER_CHUNK = 8192  # bounds the float32 copy of the inputs
PANELS = 8  # 9/16 of the products of a full multiplication
SMALLEST_PANEL = 128


class HessianAccumulator:
    """Sums x xᵀ over the inputs of one or more linear layers that see the same tensor.

    The sum is float32, or float64 once float64 inputs were added. `tokens` counts the rows added so far; `shift` [I, I]
    is Σ (x₀ - x) xᵀ over those that came with their original x₀, None if none did.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.tokens = 0
        self.shift: Tensor | None = None
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._finite: list[Tensor] = []

    @torch.no_grad()
    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """Add inputs [..., I]; every leading dimension counts tokens, so padding must have been removed.

        `original` [..., I] are the same tokens in the unquantized model.
        """
        tokens = inputs.reshape(-1, self._sum.shape[0])
        if tokens.dtype == torch.float64:
            self._sum = self._sum.double()
        for chunk in torch.split(tokens, TOKENS_PER_CHUNK):
            self._add_chunk(chunk)
        if original is not None:
            self._add_shift(tokens, original.reshape(tokens.shape))
        self.tokens += tokens.shape[0]
        self._finite.append(torch.isfinite(self._sum.diagonal()).all())

    @property
    def in_features(self) -> int:
        """The size I of the sum."""
        return self._sum.shape[0]

    def add_nothing_known(self) -> None:
        """Add the identity, without tokens: as if all inputs were alike, so that solving is rounding to nearest."""
        self._sum.diagonal().add_(1)

    @property
    def hessian(self) -> Tensor:
        """The symmetric sum [I, I] over all tokens so far: the accumulator's own tensor, not a copy."""
        for start, stop in self._panels():
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
        return self._sum

    def first_not_finite(self) -> tuple[int, int] | None:
        """Which `add`, counted from 0, of how many, first brought an input that is not finite or overflowed the sum.

        None if all is finite; waits for the device once. The diagonal tells: an input that is not finite leaves its
        mark on the sum of its own squares.
        """
        finite = torch.stack(self._finite).tolist() if self._finite else []
        return (finite.index(False), len(finite)) if False in finite else None

    def _add_chunk(self, tokens: Tensor) -> None:
        # Products of two 16-bit floats are exact in float32: tensor cores lose nothing and need no float32 copy.
        on_tensor_cores = tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16)
        if not on_tensor_cores:
            tokens = tokens.to(self._sum.dtype)
        for start, stop in self._panels():
            panel, left, right = self._sum[:stop, start:stop], tokens[:, :stop].T, tokens[:, start:stop]
            if on_tensor_cores:
                panel += torch.mm(left, right, out_dtype=torch.float32)
            else:
                panel.addmm_(left, right)

    def _add_shift(self, tokens: Tensor, original: Tensor) -> None:
        if self.shift is None:
            self.shift = torch.zeros_like(self._sum)
        for chunk, before in zip(tokens.split(TOKENS_PER_CHUNK), original.split(TOKENS_PER_CHUNK), strict=True):
            inputs = chunk.to(self.shift.dtype)
            self.shift.addmm_((before.to(self.shift.dtype) - inputs).T, inputs)

    def _panels(self) -> Iterator[tuple[int, int]]:
        size = self._sum.shape[0]
        width = max(SMALLEST_PANEL, -(-size // PANELS))
        for start in range(0, size, width):
            yield start, min(start + width, size)
