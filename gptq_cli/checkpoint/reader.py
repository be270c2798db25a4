"""Readers of one tensor at a time, and the coding of quantized linears.

`encode` turns a QuantizedLinear into the tensors of a format, and `decode` turns them back;
`Packing` in `layout.py` has their names, shapes and coding. In all formats small integers are
packed as one little-endian bit stream: bit p of the stream is bit p % 32 of word p // 32, so that
32 values of `bits` bits fill exactly `bits` words. For 2, 4 and 8 bits this is "32 / bits values a
word, lowest first"; for 3 bits it is AutoGPTQ's 10-1-10-1-10 layout.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptq_cli.checkpoint.decoded import plain_view
from gptq_cli.checkpoint.headers import PlainReader
from gptq_cli.checkpoint.layout import (
    Arrays,
    PackedModule,
    Packing,
    packed_modules,
    part_names,
    stored_parts,
)
from gptq_cli.checkpoint.quantization_config import packing_of
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.files import file_errors
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.triton_launch import dequantize_packed

if TYPE_CHECKING:
    from gptq_cli.checkpoint.coded import Block, Coded

VALUES = 32  # values packed together
BYTE = 8  # bits
SIGNIFICANT = {torch.uint8: 8, torch.int16: 15, torch.int32: 31}  # bits of numbers from 0 up


def encode(linear: QuantizedLinear, packing: Packing, *, sym: bool) -> dict[str, Tensor]:
    """Return the tensors of `linear` by part, contiguous.

    `sym` tells whether its settings say that it is symmetric.
    """
    tensors = packing.encode(linear, pack, sym=sym)
    return {part: tensor.contiguous() for part, tensor in tensors.items()}


def encode_alike(
    linears: Sequence[QuantizedLinear], packing: Packing, *, sym: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield what `encode` returns for each of `linears`, which share shapes and groups.

    On a device this takes hardly more launches than one linear.
    """
    if len(linears) == 1:  # which needs no copy
        yield encode(linears[0], packing, sym=sym)
        return
    together = replace(
        linears[0],
        codes=torch.stack([linear.codes for linear in linears]),
        scales=torch.stack([linear.scales for linear in linears]),
        zeros=torch.stack([linear.zeros for linear in linears]),
    )
    tensors = encode(together, packing, sym=sym)
    for number in range(len(linears)):
        own = dict(tensors)
        for part, tensor in tensors.items():
            if tensor.dim() > packing.dimensions(part):
                own[part] = tensor[number]
        yield own


def decode(tensors: dict[str, Tensor], bits: int, packing: Packing) -> QuantizedLinear:
    """Return the layer that `encode`, or another tool, has written."""
    scales: Tensor = packing.stored_scales(tensors)
    zeros = packing.zeros(tensors, bits, TORCH)
    if zeros is None:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=scales.device)
    codes = unpack(packing.words(tensors, TORCH), bits).T
    groups = packing.groups(tensors)
    if groups is None:
        groups = columns_in_order(codes.shape[1], scales.shape[1]).to(codes.device)
    return QuantizedLinear(codes, scales, zeros, groups, bits)


def pack(values: Tensor, bits: int) -> Tensor:
    """Return words int32 [..., N * bits / 32, C] that hold unsigned integers `values` [..., N, C].

    Values must be below 2**bits, and N must be a multiple of 32.
    """
    fields, width = values.mT.to(torch.uint8).contiguous(), bits
    # Neighbours are joined until a field has whole bytes: once for 4 bits, three times for 3.
    while width % BYTE:
        pairs = fields.to(_holding(2 * width)).unflatten(-1, (-1, 2))
        fields, width = pairs[..., 0] | (pairs[..., 1] << width), 2 * width
    stored = fields.contiguous().view(torch.uint8).unflatten(-1, (fields.shape[-1], -1))
    stream = stored[..., : width // BYTE].flatten(-2)  # a field of 3 bytes is held in 4
    words: Tensor = stream.contiguous().view(torch.int32).mT
    return words


def _holding(width: int) -> torch.dtype:
    """Return the smallest dtype that holds a number of `width` bits."""
    for dtype, bits in SIGNIFICANT.items():
        if width <= bits:
            return dtype
    return torch.int64


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


TORCH = Arrays(unpack, partial(Tensor.view, dtype=torch.int32), Tensor.float)

SAFETENSORS_DTYPE = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the last bit of four is the sign
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each of eight outputs
STACKS_KEPT = 2  # gate_up_proj and down_proj of one layer
STORED_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPE.items()}

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
            tensor: Tensor
            stack = self._tensors[name].stack
            if stack is None:
                tensor = opened.get_tensor(name)
            else:
                tensor = opened.get_slice(stack)[self._tensors[name].place]
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


