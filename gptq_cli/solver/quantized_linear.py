"""The quantized linear layer as tensors, without a file format; its weights and output error.

Letters for shapes:  O out_features   I in_features   G groups
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.float16 import LARGEST, SMALLEST, SMALLEST_NORMAL
from gptq_cli.solver.grid import (
    ScaleRangeError,
    are_runs,
    check_scales,
    find_grid,
    join_groups,
    round_to_grid,
    split_groups,
)
from gptq_cli.solver.numerics import (
    Parts,
    exact_product,
    full_precision,
    multiply_split,
    parts_of,
    row_chunks,
    split,
    splits,
)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """Integer codes and their grids: w[o, i] = scales[o, g(i)] * (codes[o, i] - zeros[o, g(i)])."""

    codes: Tensor  # uint8 [O, I], columns in the order of the original weight
    scales: Tensor  # float16 [O, G]
    zeros: Tensor  # uint8 [O, G], in [1, 2**bits - 1]
    group_of_column: Tensor  # int32 [I]
    bits: int

    def rows(self, rows: slice | Tensor) -> QuantizedLinear:
        """Return the layer that has only these rows; those of a slice are on the same memory."""
        return replace(
            self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows]
        )

    @classmethod
    def of_rows(cls, parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
        """Return the layer with the rows of all `parts`, which share their groups."""
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            zeros=torch.cat([part.zeros for part in parts]),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [O, I] of the codes, computed in float32 and then cast to `dtype`."""
        weight = torch.empty_like(self.codes, dtype=dtype)
        for rows in row_chunks(weight, CHUNKS_TO_DECODE[weight.device.type]):
            weight[rows] = self.rows(rows)._values()
        return weight

    def _values(self) -> Tensor:
        """Return the weight [O, I] in float32."""
        codes, zeros, scales = self.codes.float(), self.zeros.float(), self.scales.float()
        columns = codes.shape[1] // zeros.shape[1]
        # If groups are runs, a zero point and a scale need no copy for each code.
        if are_runs(self.group_of_column, columns):
            codes.view(*zeros.shape, columns).sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
            return codes
        group = self.group_of_column.long()
        return codes.sub_(zeros[:, group]).mul_(scales[:, group])


def check_decoded(linear: QuantizedLinear) -> None:
    """Raise ScaleRangeError for the first row with a decoded weight beyond float16.

    Waits for the device once if the scales exclude such a weight.
    """
    steps = torch.maximum(linear.zeros, 2**linear.bits - 1 - linear.zeros)
    if bool((linear.scales.float().abs() * steps <= LARGEST).all()):
        return  # no code can exceed the range
    beyond = (linear.dequantize().abs() > LARGEST).any(1)
    if bool(beyond.any()):
        raise ScaleRangeError(int(beyond.nonzero()[0]))


def small_scales(scales: Tensor) -> Tensor:
    """Return for each row of scales [O, G] two numbers, float64 [2, O], to warn of.

    They are the number of scales that are subnormal in float16, and of those that are its smallest
    number. A group of zeros has no such scale.
    """
    sizes = scales.abs()
    small = torch.stack([sizes < SMALLEST_NORMAL, sizes == SMALLEST])
    return small.sum(-1, dtype=torch.float64)


# Of H at a time, for output errors; both values for CUDA are to be measured on a GPU.
COLUMNS_PER_PANEL = {"cpu": 256, "cuda": 2048}
CHUNKS_AT_ONCE = {"cpu": 1, "cuda": 4}  # chunks of rows, for products that fill the device
CHUNKS_TO_DECODE = {"cpu": 1, "cuda": 2}  # each number takes three of float32 meanwhile


@torch.no_grad()
def round_to_nearest(
    weight: Tensor, config: LayerConfig, group_of_column: Tensor | None = None
) -> QuantizedLinear:
    """Return the weight [O, I] rounded to the min/max grid of its groups.

    Groups are those of `group_of_column` [I] if it is given, else runs of `group_size` columns.
    Raise ScaleRangeError, and ValueError if the group size does not divide I.
    """
    in_features = weight.shape[1]
    group_size = config.columns_per_group(in_features)
    if in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide in_features {in_features}")
    if group_of_column is None:
        group_of_column = (torch.arange(in_features, device=weight.device) // group_size).int()
    chunks = row_chunks(weight, CHUNKS_AT_ONCE[weight.device.type])
    nearest = QuantizedLinear.of_rows(
        [_round(weight[rows], config, group_of_column) for rows in chunks]
    )
    check_scales(nearest.scales)
    return nearest


def _round(weight: Tensor, config: LayerConfig, group_of_column: Tensor) -> QuantizedLinear:
    weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    groups = split_groups(weight, group_of_column, config.columns_per_group(weight.shape[1]))
    scales, zeros = find_grid(groups, config.bits, config.sym)
    codes = round_to_grid(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), config.bits).byte()
    return QuantizedLinear(
        join_groups(codes, group_of_column),
        scales.half(),
        zeros.byte(),
        group_of_column,
        config.bits,
    )


