from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import column_order
from tests.solver.samples import ORDERS, layer_config

DIAGONAL = torch.tensor([3.0, 9.0, 5.0, 7.0, 7.0, 1.0])


def test_natural_order_keeps_columns_and_groups() -> None:
    order = column_order(DIAGONAL, layer_config("natural", group_size=2))
    assert order.permutation.tolist() == [0, 1, 2, 3, 4, 5]
    assert order.group_of_column.tolist() == [0, 0, 1, 1, 2, 2]
    assert not order.static_grid


def test_desc_act_sorts_all_columns_and_groups_follow() -> None:
    order = column_order(DIAGONAL, layer_config("desc_act", group_size=2))
    assert order.permutation.tolist() == [1, 3, 4, 2, 0, 5]
    assert order.group_of_column.tolist() == [2, 0, 1, 0, 1, 2]
    assert not order.static_grid


def test_group_aware_order_sorts_groups_and_columns_within() -> None:
    order = column_order(DIAGONAL, layer_config("group aware", group_size=2))
    assert order.permutation.tolist() == [1, 0, 3, 2, 4, 5]
    assert order.group_of_column.tolist() == [0, 0, 1, 1, 2, 2]
    assert not order.static_grid


@pytest.mark.parametrize("order", ["static group aware", "static desc_act"])
def test_static_groups_keep_trivial_groups_in_activation_order(order: str) -> None:
    found = column_order(DIAGONAL, layer_config(order, group_size=2))
    assert found.permutation.tolist() == [1, 3, 4, 2, 0, 5]
    assert found.group_of_column.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.static_grid


@pytest.mark.parametrize("order", ["group aware", "desc_act"])
def test_one_group_per_row_is_sorted_by_activation(order: str) -> None:
    found = column_order(DIAGONAL, layer_config(order, group_size=-1))
    assert found.permutation.tolist() == [1, 3, 4, 2, 0, 5]
    assert found.group_of_column.tolist() == [0] * 6
    assert found.static_grid


@given(
    diagonal=st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=24, max_size=24),
    order=st.sampled_from(sorted(ORDERS)),
    group_size=st.sampled_from([1, 2, 8, 12, 24, -1]),
)
def test_groups_have_equal_shares_of_columns_visited_once(
    diagonal: list[float], order: str, group_size: int
) -> None:
    config = layer_config(order, group_size=group_size)
    found = column_order(torch.tensor(diagonal), config)
    members = config.columns_per_group(24)
    assert sorted(found.permutation.tolist()) == list(range(24))
    assert found.group_of_column.bincount().tolist() == [members] * (24 // members)
    if not config.desc_act or config.static_groups:
        assert found.group_of_column.tolist() == [column // members for column in range(24)]
    if not found.static_grid:
        runs = found.group_of_column[found.permutation].reshape(-1, members)
        assert (runs == runs[:, :1]).all()


def test_group_size_that_does_not_divide_raises_error() -> None:
    with pytest.raises(ValueError, match="group_size 4 does not divide in_features 6"):
        column_order(DIAGONAL, LayerConfig(group_size=4))
