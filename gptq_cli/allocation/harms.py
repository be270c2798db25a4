"""What was measured, and the harm of each unit at each width that follows from it. Needs no torch.

The harm of a unit is the KL that it adds to the predictions of the model, in nats a token. It is
known at the width whose copy was carried to the end of the model. At other widths it is in
proportion to the change of the hidden states behind the block of the unit. A width that was not
measured changes them in proportion to the square of its step, 1 / (2**width - 1).

The harms of all units at one width are scaled to the KL that the model has if all units have this
width, which is measured, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gptq_cli.allocation.units import Unit

MOST_MEASURED = 4  # bits
Harms = dict[int, float]  # of one unit, by width


@dataclass(slots=True)
class Measurement:
    """What was measured: KL in nats a token, changes as shares of the squared hidden states.

    `kl` has the KL of each unit at the widths whose copies were carried to the end, `change` what a
    unit changes in the output of its block at each measured width. `uniform` is the KL of the model
    with all units at one width.
    """

    kl: dict[str, dict[int, float]] = field(default_factory=dict)
    change: dict[str, dict[int, float]] = field(default_factory=dict)
    uniform: dict[int, float] = field(default_factory=dict)


def measured_widths(widths: Sequence[int]) -> list[int]:
    """Return the widths to measure: 2, 3 and 4, since the harm of more bits follows from these."""
    return [width for width in widths if width <= MOST_MEASURED] or [widths[0]]


def carried_width(widths: Sequence[int]) -> int:
    """Return which of the measured widths is carried to the end: the middle one."""
    return widths[len(widths) // 2]


def harms_of(units: Sequence[Unit], measured: Measurement, widths: Sequence[int]) -> list[Harms]:
    """Return the harm of each unit at each of `widths` that it may get.

    A wider unit never has more harm.
    """
    singles = []
    for unit in units:
        singles.append(_single(unit, measured, widths))
    found: list[Harms] = [{} for _ in units]
    for width in widths:
        factor = _factor(singles, measured, width)
        for unit, of_unit, single in zip(units, found, singles, strict=True):
            if unit.ruled:
                of_unit[unit.widths[0]] = single[width]
            elif width in unit.nbytes:
                of_unit[width] = factor * single[width]
    return [_falling(of_unit) for of_unit in found]


def _single(unit: Unit, measured: Measurement, widths: Sequence[int]) -> Harms:
    """Return the KL of the model if this unit alone has each of `widths`."""
    (carried, kl), *_ = measured.kl[unit.name].items()
    change = measured.change[unit.name]
    found = {}
    for width in widths:
        if unit.ruled:
            found[width] = kl
            continue
        known = _nearest(change, width)
        share = change[known] / change[carried] if change[carried] else 0.0
        found[width] = kl * share * (_step(width) / _step(known)) ** 2
    return found


def _factor(singles: Sequence[Harms], measured: Measurement, width: int) -> float:
    """Return the KL of all units together at `width`, as a multiple of the sum of single ones."""
    known = _nearest(measured.uniform, width)
    total = sum(single[known] for single in singles)
    return measured.uniform[known] / total if total else 1.0


def _nearest(known: Mapping[int, float], width: int) -> int:
    return min(known, key=lambda other: abs(other - width))


def _step(width: int) -> float:
    """Return the distance of two levels of a grid of this width, as a share of its range."""
    return 1 / float(2**width - 1)


def _falling(harms: Harms) -> Harms:
    found = {}
    least = float("inf")
    for width in sorted(harms):
        least = min(least, harms[width])
        found[width] = least
    return found
