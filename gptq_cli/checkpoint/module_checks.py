"""What must hold for the tensors of one quantized module.

qweight int32 [I * bits / 32, O], qzeros int32 [G, O * bits / 32], scales [G, O], g_idx [I]; w = s (q - z).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from gptq_cli.checkpoint.defect import Defect, convert_command
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.raw import Array, read_array, unpack_words
from gptq_cli.checkpoint.source import QUANTIZE_CONFIG
from gptq_cli.checkpoint.stored import STORED_OFFSET, Settings
from gptq_cli.engine.float16 import LARGEST, SMALLEST

DTYPES = {
    "qweight": ("I32",),
    "qzeros": ("I32",),
    "scales": ("F16", "BF16", "F32"),
    "g_idx": ("I32", "I64"),
}
PARTS = frozenset(DTYPES)
BOTH = f"config.json and {QUANTIZE_CONFIG}"


def check_module(
    module: str, stored: Mapping[str, TensorInfo], bias: TensorInfo | None, settings: Settings, format: str
) -> Iterator[Defect]:
    """What headers tell: the four tensors are there and have the dtypes and shapes that the settings ask for."""
    for part in sorted(PARTS - set(stored)):
        if part == "g_idx" and "qweight" in stored and not settings.desc_act:
            yield _no_g_idx(module, stored["qweight"], format)
        else:
            yield Defect("E_CKPT_INCOMPLETE", f"no {part}", None, module)
    for part, tensor in stored.items():
        if tensor.dtype not in DTYPES[part]:
            yield _defect("E_CKPT_SHAPE", tensor, f"{tensor.dtype}, not {' or '.join(DTYPES[part])}")
    if PARTS - set(stored) <= {"g_idx"}:
        tensors = {**stored, "bias": bias} if bias else stored
        yield from _check_shapes(module, tensors, settings)


def _no_g_idx(module: str, qweight: TensorInfo, format: str) -> Defect:
    """The columns are in order, but llama.cpp and transformers fail or take what lies in memory for g_idx."""
    command = convert_command(qweight.file.parent, format)
    return Defect("E_CKPT_INCOMPLETE", "no g_idx", None, module, f"{command} writes it", "form")


def _check_shapes(module: str, stored: Mapping[str, TensorInfo], settings: Settings) -> Iterator[Defect]:
    in_features = _in_features(stored, settings)
    out_features = stored["scales"].shape[-1] if stored["scales"].shape else 0
    group_size = in_features if settings.group_size == -1 else settings.group_size
    if in_features == 0 or out_features == 0 or in_features % 32 or out_features % 32 or in_features % group_size:
        said = f"{in_features} inputs, {out_features} outputs and groups of {group_size}"
        yield Defect("E_CKPT_SHAPE", f"{said} cannot be packed into 32-bit words", stored["qweight"].file.name, module)
        return
    groups = in_features // group_size
    expected = {
        "qweight": (in_features * settings.bits // 32, out_features),
        "qzeros": (groups, out_features * settings.bits // 32),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
        "bias": (out_features,),
    }
    for part, tensor in stored.items():
        if tensor.shape != expected[part]:
            said = f"{settings.bits} bits and groups of {group_size} ask for {list(expected[part])}"
            yield _defect("E_CKPT_SHAPE", tensor, f"has shape {list(tensor.shape)}, {said}")


def _in_features(stored: Mapping[str, TensorInfo], settings: Settings) -> int:
    if "g_idx" in stored:
        return math.prod(stored["g_idx"].shape)
    rows = stored["qweight"].shape[0] if stored["qweight"].shape else 0
    return rows * 32 // settings.bits


def check_values(stored: Mapping[str, TensorInfo], settings: Settings, format: str) -> Iterator[Defect]:
    """What the numbers tell, of a module whose headers are right."""
    if "g_idx" in stored:
        yield from _check_groups(stored["g_idx"], stored["scales"].shape[0], settings)
    yield from _check_zeros(stored["qzeros"], settings, format)
    yield from _check_scales(stored["scales"])
    yield from _check_decoded(stored, settings, format)


def _check_groups(tensor: TensorInfo, groups: int, settings: Settings) -> Iterator[Defect]:
    g_idx = read_array(tensor)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        yield _defect("E_CKPT_GROUPS", tensor, f"holds {g_idx.min()} to {g_idx.max()}, there are {groups} groups")
        return
    group_size = g_idx.size // groups
    sizes = np.bincount(g_idx, minlength=groups)
    if (sizes != group_size).any():
        odd = int((sizes != group_size).argmax())
        hint = None if settings.desc_act or g_idx.any() else _placeholder(tensor)
        message = f"group {odd} has {sizes[odd]} of the columns, not {group_size}"
        yield _defect("E_CKPT_GROUPS", tensor, message, hint)
    elif not settings.desc_act and (g_idx != np.arange(g_idx.size) // group_size).any():
        hint = f"if it was quantized by descending activation: set desc_act to true in {BOTH}"
        yield _defect("E_CKPT_GROUPS", tensor, "is not in the order of columns, and desc_act is false", hint)


def _placeholder(tensor: TensorInfo) -> str:
    command = convert_command(tensor.file.parent, "gptq")
    return f"if the columns are in order: take the g_idx tensors out of the file, and {command} writes right ones"


def _check_zeros(tensor: TensorInfo, settings: Settings, format: str) -> Iterator[Defect]:
    fields = unpack_words(read_array(tensor), settings.bits).astype(np.int32)
    offset, middle, top = STORED_OFFSET[format], 2 ** (settings.bits - 1), 2**settings.bits - 1
    if settings.sym:
        yield from _check_symmetric(tensor, fields, middle, offset)
    elif offset and (wrapped := int((fields == top).sum())):
        message = f"{wrapped} of {fields.size} zero points are 0, which readers of gptq (v1) decode in different ways"
        hint = "quantize the full-precision model again, with --sym or --format gptq_v2"
        yield _defect("E_CKPT_ZEROS", tensor, message, hint)


def _check_symmetric(tensor: TensorInfo, fields: Array, middle: int, offset: int) -> Iterator[Defect]:
    wrong = int((fields != middle - offset).sum())
    if not wrong:
        return
    if (fields == middle - 1 + offset).all():
        held, said = ("gptq_v2", "gptq") if offset else ("gptq", "gptq_v2")
        message = f"holds zero points as {held} stores them, config.json says {said}"
        yield _defect("E_CKPT_ZEROS", tensor, message, _other_format(tensor, held))
    else:
        message = f"{wrong} of {fields.size} zero points are not {middle}, and sym is true"
        hint = f"if it was quantized with asymmetric grids: set sym to false in {BOTH}"
        yield _defect("E_CKPT_ZEROS", tensor, message, hint)


def _other_format(tensor: TensorInfo, held: str) -> str:
    """What the owner does whose file is of format `held` and says otherwise; format gptq has the most readers."""
    remedy = f"set checkpoint_format and format to {held} in {BOTH}"
    command = convert_command(tensor.file.parent, "gptq")
    return remedy if held == "gptq" else f"{remedy}, then {command}"


def _check_scales(tensor: TensorInfo) -> Iterator[Defect]:
    size = np.abs(read_array(tensor).astype(np.float32))
    if not_finite := int((~np.isfinite(size)).sum()):
        yield _defect("E_CKPT_NONFINITE", tensor, f"{not_finite} of {size.size} scales are NaN or infinite")
    if tiny := int((size < SMALLEST).sum()):
        yield _defect("E_CKPT_SCALES", tensor, f"{tiny} of {size.size} scales are zero in float16")
    if huge := int((np.isfinite(size) & (size > LARGEST)).sum()):
        yield _defect("E_CKPT_SCALES", tensor, f"{huge} of {size.size} scales are beyond float16")


def _check_decoded(stored: Mapping[str, TensorInfo], settings: Settings, format: str) -> Iterator[Defect]:
    """Weights beyond float16. Codes [I] are read only of outputs that have a scale large enough for such a weight."""
    scales, top = read_array(stored["scales"]).astype(np.float32), 2**settings.bits - 1
    scales[~(np.abs(scales) <= LARGEST)] = 0  # a defect of their own
    wide = np.flatnonzero((np.abs(scales) > LARGEST / top).any(0))
    columns = np.arange(_in_features(stored, settings))
    g_idx = read_array(stored["g_idx"]) if "g_idx" in stored else columns // (columns.size // len(scales))
    if not wide.size or g_idx.min() < 0 or g_idx.max() >= len(scales):
        return
    zeros = (unpack_words(read_array(stored["qzeros"]), settings.bits).astype(np.int32) + STORED_OFFSET[format]) & top
    words, beyond = read_array(stored["qweight"]), 0
    for output in wide:
        codes = unpack_words(words[None, :, output], settings.bits)[0].astype(np.int32)
        weights = scales[g_idx, output] * (codes - zeros[g_idx, output])
        beyond += int((np.abs(weights) > LARGEST).sum())
    if beyond:
        qweight, message = stored["qweight"], f"{beyond} of its weights are beyond float16"
        hint = "quantize the full-precision model again, or gptq dequantize with --dtype bfloat16"
        yield Defect("E_CKPT_NONFINITE", message, qweight.file.name, qweight.name, hint, "readers")


def _defect(code: str, tensor: TensorInfo, message: str, hint: str | None = None) -> Defect:
    return Defect(code, message, tensor.file.name, tensor.name, hint)
