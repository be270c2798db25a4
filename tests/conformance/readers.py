"""The rules by which engines read a GPTQ checkpoint, written again from their sources in numpy.

Each reader returns the weights [O, I] with which the engine would compute, by module or by the
fused module that the engine makes of several, or raises `Refused`. Sources, read in November 2026:
vLLM 0.33.0 `auto_gptq.py`, `gptq_utils.py`, `parameter.py`; SGLang 0.5.23
`layers/quantization/gptq`; llama.cpp `conversion/base.py`; exllamav2 `config.py`, `linear.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MARLIN_GROUPS = (-1, 32, 64, 128)
FULL_PRECISION = ("float16", "float32", "bfloat16")
Weights = dict[str, np.ndarray]


class Refused(Exception):
    """An engine refuses the checkpoint, with its words."""


class Directory:
    """A checkpoint as a reader sees it."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.quantization: dict[str, Any] = self.config.get("quantization_config", {})
        self.tensors: dict[str, np.ndarray] = {}
        for file in sorted(directory.glob("*.safetensors")):
            self.tensors |= load_file(file)

    def need(self, *keys: str) -> list[Any]:
        absent = [key for key in keys if key not in self.quantization]
        if absent:
            raise Refused(f"Cannot find any of {absent} in the model's quantization config.")
        return [self.quantization[key] for key in keys]

    def modules(self, suffix: str = ".qweight") -> list[str]:
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def linears(self) -> list[str]:
        """Linear modules of the blocks and the head, packed or not."""
        found = {
            name.rpartition(".")[0]
            for name in self.tensors
            if name.endswith(("_proj.weight", "_proj.qweight"))
        }
        return sorted(found)

    def part(self, module: str, part: str) -> np.ndarray:
        if f"{module}.{part}" not in self.tensors:
            raise Refused(f"KeyError {module}.{part}")
        return self.tensors[f"{module}.{part}"]


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Return unsigned fields along the first axis; three words hold 32 fields of 3 bits."""
    unsigned = words.view(np.uint32).astype(np.uint64)
    if bits != 3:
        shifts = [unsigned >> np.uint64(bits * place) for place in range(32 // bits)]
        return (
            (np.stack(shifts, 1) & np.uint64(2**bits - 1))
            .reshape(-1, *words.shape[1:])
            .astype(np.int64)
        )
    first, second, third = unsigned[0::3], unsigned[1::3], unsigned[2::3]
    ten = [first >> np.uint64(3 * place) for place in range(10)]
    ten += [(first >> np.uint64(30)) | (second << np.uint64(2))]
    ten += [second >> np.uint64(1 + 3 * place) for place in range(10)]
    ten += [(second >> np.uint64(31)) | (third << np.uint64(1))]
    ten += [third >> np.uint64(2 + 3 * place) for place in range(10)]
    return (np.stack(ten, 1) & np.uint64(7)).reshape(-1, *words.shape[1:]).astype(np.int64)


def weights_of(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | int, group: np.ndarray
) -> np.ndarray:
    """Return weights [O, I] of codes [I, O], scales and zeros [G, O] and the group of inputs."""
    shift = zeros if isinstance(zeros, int) else zeros[group]
    return ((codes - shift) * scales.astype(np.float64)[group]).T


def vllm(directory: Path) -> Weights:
    checkpoint = Directory(directory)
    bits, group_size, desc_act, sym = checkpoint.need("bits", "group_size", "desc_act", "sym")
    base = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": sym}
    _refuse_desc_act(base)
    for values in (checkpoint.quantization.get("dynamic") or {}).values():
        _refuse_desc_act(base | values)
    result: Weights = {}
    for prefix, shards in fused_modules([*checkpoint.linears(), "lm_head"]):
        if not _vllm_quantizes(checkpoint, prefix, shards):
            continue
        settings = _override(checkpoint, base, prefix)
        _check_shapes(checkpoint, shards, settings)
        _check_marlin(settings)
        packed = [checkpoint.part(shard, "qweight") for shard in shards]
        codes = np.concatenate([fields(qweight, settings["bits"]) for qweight in packed], 1)
        scales = np.concatenate([checkpoint.part(shard, "scales") for shard in shards], 1)
        order = _in_turn(settings, len(codes))  # the loader drops g_idx
        result[prefix] = weights_of(codes, scales, 2 ** (settings["bits"] - 1), order)
    return result


def _vllm_quantizes(checkpoint: Directory, prefix: str, shards: list[str]) -> bool:
    if skipped(checkpoint, prefix):
        return False
    listed = _listed(checkpoint)
    if listed:
        answers = {_holds_one_of(listed, shard) for shard in shards}
    else:
        packed = _with_other_than_floats(checkpoint)
        answers = {shard in packed for shard in shards}
    if prefix == "lm_head" and not checkpoint.quantization.get("lm_head"):
        return False
    if len(answers) > 1:
        raise Refused(f"Detected some but not all shards of {prefix} are quantized.")
    return answers.pop()


def _listed(checkpoint: Directory) -> list[str]:
    names: list[str] = []
    for item in checkpoint.quantization.get("modules_in_block_to_quantize") or []:
        names += item if isinstance(item, list) else [item]
    return names


def _holds_one_of(names: list[str], module: str) -> bool:
    return any(name in module for name in names)


def _with_other_than_floats(checkpoint: Directory) -> set[str]:
    """Return the modules with a tensor of no float type: by the headers, they are quantized."""
    found = set()
    for name, tensor in checkpoint.tensors.items():
        if str(tensor.dtype) not in FULL_PRECISION:
            found.add(name.rpartition(".")[0])
    return found


def sglang(directory: Path) -> Weights:
    checkpoint = Directory(directory)
    bits, group_size, desc_act, sym = checkpoint.need("bits", "group_size", "desc_act", "sym")
    base = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": sym}
    if (bits, sym) not in ((4, True), (8, True)) or group_size not in MARLIN_GROUPS:
        raise Refused("The non-Marlin GPTQ CUDA kernel has been removed.")
    result: Weights = {}
    for prefix, shards in fused_modules([*checkpoint.linears(), "lm_head"]):
        if skipped(checkpoint, prefix) or (
            prefix == "lm_head" and not checkpoint.quantization.get("lm_head")
        ):
            continue
        settings = _override(checkpoint, base, prefix)
        _check_shapes(checkpoint, shards, settings)
        _check_marlin(settings)
        columns = []
        for shard in shards:
            codes = fields(checkpoint.part(shard, "qweight"), settings["bits"])
            scales, zeros = checkpoint.part(shard, "scales"), 2 ** (settings["bits"] - 1)
            # A plain parameter: each shard overwrites it, so that of the last one stays.
            last = checkpoint.part(shards[-1], "g_idx")
            columns.append(weights_of(codes, scales, zeros, _order(last, settings, len(codes))))
        result[prefix] = np.concatenate(columns)
    return result


def llama_cpp(directory: Path) -> Weights:
    checkpoint = Directory(directory)
    (bits,) = checkpoint.need("bits")
    if checkpoint.quantization.get("quant_method") != "gptq" or bits not in (2, 4, 8):
        raise Refused("NotImplementedError")
    v1 = checkpoint.quantization.get("checkpoint_format", "gptq") == "gptq"
    result: Weights = {}
    for module in checkpoint.modules():
        codes = fields(checkpoint.part(module, "qweight"), bits)
        zeros = fields(checkpoint.part(module, "qzeros").T.copy(), bits).T + v1
        scales, g_idx = checkpoint.part(module, "scales"), checkpoint.part(module, "g_idx")
        if codes.shape != (len(g_idx), scales.shape[1]) or zeros.shape != scales.shape:
            raise Refused("RuntimeError: shape mismatch")
        result[module] = weights_of(codes, scales, zeros, g_idx)
    return result


def exllamav2(directory: Path) -> Weights:
    checkpoint = Directory(directory)
    v2 = checkpoint.quantization.get("checkpoint_format") == "gptq_v2"
    result: Weights = {}
    for module in checkpoint.modules():
        qweight, qzeros, scales = (
            checkpoint.part(module, part) for part in ("qweight", "qzeros", "scales")
        )
        in_features, out_features = len(qweight) * 8, qweight.shape[1]
        if qzeros.shape != (len(scales), out_features // 8) or scales.shape[1] != out_features:
            raise Refused("AssertionError: 4 bits only")
        g_idx = checkpoint.tensors.get(f"{module}.g_idx", np.zeros(0, np.int32))
        if g_idx.size not in (0, in_features):
            raise Refused("AssertionError: 4 bits only")
        group_size = 1
        while group_size * len(scales) < in_features:
            group_size *= 2
        if group_size * len(scales) != in_features:
            raise Refused("group_size is no power of two")
        words = (qzeros.view(np.uint32) - np.uint32(0x11111111)).view(np.int32) if v2 else qzeros
        zeros = fields(words.T.copy(), 4).T + 1
        order = g_idx if g_idx.any() else np.arange(in_features) // group_size
        result[module] = weights_of(fields(qweight, 4), scales.astype(np.float16), zeros, order)
    return result


READERS: dict[str, Callable[[Path], Weights]] = {
    "vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp, "exllamav2": exllamav2,
}  # fmt: skip


def fused_modules(linears: list[str]) -> list[tuple[str, list[str]]]:
    """Return the names of the engine's modules, each with its modules of the checkpoint."""
    found: dict[str, list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        alias = next((alias for alias, parts in FUSED.items() if leaf in parts), leaf)
        found.setdefault(f"{parent}.{alias}" if parent else alias, []).append(name)
    order = {part: place for parts in FUSED.values() for place, part in enumerate(parts)}
    return [
        (prefix, sorted(s, key=lambda name: order.get(name.rpartition(".")[2], 0)))
        for prefix, s in found.items()
    ]


def skipped(checkpoint: Directory, prefix: str) -> bool:
    rules = checkpoint.quantization.get("dynamic") or {}
    return any(rule.startswith("-:") and re.match(rule[2:], prefix) for rule in rules)


def overridden(
    checkpoint: Directory, base: dict[str, Any], prefix: str, shards: list[str]
) -> dict[str, Any]:
    """Return a module's settings after `dynamic`, which have to be those of all its shards."""
    found = _override(checkpoint, base, prefix)
    if any(_override(checkpoint, base, shard) != found for shard in shards):
        raise Refused(f"the rules for {prefix} do not match those for its shards")
    return found


def _check_shapes(checkpoint: Directory, shards: list[str], settings: dict[str, Any]) -> None:
    """Refuse shards that do not fit the parameters which an engine makes for these settings."""
    for shard in shards:
        inputs = len(checkpoint.part(shard, "g_idx"))
        group_size = inputs if settings["group_size"] == -1 else settings["group_size"]
        found = len(checkpoint.part(shard, "qweight")), len(checkpoint.part(shard, "scales"))
        if found != (inputs * settings["bits"] // 32, inputs // group_size):
            raise Refused("AssertionError: param_data.shape == loaded_weight.shape")


def _override(checkpoint: Directory, base: dict[str, Any], name: str) -> dict[str, Any]:
    for rule, values in (checkpoint.quantization.get("dynamic") or {}).items():
        if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
            return base | {key: value for key, value in values.items() if key in base}
    return base


def _check_marlin(settings: dict[str, Any]) -> None:
    if (settings["bits"], settings["sym"]) not in ((4, True), (8, True)):
        raise Refused(
            f"Unsupported quantization config: bits={settings['bits']}, sym={settings['sym']}"
        )
    if settings["group_size"] not in MARLIN_GROUPS:
        raise Refused(f"group_size {settings['group_size']} is not supported")


def _refuse_desc_act(settings: dict[str, Any]) -> None:
    if settings["desc_act"] and settings["group_size"] != -1:
        raise Refused("GPTQ group activation ordering (desc_act=True) is no longer supported.")


def _order(g_idx: np.ndarray, settings: dict[str, Any], in_features: int) -> np.ndarray:
    if settings["desc_act"] and settings["group_size"] != -1:
        return g_idx
    return _in_turn(settings, in_features)


def _in_turn(settings: dict[str, Any], in_features: int) -> np.ndarray:
    group_size = in_features if settings["group_size"] == -1 else settings["group_size"]
    return np.arange(in_features) // group_size
