"""QuantizedLinear <-> the four tensors of a GPTQ checkpoint, versions `gptq` (v1) and `gptq_v2`.

`packed.py` has the shapes of the tensors.

Small integers are packed as one little-endian bit stream along the first dimension: bit p of the
stream is bit p % 32 of word p // 32, so that 32 values of `bits` bits fill exactly `bits` words.
For 2, 4 and 8 bits this is "32 / bits values a word, lowest first"; for 3 bits it is AutoGPTQ's
10-1-10-1-10 layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.checkpoint.quantization_config import STORED_OFFSET
from gptq_cli.solver.quantized_linear import QuantizedLinear

VALUES = 32  # values packed together


def encode(linear: QuantizedLinear, format: str) -> dict[str, Tensor]:
    """Return the tensors of `linear` by part, contiguous, on the device of its codes."""
    stored = linear.zeros - STORED_OFFSET[format]
    return {
        "qweight": pack(linear.codes.T, linear.bits).contiguous(),
        "qzeros": pack(stored, linear.bits).T.contiguous(),
        "scales": linear.scales.T.contiguous(),
        "g_idx": linear.group_of_column.to(torch.int32).contiguous(),
    }


def decode(tensors: dict[str, Tensor], bits: int, format: str) -> QuantizedLinear:
    """Return the layer that `encode`, or another tool, has written.

    Zero points of v1 wrap at 2**bits, as AutoGPTQ reads them.
    """
    stored = unpack(tensors["qzeros"].T, bits)
    return QuantizedLinear(
        codes=unpack(tensors["qweight"], bits).T,
        scales=tensors["scales"].T,
        zeros=(stored + STORED_OFFSET[format]) & (2**bits - 1),
        group_of_column=tensors["g_idx"],
        bits=bits,
    )


def pack(values: Tensor, bits: int) -> Tensor:
    """Return words int32 [N * bits / 32, C] that hold unsigned integers `values` [N, C].

    Values must be below 2**bits, and N must be a multiple of 32.
    """
    groups = values.unflatten(0, (-1, VALUES))
    words = torch.zeros(
        groups.shape[0], bits, *values.shape[1:], dtype=torch.int32, device=values.device
    )
    for index in range(VALUES):
        word, offset = divmod(index * bits, 32)
        value = groups[:, index].to(torch.int32)
        words[:, word] |= value << offset
        if offset + bits > 32:
            words[:, word + 1] |= value >> (32 - offset)
    return words.flatten(0, 1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the values uint8 [N, C] in `words` int32 [N * bits / 32, C]: the inverse of `pack`."""
    groups = words.unflatten(0, (-1, bits))
    values = torch.empty(
        groups.shape[0], VALUES, *words.shape[1:], dtype=torch.uint8, device=words.device
    )
    mask = 2**bits - 1
    for index in range(VALUES):
        word, offset = divmod(index * bits, 32)
        # The shift is arithmetic; the mask removes the copies of the sign.
        value = groups[:, word] >> offset
        if offset + bits > 32:
            low = 32 - offset
            value = (value & (2**low - 1)) | (groups[:, word + 1] << low)
        values[:, index] = value & mask
    return values.flatten(0, 1)
