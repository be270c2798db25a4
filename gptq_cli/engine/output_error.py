"""How much of a layer's output quantization changes: tr(E H Eᵀ) / tr(W H Wᵀ) with E = Q - W and H = Σ x xᵀ.

That is Σ ‖E x‖² / Σ ‖W x‖² over the calibration tokens, without looking at a token again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_cli.engine.chunks import row_chunks
from gptq_cli.engine.layer import QuantizedLinear

COLUMNS_PER_PANEL = 256


@torch.no_grad()
def output_energies(weight: Tensor, hessian: Tensor, candidates: Sequence[QuantizedLinear]) -> list[float]:
    """tr(W H Wᵀ) of the weight [O, I] under the undamped Hessian [I, I], then tr(E H Eᵀ) of each candidate for it.

    Rows are taken a chunk at a time, so no float copy of a large weight is needed.
    """
    energies = torch.zeros(1 + len(candidates), dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight):
        original = weight[rows].to(hessian.dtype)
        errors = (candidate.rows(rows).dequantize(hessian.dtype).sub_(original) for candidate in candidates)
        energies += torch.stack([_energy(original, hessian), *(_energy(error, hessian) for error in errors)])
    found: list[float] = energies.tolist()
    return found


def _energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """tr(M H Mᵀ) for M [n, I]; H is symmetric, so the part left of each diagonal block counts twice."""
    energy = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[1], COLUMNS_PER_PANEL):
        panel = slice(start, start + COLUMNS_PER_PANEL)
        product = torch.addmm(
            matrix[:, :start] @ hessian[:start, panel], matrix[:, panel], hessian[panel, panel], beta=2
        )
        energy += product.mul_(matrix[:, panel]).sum(dtype=torch.float64)
    return energy
