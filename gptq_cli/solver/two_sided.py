"""GPTQ that knows the loss of the model: rounding errors pass on along columns and along rows.

Let g be the gradient, at the output of a linear layer, of the log-likelihood of a label that is
drawn from the model's own predictions, and G = Σ g gᵀ over tokens. The expected loss that an error
E = W - Q of the weight adds to the model is then, to second order and with independent inputs and
gradients, a multiple of

tr(G E H Eᵀ)

which for G = I is the output error that `solve` makes small. With G = R D Rᵀ, R unit upper
triangular, rows pass errors on just as columns do: the best weights of all rows from b on, for the
errors E_{<b} of the rows before them, begin with

W_b + R_bb⁻ᵀ R_{<b,b}ᵀ E_{<b}

in rows b. The rows with the largest entries of G come first, as columns do in activation order.
The rows of a block are solved together, as layers of their own, for these weights.
Source: YAQA (Tseng et al. 2025, arXiv 2505.22988), in blocks of rows as GPTQ has blocks of columns.

Letters for shapes:  O out_features   I in_features
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import HessianFactor, prepare
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.numerics import full_precision, multiply
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.solve import Solution, measured, quantize_rows, share

ROW_BLOCK = 64
# The damping of each row is this share of its own entry of G, or more if tokens are few.
OF_ROWS = LayerConfig(group_size=-1, damp_mode="diagonal", damp_percent=0.3)


@torch.no_grad()
@full_precision()
def solve_in_row_blocks(
    weight: Tensor,
    hessian: Tensor,
    factor: HessianFactor,
    config: LayerConfig,
    gradients: Tensor,
    tokens: int,
    *,
    row_block: int = ROW_BLOCK,
) -> Solution:
    """Return the weight [O, I] quantized with feedback from both sides, with its output error.

    `hessian` [I, I] and `factor` are those that `solve` takes. `gradients` is G [O, O], a sum over
    `tokens`, which is damped as Hessians are. `loss_ratio` of the solution is tr(G E H Eᵀ) with the
    damped G, as a share of what it would be if the errors of rows had nothing to do with each
    other, Σ_r G_rr (E H Eᵀ)_rr; 0 if nothing was lost.

    Raises ScaleRangeError with the row of a weight that is not finite or too large for float16.
    """
    of_rows = prepare(gradients, OF_ROWS, tokens)
    order = of_rows.order.permutation
    try:
        sorted_rows = _in_row_blocks(weight[order], hessian, factor, config, of_rows.R, row_block)
    except ScaleRangeError as error:
        raise ScaleRangeError(int(order[error.row])) from error
    quantized = sorted_rows.rows(order.argsort())
    [solution] = measured([quantized], [weight], weight, hessian, config)
    ratio = _loss_ratio(weight, quantized, hessian, gradients + of_rows.damping.diag())
    return replace(solution, loss_ratio=ratio)


def _in_row_blocks(
    weight: Tensor,
    hessian: Tensor,
    factor: HessianFactor,
    config: LayerConfig,
    R: Tensor,
    row_block: int,
) -> QuantizedLinear:
    """Return the weight [O, I], rounded block after block of rows; R [O, O] is the factor of G."""
    dtype = factor.R.dtype
    errors = torch.zeros_like(weight, dtype=dtype)
    R = R.to(dtype)
    parts = []
    for start in range(0, len(weight), row_block):
        rows = slice(start, min(start + row_block, len(weight)))
        wanted = weight[rows].to(dtype)
        if start:
            pulls = multiply(R[:start, rows].T, errors[:start])
            wanted = wanted + torch.linalg.solve_triangular(
                R[rows, rows].T, pulls, upper=False, unitriangular=True
            )
        try:
            part = quantize_rows(wanted, hessian, factor, config)
        except ScaleRangeError as error:
            raise ScaleRangeError(start + error.row) from error
        errors[rows] = weight[rows].to(dtype) - part.dequantize(dtype)
        parts.append(part)
    return QuantizedLinear.of_rows(parts)


def _loss_ratio(
    weight: Tensor, quantized: QuantizedLinear, hessian: Tensor, gradients: Tensor
) -> float:
    """Return tr(G E H Eᵀ) / Σ_r G_rr (E H Eᵀ)_rr for the errors E of `quantized`, or 0."""
    errors = weight.to(hessian.dtype) - quantized.dequantize(hessian.dtype)
    gradients = gradients.to(hessian.dtype)
    products = multiply(errors, hessian)
    alone = gradients.diagonal() @ (products * errors).sum(1)
    together = multiply(gradients, products).mul_(errors).sum()
    found = torch.stack([together, alone]).tolist()
    return share(*found)