@torch.no_grad()
@full_precision()
def output_energies(
    weight: Tensor, hessian: Tensor, candidates: Sequence[QuantizedLinear]
) -> Tensor:
    """Return tr(W H Wᵀ) of the weight [O, I], then tr(E H Eᵀ) of each candidate, E its error.

    The energies are float64 on the device of the weight. `hessian` [I, I] is undamped. Rows are
    taken a chunk at a time, so that there is no float copy of a large weight.
    """
    energies = torch.zeros(1 + len(candidates), dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight, CHUNKS_AT_ONCE[weight.device.type]):
        original = weight[rows].to(hessian.dtype)
        matrices = [original]
        for candidate in candidates:
            matrices.append(candidate.rows(rows).dequantize(hessian.dtype).sub_(original))
        energies += _energies(matrices, hessian)
    return energies


@torch.no_grad()
@full_precision()
def energies_by_expert(
    weight: Tensor, hessians: Tensor, candidates: Sequence[QuantizedLinear]
) -> Tensor:
    """Return m H mᵀ for each row m of the weight [E O, I] and of the error of each candidate.

    The energies are float64 [1 + candidates, E, O]; `hessians` [E, I, I] are undamped.
    """
    by_expert = (len(hessians), -1)
    factors: Parts = (hessians,)
    if splits(hessians):
        factors = split(hessians)
    original = weight.to(hessians.dtype).unflatten(0, by_expert)
    energies = [_energies_of_rows(original, factors)]
    for candidate in candidates:
        decoded = candidate.dequantize(hessians.dtype).unflatten(0, by_expert)
        energies.append(_energies_of_rows(decoded.sub_(original), factors))
    return torch.stack(energies)


def _energies_of_rows(matrices: Tensor, factors: Parts) -> Tensor:
    """Return m H mᵀ for each row m of M [E, O, I], in float64 [E, O].

    `factors` are H [E, I, I], or its parts for tensor cores.
    """
    if len(factors) == 1:
        products = matrices @ factors[0]
    else:
        products = multiply_split(parts_of(matrices), factors)
    return products.mul_(matrices).sum(-1, dtype=torch.float64)


def _energies(matrices: Sequence[Tensor], hessian: Tensor) -> Tensor:
    """Return tr(M H Mᵀ) for each M [n, I], in float64.

    H is symmetric, so the part to the left of each diagonal block counts twice.
    """
    energies = torch.zeros(len(matrices), dtype=torch.float64, device=hessian.device)
    width = COLUMNS_PER_PANEL[hessian.device.type]
    for start in range(0, len(hessian), width):
        stop = min(start + width, len(hessian))
        products = _panel_products(matrices, hessian, start, stop)
        for number, product in enumerate(products):
            product.mul_(matrices[number][:, start:stop])
            energies[number] += product.sum(dtype=torch.float64)
    return energies


def _panel_products(
    matrices: Sequence[Tensor], hessian: Tensor, start: int, stop: int
) -> Iterator[Tensor]:
    """Yield for each M the columns start..stop of M (2 U + D), H without what is below D.

    D are the diagonal blocks of H, U are the blocks above them.
    """
    panel = slice(start, stop)
    for matrix in matrices:
        left = matrix[:, :start] @ hessian[:start, panel]
        yield torch.addmm(left, matrix[:, panel], hessian[panel, panel], beta=2)


@torch.no_grad()
def split_panels(hessian: Tensor) -> list[Tensor]:
    """Return panels of columns of H [I, I] for `energies_of_rows`, each bfloat16 [stop, 2, n].

    They are those of 2 U + D (see `_panel_products`). The number of a row and column is the sum of
    two.
    """
    panels = []
    width = COLUMNS_PER_PANEL["cuda"]
    for start in range(0, len(hessian), width):
        column = hessian[: start + width, start : start + width].clone()
        column[:start] *= 2
        panels.append(torch.stack(split(column), 1))
    return panels


@torch.no_grad()
def energies_of_rows(
    weight: Tensor, panels: Sequence[Tensor], candidate: QuantizedLinear | None = None
) -> Tensor:
    """Return m H mᵀ for each row m of the weight [O, I], or of the error of a candidate.

    The energies are float64 [O], from products on tensor cores; `panels` are those of
    `split_panels`.
    """
    energies = torch.empty(len(weight), dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight, CHUNKS_AT_ONCE["cuda"]):
        matrix = weight[rows]
        if candidate is not None:
            matrix = candidate.rows(rows).dequantize().sub_(matrix)
        energies[rows] = _energies_from_panels(matrix, panels)
    return energies


def _energies_from_panels(matrix: Tensor, panels: Sequence[Tensor]) -> Tensor:
    """Return m H mᵀ for each row m of M [n, I], float64 [n].

    The product of the two low parts is left out, as in `multiply_split`. bfloat16 rows have none.
    """
    high, low = matrix, None
    if matrix.dtype != torch.bfloat16:
        high, low = split(matrix.float())
    twice = high.repeat_interleave(2, dim=1)  # a column for both parts of each row of H
    energies = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
    start = 0
    for panel in panels:
        stop = len(panel)
        product = exact_product(twice[:, : 2 * stop], panel.flatten(0, 1))
        if low is not None:
            product += exact_product(low[:, :stop], panel[:, 0])
        energies += product.mul_(matrix[:, start:stop]).sum(1, dtype=torch.float64)
        start = stop
    return energies
