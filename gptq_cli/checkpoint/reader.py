"""Tensors out of a checkpoint one at a time; quantized linears come back as plain weights."""

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
from gptq_cli.checkpoint.packed import PARTS, PackedModule, packed_modules
from gptq_cli.checkpoint.quantization_config import format_of
from gptq_cli.checkpoint.source import METHOD as FP8
from gptq_cli.checkpoint.source import Checkpoint, block_size
from gptq_cli.files import file_errors
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.triton_launch import dequantize_packed

SAFETENSORS_DTYPE = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip

CPU = torch.device("cpu")
_TOLD_BY_TORCH = re.compile(
    r"unable to (?:open|mmap|stat|resize) .*\((\d+)\)\s*\Z", re.DOTALL
)  # errno at the end
Read = Callable[[str], Tensor]


@contextmanager
def _refusals(file: str) -> Iterator[None]:
    """Turn what the system refuses about `file`, also where torch tells it, into a GptqError with the path."""
    with file_errors(file, writing=False):
        try:
            yield
        except RuntimeError as error:
            told = _TOLD_BY_TORCH.search(str(error))
            if told is None:
                raise
            raise OSError(int(told[1]), os.strerror(int(told[1]))) from error


class TensorReader:
    """Reads the tensors of one checkpoint by name, straight from its files, on the CPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._tensors = checkpoint, checkpoint.tensors
        self._open: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """The tensor as stored; its memory may be the file's own pages. InputError as `check_unchanged` says."""
        file = str(self._tensors[name].file)
        opened = self._open.get(file)  # another thread may release it meanwhile
        if opened is None:
            self.check_unchanged()
            with (
                _refusals(file),
                Path(file).open("rb"),
            ):  # safetensors tells less of why it cannot be opened
                opened = self._open[file] = safe_open(file, framework="pt", device="cpu")
        with _refusals(file):
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read these tensors from the disk by itself (Linux): they will be asked for soon."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file, tensors in groupby(
            (self._tensors[name] for name in names), key=lambda tensor: tensor.file
        ):
            with file.open("rb") as opened:
                for tensor in tensors:
                    os.posix_fadvise(
                        opened.fileno(), tensor.start, tensor.nbytes, os.POSIX_FADV_WILLNEED
                    )

    def check_unchanged(self) -> None:
        """InputError E_SOURCE_CHANGED if what was read may be of other files than those that were opened first."""
        self._checkpoint.check_unchanged()

    def release(self) -> None:
        """Let go of the files: their pages no longer count as this process's once the tensors read are gone, too."""
        self._open.clear()


