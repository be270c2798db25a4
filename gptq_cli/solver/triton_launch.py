"""The steps of the solver, and the decoding of packed tensors, as fused kernels on a device that
has them.

`solve`, `grid` and `refine` call the steps. A layer takes the kernels if `uses_kernels` says so for
its tensors, and else the torch operations beside each call: the same steps in the same order, whose
codes differ only where a value lies within the rounding of float32 of a tie. Packed GPTQ tensors
become a float weight in one pass, for evaluating quantized checkpoints.

Letters for shapes:  O out_features   I in_features   G groups
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# The one switch: device types whose float32 tensors go through the kernels.
KERNEL_DEVICES = {"cuda"}

MOST_COLUMNS = 128  # of one launch of `round_columns` and `fit_codes`, held in registers
ROWS, WARPS = 16, 4
FUSED = True  # multiply and add in one step; said, as Triton's own choice depends on its release
ELEMENTS = 4096  # of a tile whose rows are short

BLOCK_O = 32
BLOCK_I = 64


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def uses_kernels(tensor: Tensor) -> bool:
    """Whether steps on tensors like this one run as Triton kernels."""
    return tensor.device.type in KERNEL_DEVICES and tensor.dtype == torch.float32 and _has_triton()


def round_columns(
    values: Tensor,
    errors: Tensor,
    R: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
) -> None:
    """Round up to MOST_COLUMNS columns to their grids in turn: values [n, O] become codes, errors [n, O] w - q.

    R [n, n] is the part of the factor between them; scales and zeros [G, O], contiguous; group_of int32 [n].
    """
    from gptq_cli.solver.triton_kernels import round_columns_kernel

    _check_contiguous(values, errors, scales, zeros, group_of)
    grids = (scales, zeros, group_of)
    round_columns_kernel[(_programs(values.shape[1], ROWS),)](
        values, errors, R.contiguous(), *grids, values.shape[1], len(values), float(2**bits - 1),
        B=_power(len(values)), ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=FUSED,
    )  # fmt: skip


def fit_codes(
    slopes: Tensor,
    errors: Tensor,
    levels: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
) -> None:
    """One round of coordinate descent over up to MOST_COLUMNS columns of a group; errors and levels [n, O] change in
    place.

    slopes [n, O] are those of all n columns at the start; hessian [n, n]; scales and zeros [O] of the group.
    """
    from gptq_cli.solver.triton_kernels import fit_codes_kernel

    _check_contiguous(slopes, errors, levels, scales, zeros)
    fit_codes_kernel[(_programs(slopes.shape[1], ROWS),)](
        slopes, errors, levels, hessian.contiguous(), scales, zeros, slopes.shape[1], len(slopes), float(2**bits - 1),
        B=_power(len(slopes)), ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=FUSED,
    )  # fmt: skip


def fit_scales(
    slopes: Tensor,
    curvatures: Tensor,
    levels: Tensor,
    errors: Tensor,
    scales: Tensor,
    *,
    signed: bool,
) -> None:
    """Fit the scales [O] of one group to slopes P and bends H_gg b, both [n, O].

    Scales change in place, and with them errors and slopes [n, O].
    """
    from gptq_cli.solver.triton_kernels import fit_scales_kernel

    _check_contiguous(slopes, curvatures, levels, errors, scales)
    n_columns, out_features = levels.shape
    width = min(MOST_COLUMNS, _power(n_columns))
    rows = ELEMENTS // MOST_COLUMNS
    fit_scales_kernel[(_programs(out_features, rows),)](
        slopes,
        curvatures,
        levels,
        errors,
        scales,
        out_features,
        n_columns,
        SIGNED=signed,
        B=width,
        ROWS=rows,
        num_warps=WARPS,
        enable_fp_fusion=FUSED,
    )


def best_candidates(
    weights: Tensor, grid: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor],
    bits: int, norm: float,
) -> Tensor:  # fmt: skip
    """Index int64 [...] of the candidate that rounds each group [..., n] of weights with the least Σ |e|^norm.

    `grid` are scales and zeros [...] of the whole range, `candidates` factors for the scale and
    offsets for the zero; the first of equals wins.
    """
    from gptq_cli.solver.triton_kernels import best_candidate_kernel

    scales, zeros = (part.contiguous() for part in grid)
    factors, offsets = candidates
    n_columns = weights.shape[-1]
    best = torch.empty(scales.shape, dtype=torch.int64, device=weights.device)
    width = min(MOST_COLUMNS, _power(n_columns))
    rows = min(ELEMENTS // width, ELEMENTS // 64)
    best_candidate_kernel[(_programs(best.numel(), rows),)](
        weights.contiguous(), scales, zeros, factors, offsets, best,
        best.numel(), n_columns, len(factors), float(2**bits - 1), norm,
        B=width, ROWS=rows, CANDIDATES=_power(len(factors)),
        num_warps=WARPS, enable_fp_fusion=FUSED,
    )  # fmt: skip
    return best


def _check_contiguous(*tensors: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), [
        tensor.stride() for tensor in tensors
    ]


def _programs(rows: int, rows_each: int) -> int:
    return -(-rows // rows_each)


def _power(number: int) -> int:
    """The least power of two that holds `number`, at least 16."""
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
    """The weight [O, I] in `dtype`: scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o]), computed in float32.

    Takes qweight int32 [I*bits/32, O], qzeros int32 [G, O*bits/32], scales [G, O] and g_idx [I] as checkpoints hold
    them, for 2, 3, 4 and 8 bits. Format `gptq_v2` stores zeros as they are, `gptq` (v2 false) zero - 1 modulo 2**bits.
    Needs triton, imported at the first call, and tensors on an accelerator.
    """
    from gptq_cli.solver.triton_kernels import dequantize_kernel

    in_features, out_features = g_idx.numel(), qweight.shape[1]
    weight = torch.empty(out_features, in_features, dtype=dtype, device=qweight.device)
    programs = (-(-in_features // BLOCK_I), -(-out_features // BLOCK_O))
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
