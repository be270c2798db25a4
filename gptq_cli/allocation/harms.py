"""What was measured, and the harm of each unit at each width that follows from it. Needs no torch.

The harm of a unit is the KL that it adds to the predictions of the model, in nats a token. It is
measured at one width, the reference. At other widths it is in proportion to the square of the step
of the grid, 1 / (2**width - 1): docs/decisions has the figures. All harms are scaled so that their
sum at the reference is the KL of the model with all units rounded, which is measured, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gptq_cli.allocation.units import Unit

REFERENCE = 3  # bits: not so few that errors are no longer small, nor so many that they get lost
Harms = dict[int, float]  # of one unit, by width


@dataclass(slots=True)
class Measurement:
    """The KL of the model, in nats a token, if one unit is rounded at the reference width.

    `uniform` is the KL if all units are. The mean is over `tokens` of the probe.
    """

    kl: dict[str, float] = field(default_factory=dict)
    uniform: float = 0.0
    tokens: int = 0


def reference_width(widths: Sequence[int]) -> int:
    """Return which of `widths` is measured: the one nearest to REFERENCE."""
    return min(widths, key=lambda width: abs(width - REFERENCE))


def harms_of(units: Sequence[Unit], measured: Measurement, reference: int) -> list[Harms]:
    """Return the harm of each unit at each width that it may get."""
    total = sum(measured.kl.values())
    factor = measured.uniform / total if total else 1.0
    found = []
    for unit in units:
        harms: Harms = {}
        for width in unit.widths:
            ratio = (_step(width) / _step(reference)) ** 2
            if unit.ruled:  # it was measured at its only width
                ratio = 1.0
            harms[width] = factor * measured.kl[unit.name] * ratio
        found.append(harms)
    return found


def _step(width: int) -> float:
    """Return the distance of two levels of a grid of this width, as a share of its range."""
    return 1 / float(2**width - 1)
