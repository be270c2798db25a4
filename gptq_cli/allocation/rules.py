"""Write the widths of units as `dynamic` rules that a person can read and edit. Needs no torch."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from gptq_cli.allocation.goals import at_width
from gptq_cli.allocation.units import Unit
from gptq_cli.config.layer import CHANGE, DOT, NUMBER, list_item
from gptq_cli.config.schema import QuantizeConfig

Place = tuple[str, str]  # patterns of the list of blocks, and of the layers inside a block


def with_widths(
    config: QuantizeConfig, units: Sequence[Unit], widths: Sequence[int]
) -> QuantizeConfig:
    """Return `config` with rules that give each of `units` its width, and without a goal.

    The width of most weights is the default and needs no rule. Each other width has one rule for
    the same units of all blocks. Rules that the user wrote come first, since the first match
    decides.
    """
    weights: Counter[int] = Counter()
    blocks: dict[tuple[int, Place], list[str]] = defaultdict(list)
    for unit, width in zip(units, widths, strict=True):
        if unit.ruled:
            continue
        weights[width] += unit.n_weights
        place, number = _place(unit)
        blocks[width, place].append(number)
    default = weights.most_common(1)[0][0]
    rules: dict[str, Mapping[str, int]] = {}
    for (width, place), numbers in sorted(blocks.items()):
        if width != default:
            rules[_rule(place, numbers)] = {"bits": width}
    changed = at_width(config, default)
    return changed.model_copy(update={"dynamic": {**config.dynamic, **rules}})


def _place(unit: Unit) -> tuple[Place, str]:
    """Return the patterns of a unit, and the number of its block ("" outside of blocks)."""
    leaves = set()
    parents = set()
    list_name = number = ""
    for layer in unit.layers:
        item = list_item(layer)
        inner = layer
        if item is not None:
            list_name, number, inner = item
        parent, _, leaf = inner.rpartition(".")
        leaves.add(re.escape(leaf))
        parents.add(_pattern(parent))
    words = [_any_of(sorted(parents)), _any_of(sorted(leaves))]
    inside = DOT.join(word for word in words if word)
    return (_pattern(list_name), inside), number


def _pattern(name: str) -> str:
    """Return the pattern of a module name in which a number stands for any number."""
    words = []
    for word in name.split("."):
        words.append(NUMBER if word.isdecimal() else re.escape(word))
    return DOT.join(words)


def _rule(place: Place, numbers: Sequence[str]) -> str:
    list_name, inside = place
    if not list_name:
        return f"{CHANGE}{inside}$"
    return f"{CHANGE}{list_name}{DOT}{_any_of(numbers)}{DOT}{inside}$"


def _any_of(patterns: Iterable[str]) -> str:
    patterns = list(patterns)
    if len(patterns) == 1:
        return patterns[0]
    return f"({'|'.join(patterns)})"
