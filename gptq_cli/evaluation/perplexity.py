"""Perplexity and divergence from logits, in float32 whatever the model's dtype.

Perplexity is the one of the GPTQ paper's evaluation (Frantar et al. 2022, section 4): exp of the mean over windows of
the mean cross-entropy of a window's tokens 1 .. seqlen - 1, each given all tokens before it in the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

POSITIONS = 256  # converted to float32 at a time: a vocabulary of 256k makes that 256 MB


@dataclass(slots=True)
class Perplexity:
    """Collects windows; `value` is their perplexity."""

    losses: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, ids: Tensor) -> None:
        """One window: logits [seqlen, V] and the token ids [seqlen] they were computed from."""
        chunks = zip(logits[:-1].split(POSITIONS), ids[1:].split(POSITIONS), strict=True)
        total = sum(float(functional.cross_entropy(row.float(), target, reduction="sum")) for row, target in chunks)
        self.losses.append(total / (len(ids) - 1))

    @property
    def value(self) -> float:
        """Infinite when a loss is too large for a float, not a number when one is not."""
        return _exp(sum(self.losses) / len(self.losses))

    @property
    def of_windows(self) -> list[float]:
        """The perplexity of each window alone."""
        return [_exp(loss) for loss in self.losses]


def _exp(loss: float) -> float:
    return math.exp(loss) if not loss > 700 else math.inf


@dataclass(slots=True)
class Divergence:
    """How far a model's predictions are from a baseline's, over the same positions as the perplexity.

    Of each window: the sum of KL(baseline || model) in nats, positions where both rank the same token first, and all.
    """

    sums: list[float] = field(default_factory=list)
    agreements: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, baseline: Tensor, logits: Tensor) -> None:
        """One window: both models' logits [seqlen, V]."""
        total, same = 0.0, 0
        for wanted, got in zip(baseline[:-1].split(POSITIONS), logits[:-1].split(POSITIONS), strict=True):
            log_p, log_q = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((wanted.argmax(-1) == got.argmax(-1)).sum())
        self.sums.append(total)
        self.agreements.append(same)
        self.positions.append(len(logits) - 1)

    @property
    def kl(self) -> float:
        """Mean KL(baseline || model) per predicted token, in nats."""
        return sum(self.sums) / sum(self.positions)

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both models rank the same token first."""
        return sum(self.agreements) / sum(self.positions)
