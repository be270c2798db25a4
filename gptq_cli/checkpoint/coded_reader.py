"""Reads weights in codes as plain ones, one at a time.

Products are made in float32 and rounded as the library of each form rounds them: once to the dtype
of the scales, if that has 16 bits, then to the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gptq_cli.checkpoint.coded import AWQ_OUTPUTS, Block, Coded, plain_tensors
from gptq_cli.checkpoint.compressed_tensors import CompressedTensorsPacking
from gptq_cli.checkpoint.reader import SAFETENSORS_DTYPE, TensorReader
from gptq_cli.checkpoint.reader import decode as decode_linear
from gptq_cli.checkpoint.source import Checkpoint

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the last bit of four is the sign
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each of eight outputs
STACKS_KEPT = 2  # gate_up_proj and down_proj of one layer
STORED_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPE.items()}


class CodedReader:
    """Reads a checkpoint with weights in codes as the plain model, whose scales do not appear."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._raw, self._coded = TensorReader(checkpoint), checkpoint.coded()
        self._names = list(plain_tensors(checkpoint, self._coded)[0])
        # Each expert is read as a part of its stack, which is not decoded for each of them.
        self._stacks: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str) -> Tensor:
        """Return the stored tensor, or the decoded weight in the dtype of the model."""
        coded = self._coded.get(name)
        if coded is None:
            return self._raw.read(name)
        if coded.kind != "stacked fp4":
            return decode(coded, self._parts(coded))
        stack = self._stacks.get(name)
        if stack is None:
            stack = decode(coded, self._parts(coded))
            for oldest in list(self._stacks)[: 1 - STACKS_KEPT]:
                self._stacks.pop(oldest, None)  # another thread may have removed it
            self._stacks[name] = stack
        return stack

    def _parts(self, coded: Coded) -> dict[str, Tensor]:
        return {role: self._raw.read(stored) for role, stored in coded.parts.items()}

    def prefetch(self, names: Iterable[str]) -> None:
        """Do the same as TensorReader, for tensors and for the parts of weights."""
        stored: list[str] = []
        for name in names:
            if name in self._coded:
                stored += self._coded[name].parts.values()
            else:
                stored.append(name)
        self._raw.prefetch(stored)

    def check_unchanged(self) -> None:
        """Do the same as TensorReader."""
        self._raw.check_unchanged()

    def release(self) -> None:
        """Do the same as TensorReader, and free the experts that were read last."""
        self._stacks.clear()
        self._raw.release()


def decode(coded: Coded, parts: dict[str, Tensor]) -> Tensor:
    """Return the weight for which `parts` stand, contiguous, in the dtype of the model."""
    dtype = STORED_DTYPES[coded.plain.dtype]
    codes, scales = parts["codes"], parts["scales"]
    if coded.kind == "packed":
        return _rounded(_unpacked(coded, parts), scales, dtype)
    if coded.kind == "stacked fp4":
        stack = torch.empty(coded.plain.shape, dtype=dtype)
        for expert, (of_rows, of_groups) in enumerate(zip(codes, scales, strict=True)):
            values = _scaled(fp4_values(of_rows.flatten(1)), as_numbers(of_groups), coded.block)
            stack[expert] = values.T
        return stack
    if coded.kind == "awq":
        return _awq(parts, coded.block[1]).to(dtype).contiguous()
    scales = as_numbers(scales)
    if "divisor" in parts:
        scales = scales / parts["divisor"].float()
    elif "factor" in parts:
        scales = scales * parts["factor"].float()
    values = fp4_values(codes) if coded.kind == "fp4" else codes.float()
    if "zeros" in parts:
        zeros = _grid(parts["zeros"].float(), values, coded.block)
        values = values.unflatten(1, (zeros.shape[1], -1)).sub(zeros.unsqueeze(-1)).flatten(1)
    return _rounded(_scaled(values, scales, coded.block), parts["scales"], dtype)


def _rounded(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 `values` in `dtype`, rounded to the dtype of the scales on the way."""
    if scales.dtype in (torch.float16, torch.bfloat16):
        values = values.to(scales.dtype)
    return values.to(dtype).contiguous()


def _unpacked(coded: Coded, parts: dict[str, Tensor]) -> Tensor:
    """Return the weight [O, I] in float32 of a packed linear of compressed-tensors."""
    stored = {**parts, "weight_packed": parts["codes"], "weight_scale": parts["scales"]}
    return decode_linear(stored, coded.bits, CompressedTensorsPacking()).dequantize()


def fp4_values(codes: Tensor) -> Tensor:
    """Return the numbers float32 [R, 2 * C] in bytes [R, C] of two floats of 4 bits, low first."""
    values = torch.tensor([*E2M1, *[-value for value in E2M1]])
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], 1)
    numbers: Tensor = pairs[codes.view(torch.uint8).int()]
    return numbers.flatten(1)


def as_numbers(scales: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two with a bias of 127."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def _scaled(values: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Return float32 `values` [O, I], changed in place, times the scale of each block."""
    rows, columns = block
    scales = _grid(scales, values, block)
    if rows == 1:
        values.unflatten(1, (-1, columns)).mul_(scales.unsqueeze(-1))
        return values
    of_columns = scales.repeat_interleave(columns, 1)[:, : values.shape[1]]
    for band, scale in zip(values.split(rows), of_columns, strict=True):
        band.mul_(scale)
    return values


def _grid(numbers: Tensor, values: Tensor, block: Block) -> Tensor:
    """Return one number for each block of `values` [O, I], in rows and columns."""
    return numbers.reshape(-(-len(values) // block[0]), -1)


def _awq(parts: dict[str, Tensor], group: int) -> Tensor:
    """Return the weight [O, I] of a linear of AWQ in the dtype of its scales."""
    codes, zeros = _awq_numbers(parts["codes"]), _awq_numbers(parts["zeros"])
    scales = parts["scales"]
    values = (codes.unflatten(0, (-1, group)) - zeros.unsqueeze(1)) * scales.float().unsqueeze(1)
    turned: Tensor = values.flatten(0, 1).to(scales.dtype)
    return turned.T


def _awq_numbers(words: Tensor) -> Tensor:
    """Return the numbers float32 [R, 8 * C] of 4 bits in words [R, C]."""
    shifts = 4 * torch.tensor(AWQ_ORDER, dtype=torch.int32)
    numbers: Tensor = (words.unsqueeze(-1) >> shifts) & 15
    return numbers.reshape(len(words), AWQ_OUTPUTS * words.shape[1]).float()
