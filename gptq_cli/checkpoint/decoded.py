"""A checkpoint as the plain one that it stands for: weights stored in parts appear as one.

Here is also a fact that no file contains: which models store their linears [I, O]. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gptq_cli.checkpoint.headers import DTYPES_OF_CONFIG, TensorInfo
from gptq_cli.checkpoint.layout import (
    FP8,
    PackedModule,
    block_size,
    packed_modules,
    part_names,
)
from gptq_cli.checkpoint.quantization_config import HEAD, format_of, packing_of
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.layer import FORMATS
from gptq_cli.errors import InputError

FULL_PRECISION = "start from the full-precision model it was made from"
AGAIN = f"{FULL_PRECISION}, or round its weights a second time: --allow-requantize"
ALTERNATIVES = {
    **dict.fromkeys(FORMATS, AGAIN),
    "mxfp4": "serve gpt-oss unchanged: its experts are already 4-bit, "
    "and no engine loads GPTQ experts for it",
}

# The causal language models of transformers whose blocks are made of Conv1D. A test compares this
# with its sources.
TRANSPOSED = frozenset({"gpt2", "gpt-sw3", "openai-gpt"})


@dataclass(frozen=True, slots=True)
class Plain:
    """Tensors by name in file order, and the stored tensors that each decoded one is made of.

    A decoded weight has the place of its codes and the dtype in which it would be stored. `how`
    describes in a few words how the decoded ones are stored; it is None if there are none. If they
    are `packed`, they are [O, I] in every model.
    """

    tensors: dict[str, TensorInfo]
    parts: dict[str, tuple[str, ...]]
    how: str | None = None
    packed: bool = False

    def is_packed(self, name: str) -> bool:
        """Return whether a weight is decoded from packed codes."""
        return self.packed and name in self.parts


def plain_view(checkpoint: Checkpoint, *, allow_requantize: bool = False) -> Plain:
    """Return the plain tensors that `checkpoint` stands for; a plain one stands for itself.

    Weights in 8-bit floats with scales are those of the model itself. InputError E_CKPT_QUANTIZED
    for weights that another method has made, and for GPTQ unless `allow_requantize`. Raises the
    errors of `Checkpoint.scales`, `packed_modules` and `merged_view`, too.
    """
    plain = _plain_view(checkpoint, allow_requantize=allow_requantize)
    if not checkpoint.adapters:
        return plain
    from gptq_cli.checkpoint.adapters import merged_view

    return merged_view(checkpoint, plain)


def _plain_view(checkpoint: Checkpoint, *, allow_requantize: bool) -> Plain:
    method = checkpoint.method
    if method in FORMATS and allow_requantize:
        return _unpacked(checkpoint)
    if method not in (None, FP8):
        if method in FORMATS:
            format_of(checkpoint)  # raises if the weights cannot be decoded for a second rounding
        message = f"`{checkpoint.directory}` is already quantized ({method})"
        hint = ALTERNATIVES.get(method, FULL_PRECISION)
        raise InputError("E_CKPT_QUANTIZED", message, hint=hint)
    scales = checkpoint.scales()
    if not scales:
        return Plain(checkpoint.tensors, {})
    return _scaled(checkpoint, scales)


def _scaled(checkpoint: Checkpoint, scales: Mapping[str, str]) -> Plain:
    """Return the tensors of an FP8 checkpoint with its scales applied."""
    hidden = set(scales.values())
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in scales:
            tensors[name] = replace(tensor, dtype="BF16")
            parts[name] = (name, scales[name])
        elif name not in hidden:
            tensors[name] = tensor
    rows, columns = block_size(checkpoint.quantization or {}) or (0, 0)
    return Plain(tensors, parts, f"fp8 in blocks of {rows}x{columns}")


def _unpacked(checkpoint: Checkpoint) -> Plain:
    """Return the tensors of a checkpoint in codes with its linears decoded."""
    format, dtype = format_of(checkpoint), declared_dtype(checkpoint)
    packing = packing_of(checkpoint)
    modules = {module.name: module for module in packed_modules(checkpoint.tensors, packing)}
    if not modules:
        message = f"`{checkpoint.directory}` is marked as quantized ({format}), but no linear is"
        hint = (
            "download the checkpoint again, or remove quantization_config from a config.json "
            "that is not its own"
        )
        raise InputError("E_CKPT_INCOMPLETE", message, hint=hint)
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name, tensor in checkpoint.tensors.items():
        owner, _, part = name.rpartition(".")
        module = modules.get(owner)
        if module is None or part not in packing.dtypes:
            tensors[name] = tensor
        elif part == packing.codes:
            weight, shape = f"{owner}.weight", (module.out_features, module.in_features)
            tensors[weight] = replace(tensor, name=weight, dtype=dtype, shape=shape)
            parts[weight] = part_names(owner, checkpoint.tensors, packing)
    return Plain(tensors, parts, f"{format}, {_kinds(modules.values())}", packed=True)


def _kinds(modules: Iterable[PackedModule]) -> str:
    """Return the combinations of bits and group size that occur, in words."""
    kinds = sorted({(module.bits, module.group_size) for module in modules})
    return ", ".join(f"{bits} bits group_size {size}" for bits, size in kinds)


def declared_dtype(checkpoint: Checkpoint) -> str:
    """Return the stored dtype that config.json names, else that of a tensor that is not packed."""
    named = _named_dtype(checkpoint.text_config)
    if named is not None:
        return DTYPES_OF_CONFIG[named]
    known = set(DTYPES_OF_CONFIG.values())
    packing = packing_of(checkpoint)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in known and tensor.name.rpartition(".")[2] not in packing.dtypes:
            return tensor.dtype
    return "BF16"


def forward_dtype(checkpoint: Checkpoint, wanted: str) -> str:
    """Return the name of the dtype that a model runs in.

    That is the `wanted` one. If it is "auto", it is the one that config.json names, else that of
    the first tensor that is stored as plain floats, else float32.
    """
    if wanted != "auto":
        return wanted
    named = _named_dtype(checkpoint.text_config) or _named_dtype(checkpoint.config)
    if named is not None:
        return named
    for tensor in checkpoint.tensors.values():
        for name, stored in DTYPES_OF_CONFIG.items():
            if tensor.dtype == stored:
                return name
    return "float32"


def _named_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config.json names; None if it names none of DTYPES_OF_CONFIG."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if named in DTYPES_OF_CONFIG:
        return named
    return None


def stores_transposed(config: Mapping[str, Any]) -> bool:
    """Return whether the model of this config.json stores the linears of its blocks [I, O].

    Quantized linears are [O, I] in every model.
    """
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in TRANSPOSED


def is_stored_transposed(config: Mapping[str, Any], module: str) -> bool:
    """Return whether the model of this config.json stores the linear `module` [I, O].

    The output head does not belong to the blocks.
    """
    return stores_transposed(config) and module != HEAD
