"""The knapsack problem of bit allocation: one option for each unit, least harm within a budget.

Each unit has options with a cost (bytes, or bits) and a harm. A dynamic programme over all costs
finds the choice with the least sum of harms for every budget at once. Costs are counted in cells of
their greatest common divisor; then the result is exact. If that makes too many cells, larger ones
are used, and each cost is rounded up to whole cells: the budget still holds, and `bound` tells how
far the result may be from the best one. Needs no torch.

The bound is that of the Lagrangian: for any price p ≥ 0 of a unit of cost, the sum over units of
their least  harm + p cost,  less p times the budget, is at most the harm of the best choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_CELLS = 2**18


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a unit."""

    cost: int
    harm: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The number of the option of each unit, the sums, and a bound: no choice has less harm."""

    picks: tuple[int, ...]
    cost: int
    harm: float
    bound: float


Options = Sequence[Sequence[Option]]


class Knapsack:
    """All choices of least harm, one for each budget."""

    def __init__(self, options: Options, most_cells: int = MOST_CELLS) -> None:
        """Solve for every budget; each unit has one option or more."""
        self._options = options
        self.least = self.most = 0
        for of_unit in options:
            costs = [option.cost for option in of_unit]
            self.least += min(costs)
            self.most += max(costs)
        divisor = self._divisor()
        self._cell = max(divisor, -(-(self.most - self.least) // most_cells), 1)
        self._exact = self._cell == divisor
        n_cells = 1
        self._harm = np.zeros(1)  # least harm with a cost of exactly this many cells above `least`
        self._picks: list[np.ndarray] = []
        for of_unit in options:
            steps = self._steps(of_unit)
            n_after = n_cells + max(steps)
            harm = np.full(n_after, np.inf)
            pick = np.zeros(n_after, dtype=np.uint8)
            for number, (step, option) in enumerate(zip(steps, of_unit, strict=True)):
                part = slice(step, step + n_cells)
                tried = self._harm + option.harm
                better = tried < harm[part]
                harm[part][better] = tried[better]
                pick[part][better] = number
            self._harm, n_cells = harm, n_after
            self._picks.append(pick)
        self._best = _running_best(self._harm)

    def _divisor(self) -> int:
        """Return the greatest common divisor of the steps from option to option."""
        divisor = 0
        for of_unit in self._options:
            least = min(option.cost for option in of_unit)
            for option in of_unit:
                divisor = math.gcd(divisor, option.cost - least)
        return max(divisor, 1)

    def _steps(self, of_unit: Sequence[Option]) -> list[int]:
        """Return the cells that each option costs above the cheapest one, rounded up."""
        least = min(option.cost for option in of_unit)
        return [-(-(option.cost - least) // self._cell) for option in of_unit]

    def within(self, budget: int) -> Choice | None:
        """Return the choice of least harm that costs at most `budget`; None if there is none."""
        if budget < self.least:
            return None
        cells = min((budget - self.least) // self._cell, len(self._best) - 1)
        return self._choice(int(self._best[cells]), budget)

    def below(self, harm: float) -> Choice | None:
        """Return the cheapest choice with less than this harm; None if there is none."""
        enough = np.nonzero(self._harm < harm)[0]
        if not len(enough):
            return None
        cell = int(enough[0])
        return self._choice(cell, self.least + cell * self._cell)

    def _choice(self, cell: int, budget: int) -> Choice:
        picks = []
        for of_unit, pick in zip(reversed(self._options), reversed(self._picks), strict=True):
            number = int(pick[cell])
            picks.append(number)
            cell -= self._steps(of_unit)[number]
        picks.reverse()
        if not self._exact:
            picks = _filled(self._options, picks, budget)
        chosen = [of_unit[number] for of_unit, number in zip(self._options, picks, strict=True)]
        cost = sum(option.cost for option in chosen)
        harm = math.fsum(option.harm for option in chosen)
        bound = harm
        if not self._exact:
            bound = lower_bound(self._options, budget)
        return Choice(tuple(picks), cost, harm, bound)


def _running_best(harm: np.ndarray) -> np.ndarray:
    """Return for each cell the cell of the least harm up to it."""
    best = np.minimum.accumulate(harm)
    is_new = np.concatenate(([True], best[1:] < best[:-1]))
    return np.maximum.accumulate(np.where(is_new, np.arange(len(harm)), 0))


def _filled(options: Options, picks: list[int], budget: int) -> list[int]:
    """Spend what rounding has left of the budget: the options that save most harm come first."""
    picks = list(picks)
    left = budget
    for of_unit, number in zip(options, picks, strict=True):
        left -= of_unit[number].cost
    while True:
        found = None
        most = 0.0
        for unit, of_unit in enumerate(options):
            now = of_unit[picks[unit]]
            for number, option in enumerate(of_unit):
                saved = now.harm - option.harm
                if option.cost - now.cost <= left and saved > most:
                    most, found = saved, (unit, number)
        if found is None:
            return picks
        unit, number = found
        left += options[unit][picks[unit]].cost - options[unit][number].cost
        picks[unit] = number


def lower_bound(options: Options, budget: int) -> float:
    """Return the Lagrangian bound of the least harm within `budget`, for the best price."""
    low, high = 0.0, 1.0
    while _cost_at(options, high) > budget and high < 1e18:
        high *= 2
    for _ in range(100):
        price = (low + high) / 2
        if _cost_at(options, price) > budget:
            low = price
        else:
            high = price
    return max(_bound_at(options, price, budget) for price in (low, high))


def _cost_at(options: Options, price: float) -> int:
    """Return the cost of the choice that is best at `price`."""
    cost = 0
    for of_unit in options:
        best = min(of_unit, key=lambda option: (option.harm + price * option.cost, option.cost))
        cost += best.cost
    return cost


def _bound_at(options: Options, price: float, budget: int) -> float:
    least = []
    for of_unit in options:
        least.append(min(option.harm + price * option.cost for option in of_unit))
    return math.fsum(least) - price * budget
