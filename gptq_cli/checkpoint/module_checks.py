"""Checks of one quantized linear: its parts, dtypes and shapes, and the numbers in them.

`layout.py` has the shapes. A weight is scales[g] * (code - zero[g]), where g is the group of its
column. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from gptq_cli.checkpoint.defects import Defect, convert_command, tensor_defect
from gptq_cli.checkpoint.headers import TensorInfo, read_array, unpack_words
from gptq_cli.checkpoint.layout import (
    NEEDED_PARTS,
    PACKED_DTYPES,
    PARTS,
    packed_shapes,
    stored_parts,
)
from gptq_cli.checkpoint.quantization_config import BOTH_FILES, STORED_OFFSET, Settings
from gptq_cli.solver.float16 import LARGEST, SMALLEST

if TYPE_CHECKING:
    from gptq_cli.checkpoint.headers import Array


def check_module(
    module: str,
    tensors: Mapping[str, TensorInfo],
    settings: Settings,
    format: str,
    *,
    numbers: bool,
) -> list[Defect]:
    """Return the defects of one module; without `numbers` only headers are read.

    Numbers are not read either if the headers show that they would be decoded wrongly.
    """
    parts = stored_parts(module, tensors)
    bias = tensors.get(f"{module}.bias")
    defects = list(_check_headers(module, parts, bias, settings, format))
    if numbers and not any(defect.effect == "numbers" for defect in defects):
        defects += _check_numbers(parts, settings, format)
    return defects


def _check_headers(
    module: str,
    parts: Mapping[str, TensorInfo],
    bias: TensorInfo | None,
    settings: Settings,
    format: str,
) -> Iterator[Defect]:
    """Yield parts that are missing, and dtypes and shapes that differ from the settings."""
    for part in PARTS:
        if part not in parts:
            yield _missing_part(module, part, parts, settings, format)
    for part, tensor in parts.items():
        accepted = PACKED_DTYPES[part]
        if tensor.dtype not in accepted:
            message = f"has dtype {tensor.dtype}, not {' or '.join(accepted)}"
            yield tensor_defect("E_CKPT_SHAPE", tensor, message)
    if parts.keys() >= set(NEEDED_PARTS):
        yield from _check_shapes(module, parts, bias, settings)


def _missing_part(
    module: str, part: str, parts: Mapping[str, TensorInfo], settings: Settings, format: str
) -> Defect:
    if part != "g_idx" or "qweight" not in parts or settings.desc_act:
        return Defect("E_CKPT_INCOMPLETE", f"no {part}", None, module)
    # The columns are in order, but llama.cpp and transformers fail, or take for g_idx whatever is
    # in memory.
    hint = f"{convert_command(parts['qweight'].file.parent, format)} writes it"
    return Defect("E_CKPT_INCOMPLETE", "no g_idx", None, module, hint, "form")


def _check_shapes(
    module: str, parts: Mapping[str, TensorInfo], bias: TensorInfo | None, settings: Settings
) -> Iterator[Defect]:
    in_features = _in_features(parts, settings)
    out_features = parts["scales"].shape[-1] if parts["scales"].shape else 0
    group_size = settings.group_size
    if group_size == -1:
        group_size = in_features
    if not _can_be_packed(out_features, in_features, group_size):
        sizes = f"{in_features} inputs, {out_features} outputs and groups of {group_size}"
        message = f"{sizes} cannot be packed into 32-bit words"
        yield Defect("E_CKPT_SHAPE", message, parts["qweight"].file.name, module)
        return
    groups = in_features // group_size
    expected = packed_shapes(out_features, in_features, groups, settings.bits)
    tensors = dict(parts)
    if bias is not None:
        tensors["bias"], expected["bias"] = bias, (out_features,)
    for part, tensor in tensors.items():
        if tensor.shape != expected[part]:
            asked = f"{settings.bits} bits and groups of {group_size} ask for"
            message = f"has shape {list(tensor.shape)}, but {asked} {list(expected[part])}"
            yield tensor_defect("E_CKPT_SHAPE", tensor, message)


def _can_be_packed(out_features: int, in_features: int, group_size: int) -> bool:
    if out_features == 0 or in_features == 0:
        return False
    return out_features % 32 == 0 and in_features % 32 == 0 and in_features % group_size == 0


def _in_features(parts: Mapping[str, TensorInfo], settings: Settings) -> int:
    if "g_idx" in parts:
        return math.prod(parts["g_idx"].shape)
    shape = parts["qweight"].shape
    if not shape:
        return 0
    return shape[0] * 32 // settings.bits


def _check_numbers(
    parts: Mapping[str, TensorInfo], settings: Settings, format: str
) -> Iterator[Defect]:
    """Yield defects of the numbers of a module whose headers are right."""
    if "g_idx" in parts:
        yield from _check_groups(parts["g_idx"], parts["scales"].shape[0], settings)
    yield from _check_zeros(parts["qzeros"], settings, format)
    yield from _check_scales(parts["scales"])
    yield from _check_decoded(parts, settings, format)


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


def _check_zeros(tensor: TensorInfo, settings: Settings, format: str) -> Iterator[Defect]:
    stored = unpack_words(read_array(tensor), settings.bits).astype(np.int32)
    if settings.sym:
        yield from _check_symmetric(tensor, stored, settings.bits, format)
        return
    wrapped = 0
    if STORED_OFFSET[format]:
        wrapped = int((stored == 2**settings.bits - 1).sum())
    if wrapped:
        count = f"{wrapped} of {stored.size} zero points are 0"
        message = f"{count}, which readers of gptq (v1) decode in different ways"
        hint = "quantize the full-precision model again, with --sym or --format gptq_v2"
        yield tensor_defect("E_CKPT_ZEROS", tensor, message, hint)


def _check_symmetric(tensor: TensorInfo, stored: Array, bits: int, format: str) -> Iterator[Defect]:
    middle = 2 ** (bits - 1)
    wrong = int((stored != middle - STORED_OFFSET[format]).sum())
    if not wrong:
        return
    other = "gptq_v2" if format == "gptq" else "gptq"
    if (stored == middle - STORED_OFFSET[other]).all():
        message = f"holds zero points as {other} stores them, but config.json names {format}"
        hint = _format_hint(tensor, other)
    else:
        message = f"{wrong} of {stored.size} zero points are not {middle}, but sym is true"
        hint = f"if it was quantized with asymmetric grids: set sym to false in {BOTH_FILES}"
    yield tensor_defect("E_CKPT_ZEROS", tensor, message, hint)


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


def _check_decoded(
    parts: Mapping[str, TensorInfo], settings: Settings, format: str
) -> Iterator[Defect]:
    """Yield a defect if weights are beyond float16.

    Codes [I] are read only of outputs that have a scale large enough for such a weight.
    """
    top = 2**settings.bits - 1
    scales = read_array(parts["scales"]).astype(np.float32)
    scales[~(np.abs(scales) <= LARGEST)] = 0  # `_check_scales` reports these
    outputs = np.flatnonzero((np.abs(scales) > LARGEST / top).any(0))
    groups = _groups(parts, settings, len(scales))
    # `_check_groups` reports groups that do not exist.
    if not outputs.size or groups.min() < 0 or groups.max() >= len(scales):
        return
    stored = unpack_words(read_array(parts["qzeros"]), settings.bits).astype(np.int32)
    zeros = (stored + STORED_OFFSET[format]) & top
    words = read_array(parts["qweight"])
    beyond = 0
    for output in outputs:
        codes = unpack_words(words[None, :, output], settings.bits)[0].astype(np.int32)
        weights = scales[groups, output] * (codes - zeros[groups, output])
        beyond += int((np.abs(weights) > LARGEST).sum())
    if beyond:
        qweight, message = parts["qweight"], f"{beyond} of its weights are beyond float16"
        hint = "quantize the full-precision model again, or gptq dequantize with --dtype bfloat16"
        yield Defect("E_CKPT_NONFINITE", message, qweight.file.name, qweight.name, hint, "readers")


def _groups(parts: Mapping[str, TensorInfo], settings: Settings, groups: int) -> Array:
    """Return the group of each column, which is that of the order if there is no g_idx."""
    if "g_idx" in parts:
        return read_array(parts["g_idx"])
    columns = np.arange(_in_features(parts, settings))
    return columns // (columns.size // groups)
