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

in rows b. Rows come in blocks, those with the largest entries of G first. A layer is solved in
three steps:

1. `quantize_rows` solves it without G. The grids stay.
2. Its rows are rounded once more, block after block, each for the weights above.
3. Blocks are visited again, and now see the errors of all other rows o, before and behind them:
   their codes and scales are refined for the weights W_b + G_bb⁻¹ G_bo E_o.

Source: YAQA (Tseng et al. 2025, arXiv 2505.22988), in blocks of rows as GPTQ has blocks of columns;
step 3 is coordinate descent, as in `refine`.

Letters for shapes:  O out_features   I in_features
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver.factor import HessianFactor, prepare
from gptq_cli.solver.numerics import full_precision, multiply
from gptq_cli.solver.quantized_linear import QuantizedLinear, check_decoded
from gptq_cli.solver.refine import refine
from gptq_cli.solver.solve import Solution, measured, quantize_rows

ROW_BLOCK = 32  # in step 2
REFINED_BLOCKS = 2  # that are refined together in step 3
VISITS = 2  # of each of them
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
    `tokens`, which is damped as Hessians are. Step 3 is left out without `refine_sweeps`.
    `loss_ratio` of the solution is tr(G E H Eᵀ) with the damped G, as a share of that of `solve`;
    if it would be 1 or more, the solution is that of `solve`, and the ratio is 1.

    Raises ScaleRangeError with the row of a weight that is not finite or too large for float16.
    """
    plain = quantize_rows(weight, hessian, factor, config)
    of_rows = prepare(gradients, OF_ROWS, tokens)
    damped = gradients + of_rows.damping.diag()
    order = of_rows.order.permutation
    layer = _Layer(weight[order], hessian, factor, config)
    found = _rounded(layer, plain.rows(order), of_rows.R, row_block)
    if config.refine_sweeps:
        found = _refined(layer, found, damped[order][:, order], REFINED_BLOCKS * row_block)
    quantized, ratio = plain, 1.0
    both_sides = found.rows(order.argsort())
    loss = _loss(weight, both_sides, hessian, damped)
    of_plain = _loss(weight, plain, hessian, damped)
    if loss < of_plain:  # which is not so if both are 0
        quantized, ratio = both_sides, loss / of_plain
    check_decoded(quantized)
    [solution] = measured([quantized], [weight], weight, hessian, config)
    return replace(solution, loss_ratio=ratio)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the rows of a layer share, in the order in which they are solved."""

    weight: Tensor  # [O, I]
    hessian: Tensor  # [I, I]
    factor: HessianFactor
    config: LayerConfig

    def blocks(self, row_block: int) -> Iterator[slice]:
        """Yield the rows of each block."""
        for start in range(0, len(self.weight), row_block):
            yield slice(start, min(start + row_block, len(self.weight)))

    def errors(self, quantized: QuantizedLinear, rows: slice) -> Tensor:
        """Return W - Q [rows, I] of these rows, which `quantized` has."""
        dtype = self.factor.R.dtype
        return self.weight[rows].to(dtype) - quantized.dequantize(dtype)


def _rounded(layer: _Layer, plain: QuantizedLinear, R: Tensor, row_block: int) -> QuantizedLinear:
    """Return the layer, rounded to the grids of `plain`; R [O, O] is the factor of G."""
    dtype = layer.factor.R.dtype
    errors, R = torch.zeros_like(layer.weight, dtype=dtype), R.to(dtype)
    unrefined, parts = replace(layer.config, refine_sweeps=0), []
    for rows in layer.blocks(row_block):
        before = slice(0, rows.start)
        pulls = multiply(R[before, rows].T, errors[before])
        shift = torch.linalg.solve_triangular(
            R[rows, rows].T, pulls, upper=False, unitriangular=True
        )
        wanted = layer.weight[rows].to(dtype) + shift
        part = quantize_rows(wanted, layer.hessian, layer.factor, unrefined, grids=plain.rows(rows))
        errors[rows] = layer.errors(part, rows)
        parts.append(part)
    return QuantizedLinear.of_rows(parts)


def _refined(
    layer: _Layer, rounded: QuantizedLinear, gradients: Tensor, row_block: int
) -> QuantizedLinear:
    """Return the layer with refined codes and scales; `gradients` is the damped G [O, O]."""
    dtype, signed = layer.factor.R.dtype, layer.config.signed_scales
    gradients = gradients.to(dtype)
    errors = layer.errors(rounded, slice(None))
    slopes = multiply(gradients, errors)  # G E
    parts = [rounded.rows(rows) for rows in layer.blocks(row_block)]
    for _ in range(VISITS):
        for number, rows in enumerate(layer.blocks(row_block)):
            own = torch.linalg.cholesky(gradients[rows, rows])
            shift = torch.cholesky_solve(slopes[rows], own) - errors[rows]
            wanted = layer.weight[rows].to(dtype) + shift
            part = refine(
                wanted, layer.hessian, layer.factor, parts[number], sweeps=1, signed=signed
            )
            found = layer.errors(part, rows)
            slopes += multiply(gradients[:, rows], found - errors[rows])
            errors[rows], parts[number] = found, part
    return QuantizedLinear.of_rows(parts)


def _loss(weight: Tensor, quantized: QuantizedLinear, hessian: Tensor, gradients: Tensor) -> float:
    """Return tr(G E H Eᵀ) for the error E of `quantized`."""
    errors = weight.to(hessian.dtype) - quantized.dequantize(hessian.dtype)
    products = multiply(gradients.to(hessian.dtype), multiply(errors, hessian))
    return float(products.mul_(errors).sum(dtype=torch.float64))
