"""The truth: a quantized checkpoint, unpacked to float32 by code that shares nothing with gptq_cli.

Written from the layouts that AutoGPTQ, compressed-tensors and MLX publish.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]


def logits_of(plain: Path, ids: np.ndarray) -> np.ndarray:
    """Return the float32 logits [B, T, V] of a checkpoint that is not quantized."""
    model, info = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, output_loading_info=True
    )
    unknown = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert not unknown, f"the weights do not fit the model: {unknown}"
    with torch.inference_mode():
        return model.eval()(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()


def unpack(checkpoint: Path, plain: Path) -> None:
    """Write the weights of `checkpoint` in float32, unpacked, into the new directory `plain`."""
    plain.mkdir()
    settings = json.loads((checkpoint / "config.json").read_text())
    quantization = settings.pop("quantization_config", {})
    if "quantization" in settings:  # as MLX has it
        quantization = settings.pop("quantization") | {"quant_method": "mlx"}
    tensors = _read(checkpoint)
    weights = UNPACK[quantization["quant_method"]](tensors, quantization)
    for name in list(weights):
        if settings["model_type"] == "gpt2" and f"{name[:-6]}qweight" in tensors:
            weights[name] = weights[name].T.contiguous()  # Conv1D stores [I, O]
        if weights[name].is_floating_point():
            weights[name] = weights[name].float()
    (plain / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    for file in checkpoint.glob("*token*"):
        shutil.copy(file, plain)


def _read(checkpoint: Path) -> Tensors:
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = opened.get_tensor(name)
    return tensors


def _bit_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the values of `bits` bits [N, 32 * W // bits] of little-endian words [N, W]."""
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    stream = (unsigned[:, :, None] >> np.arange(32)) & 1
    stream = stream.reshape(len(words), -1)
    count = stream.shape[1] // bits
    values = stream[:, : count * bits].reshape(len(words), count, bits)
    return (values << np.arange(bits)).sum(-1)


def _words(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int32).numpy()


# ---------------------------------------------------------------- gptq and gptq_v2


def _unpack_gptq(tensors: Tensors, quantization: dict[str, Any]) -> Tensors:
    offset = int(quantization.get("checkpoint_format") != "gptq_v2")
    weights = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            bits = _bits_of(module, quantization)
            weights[f"{module}.weight"] = _gptq_weight(tensors, module, bits, offset)
        elif f"{module}.qweight" not in tensors or part == "bias":
            weights[name] = tensor
    return weights


def _bits_of(module: str, quantization: dict[str, Any]) -> int:
    for pattern, change in (quantization.get("dynamic") or {}).items():
        if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, module):
            assert not pattern.startswith("-:"), f"{module} is quantized, but {pattern} keeps it"
            return change.get("bits", quantization["bits"])
    return quantization["bits"]


def _gptq_weight(tensors: Tensors, module: str, bits: int, offset: int) -> torch.Tensor:
    """Return the weight [O, I]: scale * (code - zero), column by column."""
    codes = _bit_stream(_words(tensors[f"{module}.qweight"]).T, bits)  # [O, I]
    zeros = _bit_stream(_words(tensors[f"{module}.qzeros"]), bits) + offset  # [G, O]
    scales = tensors[f"{module}.scales"].double().numpy()  # [G, O]
    groups = tensors[f"{module}.g_idx"].numpy()
    assert codes.shape[1] == len(groups), f"{module} has {codes.shape[1]} columns"
    weight = scales[groups].T * (codes - zeros[groups].T)
    return torch.from_numpy(weight.astype(np.float32))


# ---------------------------------------------------------------- auto-round


def _unpack_auto_round(tensors: Tensors, quantization: dict[str, Any]) -> Tensors:
    offset = int(quantization["packing_format"] == "auto_round:auto_gptq")
    changes = quantization.get("extra_config") or {}
    grouped = dict(tensors)
    dynamic = {}
    for name, change in changes.items():
        if change.get("bits", 4) < 16:
            dynamic[f"+:.*{name}"] = change
    settings = {"bits": quantization["bits"], "dynamic": dynamic}
    settings["checkpoint_format"] = ("gptq_v2", "gptq")[offset]
    for name, codes in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            columns = codes.shape[0] * 32 // _bits_of(module, settings)
            size = columns // tensors[f"{module}.scales"].shape[0]
            grouped[f"{module}.g_idx"] = torch.arange(columns) // size
    return _unpack_gptq(grouped, settings)


# ---------------------------------------------------------------- compressed-tensors


def _unpack_compressed(tensors: Tensors, quantization: dict[str, Any]) -> Tensors:
    assert quantization["format"] == "pack-quantized"
    weights = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            weights[f"{module}.weight"] = _compressed_weight(tensors, module)
        elif f"{module}.weight_packed" not in tensors or part == "bias":
            weights[name] = tensor
    return weights


def _compressed_weight(tensors: Tensors, module: str) -> torch.Tensor:
    """Return the weight [O, I]; codes lie along I, zero points along O, both without a sign."""
    packed = _words(tensors[f"{module}.weight_packed"])
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    bits = packed.shape[1] * 32 // columns
    scales = tensors[f"{module}.weight_scale"].double().numpy()  # [O, G]
    zeros = np.full(scales.shape, 1 << (bits - 1))
    if f"{module}.weight_zero_point" in tensors:
        zeros = _bit_stream(_words(tensors[f"{module}.weight_zero_point"]).T, bits).T[:rows]
    groups = np.arange(columns) // (columns // scales.shape[1])
    weight = scales[:, groups] * (_bit_stream(packed, bits)[:, :columns] - zeros[:, groups])
    return torch.from_numpy(weight.astype(np.float32))


# ---------------------------------------------------------------- mlx


OF_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _unpack_mlx(tensors: Tensors, quantization: dict[str, Any]) -> Tensors:
    weights = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if f"{module}.scales" not in tensors or part == "bias":
            weights[name] = tensor
        elif part == "weight":
            size = quantization.get(module, quantization)["group_size"]
            parts = [tensors[f"{module}.{kind}"] for kind in ("weight", "scales", "biases")]
            if tensor.dim() == 2:
                weights[name] = _mlx_weight(*parts, size)
                continue
            holder, _, last = module.partition(".switch_mlp.")  # [E, O, I] of all experts
            if holder.endswith("block_sparse_moe"):
                last = OF_MIXTRAL[last]
            for expert, slices in enumerate(zip(*parts, strict=True)):
                weight = _mlx_weight(*slices, size)
                weights[f"{holder}.experts.{expert}.{last}.weight"] = weight
    return weights


def _mlx_weight(
    codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Return the weight [O, I]: scale * code + bias, column by column."""
    scale, bias = scales.double().numpy(), biases.double().numpy()  # [O, G]
    packed = _words(codes)
    columns = scale.shape[1] * group_size
    groups = np.arange(columns) // group_size
    numbers = _bit_stream(packed, packed.shape[1] * 32 // columns)
    weight = scale[:, groups] * numbers + bias[:, groups]
    return torch.from_numpy(weight.astype(np.float32))


UNPACK = {
    "gptq": _unpack_gptq,
    "auto-round": _unpack_auto_round,
    "compressed-tensors": _unpack_compressed,
    "mlx": _unpack_mlx,
}
