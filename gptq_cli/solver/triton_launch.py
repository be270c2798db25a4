"""Launchers of the fused kernels in `triton_kernels`: steps of the solver, and decoding of weights.

`solve`, `grid` and `refine` call them if `numerics.uses_kernels` is true for their tensors; else
they use the torch operations beside each call: the same steps in the same order. The codes differ
only if a value is within the rounding of float32 of a tie. `dequantize_packed` decodes packed GPTQ
tensors in one pass, for the evaluation of quantized checkpoints.

Letters for shapes:  O out_features   I in_features   G groups
E experts of equal shapes: O counts the rows of all of them, those of the first one first
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_COLUMNS = 128  # in one launch for columns of a layer
# Columns that one launch takes one after the other: those in registers, rows of a program, warps.
# One warp needs no barriers of many threads: by the compiled code, a column and row of a program
# take 8 instructions of a warp instead of 63 with 16 rows, 4 warps and 128 columns in registers.
COLUMNS, ROWS, WARPS = 16, 32, 1
# Columns of a group that one launch takes together: rows of a program, warps, and summands of a
# product at a time, of which two are in shared memory.
GROUP_ROWS, GROUP_WARPS, SUMMANDS, STAGES = 32, 4, 32, 2
FUSED = True  # multiply and add in one step; the default depends on the release of Triton
ELEMENTS = 4096  # in a tile of short rows

BLOCK_O = 32
BLOCK_I = 64


def find_grids(
    values: Tensor,
    errors: Tensor,
    inverse: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    *,
    sym: bool,
) -> None:
    """Find the min/max grid of up to MOST_COLUMNS columns that are one group.

    It is that of `grid.find_grid` for the weights u = w + (v - w) R⁻¹. `values` [n, O] are v,
    `errors` [n, O] are w, `inverse` [E, n, n] is R⁻¹. The grid goes into the row of `scales` and
    `zeros` [G, O] that the first entry of group_of, int32 [E, n], names. A row with a weight that
    is not finite gets an infinite scale.
    """
    from gptq_cli.solver.triton_kernels import find_grids_kernel

    _check_contiguous(values, errors, inverse[0], scales, zeros, group_of[0])
    n_experts, n_rows = _experts(inverse, values)
    find_grids_kernel[(_programs(n_rows, GROUP_ROWS), n_experts)](
        values, errors, inverse, inverse.stride(0), scales, zeros, group_of, group_of.stride(0),
        values.shape[1], n_rows, len(values), float(2**bits - 1),
        SYM=sym, B=_power(len(values)), K=SUMMANDS, ROWS=GROUP_ROWS,
        num_warps=GROUP_WARPS, num_stages=STAGES, enable_fp_fusion=FUSED,
    )  # fmt: skip


def round_columns(
    values: Tensor,
    errors: Tensor,
    R: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
) -> None:
    """Round up to MOST_COLUMNS columns to their grids one after the other.

    `values` [n, O] become codes and `errors` [n, O] become w - q, in place. R [E, n, n] is the part
    of the factor between the columns, a view of it; scales and zeros [G, O] are contiguous;
    group_of is int32 [E, n].
    """
    from gptq_cli.solver.triton_kernels import round_columns_kernel

    _check_contiguous(values, errors, scales, zeros, group_of[0])
    n_experts, n_rows = _experts(R, values)
    round_columns_kernel[(_programs(n_rows, ROWS), n_experts)](
        values, errors, R, _row_stride(R), R.stride(0), scales, zeros,
        group_of, group_of.stride(0),
        values.shape[1], n_rows, len(values), float(2**bits - 1),
        S=COLUMNS, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=FUSED,
    )  # fmt: skip


def fit_scales(
    slopes: Tensor,
    changes: Tensor,
    levels: Tensor,
    hessian: Tensor,
    scales: Tensor,
    *,
    signed: bool,
) -> None:
    """Fit the scales [O] of one group of up to MOST_COLUMNS columns.

    `slopes` [n, O] are P and `levels` [n, O] are b, codes minus zeros; hessian is H_gg
    [E, n, n], a view. `scales` and `slopes` change in place; `changes` [n, O] become those of the
    errors.
    """
    from gptq_cli.solver.triton_kernels import fit_scales_kernel

    _check_contiguous(slopes, changes, levels, scales)
    n_experts, n_rows = _experts(hessian, slopes)
    fit_scales_kernel[(_programs(n_rows, GROUP_ROWS), n_experts)](
        slopes, changes, levels, hessian, _row_stride(hessian), hessian.stride(0), scales,
        slopes.shape[1], n_rows, len(slopes),
        SIGNED=signed, B=_power(len(slopes)), K=SUMMANDS, ROWS=GROUP_ROWS,
        num_warps=GROUP_WARPS, num_stages=STAGES, enable_fp_fusion=FUSED,
    )  # fmt: skip


def fit_codes(
    slopes: Tensor,
    changes: Tensor,
    levels: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
) -> None:
    """Run one round of coordinate descent over up to MOST_COLUMNS columns of a group.

    `levels` [n, O] change in place, and what the errors change by is added to `changes` [n, O].
    `slopes` [n, O] are those at the start, and are overwritten; hessian is [E, n, n], a view;
    scales and zeros [O] are those of the group.
    """
    from gptq_cli.solver.triton_kernels import fit_codes_kernel

    _check_contiguous(slopes, changes, levels, scales, zeros)
    n_experts, n_rows = _experts(hessian, slopes)
    fit_codes_kernel[(_programs(n_rows, ROWS), n_experts)](
        slopes, changes, levels, hessian, _row_stride(hessian), hessian.stride(0), scales, zeros,
        slopes.shape[1], n_rows, len(slopes), float(2**bits - 1),
        S=COLUMNS, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=FUSED,
    )  # fmt: skip


def best_candidates(
    weights: Tensor, grid: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor],
    bits: int, norm: float,
) -> Tensor:  # fmt: skip
    """Return int64 [...], for each group [..., n] the candidate with the least Σ |e|^norm.

    `grid` holds scales and zeros [...] of the whole range; `candidates` holds factors for the scale
    and offsets for the zero. The first of equal candidates wins.
    """
    from gptq_cli.solver.triton_kernels import best_candidate_kernel

    scales, zeros = grid
    factors, offsets = candidates
    n_columns = weights.shape[-1]
    best = torch.empty(scales.shape, dtype=torch.int64, device=weights.device)
    width = min(MOST_COLUMNS, _power(n_columns))
    rows = min(ELEMENTS // width, ELEMENTS // 64)
    best_candidate_kernel[(_programs(best.numel(), rows),)](
        weights.contiguous(), scales.contiguous(), zeros.contiguous(), factors, offsets, best,
        best.numel(), n_columns, len(factors), float(2**bits - 1), norm,
        B=width, ROWS=rows, CANDIDATES=_power(len(factors)),
        num_warps=GROUP_WARPS, enable_fp_fusion=FUSED,
    )  # fmt: skip
    return best


def _check_contiguous(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), tensor.stride()


def _row_stride(matrix: Tensor) -> int:
    """Return the distance of the rows of matrices [E, n, n] whose rows are contiguous."""
    _, distance, step = matrix.stride()
    assert step == 1, matrix.stride()
    return distance


def _experts(factors: Tensor, values: Tensor) -> tuple[int, int]:
    """Return the number of experts, and of the rows of each, for factors [E, n, n]."""
    return len(factors), values.shape[1] // len(factors)


def _programs(rows: int, rows_each: int) -> int:
    """Return the number of programs that cover `rows`."""
    return -(-rows // rows_each)


def _power(number: int) -> int:
    """Return the least power of two that is not below `number`, 16 at least."""
    return max(16, 1 << (number - 1).bit_length())


def dequantize_packed(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    v2: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [O, I] of packed GPTQ tensors, computed in float32 and cast to `dtype`.

    weight[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o]). Shapes are those of
    checkpoints with 2, 3, 4 or 8 bits: qweight int32 [I*bits/32, O], qzeros int32 [G, O*bits/32],
    scales [G, O], g_idx [I]. Format `gptq_v2` stores zeros unchanged; `gptq` (`v2` false) stores
    zero - 1 modulo 2**bits. Needs triton, which is imported at the first call, and tensors on an
    accelerator.
    """
    from gptq_cli.solver.triton_kernels import dequantize_kernel

    in_features, out_features = g_idx.numel(), qweight.shape[1]
    weight = torch.empty(out_features, in_features, dtype=dtype, device=qweight.device)
    programs = (_programs(in_features, BLOCK_I), _programs(out_features, BLOCK_O))
    packed = (qweight.contiguous(), qzeros.contiguous(), scales.contiguous(), g_idx.contiguous())
    dequantize_kernel[programs](
        *packed,
        weight,
        out_features,
        in_features,
        0 if v2 else 1,
        BITS=bits,
        BLOCK_O=BLOCK_O,
        BLOCK_I=BLOCK_I,
        enable_fp_fusion=True,
    )
    return weight
