"""Weights in 8-bit floats with a scale for each block of rows and columns, as DeepSeek publishes them; headers only.

`X.weight` F8_E4M3 [O, I] stands for `X.weight * X.weight_scale_inv`, whose scales are [ceil(O / rows), ceil(I /
columns)]. Source: inference/kernel.py of deepseek-ai/DeepSeek-V3, and transformers' FineGrainedFP8Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.errors import InputError

METHOD = "fp8"
SCALES = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
FEW_BITS = ("F8_", "F4")


def block_size(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as a `quantization_config` says; None if it says something else."""
    size = said.get("weight_block_size")
    is_pair = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    dynamic = said.get("activation_scheme", "dynamic") == "dynamic"
    return (size[0], size[1]) if said.get("quant_method") == METHOD and is_pair and dynamic and size else None


def scales_of(directory: Path, said: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The name of the scales of each weight that is stored in 8-bit floats; `said` is the `quantization_config`.

    InputError E_CKPT_FP8 for floats of 8 or 4 bits that are stored otherwise, E_CKPT_INCOMPLETE for a weight without
    scales, E_CKPT_SHAPE where the two do not fit.
    """
    few = [
        tensor for tensor in tensors.values() if tensor.dtype.startswith(FEW_BITS) and not _is_scale(tensor, tensors)
    ]
    if not few:
        return {}
    block = block_size(said or {})
    odd = next((t for t in few if block is None or t.dtype != "F8_E4M3" or not _is_matrix(t)), None)
    if odd is not None or block is None:
        odd = odd or few[0]
        raise InputError(
            "E_CKPT_FP8", f"`{directory}` holds {odd.dtype} weights, first `{odd.name}`",
            hint="use a float16 or bfloat16 version of the model: 8-bit floats are read as DeepSeek stores them, with "
            "quant_method fp8, a weight_block_size, and a tensor of scales for each weight",
        )  # fmt: skip
    for weight in few:
        _check_scales(weight, tensors.get(f"{weight.name}{SCALES}"), block)
    return {weight.name: f"{weight.name}{SCALES}" for weight in few}


def _is_scale(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    weight = tensors.get(tensor.name.removesuffix(SCALES)) if tensor.name.endswith(SCALES) else None
    return weight is not None and weight.dtype.startswith(FEW_BITS)


def _is_matrix(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def _check_scales(weight: TensorInfo, scales: TensorInfo | None, block: tuple[int, int]) -> None:
    if scales is None:
        raise InputError(
            "E_CKPT_INCOMPLETE", f"`{weight.name}` is stored in 8-bit floats, and its scales `{weight.name}{SCALES}` "
            "are missing", hint="download the checkpoint again",
        )  # fmt: skip
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if scales.shape != expected or scales.dtype not in SCALE_DTYPES:
        raise InputError(
            "E_CKPT_SHAPE",
            f"`{scales.name}` is {scales.dtype} {list(scales.shape)}, blocks of {block[0]}x{block[1]} in "
            f"{list(weight.shape)} ask for {list(expected)} floats",
        )
