"""Sums of numbered summands whose bits do not depend on who adds which of them.

Floats are added in the order of one binary tree over the numbers 0, 1, 2 ...: a pair at a time, then pairs of pairs.
Whoever has consecutive summands adds what the tree adds among them and keeps the rest apart; put together in the order
of their numbers, the rests make the tree whole. Of n summands that one process has, log2(n) + 1 at most are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")
Add = Callable[[Value, Value], None]  # adds the second to the first


@dataclass(frozen=True, slots=True)
class Node(Generic[Value]):
    """The sum of the summands start..stop, whose number is a power of two that divides `start`."""

    start: int
    stop: int
    value: Value


def push(nodes: list[Node[Value]], node: Node[Value], add: Add[Value]) -> None:
    """Append `node`, which begins where `nodes` end, and add up whatever the tree adds at once."""
    while nodes and _siblings(nodes[-1], node):
        left = nodes.pop()
        add(left.value, node.value)
        node = Node(left.start, node.stop, left.value)
    nodes.append(node)


def total(nodes: list[Node[Value]], add: Add[Value]) -> Value:
    """The sum of all that was pushed; `nodes` are empty then."""
    value = nodes.pop().value
    while nodes:
        left = nodes.pop().value
        add(left, value)
        value = left
    return value


def kept_apart(numbers: range) -> list[range]:
    """The nodes that are left of the summands `numbers`."""
    nodes: list[Node[None]] = []
    for number in numbers:
        push(nodes, Node(number, number + 1, None), lambda _left, _right: None)
    return [range(node.start, node.stop) for node in nodes]


def _siblings(left: Node[Value], right: Node[Value]) -> bool:
    size = left.stop - left.start
    return right.stop - right.start == size and left.start % (2 * size) == 0
