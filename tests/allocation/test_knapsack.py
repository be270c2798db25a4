"""The knapsack finds the best choice for every budget: compared with trying all choices."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import product

import pytest

from gptq_cli.allocation.knapsack import Knapsack, Option, Options


def problem(seed: int) -> Options:
    """Return five units of several sizes, each with three options that cost more and harm less."""
    chance = random.Random(seed)
    units = []
    for _ in range(5):
        size = chance.randint(1, 20)
        harms = sorted((chance.random() for _ in range(3)), reverse=True)
        units.append([Option(size * 3 * width, harms[width - 2]) for width in (2, 3, 4)])
    return units


def choices(options: Options) -> Iterator[tuple[int, float]]:
    """Yield cost and harm of every choice."""
    for chosen in product(*options):
        yield sum(option.cost for option in chosen), math.fsum(option.harm for option in chosen)


@pytest.mark.parametrize("seed", range(10))
def test_every_budget_gets_the_choice_of_least_harm(seed: int) -> None:
    options = problem(seed)
    solved = Knapsack(options)
    for budget in range(solved.least - 7, solved.most + 7, 11):
        possible = [harm for cost, harm in choices(options) if cost <= budget]
        found = solved.within(budget)
        if not possible:
            assert found is None
            continue
        assert found is not None
        assert found.cost <= budget
        assert found.harm == found.bound == pytest.approx(min(possible))


@pytest.mark.parametrize("seed", range(5))
def test_coarse_cells_keep_the_budget_and_bound_the_gap(seed: int) -> None:
    options = problem(seed)
    solved = Knapsack(options, most_cells=9)
    for budget in range(solved.least, solved.most, 13):
        best = min(harm for cost, harm in choices(options) if cost <= budget)
        found = solved.within(budget)
        assert found is not None
        assert found.cost <= budget
        assert found.bound <= best + 1e-9 <= found.harm + 2e-9


@pytest.mark.parametrize("seed", range(5))
def test_a_limit_of_harm_gets_the_cheapest_choice_below_it(seed: int) -> None:
    options = problem(seed)
    solved = Knapsack(options)
    for limit in (0.5, 1.0, 2.0, 3.0):
        possible = [cost for cost, harm in choices(options) if harm < limit]
        found = solved.below(limit)
        if found is None:
            assert not possible
            continue
        assert found.harm < limit
        assert found.cost == min(possible)
