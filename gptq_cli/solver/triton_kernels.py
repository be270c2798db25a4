"""The Triton kernels that `triton_launch` launches; importing this module needs triton.

Kernels of the solver run in float32, without a vendor's library, and add in a fixed order, so that
two runs give the same bits. A matrix [n, O] holds the columns of a layer one after the
other: neighbours in memory belong to neighbouring rows of the weight. A program owns some rows and
keeps what it needs of them in registers.

Tensors of a GPTQ checkpoint hold `BITS`-bit fields in a little-endian stream of 32-bit words: field
i lies at bits [BITS i, BITS i + BITS), which for 3 bits may straddle two words. `qweight` streams
run down its rows, along I; `qzeros` streams run along its columns, along O.

Letters for shapes:  O out_features   G groups   n columns taken together
E experts of equal shapes: O counts the rows of all of them, those of the first one first
B, S, ROWS powers of two: B holds n, S columns are in registers at a time, a program has ROWS rows

Experts have matrices of their own, `.._distance` elements apart, and the second axis of the grid of
programs. An expert has `n_rows` rows; a dense layer is one expert.

Columns that depend on each other are taken S at a time. Inside these S, one column passes on to
the next in registers; then `pass_on` brings what they did to all later columns in one product.
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


@triton.jit
def float16_scale(scale):  # type: ignore[no-untyped-def]
    """Return the scale, 0 or more, as `grid.find_grid` stores it: the nearest number of float16.

    It is infinite beyond float16. Subnormal numbers are rounded up.
    """
    subnormal = tl.ceil(scale * (1.0 / SMALLEST)) * SMALLEST
    subnormal = tl.where(scale == 0, SMALLEST_NORMAL, subnormal)
    scale = tl.where(scale < SMALLEST_NORMAL, subnormal, scale)
    return scale.to(tl.float16).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def pass_on(  # type: ignore[no-untyped-def]
    target, factors, stride, done, start, n_columns, rows, inside, out_features, S: tl.constexpr
):
    """Add factors[done, later] times `done` [S, rows] to the columns of `target` after `done`.

    `done` holds columns start..start + S; `factors` [n, n] has rows `stride` apart.
    """
    few = tl.arange(0, S)
    columns = start + few
    for first in range(start + S, n_columns, S):
        later = first + few
        here = (later < n_columns)[:, None] & inside[None, :]
        tile = later[:, None].to(tl.int64) * out_features + rows[None, :]
        # [later, columns]: read along rows of `factors`
        mixed = tl.load(
            factors + columns[None, :].to(tl.int64) * stride + later[:, None],
            mask=(later < n_columns)[:, None],
            other=0.0,
        )
        found = tl.load(target + tile, mask=here, other=0.0)
        found = tl.dot(mixed, done, found, input_precision="tf32x3")
        tl.store(target + tile, found, mask=here)
    tl.debug_barrier()  # other threads read what was just passed on


@triton.jit  # type: ignore[untyped-decorator]
def find_grids_kernel(  # type: ignore[no-untyped-def]
    values,
    errors,
    inverse,
    inverse_distance,
    scales,
    zeros,
    group_of,
    group_distance,
    out_features,
    n_rows,
    n_columns,
    max_code,
    SYM: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Find the min/max grid of one group of columns from its updated weights.

    These are u = w + (v - w) R⁻¹. values [n, O]: v; errors [n, O]: w; inverse [n, n]: R⁻¹;
    group_of int32: the first entry names the row of scales, zeros [G, O] that receives the grid.
    A row with a weight that is not finite gets an infinite scale.
    """
    expert = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n_rows
    rows += expert * n_rows
    inverse += expert * inverse_distance
    group_of += expert * group_distance
    columns = tl.arange(0, B)
    tile = columns[:, None].to(tl.int64) * out_features + rows[None, :]
    here = (columns < n_columns)[:, None] & inside[None, :]
    updated = tl.load(errors + tile, mask=here, other=0.0)
    for start in range(0, n_columns, K):
        some = start + tl.arange(0, K)
        part = some[:, None].to(tl.int64) * out_features + rows[None, :]
        there = (some < n_columns)[:, None] & inside[None, :]
        value = tl.load(values + part, mask=there, other=0.0)
        feedback = value - tl.load(errors + part, mask=there, other=0.0)
        mixed = tl.load(
            inverse + some[None, :] * n_columns + columns[:, None],
            mask=(columns < n_columns)[:, None] & (some < n_columns)[None, :],
            other=0.0,
        )
        updated = tl.dot(mixed, feedback, updated, input_precision="tf32x3")

    if SYM:
        scale = float16_scale(tl.div_rn(tl.max(tl.abs(updated), axis=0) * 2, max_code))
        zero = tl.full([ROWS], 0.5, tl.float32) * (max_code + 1)
    else:
        low = tl.minimum(tl.min(updated, axis=0), 0.0)
        high = tl.maximum(tl.max(updated, axis=0), 0.0)
        scale = float16_scale(tl.div_rn(high - low, max_code))
        zero = nearest_level(tl.div_rn(-low, scale), 0.0, max_code)
        # If a zero is raised from 0 to 1, the largest weight has one step less.
        scale = tl.where(zero < 1, float16_scale(tl.div_rn(high, max_code - 1)), scale)
        zero = tl.maximum(zero, 1.0)
    finite = tl.sum(updated - updated, axis=0) == 0
    grid = tl.load(group_of).to(tl.int64) * out_features + rows
    tl.store(scales + grid, tl.where(finite, scale, float("inf")), mask=inside)
    tl.store(zeros + grid, zero, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def round_columns_kernel(  # type: ignore[no-untyped-def]
    values,
    errors,
    R,
    R_stride,
    R_distance,
    scales,
    zeros,
    group_of,
    group_distance,
    out_features,
    n_rows,
    n_columns,
    max_code,
    S: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round n columns one after the other and pass each error on to the columns right of it.

    values [n, O]: v in, codes out; errors [n, O]: w in, w - q out; R [n, n] with rows R_stride
    apart; scales, zeros [G, O]; group_of int32 [n].
    """
    expert = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n_rows
    rows += expert * n_rows
    R += expert * R_distance
    group_of += expert * group_distance
    few = tl.arange(0, S)
    position = rows
    grid = tl.load(group_of).to(tl.int64) * out_features + rows
    weight = tl.load(errors + position, mask=inside, other=0.0)
    scale = tl.load(scales + grid, mask=inside, other=1.0)
    zero = tl.load(zeros + grid, mask=inside, other=0.0)
    for start in range(0, n_columns, S):
        columns = start + few
        tile = columns[:, None].to(tl.int64) * out_features + rows[None, :]
        here = (columns < n_columns)[:, None] & inside[None, :]
        v = tl.load(values + tile, mask=here, other=0.0)
        passed = tl.zeros([S, ROWS], tl.float32)
        for column in range(start, min(start + S, n_columns)):  # not unrolled
            # What the next column needs is read ahead, so that it need not wait for the memory.
            ahead = min(column + 1, n_columns - 1)
            grid = tl.load(group_of + ahead).to(tl.int64) * out_features + rows
            next_weight = tl.load(errors + ahead * out_features + rows, mask=inside, other=0.0)
            next_scale = tl.load(scales + grid, mask=inside, other=1.0)
            next_zero = tl.load(zeros + grid, mask=inside, other=0.0)
            right = tl.load(
                R + column * R_stride + columns,
                mask=(columns > column) & (columns < n_columns),
                other=0.0,
            )
            chosen = (columns == column)[:, None]
            value = tl.sum(tl.where(chosen, v, 0.0), axis=0)
            level = nearest_level(tl.div_rn(value, scale), zero, max_code)
            error = weight - scale * level
            v += right[:, None] * error[None, :]
            passed = tl.where(chosen, error[None, :], passed)
            tl.store(values + position, level + zero, mask=inside)
            tl.store(errors + position, error, mask=inside)
            position += out_features
            weight, scale, zero = next_weight, next_scale, next_zero
        pass_on(values, R, R_stride, passed, start, n_columns, rows, inside, out_features, S)


@triton.jit  # type: ignore[untyped-decorator]
def fit_codes_kernel(  # type: ignore[no-untyped-def]
    slopes,
    changes,
    levels,
    hessian,
    hessian_stride,
    hessian_distance,
    scales,
    zeros,
    out_features,
    n_rows,
    n_columns,
    max_code,
    S: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Run coordinate descent over n columns: move each code to its best point.

    After each move the slopes of the columns right of it are updated.
    slopes [n, O]: P, overwritten; changes, levels [n, O]: in place; hessian [n, n] with rows
    hessian_stride apart; scales, zeros [O]: those of the group.
    """
    expert = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n_rows
    rows += expert * n_rows
    hessian += expert * hessian_distance
    few = tl.arange(0, S)
    scale = tl.load(scales + rows, mask=inside, other=1.0)
    zero = tl.load(zeros + rows, mask=inside, other=0.0)
    per_level = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), scale)
    position = rows
    level = tl.load(levels + position, mask=inside, other=0.0)
    for start in range(0, n_columns, S):
        columns = start + few
        tile = columns[:, None].to(tl.int64) * out_features + rows[None, :]
        here = (columns < n_columns)[:, None] & inside[None, :]
        p = tl.load(slopes + tile, mask=here, other=0.0)
        passed = tl.zeros([S, ROWS], tl.float32)
        for column in range(start, min(start + S, n_columns)):
            # The level of the next column is read ahead, so that it need not wait for the memory.
            ahead = min(column + 1, n_columns - 1)
            next_level = tl.load(levels + ahead * out_features + rows, mask=inside, other=0.0)
            change = tl.load(changes + position, mask=inside, other=0.0)
            row = hessian + column * hessian_stride
            curvature = tl.load(row + column)
            right = tl.load(
                row + columns, mask=(columns > column) & (columns < n_columns), other=0.0
            )
            chosen = (columns == column)[:, None]
            slope = tl.sum(tl.where(chosen, p, 0.0), axis=0)
            nearest = nearest_level(level + slope * per_level / curvature, zero, max_code)
            change_here = (level - nearest) * scale
            p += right[:, None] * change_here[None, :]
            passed = tl.where(chosen, change_here[None, :], passed)
            tl.store(levels + position, nearest, mask=inside)
            tl.store(changes + position, change + change_here, mask=inside)
            position += out_features
            level = next_level
        pass_on(
            slopes, hessian, hessian_stride, passed, start, n_columns, rows, inside, out_features, S
        )


