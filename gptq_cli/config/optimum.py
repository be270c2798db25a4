"""The dicts that Optimum, transformers 4 and 5, AutoGPTQ and GPTQModel write, read without loss.

A foreign field is renamed if we have the same setting under another name, noted if it cannot change
our result, and refused if its value asks for something that we would not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptq_cli.errors import Finding, KeyPath, shown

RENAMED = {"checkpoint_format": "format", "model_seqlen": "seqlen", "hyb_act": "act_group_aware"}

KERNEL = "it chooses a kernel that reads the output"
SOURCE = "it names the checkpoint that the dict was written for"
PLACES = "it tells another tool where to keep and compute things"
NO_ALPHA = "it belongs to a setting that is off"

# field -> the reason why no value of it can change the result
WITHOUT_EFFECT = {
    "meta": "it names the tool that wrote the dict",
    "pad_token_id": "calibration windows are full, nothing is padded",
    "max_input_length": "it sizes a buffer of a kernel that is not used here",
    "cache_block_outputs": "block outputs are always kept for the next block",
    "module_name_preceding_first_block": "the model's own forward runs all before the blocks",
    "damp_auto_increment": "this tool has its own steps for a Hessian without a factor",
}
WITHOUT_EFFECT |= dict.fromkeys(
    ("use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "use_marlin"), KERNEL
)
WITHOUT_EFFECT |= dict.fromkeys(("model_name_or_path", "model_file_base_name", "uri"), SOURCE)
WITHOUT_EFFECT |= dict.fromkeys(
    (
        "offload_to_disk",
        "offload_to_disk_path",
        "calibration_data_device",
        "dense_vram_strategy",
        "dense_vram_strategy_devices",
        "moe_vram_strategy",
        "moe_vram_strategy_devices",
        "auto_forward_data_parallel",
        "wait_for_submodule_finalizers",
        "gc_mode",
        "buffered_fwd",
        "compute_device_filter",
        "hessian_chunk_size",
        "hessian_chunk_bytes",
    ),
    PLACES,
)
WITHOUT_EFFECT |= dict.fromkeys(
    ("pack_impl", "parallel_packing"), "codes are packed the same way by any code"
)
WITHOUT_EFFECT |= dict.fromkeys(
    ("v2_alpha", "v2_memory_device", "gptaq_alpha", "gptaq_memory_device"), NO_ALPHA
)
RECORDED = ("damp_percent", "static_groups", "true_sequential", "act_group_aware")
READERS = {  # values of `backend` that name a kernel of another tool
    "auto_trainable",
    "exllama",
    "exllama_v1",
    "exllama_v2",
    "exllama_eora",
    "marlin",
    "marlin_fp16",
    "machete",
    "bitblas",
    "ipex",
    "torch_fused",
    "cuda",
    "vllm",
    "sglang",
    "mlx",
}

UNUSABLE = "layers without usable inputs are a matter of on_numeric_fault and moe_uncovered"
ASYMMETRIC = "inputs before and after quantization are weighed by asymmetric_calibration"
# field -> (the only value we can honour besides null, our behaviour)
ONLY = {
    "quant_method": ("gptq", "this tool writes GPTQ"),
    "method": ("gptq", "this tool writes GPTQ"),
    "pack_dtype": ("int32", "codes are packed into int32 words"),
    "tokenizer": (None, "calibration uses the tokenizer that comes with the model"),
    "block_name_to_quantize": (None, "the blocks are found by running the model"),
    "is_marlin_format": (False, "codes are written in the layouts gptq and gptq_v2"),
    "mse": (0, "scales are searched for with `scale_search: mse`"),
    "v2": (False, ASYMMETRIC),
    "gptaq": (False, ASYMMETRIC),
    "foem": (False, "this tool has no such method"),
    "rotation": (None, "weights are not rotated"),
    "adapter": (None, "no adapter is trained"),
    "activation": (None, "activations are not quantized"),
    "moe": (None, "experts without tokens are a matter of moe_uncovered"),
    "fail_safe": (False, UNUSABLE),
    "failsafe": (None, UNUSABLE),
    "fallback": (None, UNUSABLE),
    "mock_quantization": (False, "layers are really quantized"),
    "hessian_use_bfloat16_staging": (False, "Hessians are summed in float32"),
}
SILENT_DEFAULTS = {"cache_block_outputs": True}


@dataclass(frozen=True, slots=True)
class Adopted:
    """The values under our names, the path that each renamed one had, findings and notes."""

    values: dict[str, Any]
    renamed: dict[KeyPath, KeyPath] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def adopt(values: Mapping[str, Any]) -> Adopted:
    """Return `values` with the fields of other tools translated, noted or refused."""
    adopted = Adopted({})
    for key, value in values.items():
        if key in RENAMED:
            _rename(adopted, values, key, value)
        elif key in WITHOUT_EFFECT:
            _note(adopted, key, value)
        elif key in ONLY:
            _insist(adopted, key, value)
        elif key == "backend" and _is_reader(values):
            adopted.notes.append(f"backend {value} has no effect: {KERNEL}")
        elif value is not None or key not in adopted.values:
            adopted.values[key] = value
    return adopted


def _is_reader(values: Mapping[str, Any]) -> bool:
    """Return whether `backend` is for the readers of a checkpoint and not from a user."""
    backend = values["backend"]
    return "quant_method" in values and isinstance(backend, str) and backend in READERS


def _note(adopted: Adopted, key: str, value: Any) -> None:
    if value in (None, {}, [], SILENT_DEFAULTS.get(key)):
        return
    note = f"{key} has no effect: {WITHOUT_EFFECT[key]}"
    if isinstance(value, Mapping):
        # GPTQModel records settings in `meta` that a user may want.
        recorded = [name for name in RECORDED if value.get(name) is not None]
        if recorded:
            note += (
                f"; if you want these of its settings, give them yourself: {', '.join(recorded)}"
            )
    adopted.notes.append(note)


def _rename(adopted: Adopted, values: Mapping[str, Any], key: str, value: Any) -> None:
    ours = RENAMED[key]
    if value is None:
        return
    if values.get(ours) is None:
        adopted.values[ours] = value
        adopted.renamed[(ours,)] = (key,)
    elif values[ours] != value:
        predicate = f"mean the same but differ: {shown(value)} and {shown(values[ours])}"
        adopted.findings.append(
            Finding(((key,), (ours,)), "E_CFG_CONFLICT", predicate, f"keep {ours} only")
        )


def _insist(adopted: Adopted, key: str, value: Any) -> None:
    only, why = ONLY[key]
    if value is None or value == only:
        return
    accepted = "left out" if only is None else shown(only).strip('"')
    hint = f"remove it: {why}"
    adopted.findings.append(
        Finding(((key,),), "E_CFG_RANGE", f"must be {accepted}, got {shown(value)}", hint)
    )
