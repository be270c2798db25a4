"""Packed GPTQ tensors to a float weight in one pass on the device, for evaluating quantized checkpoints.

Letters for shapes:  O out_features   I in_features   G groups
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_O = 32
BLOCK_I = 64


def dequantize_packed(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, v2: bool, dtype: torch.dtype
) -> Tensor:
    """The weight [O, I] in `dtype`: scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o]), computed in float32.

    Takes qweight int32 [I*bits/32, O], qzeros int32 [G, O*bits/32], scales [G, O] and g_idx [I] as checkpoints hold
    them, for 2, 3, 4 and 8 bits. Format `gptq_v2` stores zeros as they are, `gptq` (v2 false) zero - 1 modulo 2**bits.
    Needs triton, imported at the first call, and tensors on an accelerator.
    """
    from gptq_cli.engine.dequantize_kernel import dequantize_kernel

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
