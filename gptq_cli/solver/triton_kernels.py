"""The Triton kernels that `triton_launch` launches; importing this module needs triton.

Kernels of the solver run in float32, without a vendor's library, and add in a fixed order, so that
two runs give the same bits. A matrix [n, O] holds the columns of a layer one after the
other: neighbours in memory belong to neighbouring rows of the weight. A program owns some rows and
keeps what it needs of them in registers.

Tensors of a GPTQ checkpoint hold `BITS`-bit fields in a little-endian stream of 32-bit words: field
i lies at bits [BITS i, BITS i + BITS), which for 3 bits may straddle two words. `qweight` streams
run down its rows, along I; `qzeros` streams run along its columns, along O.

Letters for shapes:  O out_features   G groups   n columns taken together
B, ROWS powers of two that hold n and the rows of a program
"""

import triton
import triton.language as tl

from gptq_cli.solver import float16

SMALLEST = tl.constexpr(float16.SMALLEST)
SMALLEST_NORMAL = tl.constexpr(float16.SMALLEST_NORMAL)
LARGEST = tl.constexpr(float16.LARGEST)


@triton.jit
def nearest_level(value, zero, max_code):  # type: ignore[no-untyped-def]
    """Return the whole number nearest to `value`, even at ties, in [-zero, max_code - zero]."""
    value = tl.minimum(tl.maximum(value, -zero), max_code - zero)
    # 1.5 * 2**23: next to it floats are one apart, so the addition rounds.
    return (value + 12582912.0) - 12582912.0


@triton.jit
def stored_scale(scale):  # type: ignore[no-untyped-def]
    """Return the scale as `grid.round_scales` does.

    It is the nearest number with 8 significant bits, infinite beyond float16. Subnormal numbers are
    rounded up.
    """
    magnitude = tl.abs(scale)
    subnormal = tl.ceil(magnitude * (1.0 / SMALLEST)) * SMALLEST
    subnormal = tl.where(magnitude == 0, SMALLEST_NORMAL, subnormal)
    magnitude = tl.where(magnitude < SMALLEST_NORMAL, subnormal, magnitude)
    pattern = magnitude.to(tl.int32, bitcast=True)
    pattern = (pattern + 0x7FFF + ((pattern >> 16) & 1)) & -65536
    magnitude = pattern.to(tl.float32, bitcast=True)
    magnitude = tl.where(magnitude > LARGEST, float("inf"), magnitude)
    return tl.where(scale < 0, -magnitude, magnitude)


