"""QuantizedLinear <-> the four tensors of a GPTQ checkpoint, versions `gptq` (v1) and `gptq_v2`.

qweight int32 [I * bits / 32, O]    codes, packed along I
qzeros  int32 [G, O * bits / 32]    zero points, packed along O
scales  float16 [G, O]
g_idx   int32 [I]                   group of each input column
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.checkpoint.packing import pack, unpack
from gptq_cli.checkpoint.stored import STORED_OFFSET
from gptq_cli.engine.layer import QuantizedLinear


def encode(linear: QuantizedLinear, format: str) -> dict[str, Tensor]:
    """The tensors of `linear` by suffix, contiguous, on the device of its codes."""
    stored = linear.zeros - STORED_OFFSET[format]
    return {
        "qweight": pack(linear.codes.T, linear.bits).contiguous(),
        "qzeros": pack(stored, linear.bits).T.contiguous(),
        "scales": linear.scales.T.contiguous(),
        "g_idx": linear.group_of_column.to(torch.int32).contiguous(),
    }


def decode(tensors: dict[str, Tensor], bits: int, format: str) -> QuantizedLinear:
    """The layer that `encode` wrote, or another tool did; v1 zero points wrap at 2**bits as AutoGPTQ reads them."""
    stored = unpack(tensors["qzeros"].T, bits)
    return QuantizedLinear(
        codes=unpack(tensors["qweight"], bits).T,
        scales=tensors["scales"].T,
        zeros=(stored + STORED_OFFSET[format]) & (2**bits - 1),
        group_of_column=tensors["g_idx"],
        bits=bits,
    )
