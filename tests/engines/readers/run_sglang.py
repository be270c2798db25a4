"""Ask SGLang's own classes about checkpoints: they make the parameters that a checkpoint fills.

SGLang needs a GPU, so nothing is computed: kernels are left out, and the classes believe in a GPU
of compute capability 9.0. The first argument is SGLang's unpacked wheel.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from answers import serve
from safetensors import safe_open
from stand_ins import stand_in_for

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
NEVER = re.compile(r"embed|\.w[tp]e$|\.mlp\.gate$")  # embeddings and routers
EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")


sys.path.insert(0, sys.argv[1])
stand_in_for({"orjson", "IPython", "torchvision", "gguf"})
torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization import marlin_utils
from sglang.srt.layers.quantization.gptq import GPTQConfig, GPTQMarlinConfig
from sglang.srt.layers.quantization.gptq.schemes.gptq_marlin import GPTQMarlinLinearScheme
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

marlin_utils.get_device_capability = lambda *_, **__: (9, 0)
GPTQMarlinLinearScheme._init_kernel = lambda *_: MagicMock()

Shapes = dict[str, list[int]]


class Refused(Exception):
    """A layer that SGLang would make otherwise than the checkpoint has it."""


def run(directory: str, ids: object) -> tuple[None, list[str]]:
    """Return nothing if the parameters of each layer fit the checkpoint; raise otherwise."""
    del ids
    config = json.loads((Path(directory) / "config.json").read_text())
    quantization = config.get("quantization_config")
    if quantization is None:
        return None, []
    kind = GPTQConfig
    if GPTQMarlinConfig.override_quantization_method(quantization, None):
        kind = GPTQMarlinConfig
    settings = kind.from_config(quantization)
    shapes = shapes_of(Path(directory))
    for name, parts in linears(shapes).items():
        check(name, parts, shapes, settings)
    return None, []


def shapes_of(directory: Path) -> Shapes:
    """Return the shape of each tensor of a checkpoint."""
    shapes = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                shapes[name] = opened.get_slice(name).get_shape()
    return shapes


def linears(shapes: Shapes) -> dict[str, list[str]]:
    """Return the linears as SGLang names them, with their parts as the checkpoint does."""
    found: dict[str, list[str]] = {}
    for name in shapes:
        module, _, part = name.rpartition(".")
        if part not in ("qweight", "weight") or len(shapes[name]) < 2 or NEVER.search(module):
            continue
        parent, _, last = module.rpartition(".")
        for fused, parts in FUSED.items():
            if last in parts and not EXPERTS.match(name):
                module = f"{parent}.{fused}"
        if EXPERTS.match(name):
            module = EXPERTS.match(name)[1]
        found.setdefault(module, []).append(name)
    return found


def check(module: str, parts: list[str], shapes: Shapes, settings: Any) -> None:
    """Raise Refused if SGLang would make other parameters for `module` than its `parts` have."""
    stored = {shape_in_checkpoint(part, shapes) for part in parts}
    if module.endswith("experts"):
        method = settings.get_quant_method(bare(FusedMoE), module)
        made = "plain" if method is None else "quantized"
        stored = {"plain" if shape == "plain" else "quantized" for shape in stored}
    elif module.endswith("lm_head"):
        method = settings.get_quant_method(bare(ParallelLMHead), module)
        made = "plain"
        if "GPTQ" in type(method).__name__:
            made = shape_made(module, parts, shapes, settings)
    else:
        made = shape_made(module, parts, shapes, settings)
    if stored != {made}:
        raise Refused(f"it makes {module} {made}, but in the checkpoint it is {sorted(stored)}")


def shape_in_checkpoint(part: str, shapes: Shapes) -> str:
    """Return "plain", or the rows of the packed codes and of the scales of a linear."""
    if part.endswith(".weight"):
        return "plain"
    scales = part.removesuffix("qweight") + "scales"
    return f"{shapes[part][0]} x {shapes[scales][0]}"


def shape_made(module: str, parts: list[str], shapes: Shapes, settings: Any) -> str:
    """Return the same of the linear that SGLang makes with `settings`."""
    first = parts[0]
    width, height = shapes[first][1], sum(shapes[part][0] for part in parts)
    if first.endswith("qweight"):
        width = shapes[first.removesuffix("qweight") + "g_idx"][0]
        height = sum(shapes[part][1] for part in parts)
    layer = ReplicatedLinear(
        width,
        height,
        bias=False,
        quant_config=settings,
        prefix=module,
        params_dtype=torch.float16,
    )
    made = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    if "weight" in made:
        return "plain"
    return f"{made['qweight'][0]} x {made['scales'][0]}"


def bare(kind: type) -> Any:
    """Return a layer of `kind` without parameters."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    return layer


if __name__ == "__main__":
    serve(run)
