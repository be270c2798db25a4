"""Ask LMDeploy's own TurboMind converter about checkpoints, and unpack them with its code.

LMDeploy needs a GPU, so its kernels are left out; transformers computes with the weights that its
format classes unpack. The first argument is LMDeploy's unpacked wheel.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import serve
from run_transformers import logits_of, unknown_names
from safetensors.torch import load_file, save_file
from stand_ins import stand_in_for
from transformers import AutoModelForCausalLM

sys.path.insert(0, sys.argv[1])
stand_in_for({"lmdeploy.turbomind._turbomind", "mmengine", "shortuuid"})
from lmdeploy.messages import TurbomindEngineConfig
from lmdeploy.turbomind import converter

Tensors = dict[str, torch.Tensor]


class Refused(Exception):
    """A tensor that none of LMDeploy's formats accepts."""


class Accepted(Exception):
    """The converter accepted a configuration and would now make the model."""


def formats_of(directory: str) -> list[Any]:
    """Return the formats with which LMDeploy reads a checkpoint; raise what its converter raises.

    The stub of the kernels takes both dtypes.
    """
    formats: list[Any] = []
    registered = converter.get_registered_name

    def stop(*arguments: Any, **named: Any) -> None:
        registered(*arguments, **named)
        raise Accepted

    converter._get_executable_dtypes = lambda *_: {"bfloat16", "float16"}
    converter.WeightFormatResolver = lambda **named: formats.extend(named["formats"])
    converter.get_registered_name = stop
    try:
        converter.get_tm_config(directory, TurbomindEngineConfig(devices=[0]))
    except Accepted:
        return formats
    finally:
        converter.get_registered_name = registered
    raise Refused("the converter ended early")


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the logits [B, T, V] of the weights as LMDeploy unpacks them."""
    formats = formats_of(directory)
    tensors: Tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((Path(directory) / "config.json").read_text())
    config.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as plain:
        (Path(plain) / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        save_file(unpack(tensors, formats), Path(plain) / "model.safetensors", {"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
        return logits_of(model, ids), unknown_names(info)


def unpack(tensors: Tensors, formats: list[Any]) -> Tensors:
    """Return plain float32 weights of a checkpoint, unpacked by `formats`."""
    weights = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            weights[f"{module}.weight"] = weight_of(module, tensors, formats)
        elif f"{module}.qweight" not in tensors or part == "bias":
            weights[name] = tensor.float()
    return weights


def weight_of(module: str, tensors: Tensors, formats: list[Any]) -> torch.Tensor:
    """Return the weight [O, I] of a quantized linear."""
    parts = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{module}.") and not name.endswith("g_idx"):
            parts[name.removeprefix(module)] = tensor
    for reader in formats:
        if reader.accepts(parts):
            codes = reader.normalize(parts[".qweight"], "weight").float()
            zeros = reader.normalize(parts[".qzeros"], "zeros").float()
            scales = reader.normalize(parts[".scales"], "scales").float()
            columns = len(tensors[f"{module}.g_idx"])
            if len(codes) != columns:
                raise Refused(f"{module} has {columns} columns, unpacked {len(codes)}")
            groups = torch.arange(len(codes)) // reader.block_in
            if len(groups.unique()) != len(scales):
                raise Refused(
                    f"{module} has {len(scales)} groups, not of {reader.block_in} columns"
                )
            return ((codes - zeros[groups]) * scales[groups]).T.contiguous()
    raise Refused(f"no format accepts {module}")


if __name__ == "__main__":
    serve(run)