@triton.jit  # type: ignore[untyped-decorator]
def fit_scales_kernel(  # type: ignore[no-untyped-def]
    slopes,
    changes,
    levels,
    hessian,
    hessian_stride,
    hessian_distance,
    scales,
    out_features,
    n_rows,
    n_columns,
    SIGNED: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Fit the scale of a group for fixed levels, if that lowers the loss.

    levels [n, O]: b; slopes [n, O]: P, in place; changes [n, O]: of the errors, out; hessian
    [n, n] with rows hessian_stride apart; scales [O]: in place.
    """
    expert = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n_rows
    rows += expert * n_rows
    hessian += expert * hessian_distance
    columns = tl.arange(0, B)
    bends = tl.zeros([B, ROWS], tl.float32)  # H_gg b
    for start in range(0, n_columns, K):
        some = start + tl.arange(0, K)
        there = some < n_columns
        level = tl.load(
            levels + some[:, None].to(tl.int64) * out_features + rows[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        # H is symmetric: it is read along its rows
        mixed = tl.load(
            hessian + some[None, :].to(tl.int64) * hessian_stride + columns[:, None],
            mask=(columns < n_columns)[:, None] & there[None, :],
            other=0.0,
        )
        bends = tl.dot(mixed, level, bends, input_precision="tf32x3")

    tile = columns[:, None].to(tl.int64) * out_features + rows[None, :]
    here = (columns < n_columns)[:, None] & inside[None, :]
    level = tl.load(levels + tile, mask=here, other=0.0)
    p = tl.load(slopes + tile, mask=here, other=0.0)
    slope = tl.sum(level * p, axis=0)
    curvature = tl.sum(level * bends, axis=0)
    scale = tl.load(scales + rows, mask=inside, other=1.0)
    best = scale + tl.div_rn(slope, tl.maximum(curvature, 1.1754943508222875e-38))
    if not SIGNED:
        best = tl.maximum(best, 0.0)
    step = stored_scale(best) - scale
    step = tl.where(step * (curvature * step - 2 * slope) < 0, step, 0.0)
    tl.store(scales + rows, scale + step, mask=inside)
    tl.store(changes + tile, -level * step[None, :], mask=here)
    tl.store(slopes + tile, p - bends * step[None, :], mask=here)


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