@triton.jit  # type: ignore[untyped-decorator]
def round_columns_kernel(  # type: ignore[no-untyped-def]
    values,
    errors,
    R,
    scales,
    zeros,
    group_of,
    out_features,
    n_columns,
    max_code,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round n columns one after the other and pass each error on to the columns right of it.

    values [n, O]: v in, codes out; errors [n, O]: w in, w - q out; R [n, n]; scales, zeros [G, O];
    group_of int32 [n].
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < out_features
    columns = tl.arange(0, B)
    tile = columns[None, :].to(tl.int64) * out_features + rows[:, None]
    v = tl.load(values + tile, mask=inside[:, None] & (columns < n_columns)[None, :], other=0.0)
    position = rows
    for column in range(n_columns):  # not unrolled: that would compile for minutes
        group = tl.load(group_of + column).to(tl.int64)
        weight = tl.load(errors + position, mask=inside, other=0.0)
        scale = tl.load(scales + group * out_features + rows, mask=inside, other=1.0)
        zero = tl.load(zeros + group * out_features + rows, mask=inside, other=0.0)
        right = tl.load(
            R + column * n_columns + columns,
            mask=(columns > column) & (columns < n_columns),
            other=0.0,
        )

        value = tl.sum(tl.where((columns == column)[None, :], v, 0.0), axis=1)
        level = nearest_level(tl.div_rn(value, scale), zero, max_code)
        error = weight - scale * level
        v += error[:, None] * right[None, :]
        tl.store(values + position, level + zero, mask=inside)
        tl.store(errors + position, error, mask=inside)
        position += out_features


@triton.jit  # type: ignore[untyped-decorator]
def fit_codes_kernel(  # type: ignore[no-untyped-def]
    slopes,
    errors,
    levels,
    hessian,
    scales,
    zeros,
    out_features,
    n_columns,
    max_code,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Run coordinate descent over n columns: move each code to its best point.

    After each move the slopes of the columns right of it are updated, in registers only.
    slopes [n, O]: P, not written; errors, levels [n, O]: in place; hessian [n, n]; scales,
    zeros [O]: those of the group.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < out_features
    columns = tl.arange(0, B)
    tile = columns[None, :].to(tl.int64) * out_features + rows[:, None]
    p = tl.load(slopes + tile, mask=inside[:, None] & (columns < n_columns)[None, :], other=0.0)
    scale = tl.load(scales + rows, mask=inside, other=1.0)
    zero = tl.load(zeros + rows, mask=inside, other=0.0)
    position = rows
    for column in range(n_columns):
        level = tl.load(levels + position, mask=inside, other=0.0)
        error = tl.load(errors + position, mask=inside, other=0.0)
        curvature = tl.load(hessian + column * n_columns + column)
        right = tl.load(
            hessian + column * n_columns + columns,
            mask=(columns > column) & (columns < n_columns),
            other=0.0,
        )

        slope = tl.sum(tl.where((columns == column)[None, :], p, 0.0), axis=1)
        target = level * scale + tl.div_rn(slope, tl.zeros([ROWS], tl.float32) + curvature)
        nearest = nearest_level(tl.div_rn(target, scale), zero, max_code)
        move = (nearest - level) * scale
        p -= move[:, None] * right[None, :]
        tl.store(levels + position, nearest, mask=inside)
        tl.store(errors + position, error - move, mask=inside)
        position += out_features


@triton.jit  # type: ignore[untyped-decorator]
def fit_scales_kernel(  # type: ignore[no-untyped-def]
    slopes,
    curvatures,
    levels,
    errors,
    scales,
    out_features,
    n_columns,
    SIGNED: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Fit the scale of a group for fixed levels, if that lowers the loss.

    curvatures [n, O]: H_gg b; levels [n, O]: b; slopes [n, O]: P, in place; errors [n, O] and
    scales [O]: in place.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < out_features
    columns = tl.arange(0, B).to(tl.int64)
    slope = tl.zeros([ROWS], tl.float32)
    curvature = tl.zeros([ROWS], tl.float32)
    for start in range(0, n_columns, B):
        tile = (start + columns)[:, None] * out_features + rows[None, :]
        here = (start + columns < n_columns)[:, None] & inside[None, :]
        level = tl.load(levels + tile, mask=here, other=0.0)
        slope += tl.sum(level * tl.load(slopes + tile, mask=here, other=0.0), axis=0)
        curvature += tl.sum(level * tl.load(curvatures + tile, mask=here, other=0.0), axis=0)

    scale = tl.load(scales + rows, mask=inside, other=1.0)
    best = scale + tl.div_rn(slope, tl.maximum(curvature, 1.1754943508222875e-38))
    if not SIGNED:
        best = tl.maximum(best, 0.0)
    step = stored_scale(best) - scale
    step = tl.where(step * (curvature * step - 2 * slope) < 0, step, 0.0)
    tl.store(scales + rows, scale + step, mask=inside)
    for start in range(0, n_columns, B):
        tile = (start + columns)[:, None] * out_features + rows[None, :]
        here = (start + columns < n_columns)[:, None] & inside[None, :]
        level = tl.load(levels + tile, mask=here, other=0.0)
        error = tl.load(errors + tile, mask=here, other=0.0)
        slope_tile = tl.load(slopes + tile, mask=here, other=0.0)
        curvature_tile = tl.load(curvatures + tile, mask=here, other=0.0)
        tl.store(errors + tile, error - level * step[None, :], mask=here)
        tl.store(slopes + tile, slope_tile - curvature_tile * step[None, :], mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def best_candidate_kernel(  # type: ignore[no-untyped-def]
    weights,
    scales,
    zeros,
    factors,
    offsets,
    best,
    n_rows,
    n_columns,
    n_candidates,
    max_code,
    norm,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Find for each row of weights [n_rows, n] the candidate with the least rounding error.

    Candidate c of a row has the scale factors[c] * scales[row] and the zero
    zeros[row] + offsets[c]. Its index goes into best int64 [n_rows].
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n_rows
    widest = tl.load(scales + rows, mask=inside, other=1.0)
    usual = tl.load(zeros + rows, mask=inside, other=1.0)
    candidates = tl.arange(0, CANDIDATES)
    losses = tl.zeros([ROWS, CANDIDATES], tl.float32)
    for start in range(0, n_columns, B):
        columns = start + tl.arange(0, B)
        here = inside[:, None] & (columns < n_columns)[None, :]
        weight = tl.load(
            weights + rows[:, None] * n_columns + columns[None, :], mask=here, other=0.0
        )
        for candidate in range(n_candidates):
            scale = stored_scale(widest * tl.load(factors + candidate))
            zero = tl.minimum(tl.maximum(usual + tl.load(offsets + candidate), 1.0), max_code)
            # If the inverse moves a value across a tie, both neighbours have the same error.
            level = nearest_level(weight * (1.0 / scale)[:, None], zero[:, None], max_code)
            error = level * scale[:, None] - weight
            loss = tl.sum(tl.exp2(norm * tl.log2(tl.maximum(tl.abs(error), 1e-30))), axis=1)
            losses += tl.where((candidates == candidate)[None, :], loss[:, None], 0.0)
    losses = tl.where(
        (losses == losses) & (candidates < n_candidates)[None, :], losses, float("inf")
    )
    tl.store(best + rows, tl.argmin(losses, axis=1, tie_break_left=True), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_kernel(  # type: ignore[no-untyped-def]
    qweight,
    qzeros,
    scales,
    g_idx,
    weight,
    out_features,
    in_features,
    zero_offset,
    BITS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Decode a tile [BLOCK_O, BLOCK_I] of weight [O, I] in each program.

    qweight [I*BITS/32, O], qzeros [G, O*BITS/32], scales [G, O] and g_idx [I] are contiguous.
    `zero_offset` is added to a stored zero, modulo 2**BITS.
    """
    # 64-bit offsets: a tensor of a large layer has more than 2**31 elements.
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)[None, :]
    o = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)[:, None]
    inside = (i < in_features) & (o < out_features)
    group = tl.load(g_idx + i, mask=i < in_features, other=0).to(tl.int64)

    word, shift = i * BITS // 32, i * BITS % 32
    fields = (
        tl.load(qweight + word * out_features + o, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    )
    straddles = inside & (shift + BITS > 32)
    fields |= (
        tl.load(qweight + (word + 1) * out_features + o, mask=straddles, other=0).to(tl.int64) << 32
    )
    code = (fields >> shift) & (2**BITS - 1)

    row, word, shift = group * (out_features * BITS // 32), o * BITS // 32, o * BITS % 32
    fields = tl.load(qzeros + row + word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    straddles = inside & (shift + BITS > 32)
    fields |= tl.load(qzeros + row + word + 1, mask=straddles, other=0).to(tl.int64) << 32
    zero = ((fields >> shift) + zero_offset) & (2**BITS - 1)

    scale = tl.load(scales + group * out_features + o, mask=inside, other=0.0).to(tl.float32)
    value = scale * (code - zero).to(tl.float32)
    tl.store(weight + o * in_features + i, value.to(weight.dtype.element_ty), mask=inside)
