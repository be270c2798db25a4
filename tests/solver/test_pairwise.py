"""Floats added in the order of one tree, however the summands are handed out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_cli.solver.hessian import (
    HessianAccumulator,
    HessianOfBatches,
    Node,
    kept_apart,
    push,
    total,
)
from tests.solver.samples import correlated_inputs


def add(left: Tensor, right: Tensor) -> None:
    left += right


def summands(n: int) -> list[Tensor]:
    return list(
        torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).mul(
            10 ** torch.linspace(-4, 4, 5)
        )
    )


def slow(values: list[Tensor]) -> Tensor:
    """By recursion: the largest power of two of summands, and then the rest."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return slow(values[:half]) + slow(values[half:])


@given(n=st.integers(1, 40), cuts=st.sets(st.integers(1, 39), max_size=6))
def test_sum_has_the_same_bits_for_any_split_of_summands(n: int, cuts: set[int]) -> None:
    values = summands(n)
    together: list[Node[Tensor]] = []
    for start, stop in pairwise(sorted({0, n, *(cut for cut in cuts if cut < n)})):
        own: list[Node[Tensor]] = []
        for number in range(start, stop):
            push(own, Node(number, number + 1, values[number].clone()), add)
        assert [range(node.start, node.stop) for node in own] == kept_apart(range(start, stop))
        for node in own:
            push(together, node, add)
    assert len(together) == n.bit_count()
    assert torch.equal(total(together, add), slow(values))
    assert together == []


@pytest.mark.parametrize("n_batches", [1, 2, 7, 8])
def test_hessian_of_batches_equals_that_of_all_tokens(n_batches: int) -> None:
    inputs = correlated_inputs(40 * n_batches, 150)
    batches = HessianOfBatches(150, "cpu")
    for batch, tokens in enumerate(inputs.split(40)):
        batches.add(batch, tokens[:10], 2 * tokens[:10])
        batches.add(batch, tokens[10:], 2 * tokens[10:])
    nodes = batches.nodes()
    assert len(nodes) == n_batches.bit_count()
    found = total(nodes, HessianAccumulator.absorb)
    assert found.tokens == 40 * n_batches
    torch.testing.assert_close(found.hessian, inputs.T @ inputs, rtol=1e-12, atol=1e-9)
    assert torch.equal(found.hessian, found.hessian.T)
    first_half = torch.arange(len(inputs)) % 40 < 5
    first_half |= (torch.arange(len(inputs)) % 40 >= 10) & (torch.arange(len(inputs)) % 40 < 25)
    for shift, mine in zip(found.shifts, (inputs[first_half], inputs[~first_half]), strict=True):
        torch.testing.assert_close(shift, mine.T @ mine, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("windows", "first"), [(1, [0, 2]), (2, [0, 2, 4]), (3, [0, 1, 3, 6, 7])])
def test_windows_of_a_batch_belong_to_two_halves(windows: int, first: list[int]) -> None:
    inputs = correlated_inputs(3 * windows * 20, 150).view(3, windows, 20, 150)
    batches = HessianOfBatches(150, "cpu")
    for number, batch in enumerate(inputs):
        batches.add(number, batch, 3 * batch, batch[..., :30], 5 * batch[..., :30])
    found = total(batches.nodes(), HessianAccumulator.absorb)
    belongs = torch.zeros(3 * windows, dtype=torch.bool)
    belongs[first] = True
    apart = inputs.flatten(0, 1)
    for shift, mine in zip(found.shifts, (apart[belongs], apart[~belongs]), strict=True):
        rows = mine.flatten(0, 1)
        torch.testing.assert_close(shift, 2 * rows.T @ rows, rtol=1e-12, atol=1e-9)
    for drift, mine in zip(found.drifts, (apart[belongs], apart[~belongs]), strict=True):
        rows = mine.flatten(0, 1)
        torch.testing.assert_close(drift, 4 * rows[:, :30].T @ rows, rtol=1e-12, atol=1e-9)
