"""Readers of one tensor at a time, and the coding of quantized linears.

`encode` turns a QuantizedLinear into the four tensors of a GPTQ checkpoint, version `gptq` (v1) or
`gptq_v2`, and `decode` turns them back; `layout.py` has their shapes. Small integers are packed as
one little-endian bit stream along the first dimension: bit p of the stream is bit p % 32 of word
p // 32, so that 32 values of `bits` bits fill exactly `bits` words. For 2, 4 and 8 bits this is
"32 / bits values a word, lowest first"; for 3 bits it is AutoGPTQ's 10-1-10-1-10 layout.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptq_cli.checkpoint.layout import (
    FP8,
    PARTS,
    PackedModule,
    block_size,
    packed_modules,
    part_names,
    stored_parts,
)
from gptq_cli.checkpoint.quantization_config import STORED_OFFSET, format_of
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.files import file_errors
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.triton_launch import dequantize_packed

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


SAFETENSORS_DTYPE = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip

CPU = torch.device("cpu")
# Messages of torch that end with an errno.
_TORCH_ERROR = re.compile(r"unable to (?:open|mmap|stat|resize) .*\((\d+)\)\s*\Z", re.DOTALL)
Read = Callable[[str], Tensor]


@contextmanager
def _system_errors(file: str) -> Iterator[None]:
    """Turn errors of the system about `file`, also those that torch reports, into a GptqError."""
    with file_errors(file, writing=False):
        try:
            yield
        except RuntimeError as error:
            match = _TORCH_ERROR.search(str(error))
            if match is None:
                raise
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from error


class TensorReader:
    """Reads the tensors of one checkpoint by name, straight from its files, on the CPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._tensors = checkpoint, checkpoint.tensors
        self._open: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """Return the tensor as stored; its memory may be the file's own pages.

        Raises the InputError of `check_unchanged`.
        """
        file = str(self._tensors[name].file)
        opened = self._open.get(file)  # another thread may release it meanwhile
        if opened is None:
            self.check_unchanged()
            # Python reports why a file cannot be opened in more detail than safetensors.
            with _system_errors(file), Path(file).open("rb"):
                opened = self._open[file] = safe_open(file, framework="pt", device="cpu")
        with _system_errors(file):
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Make the system read these tensors from the disk in advance (Linux)."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = [self._tensors[name] for name in names]
        for file, tensors in groupby(wanted, key=lambda tensor: tensor.file):
            with file.open("rb") as opened:
                descriptor = opened.fileno()
                for tensor in tensors:
                    size = tensor.nbytes
                    os.posix_fadvise(descriptor, tensor.start, size, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise InputError E_SOURCE_CHANGED if a file changed since the checkpoint was opened."""
        self._checkpoint.check_unchanged()

    def release(self) -> None:
        """Close the files, so that their mapped pages can be freed with the last tensor."""
        self._open.clear()


class DequantizingReader:
    """Reads a GPTQ checkpoint as a full-precision model: `X.qweight`, ... appear as `X.weight`.

    It reads v1 and v2, 2, 3, 4 and 8 bits, with g_idx or without. The shapes show the bits, so
    that mixed checkpoints need no rules. With `backend` "triton" the packed words are moved to
    `device` and decoded there by one kernel.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, backend: str) -> None:
        self._tensors = checkpoint.tensors
        self._raw = TensorReader(checkpoint)
        self._format = format_of(checkpoint)
        self._modules = {module.name: module for module in packed_modules(checkpoint.tensors)}
        self._device, self._backend = device, backend

    def names(self) -> list[str]:
        names = [f"{module}.weight" for module in self._modules]
        plain = [name for name in self._tensors if name.rpartition(".")[2] not in PARTS]
        return plain + names

    def read(self, name: str) -> Tensor:
        """Return the stored tensor, or the dequantized weight [O, I] in float32."""
        if name in self._tensors:
            return self._raw.read(name)
        module = self._modules[name.removesuffix(".weight")]
        packed = self._packed(module)
        if self._backend == "triton":
            moved = {part: tensor.to(self._device) for part, tensor in packed.items()}
            return dequantize_packed(
                **moved, bits=module.bits, v2=self._format == "gptq_v2", dtype=torch.float32
            )
        # Contiguous, as a stored weight: products of another layout differ in their last bits.
        return decode(packed, module.bits, self._format).dequantize().contiguous()

    def prefetch(self, names: Iterable[str]) -> None:
        """Do the same as TensorReader, for tensors and for the parts of weights."""
        stored: list[str] = []
        for name in names:
            if name in self._tensors:
                stored.append(name)
            else:
                stored += part_names(name.removesuffix(".weight"), self._tensors)
        self._raw.prefetch(stored)

    def check_unchanged(self) -> None:
        """Do the same as TensorReader."""
        self._raw.check_unchanged()

    def release(self) -> None:
        """Do the same as TensorReader."""
        self._raw.release()

    def linear(self, name: str) -> QuantizedLinear:
        """Return the codes and the grid of one quantized linear."""
        module = self._modules[name]
        return decode(self._packed(module), module.bits, self._format)

    def _packed(self, module: PackedModule) -> dict[str, Tensor]:
        """Return the packed tensors of a linear by part, with a g_idx in any case."""
        packed = {}
        for part in stored_parts(module.name, self._tensors):
            packed[part] = self._raw.read(f"{module.name}.{part}")
        if "g_idx" not in packed:
            packed["g_idx"] = columns_in_order(module)
        return packed


