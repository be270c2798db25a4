#!/usr/bin/env python3
"""Measure what decides open questions on a new device: the rates of the operations of a run.

    python scripts/measure_gpu.py --json FILE [--device cuda] [--tiny]

Each measurement stands alone: if one fails, the JSON holds its error in place of its figures, and
the exit code is 1. Prints the figures of each measurement as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_engine import SEQLEN, Bench
from common import argument_parser, write_json
from shapes import SHAPES, Shape
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from work_floor import BlockWork, Text

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import numerics, triton_launch
from gptq_cli.solver.factor import cholesky_, prepare
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.solve import solve
from gptq_cli.solver.triton_launch import dequantize_packed

NAMES = ("hessian_products", "factorisation", "column_kernel", "forward", "solver", "evaluation")
NEEDS_GPU = {"skipped": "needs a GPU"}
# (rows of a program, warps) of the kernel that rounds columns
TILES = ((32, 1), (16, 1), (64, 1), (32, 2), (64, 2), (16, 4), (32, 4), (64, 4))


class Measurements:
    """The measurements on one device; `tiny` shapes and repetitions suit a CPU."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        self.bench, self.tiny = Bench(device, 1 if tiny else 5), tiny

    def _sizes(self, *sizes: int) -> list[int]:
        return [64] if self.tiny else list(sizes)

    def _size(self, size: int) -> int:
        return 64 if self.tiny else size

    def hessian_products(self) -> dict[str, Any]:
        """Measure 16-bit products summed in float32, by torch and by the accumulator (TFLOP/s)."""
        found = {}
        tokens = self._size(16384)
        for size in self._sizes(4096, 14336, 28672):
            calls = self._ways_to_add(self.bench.random(tokens, size))
            work = 2 * size**2 * tokens / 1e12
            found[str(size)] = {name: self._rate(call, work) for name, call in calls.items()}
        return found

    def _ways_to_add(self, inputs: Tensor) -> dict[str, Callable[[], object]]:
        """Return calls that add the products of `inputs` to a Hessian."""
        accumulator = HessianAccumulator(inputs.shape[1], inputs.device)
        calls: dict[str, Callable[[], object]] = {"accumulator": lambda: accumulator.add(inputs)}
        if self.bench.on_gpu:
            size = inputs.shape[1]
            total = torch.zeros(size, size, device=inputs.device)
            wide = torch.float32
            calls["mm"] = lambda: torch.mm(inputs.T, inputs, out_dtype=wide)
            calls["addmm"] = lambda: torch.addmm(total, inputs.T, inputs, out_dtype=wide)
            calls["addmm_in_place"] = lambda: torch.addmm(
                total, inputs.T, inputs, out_dtype=wide, out=total
            )
        return calls

    def _rate(self, call: Callable[[], object], work: float) -> float | str:
        try:
            return work / self.bench.seconds(call)
        except (RuntimeError, TypeError) as error:
            return str(error).splitlines()[0]

    def factorisation(self) -> dict[str, Any]:
        """Measure Cholesky factors by the library, one by one and batched, and by panels."""
        found: dict[str, Any] = {}
        for size in self._sizes(4096, 14336, 28672):
            found[str(size)] = self._two_factorisations(size)
        batch, size = self._size(16) // 4, self._size(4096)
        matrices = torch.eye(size, device=self.bench.device).expand(batch, size, size).contiguous()
        seconds = self.bench.seconds(lambda: torch.linalg.cholesky_ex(matrices), runs=2)
        found["batched"] = {"matrices": batch, "size": size, "seconds": seconds}
        return found

    def _two_factorisations(self, size: int) -> dict[str, float]:
        factor = self.bench.random(size, size, dtype=torch.float32)
        matrix = factor @ factor.T / size
        matrix.diagonal().add_(1.0)
        copy = matrix.clone()
        by_library = self.bench.seconds(lambda: torch.linalg.cholesky_ex(matrix), runs=2)
        by_panels = self.bench.seconds(lambda: cholesky_(copy.copy_(matrix)), runs=2)
        library = torch.linalg.cholesky_ex(matrix)[0]
        cholesky_(copy.copy_(matrix))
        difference = (copy - library).norm() / library.norm()
        return {
            "library": by_library,
            "panels": by_panels,
            "relative_difference": difference.item(),
        }

    def column_kernel(self) -> dict[str, Any]:
        """Measure one column block by rows of the layer, rows of a program, and warps."""
        if not self.bench.on_gpu:
            return NEEDS_GPU
        found = {}
        usual = triton_launch.ROWS, triton_launch.WARPS
        for rows in (1024, 4096, 28672):
            for tile in TILES:
                triton_launch.ROWS, triton_launch.WARPS = tile
                name = f"{rows} rows, {tile[0]} a program, {tile[1]} warps"
                found[name] = self._seconds_of_columns(rows)
        triton_launch.ROWS, triton_launch.WARPS = usual
        return found

    def _seconds_of_columns(self, rows: int) -> float:
        values = self.bench.random(128, rows, dtype=torch.float32)
        R = self.bench.random(128, 128, dtype=torch.float32) / 1e3
        scales = torch.full((32, rows), 0.1, device=values.device)
        zeros = torch.full_like(values[:32], 8.0)
        group_of = torch.zeros(128, dtype=torch.int32, device=values.device)
        errors = values.clone()

        def round_columns() -> None:
            triton_launch.round_columns(values, errors, R, scales, zeros, group_of, 4)

        return self.bench.seconds(round_columns)

    def forward(self) -> dict[str, Any]:
        """Measure a block at 8 x 2048 tokens, and its share of the peak rate of products."""
        shape, tokens = SHAPES["llama-3-8b"], 8 * SEQLEN
        if self.tiny:
            shape, tokens = SHAPES["tiny"], 128
        size = self._size(8192)
        matrix = self.bench.random(size, size)
        peak = 2 * size**3 / self.bench.seconds(lambda: matrix @ matrix)
        seconds = forward_seconds(self.bench, shape, tokens)
        text = Text(tokens, min(SEQLEN, tokens))
        share = BlockWork(shape, LayerConfig(), text).parts["forward"]["bfloat16"] / peak / seconds
        return {"seconds": seconds, "peak": peak, "share": share}

    def solver(self) -> dict[str, Any]:
        """Measure a layer solved with kernels and without, and the share of codes that differ."""
        size = self._size(4096)
        inputs = self.bench.random(2 * size, size, dtype=torch.float32)
        hessian, weight = inputs.T @ inputs, self.bench.random(size, size, dtype=torch.float32) / 50
        config = LayerConfig(
            group_size=32 if self.tiny else 128,
            static_groups=True,
            signed_scales=True,
            scale_search="mse",
            refine_sweeps=1,
        )
        prepared = prepare(hessian, config)
        found, codes = {}, []
        kernel_devices = set(numerics.KERNEL_DEVICES)
        for name, devices in {"kernels": kernel_devices, "torch": set[str]()}.items():
            numerics.KERNEL_DEVICES = devices
            found[name] = self.bench.seconds(
                lambda: solve(weight, hessian, prepared, config), runs=2
            )
            codes.append(solve(weight, hessian, prepared, config).quantized.codes)
        numerics.KERNEL_DEVICES = kernel_devices
        found["codes_that_differ"] = (codes[0] != codes[1]).double().mean().item()
        return found

    def evaluation(self) -> dict[str, Any]:
        """Measure a linear over 2048 tokens, its weight at hand or dequantized for each window."""
        if not self.bench.on_gpu:
            return NEEDS_GPU
        o, i = 14336, 4096
        words = torch.randint(-(2**31), 2**31 - 1, (i // 8, o), dtype=torch.int64, device="cuda")
        words = words.int()
        zeros = torch.full((i // 128, o // 8), 0x77777777, dtype=torch.int32, device="cuda")
        scales = torch.full((i // 128, o), 0.01, dtype=torch.float16, device="cuda")
        g_idx = (torch.arange(i, device="cuda") // 128).int()
        inputs = self.bench.random(2048, i)

        def dequantized() -> Tensor:
            return dequantize_packed(words, zeros, scales, g_idx, 4, False, torch.bfloat16)

        weight = dequantized()
        return {
            "product": self.bench.seconds(lambda: inputs @ weight.T),
            "dequantize": self.bench.seconds(dequantized),
            "both": self.bench.seconds(lambda: inputs @ dequantized().T),
        }


def forward_seconds(bench: Bench, shape: Shape, tokens: int) -> float:
    """Return the seconds of one block over windows of as many tokens, all at once."""
    settings = replace(shape, vocabulary=32).config(1)
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=bench.dtype).model.eval()
    seqlen = min(SEQLEN, tokens)
    hidden = bench.random(tokens // seqlen, seqlen, shape.hidden)
    with torch.inference_mode():
        return bench.seconds(lambda: model(inputs_embeds=hidden, use_cache=False))


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    arguments = parser.parse_args()
    measurements = Measurements(arguments.device, tiny=arguments.tiny)
    found: dict[str, Any] = {"torch": torch.__version__, "device": arguments.device}
    code = 0
    for name in NAMES:
        try:
            found[name] = getattr(measurements, name)()
        except Exception as error:  # noqa: BLE001 -- the other measurements still run
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            code = 1
        print(name, json.dumps(found[name]), flush=True)
        write_json(arguments.json, found)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return code


if __name__ == "__main__":
    sys.exit(main())
