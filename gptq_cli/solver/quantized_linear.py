"""The quantized linear layer as tensors, independent of any file format.

Letters for shapes:  O out_features   I in_features   G groups
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.solver.float16 import LARGEST
from gptq_cli.solver.grid import ScaleRangeError, are_runs
from gptq_cli.solver.numerics import row_chunks


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """Integer codes with the grid they live on: w[o, i] = scales[o, g(i)] * (codes[o, i] - zeros[o, g(i)])."""

    codes: Tensor  # uint8 [O, I], columns in the order of the original weight
    scales: Tensor  # float16 [O, G]
    zeros: Tensor  # uint8 [O, G], in [1, 2**bits - 1]
    group_of_column: Tensor  # int32 [I]
    bits: int

    def rows(self, rows: slice) -> QuantizedLinear:
        """The layer that has only these rows, on the same memory."""
        return replace(
            self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows]
        )

    @classmethod
    def of_rows(cls, parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
        """The layer whose rows are those of `parts`, which share their groups."""
        codes, scales, zeros = (
            torch.cat(t) for t in zip(*((p.codes, p.scales, p.zeros) for p in parts), strict=True)
        )
        return cls(codes, scales, zeros, parts[0].group_of_column, parts[0].bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] these codes stand for, computed in float32 and then cast to `dtype`."""
        weight = torch.empty_like(self.codes, dtype=dtype)
        for rows in row_chunks(weight):
            weight[rows] = self.rows(rows)._values()
        return weight

    def _values(self) -> Tensor:
        codes, zeros, scales = self.codes.float(), self.zeros.float(), self.scales.float()
        columns = codes.shape[1] // zeros.shape[1]
        if are_runs(self.group_of_column, columns):  # spares a zero point and a scale for each code
            codes.view(*zeros.shape, columns).sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
            return codes
        group = self.group_of_column.long()
        return codes.sub_(zeros[:, group]).mul_(scales[:, group])


def check_decoded(linear: QuantizedLinear) -> None:
    """Raise ScaleRangeError for the first row with a weight beyond float16; waits for the device once."""
    steps = torch.maximum(linear.zeros, 2**linear.bits - 1 - linear.zeros)
    if bool((linear.scales.float().abs() * steps <= LARGEST).all()):
        return  # whatever the codes are
    beyond = (linear.dequantize().abs() > LARGEST).any(1)
    if bool(beyond.any()):
        raise ScaleRangeError(int(beyond.nonzero()[0]))
