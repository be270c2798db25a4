"""Readers of one tensor at a time; quantized linears come back as plain weights."""

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

from gptq_cli.checkpoint.codec import decode
from gptq_cli.checkpoint.packed import (
    FP8,
    PARTS,
    PackedModule,
    block_size,
    packed_modules,
    part_names,
    stored_parts,
)
from gptq_cli.checkpoint.quantization_config import format_of
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.files import file_errors
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.triton_launch import dequantize_packed

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
