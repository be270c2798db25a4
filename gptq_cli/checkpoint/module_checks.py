"""Checks of one quantized linear: its parts, dtypes and shapes, and the numbers in them.

`layout.py` has the shapes. A weight is scales[g] * (code - zero[g]), where g is the group of its
column. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptq_cli.checkpoint.defects import Defect, convert_command, tensor_defect
from gptq_cli.checkpoint.headers import TensorInfo, read_array, unpack_words
from gptq_cli.checkpoint.layout import Arrays, Packing, Sizes, stored_parts
from gptq_cli.checkpoint.quantization_config import BOTH_FILES
from gptq_cli.config.layer import Settings
from gptq_cli.solver.float16 import LARGEST, SMALLEST

if TYPE_CHECKING:
    from gptq_cli.checkpoint.headers import Array


NUMPY = Arrays(
    unpack=lambda words, bits: unpack_words(words.T, bits).T,
    signed=lambda words: words.view("<i4"),
    single=lambda numbers: numbers.astype(np.float32),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A module, its stored parts, its settings and the packing that these ask for."""

    module: str
    parts: Mapping[str, TensorInfo]
    settings: Settings
    packing: Packing

    @property
    def smallest(self) -> Sizes:
        """The sizes of the smallest such linear, which has the same parts."""
        return Sizes(32, 32, 1, self.settings.bits, self.settings.sym)

    @property
    def out_features(self) -> int:
        return self.packing.out_features(self.parts)

    @property
    def in_features(self) -> int:
        g_idx = self.parts.get(self.packing.g_idx or "")
        if g_idx is not None:
            return math.prod(g_idx.shape)
        return self.packing.in_features(self.parts, self.settings.bits)


def check_module(
    module: str,
    tensors: Mapping[str, TensorInfo],
    settings: Settings,
    packing: Packing,
    *,
    numbers: bool,
) -> list[Defect]:
    """Return the defects of one module; without `numbers` only headers are read.

    Numbers are not read either if the headers show that they would be decoded wrongly.
    """
    stored = Stored(module, stored_parts(module, tensors, packing), settings, packing)
    defects = list(_check_headers(stored, tensors.get(f"{module}.bias")))
    if numbers and not any(defect.effect == "numbers" for defect in defects):
        defects += _check_numbers(stored)
    return defects


def _check_headers(stored: Stored, bias: TensorInfo | None) -> Iterator[Defect]:
    """Yield parts that are missing, and dtypes and shapes that differ from the settings."""
    packing, parts = stored.packing, stored.parts
    for part in packing.shapes(stored.smallest):
        if part not in parts:
            yield _missing_part(stored, part)
    for part, tensor in parts.items():
        accepted = packing.dtypes[part]
        if tensor.dtype not in accepted:
            message = f"has dtype {tensor.dtype}, not {' or '.join(accepted)}"
            yield tensor_defect("E_CKPT_SHAPE", tensor, message)
    if parts.keys() >= set(packing.needed):
        yield from _check_shapes(stored, bias)


def _missing_part(stored: Stored, part: str) -> Defect:
    parts, packing = stored.parts, stored.packing
    if part != packing.g_idx or packing.codes not in parts or stored.settings.desc_act:
        return Defect("E_CKPT_INCOMPLETE", f"no {part}", None, stored.module)
    # The columns are in order, but llama.cpp and transformers fail, or take for g_idx whatever is
    # in memory.
    directory = parts[packing.codes].file.parent
    hint = f"{convert_command(directory, packing.format)} writes it"
    return Defect("E_CKPT_INCOMPLETE", f"no {part}", None, stored.module, hint, "form")


def _check_shapes(stored: Stored, bias: TensorInfo | None) -> Iterator[Defect]:
    settings, packing = stored.settings, stored.packing
    in_features, out_features = stored.in_features, stored.out_features
    group_size = settings.group_size
    if group_size == -1:
        group_size = in_features
    if not _can_be_packed(out_features, in_features, group_size):
        sizes = f"{in_features} inputs, {out_features} outputs and groups of {group_size}"
        message = f"{sizes} cannot be packed into 32-bit words"
        file = stored.parts[packing.codes].file.name
        yield Defect("E_CKPT_SHAPE", message, file, stored.module)
        return
    groups = in_features // group_size
    asked_sizes = Sizes(out_features, in_features, groups, settings.bits, settings.sym)
    expected = packing.shapes(asked_sizes)
    tensors = dict(stored.parts)
    if bias is not None:
        tensors["bias"], expected["bias"] = bias, (out_features,)
    if packing.g_idx is not None:
        expected[packing.g_idx] = (in_features,)
    for part, tensor in tensors.items():
        if part in expected and tensor.shape != expected[part]:
            asked = f"{settings.bits} bits and groups of {group_size} ask for"
            message = f"has shape {list(tensor.shape)}, but {asked} {list(expected[part])}"
            yield tensor_defect("E_CKPT_SHAPE", tensor, message)


