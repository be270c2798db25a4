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
    assert found.shift is not None
    torch.testing.assert_close(found.shift, inputs.T @ inputs, rtol=1e-12, atol=1e-9)
    assert torch.equal(found.hessian, found.hessian.T)