class DecodingReader:
    """What readers have in common that make some weights of several stored tensors each."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._raw = TensorReader(checkpoint)

    def _stored(self, name: str) -> Iterable[str]:
        """Return the names of the stored tensors that tensor `name` is made of."""
        raise NotImplementedError

    def prefetch(self, names: Iterable[str]) -> None:
        """Do the same as TensorReader, for tensors and for the parts of weights."""
        stored: list[str] = []
        for name in names:
            stored += self._stored(name)
        self._raw.prefetch(stored)

    def check_unchanged(self) -> None:
        """Do the same as TensorReader."""
        self._raw.check_unchanged()

    def release(self) -> None:
        """Do the same as TensorReader."""
        self._raw.release()


class DequantizingReader(DecodingReader):
    """Reads a checkpoint in codes as a full-precision model: the parts of X appear as `X.weight`.

    It reads every format of `FORMATS`, mixed bits and groups, with g_idx or without. With `backend`
    "triton" the words of a linear are moved to `device` and decoded there by one kernel, if
    `has_kernel` is true for the checkpoint; else torch decodes them on the host.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, backend: str) -> None:
        super().__init__(checkpoint)
        self._tensors = checkpoint.tensors
        self._packing = packing_of(checkpoint)
        self._with_kernel = backend == "triton" and has_kernel(checkpoint)
        modules = packed_modules(checkpoint.tensors, self._packing)
        self._modules = {f"{module.name}.weight": module for module in modules}
        self._device = device

    def names(self) -> list[str]:
        hidden: set[str] = set()
        for module in self._modules.values():
            hidden.update(self._parts(module))
        plain = [name for name in self._tensors if name not in hidden]
        return plain + list(self._modules)

    def read(self, name: str) -> Tensor:
        """Return the stored tensor, or the dequantized weight [O, I] in float32."""
        module = self._modules.get(name)
        if module is None:
            return self._raw.read(name)
        packed = self._packed(module)
        if self._with_kernel:
            assert isinstance(self._packing, Packing)
            if "g_idx" not in packed:
                packed["g_idx"] = columns_in_order(module.in_features, module.groups)
            moved = {part: tensor.to(self._device) for part, tensor in packed.items()}
            v2 = not self._packing.zero_offset
            return dequantize_packed(**moved, bits=module.bits, v2=v2, dtype=torch.float32)
        # Contiguous, as a stored weight: products of another layout differ in their last bits.
        return decode(packed, module.bits, self._packing).dequantize().contiguous()

    def linear(self, name: str) -> QuantizedLinear:
        """Return the codes and the grid of one quantized linear."""
        module = self._modules[f"{name}.weight"]
        return decode(self._packed(module), module.bits, self._packing)

    def _stored(self, name: str) -> Iterable[str]:
        if name in self._modules:
            return self._parts(self._modules[name])
        return [name]

    def _parts(self, module: PackedModule) -> tuple[str, ...]:
        return part_names(module.name, self._tensors, self._packing)

    def _packed(self, module: PackedModule) -> dict[str, Tensor]:
        """Return the packed tensors of a linear by part."""
        packed = {}
        for part in stored_parts(module.name, self._tensors, self._packing):
            packed[part] = self._raw.read(f"{module.name}.{part}")
        return packed


class CodedReader(DecodingReader):
    """Reads a checkpoint with weights in codes as the plain model, whose scales do not appear."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from gptq_cli.checkpoint.coded import plain_tensors

        super().__init__(checkpoint)
        self._coded = checkpoint.coded()
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
            return decode_coded(coded, self._parts(coded))
        stack = self._stacks.get(name)
        if stack is None:
            stack = decode_coded(coded, self._parts(coded))
            for oldest in list(self._stacks)[: 1 - STACKS_KEPT]:
                self._stacks.pop(oldest, None)  # another thread may have removed it
            self._stacks[name] = stack
        return stack

    def _stored(self, name: str) -> Iterable[str]:
        if name in self._coded:
            return self._coded[name].parts.values()
        return [name]

    def _parts(self, coded: Coded) -> dict[str, Tensor]:
        return {role: self._raw.read(stored) for role, stored in coded.parts.items()}

    def release(self) -> None:
        """Do the same as TensorReader, and free the experts that were read last."""
        self._stacks.clear()
        super().release()


def open_reader(
    checkpoint: Checkpoint, device: torch.device = CPU, backend: str = "torch"
) -> PlainReader:
    """Return a reader of the plain weights that `checkpoint` stands for.

    Raises the errors of `format_of` and `Checkpoint.coded`.
    """
    if checkpoint.adapters:
        from gptq_cli.checkpoint.adapters import MergingReader, changes_of

        model = replace(checkpoint, adapters=())
        stored = plain_view(model, allow_requantize=True)
        changes = changes_of(checkpoint, stored.tensors)
        return MergingReader(open_reader(model, device, backend), changes)
    if checkpoint.download is not None:
        from gptq_cli.checkpoint.download import FetchingReader

        fetched = replace(checkpoint, download=None)
        return FetchingReader(open_reader(fetched, device, backend), checkpoint.download)
    if checkpoint.is_packed:
        return DequantizingReader(checkpoint, device, backend)
    if not checkpoint.coded():
        return TensorReader(checkpoint)
    return CodedReader(checkpoint)


def has_kernel(checkpoint: Checkpoint) -> bool:
    """Return whether a kernel decodes the linears of `checkpoint`: those of gptq and gptq_v2."""
    return checkpoint.is_packed and type(packing_of(checkpoint)) is Packing


def columns_in_order(in_features: int, groups: int) -> Tensor:
    """Return the g_idx [I] of a linear whose groups are runs of columns."""
    return torch.arange(in_features, dtype=torch.int32) // (in_features // groups)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of `tensor` as they are stored.

    There is no copy if the tensor is contiguous and on the CPU.
    """
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


# ---------------------------------------------------------------- weights in codes


def decode_coded(coded: Coded, parts: dict[str, Tensor]) -> Tensor:
    """Return the weight for which `parts` stand, contiguous, in the dtype of the model.

    Products are made in float32 and rounded as the library of each form rounds them: once to the
    dtype of the scales, if that has 16 bits, then to the dtype of the model.
    """
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
    from gptq_cli.checkpoint.compressed_tensors import CompressedTensorsPacking

    stored = {**parts, "weight_packed": parts["codes"], "weight_scale": parts["scales"]}
    return decode(stored, coded.bits, CompressedTensorsPacking()).dequantize()


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
    return numbers.reshape(len(words), len(AWQ_ORDER) * words.shape[1]).float()