def _can_be_packed(out_features: int, in_features: int, group_size: int) -> bool:
    if out_features == 0 or in_features == 0:
        return False
    return out_features % 32 == 0 and in_features % 32 == 0 and in_features % group_size == 0


def _check_numbers(stored: Stored) -> Iterator[Defect]:
    """Yield defects of the numbers of a module whose headers are right."""
    packing, parts = stored.packing, stored.parts
    if "weight_shape" in parts:
        yield from _check_shape_note(stored, parts["weight_shape"])
    if packing.g_idx is not None and packing.g_idx in parts:
        scales = packing.stored_scales({packing.scales: read_array(parts[packing.scales])})
        yield from _check_groups(parts[packing.g_idx], scales.shape[1], stored.settings)
    if "qzeros" in parts:
        yield from _check_zeros(parts["qzeros"], stored.settings, packing)
    else:
        yield from _check_other_zeros(stored)
    yield from _check_scales(parts[packing.scales])
    yield from _check_decoded(stored)


def _check_shape_note(stored: Stored, tensor: TensorInfo) -> Iterator[Defect]:
    """Yield a shape in a tensor of compressed-tensors that is not the shape of the codes."""
    noted, shape = read_array(tensor).tolist(), [stored.out_features, stored.in_features]
    if noted != shape:
        yield tensor_defect("E_CKPT_SHAPE", tensor, f"holds {noted}, but the codes are {shape}")


# ---------------------------------------------------------------- groups