class BlockFloatReader:
    """Reads a checkpoint of 8-bit floats as a bfloat16 one, in which scales do not appear."""

    def __init__(self, checkpoint: Checkpoint, scales: dict[str, str]) -> None:
        block = block_size(checkpoint.quantization or {})
        assert block is not None
        self._raw, self._scales, self._block = TensorReader(checkpoint), scales, block

    def names(self) -> list[str]:
        hidden = set(self._scales.values())
        return [name for name in self._raw.names() if name not in hidden]

    def read(self, name: str) -> Tensor:
        """Return the stored tensor, or its product with its scales in bfloat16."""
        tensor = self._raw.read(name)
        if name not in self._scales:
            return tensor
        return scale_blocks(tensor, self._raw.read(self._scales[name]), self._block)

    def prefetch(self, names: Iterable[str]) -> None:
        """Do the same as TensorReader, for weights and their scales."""
        stored = []
        for name in names:
            stored.append(name)
            if name in self._scales:
                stored.append(self._scales[name])
        self._raw.prefetch(stored)

    def check_unchanged(self) -> None:
        """Do the same as TensorReader."""
        self._raw.check_unchanged()

    def release(self) -> None:
        """Do the same as TensorReader."""
        self._raw.release()


PlainReader = TensorReader | DequantizingReader | BlockFloatReader


def open_reader(
    checkpoint: Checkpoint, device: torch.device = CPU, backend: str = "torch"
) -> PlainReader:
    """Return a reader of the plain weights that `checkpoint` stands for.

    Raises the errors of `format_of` and `Checkpoint.scales`.
    """
    scales = checkpoint.scales()
    if scales:
        return BlockFloatReader(checkpoint, scales)
    if checkpoint.method in (None, FP8):
        return TensorReader(checkpoint)
    return DequantizingReader(checkpoint, device, backend)


def scale_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return `weight` [O, I] times the scale of each block, in bfloat16.

    `scales` are [ceil(O / rows), ceil(I / columns)], `block` is (rows, columns).
    """
    rows, columns = block
    scaled = weight.float()
    of_columns = scales.float().repeat_interleave(columns, 1)[:, : weight.shape[1]]
    for band, scale in zip(scaled.split(rows), of_columns, strict=True):
        band.mul_(scale)
    return scaled.bfloat16()


def columns_in_order(module: PackedModule) -> Tensor:
    """Return the g_idx [I] of a linear whose groups are runs of columns."""
    columns = torch.arange(module.in_features, dtype=torch.int32)
    return columns // (module.in_features // module.groups)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of `tensor` as they are stored.

    There is no copy if the tensor is contiguous and on the CPU.
    """
    array: Any = tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
    return memoryview(array)
