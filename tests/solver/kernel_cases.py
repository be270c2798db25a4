"""Layers for tests of the kernels: every order and kind of grid, and various widths and groups."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, product

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.solve import Solution, solve, solve_together
from tests.solver.samples import ORDERS, correlated_layer, layer_config

KINDS: dict[str, dict[str, object]] = {
    "sym": {},
    "asym": {"sym": False},
    "signed": {"signed_scales": True},
}


@dataclass(frozen=True)
class Case:
    """A layer and the way to solve it; a launch takes `column_block` columns or one larger group.

    If `ties` is set, half of the weights lie in the middle between two points of their grid, and
    no error changes another weight. `shrink` multiplies the weights; if it is not 1, the first
    group of each row is 0. If `positive` is set, no weight is negative, so zero points are raised.
    """

    config: LayerConfig
    out_features: int = 13
    in_features: int = 48
    column_block: int = 20
    ties: bool = False
    shrink: float = 1.0
    positive: bool = False

    def layer(self) -> tuple[Tensor, Tensor]:
        if self.ties:
            halves = torch.randint(
                -15, 16, (self.out_features, self.in_features), generator=torch.Generator()
            )
            halves[:, ::8] = 15  # the largest, in every group: with 4 bits the scale is two halves
            return halves / 32, torch.arange(1.0, self.in_features + 1).diag()
        weight, hessian = correlated_layer(
            self.out_features, self.in_features, seed=self.config.bits
        )
        if self.shrink != 1:
            weight[:, : self.config.group_size] = 0
        if self.positive:
            weight = weight.abs()
        return self.shrink * weight.float(), hessian.float()


def _case(
    order: str,
    kind: str,
    *,
    refine_sweeps: int = 0,
    shape: dict[str, float] | None = None,
    **fields: object,
) -> Case:
    return Case(
        layer_config(order, refine_sweeps=refine_sweeps, **KINDS[kind], **fields), **(shape or {})
    )  # type: ignore[arg-type]


# Launches of 20, 20 and 8 columns; some groups are smaller than a launch, some larger, and the end
# of a launch cuts some of them.
_TURNS = cycle([(2, 24, "none"), (3, 16, "mse"), (4, 8, "mse"), (8, -1, "none"), (4, 12, "mse")])
CASES: dict[str, Case] = {}
for (_order, _kind), (_bits, _group, _search) in zip(product(ORDERS, KINDS), _TURNS, strict=False):
    _name = f"{_order}, {_kind}, {_bits} bits, group {_group}, search {_search}"
    _shape: dict[str, float] = {}
    if _search == "mse" and not _order.startswith("static"):
        _shape["in_features"] = 24  # launches of 20 and 4 columns, because each group is a search
        if _group == 16:
            _shape["in_features"] = 32
    CASES[_name] = _case(
        _order, _kind, bits=_bits, group_size=_group, scale_search=_search, shape=_shape
    )
# More rows than one program has, more columns than a launch, and a group larger than a launch of
# MOST_COLUMNS.
MOST_COLUMNS = 32
_LARGE = {"out_features": 37, "column_block": MOST_COLUMNS}
_LONG = {"out_features": 5, "in_features": 80, "column_block": MOST_COLUMNS}
_WIDE = {"out_features": 37, "in_features": 96, "column_block": MOST_COLUMNS}
CASES |= {
    "two programs, two launches": _case(
        "static group aware", "signed", bits=4, group_size=16, shape=_LARGE
    ),
    "a found group of two launches": _case(
        "group aware", "asym", bits=3, group_size=40, shape=_LONG
    ),
    "a static group of two launches": _case(
        "static desc_act", "asym", bits=2, group_size=40, scale_search="mse", shape=_LONG
    ),
    "found grids whose zero points are raised": Case(
        layer_config("natural", bits=2, group_size=16, sym=False), positive=True
    ),
    "ties": Case(layer_config("static desc_act", bits=4, group_size=8), ties=True),
    "refined, signed": _case(
        "static group aware", "signed", bits=4, group_size=24, refine_sweeps=2
    ),
    "refined, asym, scattered groups": _case(
        "desc_act", "asym", bits=2, group_size=16, refine_sweeps=1
    ),
    "refined, one group a row": _case("natural", "sym", bits=3, group_size=-1, refine_sweeps=1),
    "refined, two programs, two launches": _case(
        "static group aware", "signed", bits=3, group_size=24, refine_sweeps=1, shape=_LARGE
    ),
    "refined, two panels of several groups": _case(
        "static group aware", "sym", bits=4, group_size=16, refine_sweeps=2, shape=_LONG
    ),
    "refined, two panels of one group": _case(
        "static natural", "signed", bits=3, group_size=-1, refine_sweeps=2, shape=_LONG
    ),
    "a found group of one launch": _case("group aware", "sym", bits=4, group_size=32, shape=_WIDE),
    "found groups inside a launch": _case("natural", "asym", bits=4, group_size=16, shape=_WIDE),
    "subnormal scales, signed": _case(
        "natural",
        "signed",
        bits=8,
        group_size=16,
        scale_search="mse",
        refine_sweeps=1,
        shape={"shrink": 2.0**-7},
    ),
    "subnormal scales, asym": _case(
        "static group aware",
        "asym",
        bits=4,
        group_size=24,
        scale_search="mse",
        shape={"shrink": 2.0**-14},
    ),
    "the smallest scales": _case(
        "natural", "signed", bits=4, group_size=16, scale_search="mse", shape={"shrink": 2.0**-24}
    ),
}


def solved(case: Case, device: str = "cpu") -> QuantizedLinear:
    """The case's layer on `device`, by whatever steps are switched on."""
    weight, hessian = (tensor.to(device) for tensor in case.layer())
    prepared = prepare(hessian, case.config)
    return solve(weight, hessian, prepared, case.config, column_block=case.column_block).quantized


@dataclass(frozen=True)
class ExpertsCase:
    """Three experts with two layers each; the second has a column without input.

    A launch takes 32 columns or one larger group.
    """

    config: LayerConfig
    rows: tuple[int, int] = (5, 31)
    in_features: int = 48

    def layers(self) -> tuple[list[Tensor], Tensor]:
        """Return the weights, expert by expert, and the Hessians."""
        weights, hessians = [], []
        for expert in range(3):
            for part, rows in enumerate(self.rows):
                weight, hessian = correlated_layer(rows, self.in_features, seed=10 * expert + part)
                weights.append(weight.float())
            hessians.append(hessian.float())
        hessians[1][7] = 0
        hessians[1][:, 7] = 0
        return weights, torch.stack(hessians)


def _experts(order: str, kind: str, **fields: object) -> ExpertsCase:
    return ExpertsCase(layer_config(order, **KINDS[kind], **fields))  # type: ignore[arg-type]


EXPERTS: dict[str, ExpertsCase] = {
    "static groups": _experts(
        "static group aware", "signed", bits=4, group_size=16, scale_search="mse", refine_sweeps=1
    ),
    "groups found by a kernel": _experts("group aware", "asym", bits=3, group_size=16),
    "groups searched on the way": _experts(
        "group aware", "sym", bits=4, group_size=16, scale_search="mse"
    ),
    "one group a row": _experts("static desc_act", "sym", bits=3, group_size=-1, refine_sweeps=1),
}


def solved_experts(case: ExpertsCase) -> list[Solution]:
    """The solutions of the layers of all experts, solved together if kernels are switched on."""
    weights, hessians = case.layers()
    prepared = prepare(hessians, case.config)
    return solve_together(weights, hessians, prepared, case.config, column_block=32)