def _check_groups(tensor: TensorInfo, groups: int, settings: Settings) -> Iterator[Defect]:
    g_idx = read_array(tensor)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        message = f"holds {g_idx.min()} to {g_idx.max()}, but there are {groups} groups"
        yield tensor_defect("E_CKPT_GROUPS", tensor, message)
        return
    group_size = g_idx.size // groups
    sizes = np.bincount(g_idx, minlength=groups)
    is_odd = sizes != group_size
    if is_odd.any():
        group = int(is_odd.argmax())
        message = f"group {group} has {sizes[group]} of the columns, not {group_size}"
        is_placeholder = not settings.desc_act and not g_idx.any()
        hint = _placeholder_hint(tensor) if is_placeholder else None
        yield tensor_defect("E_CKPT_GROUPS", tensor, message, hint)
    elif not settings.desc_act and (g_idx != np.arange(g_idx.size) // group_size).any():
        message = "is not in the order of columns, but desc_act is false"
        hint = f"if it was quantized by descending activation: set desc_act to true in {BOTH_FILES}"
        yield tensor_defect("E_CKPT_GROUPS", tensor, message, hint)


def _placeholder_hint(tensor: TensorInfo) -> str:
    command = convert_command(tensor.file.parent, "gptq")
    remedy = f"remove the g_idx tensors from the file, and {command} writes correct ones"
    return f"if the columns are in order: {remedy}"


# ---------------------------------------------------------------- zero points


def _check_zeros(tensor: TensorInfo, settings: Settings, packing: Packing) -> Iterator[Defect]:
    """Yield defects of the packed zero points of a GPTQ linear."""
    stored = unpack_words(read_array(tensor), settings.bits).astype(np.int32)
    if settings.sym:
        yield from _check_symmetric(tensor, stored, settings.bits, packing)
        return
    wrapped = 0
    if packing.zero_offset:
        wrapped = int((stored == 2**settings.bits - 1).sum())
    if wrapped:
        count = f"{wrapped} of {stored.size} zero points are 0"
        message = f"{count}, which readers of gptq (v1) decode in different ways"
        hint = "quantize the full-precision model again, with --sym or --format gptq_v2"
        yield tensor_defect("E_CKPT_ZEROS", tensor, message, hint)


def _check_symmetric(
    tensor: TensorInfo, stored: Array, bits: int, packing: Packing
) -> Iterator[Defect]:
    middle = 2 ** (bits - 1)
    wrong = int((stored != middle - packing.zero_offset).sum())
    if not wrong:
        return
    other = "gptq_v2" if packing.zero_offset else "gptq"
    if (stored == middle - 1 + packing.zero_offset).all():
        message = (
            f"holds zero points as {other} stores them, but config.json names {packing.format}"
        )
        hint = _format_hint(tensor, other)
    else:
        message = f"{wrong} of {stored.size} zero points are not {middle}, but sym is true"
        hint = f"if it was quantized with asymmetric grids: set sym to false in {BOTH_FILES}"
    yield tensor_defect("E_CKPT_ZEROS", tensor, message, hint)


def _check_other_zeros(stored: Stored) -> Iterator[Defect]:
    """Yield zero points that are no codes, or not in the middle although the grid is symmetric."""
    bits, top = stored.settings.bits, 2**stored.settings.bits - 1
    arrays = {
        part: read_array(tensor)
        for part, tensor in stored.parts.items()
        if part != stored.packing.codes
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = stored.packing.zeros(arrays, bits, NUMPY)
    if zeros is None:
        return
    is_code = (zeros == np.round(zeros)) & (zeros >= 0) & (zeros <= top)
    wrong = int((~is_code).sum())
    if wrong:
        message = f"{wrong} of {zeros.size} zero points are no whole number from 0 to {top}"
        hint = f"use it as it is: only readers of {stored.packing.format} decode such grids"
        yield Defect("E_CKPT_ZEROS", message, None, stored.module, hint)
        return
    wrong = int((zeros != 2 ** (bits - 1)).sum())
    if stored.settings.sym and wrong:
        message = f"{wrong} of {zeros.size} zero points are not {2 ** (bits - 1)}, but sym is true"
        yield Defect("E_CKPT_ZEROS", message, None, stored.module)


def _format_hint(tensor: TensorInfo, stored: str) -> str:
    """Return the remedy for a file of format `stored` whose configuration names the other one."""
    remedy = f"set checkpoint_format and format to {stored} in {BOTH_FILES}"
    if stored == "gptq":
        return remedy
    # Format gptq has the most readers.
    return f"{remedy}, then {convert_command(tensor.file.parent, 'gptq')}"


# ---------------------------------------------------------------- scales and weights


def _check_scales(tensor: TensorInfo) -> Iterator[Defect]:
    size = np.abs(read_array(tensor).astype(np.float32))
    finite = np.isfinite(size)
    not_finite = int((~finite).sum())
    if not_finite:
        message = f"{not_finite} of {size.size} scales are NaN or infinite"
        yield tensor_defect("E_CKPT_NONFINITE", tensor, message)
    tiny = int((size < SMALLEST).sum())
    if tiny:
        message = f"{tiny} of {size.size} scales are zero in float16"
        yield tensor_defect("E_CKPT_SCALES", tensor, message)
    huge = int((finite & (size > LARGEST)).sum())
    if huge:
        message = f"{huge} of {size.size} scales are beyond float16"
        yield tensor_defect("E_CKPT_SCALES", tensor, message)


def _check_decoded(stored: Stored) -> Iterator[Defect]:
    """Yield a defect if weights are beyond float16.

    Codes [I] are read only of outputs that have a scale large enough for such a weight.
    """
    packing, bits = stored.packing, stored.settings.bits
    top = 2**bits - 1
    scales = packing.stored_scales({packing.scales: read_array(stored.parts[packing.scales])})
    scales = scales.astype(np.float32)
    scales[~(np.abs(scales) <= LARGEST)] = 0  # `_check_scales` reports these
    outputs = np.flatnonzero((np.abs(scales) > LARGEST / top).any(1))
    if not outputs.size:
        return
    arrays = {part: read_array(tensor) for part, tensor in stored.parts.items()}
    groups = _groups(stored, arrays, scales.shape[1])
    # `_check_groups` reports groups that do not exist.
    if groups.min() < 0 or groups.max() >= scales.shape[1]:
        return
    zeros = packing.zeros(arrays, bits, NUMPY)
    if zeros is None:
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    words = packing.words(arrays, NUMPY)
    beyond = 0
    for output in outputs:
        codes = unpack_words(words[None, :, output], bits)[0].astype(np.int32)
        weights = scales[output, groups] * (codes - zeros[output, groups].astype(np.int32))
        beyond += int((np.abs(weights) > LARGEST).sum())
    if beyond:
        codes_part = stored.parts[packing.codes]
        message = f"{beyond} of its weights are beyond float16"
        hint = "quantize the full-precision model again, or gptq dequantize with --dtype bfloat16"
        file, name = codes_part.file.name, codes_part.name
        yield Defect("E_CKPT_NONFINITE", message, file, name, hint, "readers")


def _groups(stored: Stored, arrays: Mapping[str, Array], groups: int) -> Array:
    """Return the group of each column, which is that of the order if there is no g_idx."""
    g_idx: Array | None = stored.packing.groups(arrays)
    if g_idx is not None:
        return g_idx
    columns = np.arange(stored.in_features)
    return columns // (columns.size // groups)
