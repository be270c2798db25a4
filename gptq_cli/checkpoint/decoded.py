"""A checkpoint as the plain one that it stands for: weights that are stored in parts appear as one,
and a fact that no file tells: which models store their linears [I, O]. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.packed import PARTS, packed_modules
from gptq_cli.checkpoint.quantization_config import format_of
from gptq_cli.checkpoint.source import METHOD as FP8
from gptq_cli.checkpoint.source import Checkpoint, block_size
from gptq_cli.errors import InputError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FULL_PRECISION = "start from the full-precision model it was made from"
INSTEAD = {
    "gptq": f"{FULL_PRECISION}, or round its weights a second time: --allow-requantize",
    "mxfp4": "serve gpt-oss as it is: engines run its 4-bit experts so, and have no place for GPTQ in them",
}

# The causal language models of transformers whose blocks are made of Conv1D; a test compares this with its sources.
TRANSPOSED = frozenset({"gpt2", "gpt-sw3", "openai-gpt"})


@dataclass(frozen=True, slots=True)
class Plain:
    """Tensors by name in file order, and for each that is decoded the stored tensors that it is made of.

    A decoded weight lies where its codes do and has the dtype that it would be stored in. `how` tells in a few words
    how the decoded ones are stored, None if there are none.
    """

    tensors: dict[str, TensorInfo]
    parts: dict[str, tuple[str, ...]]
    how: str | None = None

    def is_packed(self, name: str) -> bool:
        """Whether a decoded weight has another name in the files, under which it is [O, I] in every model."""
        return name in self.parts and name not in self.parts[name]


def plain_view(checkpoint: Checkpoint, *, allow_requantize: bool = False) -> Plain:
    """What `checkpoint` stands for; a plain one stands for itself.

    Weights in 8-bit floats with scales are those of the model itself. InputError E_CKPT_QUANTIZED for one that another
    method has made, and for GPTQ unless `allow_requantize`; otherwise as `Checkpoint.scales` and `packed_modules` say.
    """
    method = checkpoint.method
    if method == "gptq" and allow_requantize:
        return _unpacked(checkpoint)
    if method not in (None, FP8):
        if method == "gptq":
            format_of(checkpoint)  # what cannot be decoded cannot be rounded a second time either
        raise InputError(
            "E_CKPT_QUANTIZED", f"`{checkpoint.directory}` is already quantized ({method})",
            hint=INSTEAD.get(method, FULL_PRECISION),
        )  # fmt: skip
    scales = checkpoint.scales()
    if not scales:
        return Plain(checkpoint.tensors, {})
    hidden = set(scales.values())
    tensors = {
        name: replace(tensor, dtype="BF16") if name in scales else tensor
        for name, tensor in checkpoint.tensors.items()
        if name not in hidden
    }
    rows, columns = block_size(checkpoint.quantization or {}) or (0, 0)
    return Plain(
        tensors,
        {name: (name, scale) for name, scale in scales.items()},
        f"fp8 in blocks of {rows}x{columns}",
    )


def declared_dtype(checkpoint: Checkpoint) -> str:
    """What weights are stored in: the dtype that config.json names, else that of the tensors that are not packed."""
    config = checkpoint.text_config
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    parts = tuple(f".{part}" for part in PARTS)
    kept = [
        t.dtype
        for t in checkpoint.tensors.values()
        if t.dtype in DTYPES.values() and not t.name.endswith(parts)
    ]
    return DTYPES.get(named) or (kept[0] if kept else "BF16")


def _unpacked(checkpoint: Checkpoint) -> Plain:
    format, dtype = format_of(checkpoint), declared_dtype(checkpoint)
    modules = {module.name: module for module in packed_modules(checkpoint.tensors)}
    if not modules:
        raise InputError(
            "E_CKPT_INCOMPLETE", f"`{checkpoint.directory}` says that it is quantized with GPTQ, and no linear is",
            hint="download the checkpoint again, or take quantization_config out of a config.json that is not its own",
        )  # fmt: skip
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name, tensor in checkpoint.tensors.items():
        owner, _, part = name.rpartition(".")
        if owner not in modules or part not in PARTS:
            tensors[name] = tensor
        elif part == "qweight":
            weight, shape = (
                f"{owner}.weight",
                (modules[owner].out_features, modules[owner].in_features),
            )
            tensors[weight] = replace(tensor, name=weight, dtype=dtype, shape=shape)
            parts[weight] = tuple(
                f"{owner}.{p}" for p in PARTS if f"{owner}.{p}" in checkpoint.tensors
            )
    kinds = sorted({(module.bits, module.group_size) for module in modules.values()})
    return Plain(
        tensors,
        parts,
        f"{format}, " + ", ".join(f"{bits} bits group_size {size}" for bits, size in kinds),
    )


def stores_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the model of this config.json stores the linears of its blocks [I, O]; quantized they are [O, I]."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in TRANSPOSED


def is_stored_transposed(config: Mapping[str, Any], module: str) -> bool:
    """Whether the model of this config.json stores the linear `module` [I, O]; its head is no part of the blocks."""
    return stores_transposed(config) and module != "lm_head"
