"""The Triton kernel behind `triton_dequantize`; importing this module needs triton.

Tensors of a GPTQ checkpoint hold `BITS`-bit fields in a little-endian stream of 32-bit words: field i lies at bits
[BITS i, BITS i + BITS), which for 3 bits may straddle two words. `qweight` streams run down its rows, along I; `qzeros`
streams run along its columns, along O.
"""

import triton
import triton.language as tl


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
    """One program writes weight [BLOCK_O, BLOCK_I] of [O, I], from qweight [I*BITS/32, O], qzeros [G, O*BITS/32],
    scales [G, O] and g_idx [I], all contiguous. `zero_offset` is added to a stored zero, modulo 2**BITS."""
    # 64-bit offsets: a tensor of a large layer has more than 2**31 elements.
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)[None, :]
    o = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)[:, None]
    inside = (i < in_features) & (o < out_features)
    group = tl.load(g_idx + i, mask=i < in_features, other=0).to(tl.int64)

    word, shift = i * BITS // 32, i * BITS % 32
    fields = tl.load(qweight + word * out_features + o, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    straddles = inside & (shift + BITS > 32)
    fields |= tl.load(qweight + (word + 1) * out_features + o, mask=straddles, other=0).to(tl.int64) << 32
    code = (fields >> shift) & (2**BITS - 1)

    row, word, shift = group * (out_features * BITS // 32), o * BITS // 32, o * BITS % 32
    fields = tl.load(qzeros + row + word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    straddles = inside & (shift + BITS > 32)
    fields |= tl.load(qzeros + row + word + 1, mask=straddles, other=0).to(tl.int64) << 32
    zero = ((fields >> shift) + zero_offset) & (2**BITS - 1)

    scale = tl.load(scales + group * out_features + o, mask=inside, other=0.0).to(tl.float32)
    value = scale * (code - zero).to(tl.float32)
    tl.store(weight + o * in_features + i, value.to(weight.dtype.element_ty), mask=inside)
