"""Choose a width for each unit: for the goal of a run, and for the frontier of all goals.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gptq_cli.allocation.goals import allowed_bits, check_size, has_average, unreachable
from gptq_cli.allocation.harms import REFERENCE, Harms, Measurement, harms_of
from gptq_cli.allocation.knapsack import Choice, Knapsack, Option
from gptq_cli.allocation.units import Unit
from gptq_cli.config.fields import size_in_bytes
from gptq_cli.config.schema import QuantizeConfig

MOST_TRIES = 8  # headers of files change by a few bytes with the sizes in them
FRONTIER_STEP = 0.25  # of average bits

SizeOf = Callable[[Sequence[int]], int]  # widths of all units -> bytes of all safetensors files


@dataclass(frozen=True, slots=True)
class Allocation:
    """The width of each unit, and what the whole model then has.

    `bits` is the average over all quantized weights, without scales; `nbytes` the size of all
    safetensors files; `kl` the expected KL to the original, in nats a token. No other choice has an
    expected KL below `bound`.
    """

    widths: tuple[int, ...]
    bits: float
    nbytes: int
    kl: float
    bound: float


class Allocator:
    """The widths of least harm for any goal."""

    def __init__(self, units: Sequence[Unit], harms: Sequence[Harms], size_of: SizeOf) -> None:
        self._units, self._harms, self._size_of = units, harms, size_of
        self._n_weights = sum(unit.n_weights for unit in units)
        self._by_bits = Knapsack(self._options(lambda unit, width: width * unit.n_weights))
        self._by_bytes = Knapsack(self._options(lambda unit, width: unit.nbytes[width]))

    @property
    def least_bits(self) -> float:
        """The smallest average of bits that the widths of the units make."""
        return self._by_bits.least / self._n_weights

    def solve(self, config: QuantizeConfig) -> Allocation:
        """Return the allocation for the goal of `config`.

        Raises ConfigError E_ALLOC_GOAL if no choice of widths meets it, or if every choice does.
        """
        if has_average(config):
            return self.with_average(config.bits)
        if config.target_size is not None:
            return self._with_size(config.target_size)
        assert config.target_kl is not None
        return self._with_kl(config.target_kl)

    def with_average(self, bits: float) -> Allocation:
        """Return the allocation of least harm with at most `bits` on average.

        Raises ConfigError E_ALLOC_GOAL if the rules and `protect` need more.
        """
        choice = self._by_bits.within(int(bits * self._n_weights))
        if choice is None:
            least = f"smallest average is {self.least_bits:.4g}"
            raise unreachable(f"--bits {bits:g} on average", least)
        return self._allocation(choice)

    def uniform(self, width: int) -> Allocation:
        """Return the allocation of `width` to every unit that may get it, else of the nearest."""
        widths = []
        for unit in self._units:
            widths.append(min(unit.widths, key=lambda other: abs(other - width)))
        return self._of_widths(widths, 0.0)

    def frontier(self) -> Iterator[Allocation]:
        """Yield the allocations of least harm in steps of average bits, smallest first."""
        least, most = self._by_bits.least, self._by_bits.most
        first = -(-least // (self._n_weights * FRONTIER_STEP))
        step = int(first)
        while step * FRONTIER_STEP * self._n_weights <= most:
            yield self.with_average(step * FRONTIER_STEP)
            step += 1

    def _with_size(self, goal: int | str) -> Allocation:
        narrowest = [unit.widths[0] for unit in self._units]
        widest = [unit.widths[-1] for unit in self._units]
        least, most = self._size_of(narrowest), self._size_of(widest)
        check_size(goal, least, most)
        target = size_in_bytes(goal)
        budget = target - (least - self._by_bytes.least)
        for _ in range(MOST_TRIES):
            choice = self._by_bytes.within(budget)
            assert choice is not None
            found = self._allocation(choice)
            if found.nbytes <= target:
                return found
            budget -= found.nbytes - target
        raise AssertionError("the headers of the output do not get smaller")

    def _with_kl(self, target: float) -> Allocation:
        choice = self._by_bytes.below(target)
        if choice is None:
            least = f"smallest expected KL is {self.uniform(8).kl:.3g}"
            raise unreachable(f"--target-kl {target:g}", least)
        return self._allocation(choice)

    def _options(self, cost: Callable[[Unit, int], int]) -> list[list[Option]]:
        options = []
        for unit, harms in zip(self._units, self._harms, strict=True):
            options.append([Option(cost(unit, width), harms[width]) for width in unit.widths])
        return options

    def _allocation(self, choice: Choice) -> Allocation:
        widths = []
        for unit, pick in zip(self._units, choice.picks, strict=True):
            widths.append(unit.widths[pick])
        return self._of_widths(widths, choice.bound)

    def _of_widths(self, widths: Sequence[int], bound: float) -> Allocation:
        bits = kl = 0.0
        for unit, harms, width in zip(self._units, self._harms, widths, strict=True):
            bits += width * unit.n_weights
            kl += harms[width]
        return Allocation(tuple(widths), bits / self._n_weights, self._size_of(widths), kl, bound)


def unmeasured(units: Sequence[Unit], goal: QuantizeConfig, size_of: SizeOf) -> Allocation:
    """Return the allocation for `goal` if each weight did as much harm as any other.

    It is an example of the size that a run will have: only a measurement tells the harms. A KL
    says nothing about the size, so the example for `target_kl` has the mean of the widths. Raises
    ConfigError E_ALLOC_GOAL if no choice of widths meets the goal, whatever the harms are.
    """
    even = Measurement({unit.name: float(unit.n_weights) for unit in units})
    even.uniform = sum(even.kl.values())
    allocator = Allocator(units, harms_of(units, even, REFERENCE), size_of)
    if goal.target_kl is None:
        return allocator.solve(goal)
    widths = allowed_bits(goal)
    return allocator.with_average(max((widths[0] + widths[-1]) / 2, allocator.least_bits))