class DequantizingReader:
    """A GPTQ checkpoint seen as the full-precision model it stands for: `X.qweight`, ... appear as `X.weight`.

    Reads v1 and v2, any of 2, 3, 4 and 8 bits (told by the shapes, so that mixed checkpoints need no rules), with g_idx
    or without. With `backend` "triton" the packed words are moved to `device` and decoded there by one kernel.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, backend: str) -> None:
        self._tensors = checkpoint.tensors
        self._raw = TensorReader(checkpoint)
        self._format = format_of(checkpoint)
        self._modules = {module.name: module for module in packed_modules(checkpoint.tensors)}
        self._device, self._backend = device, backend

    def names(self) -> list[str]:
        packed = tuple(f".{part}" for part in PARTS)
        plain = [name for name in self._tensors if not name.endswith(packed)]
        return plain + [f"{module}.weight" for module in self._modules]

    def read(self, name: str) -> Tensor:
        """The stored tensor, or the dequantized weight [O, I] in float32."""
        if name in self._tensors:
            return self._raw.read(name)
        module = self._modules[name.removesuffix(".weight")]
        packed = self._packed(module)
        if self._backend == "triton":
            moved = {part: tensor.to(self._device) for part, tensor in packed.items()}
            return dequantize_packed(
                **moved, bits=module.bits, v2=self._format == "gptq_v2", dtype=torch.float32
            )
        # As a stored weight would lie in memory: products of the other layout differ in their last bits.
        return decode(packed, module.bits, self._format).dequantize().contiguous()

    def prefetch(self, names: Iterable[str]) -> None:
        """As TensorReader does, for weights and what stands for them."""
        self._raw.prefetch(stored for name in names for stored in self._stored(name))

    def check_unchanged(self) -> None:
        """As TensorReader does."""
        self._raw.check_unchanged()

    def release(self) -> None:
        """As TensorReader does."""
        self._raw.release()

    def linear(self, name: str) -> QuantizedLinear:
        """The codes and the grid of one quantized linear."""
        module = self._modules[name]
        return decode(self._packed(module), module.bits, self._format)

    def _stored(self, name: str) -> list[str]:
        return [name] if name in self._tensors else self._parts(name.removesuffix(".weight"))

    def _parts(self, module: str) -> list[str]:
        return [name for part in PARTS if (name := f"{module}.{part}") in self._tensors]

    def _packed(self, module: PackedModule) -> dict[str, Tensor]:
        packed = {
            name.rpartition(".")[2]: self._raw.read(name) for name in self._parts(module.name)
        }
        if "g_idx" not in packed:
            packed["g_idx"] = columns_in_order(module)
        return packed


class BlockFloatReader:
    """A checkpoint of 8-bit floats seen as the bfloat16 one it stands for: scales are applied and do not appear."""

    def __init__(self, checkpoint: Checkpoint, scales: dict[str, str]) -> None:
        block = block_size(checkpoint.quantization or {})
        assert block is not None
        self._raw, self._scales, self._block = TensorReader(checkpoint), scales, block

    def names(self) -> list[str]:
        hidden = set(self._scales.values())
        return [name for name in self._raw.names() if name not in hidden]

    def read(self, name: str) -> Tensor:
        """The stored tensor, or the weight that it and its scales stand for, in bfloat16."""
        tensor = self._raw.read(name)
        if name not in self._scales:
            return tensor
        return scale_blocks(tensor, self._raw.read(self._scales[name]), self._block)

    def prefetch(self, names: Iterable[str]) -> None:
        """As TensorReader does, for weights and their scales."""
        self._raw.prefetch(
            part for name in names for part in (name, self._scales.get(name)) if part
        )

    def check_unchanged(self) -> None:
        """As TensorReader does."""
        self._raw.check_unchanged()

    def release(self) -> None:
        """As TensorReader does."""
        self._raw.release()


PlainReader = TensorReader | DequantizingReader | BlockFloatReader


def open_reader(
    checkpoint: Checkpoint, device: torch.device = CPU, backend: str = "torch"
) -> PlainReader:
    """A reader of the plain weights that `checkpoint` stands for; InputError as `format_of` and `scales` say."""
    if scales := checkpoint.scales():
        return BlockFloatReader(checkpoint, scales)
    quantized = checkpoint.method not in (None, FP8)
    return (
        DequantizingReader(checkpoint, device, backend) if quantized else TensorReader(checkpoint)
    )


def scale_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """`weight` [O, I] times the scale [ceil(O / rows), ceil(I / columns)] of each block, in bfloat16."""
    rows, columns = block
    scaled = weight.float()
    of_columns = scales.float().repeat_interleave(columns, 1)[:, : weight.shape[1]]
    for band, scale in zip(scaled.split(rows), of_columns, strict=True):
        band.mul_(scale)
    return scaled.bfloat16()


def columns_in_order(module: PackedModule) -> Tensor:
    """The g_idx [I] of a linear whose groups are runs of columns."""
    columns = torch.arange(module.in_features, dtype=torch.int32)
    return columns // (module.in_features // module.groups)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` as they are stored, without a copy when it is contiguous on the CPU."""
    array: Any = tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
    return memoryview(array)
