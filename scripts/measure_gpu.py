#!/usr/bin/env python3
"""What decides open questions on a new device: rates of the operations that quantizing consists of.

Each measurement stands alone: one that fails leaves its error in the JSON, in place of its figures.

    python scripts/measure_gpu.py --json FILE [--device cuda] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_engine import SEQLEN, Bench, forward_floor, forward_seconds
from shapes import SHAPES
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.solver import triton_launch
from gptq_cli.solver.factor import cholesky_, prepare
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.solve import solve
from gptq_cli.solver.triton_launch import dequantize_packed


class Measurements:
    """`tiny` keeps shapes and repetitions small enough for a CPU."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        self.bench, self.tiny = Bench(device, 1 if tiny else 5), tiny

    def _sizes(self, *sizes: int) -> list[int]:
        return [64] if self.tiny else list(sizes)

    def hessian_products(self) -> dict[str, Any]:
        """Tera-operations a second of 16-bit products summed in float32, in place and not, and of the accumulator."""
        found = {}
        for size in self._sizes(4096, 14336, 28672):
            inputs, tokens = self.bench.random(self._sizes(16384)[0], size), self._sizes(16384)[0]
            total = torch.zeros(size, size, device=inputs.device)
            work = 2 * size**2 * tokens / 1e12
            ways: dict[str, Callable[[], object]] = {"accumulator": self._accumulate(inputs)}
            if self.bench.on_gpu:
                ways["mm"] = lambda x=inputs: torch.mm(x.T, x, out_dtype=torch.float32)
                ways["addmm"] = lambda x=inputs, h=total: torch.addmm(
                    h, x.T, x, out_dtype=torch.float32
                )
                ways["addmm_in_place"] = lambda x=inputs, h=total: torch.addmm(
                    h, x.T, x, out_dtype=torch.float32, out=h
                )
            found[str(size)] = {name: self._rate(way, work) for name, way in ways.items()}
        return found

    def _accumulate(self, inputs: Tensor) -> Callable[[], object]:
        accumulator = HessianAccumulator(inputs.shape[1], inputs.device)
        return lambda: accumulator.add(inputs)

    def _rate(self, call: Callable[[], object], work: float) -> float | str:
        try:
            return work / self.bench.seconds(call)
        except (RuntimeError, TypeError) as error:
            return str(error).splitlines()[0]

    def factorisation(self) -> dict[str, Any]:
        """Seconds of a Cholesky factorisation: the library's, one by one and batched, and the one by panels."""
        found: dict[str, Any] = {}
        for size in self._sizes(4096, 14336, 28672):
            factor = self.bench.random(size, size, dtype=torch.float32)
            matrix = factor @ factor.T / size
            matrix.diagonal().add_(1.0)
            copy = matrix.clone()
            found[str(size)] = {
                "library": self.bench.seconds(lambda m=matrix: torch.linalg.cholesky_ex(m), runs=2),
                "panels": self.bench.seconds(
                    lambda m=matrix, c=copy: cholesky_(c.copy_(m)), runs=2
                ),
            }
            library = torch.linalg.cholesky_ex(matrix)[0]
            cholesky_(copy.copy_(matrix))
            found[str(size)]["relative_difference"] = (
                (copy - library).norm() / library.norm()
            ).item()
            del factor, matrix, copy, library
        batch, size = self._sizes(16)[0] // 4, self._sizes(4096)[0]
        matrices = torch.eye(size, device=self.bench.device).expand(batch, size, size).contiguous()
        found["batched"] = {
            "matrices": batch,
            "size": size,
            "seconds": self.bench.seconds(lambda: torch.linalg.cholesky_ex(matrices), runs=2),
        }
        return found

    def column_kernel(self) -> dict[str, Any]:
        """Seconds of one column block by rows of the layer, rows of a program, and warps."""
        if not self.bench.on_gpu:
            return {"skipped": "needs a GPU"}
        found, usual = {}, (triton_launch.ROWS, triton_launch.WARPS)
        for rows in (1024, 4096, 28672):
            values, R = (self.bench.random(128, n, dtype=torch.float32) for n in (rows, 128))
            scales, zeros = (
                torch.full((32, rows), 0.1, device=values.device),
                torch.full_like(values[:32], 8.0),
            )
            group_of = torch.zeros(128, dtype=torch.int32, device=values.device)
            for tile in (
                (16, 4),
                (16, 2),
                (16, 8),
                (32, 4),
                (32, 8),
                (64, 4),
                (64, 8),
                (8, 1),
                (8, 2),
            ):
                triton_launch.ROWS, triton_launch.WARPS = tile
                errors = values.clone()
                found[f"{rows} rows, {tile[0]} a program, {tile[1]} warps"] = self.bench.seconds(
                    lambda v=values, e=errors, r=R / 1e3, s=scales, z=zeros, g=group_of: (
                        triton_launch.round_columns(v, e, r, s, z, g, 4)
                    )
                )
        triton_launch.ROWS, triton_launch.WARPS = usual
        return found

    def forward(self) -> dict[str, Any]:
        """A block forward at 8 x 2048 tokens, and the share of the peak rate of products that it reaches."""
        shape, tokens = (
            SHAPES["tiny" if self.tiny else "llama-3-8b"],
            128 if self.tiny else 8 * SEQLEN,
        )
        size = self._sizes(8192)[0]
        matrix = self.bench.random(size, size)
        peak = 2 * size**3 / self.bench.seconds(lambda: matrix @ matrix)
        seconds = forward_seconds(self.bench, shape, tokens)
        return {
            "seconds": seconds,
            "peak": peak,
            "share": forward_floor(shape, tokens, {"gemm": peak}) / seconds,
        }

    def solver(self) -> dict[str, Any]:
        """Seconds to solve a layer with kernels and without, and how many of their codes differ."""
        size, rows = self._sizes(4096)[0], self._sizes(4096)[0]
        inputs = self.bench.random(2 * size, size, dtype=torch.float32)
        hessian, weight = inputs.T @ inputs, self.bench.random(rows, size, dtype=torch.float32) / 50
        config = LayerConfig(
            group_size=32 if self.tiny else 128, static_groups=True, signed_scales=True, scale_search="mse",
            refine_sweeps=1,
        )  # fmt: skip
        prepared = prepare(hessian, config)
        devices, found, codes = set(triton_launch.KERNEL_DEVICES), {}, []
        for name, switched_on in (("kernels", devices), ("torch", set[str]())):
            triton_launch.KERNEL_DEVICES = switched_on
            found[name] = self.bench.seconds(
                lambda: solve(weight, hessian, prepared, config), runs=2
            )
            codes.append(solve(weight, hessian, prepared, config).quantized.codes)
        triton_launch.KERNEL_DEVICES = devices
        return found | {"codes_that_differ": (codes[0] != codes[1]).double().mean().item()}

    def evaluation(self) -> dict[str, Any]:
        """Seconds of one linear over 2048 tokens: its weight at hand, and dequantized for each window anew."""
        if not self.bench.on_gpu:
            return {"skipped": "needs a GPU"}
        o, i = 14336, 4096
        words = torch.randint(
            -(2**31), 2**31 - 1, (i // 8, o), dtype=torch.int64, device="cuda"
        ).int()
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

    def served(self) -> dict[str, Any]:
        """Whether engines that serve the output are there to try negative scales with."""
        found = {}
        for name in ("vllm", "gptqmodel", "exllamav2"):
            try:
                found[name] = getattr(__import__(name), "__version__", "there")
            except ImportError:
                found[name] = "not installed: negative scales not tried"
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    arguments = parser.parse_args()
    measurements = Measurements(arguments.device, tiny=arguments.tiny)
    found: dict[str, Any] = {"torch": torch.__version__, "device": arguments.device}
    for name in (
        "hessian_products",
        "factorisation",
        "column_kernel",
        "forward",
        "solver",
        "evaluation",
        "served",
    ):
        try:
            found[name] = getattr(measurements, name)()
        except Exception as error:  # noqa: BLE001 -- the others are still wanted
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(found[name]), flush=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return int(any("error" in part for part in found.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main())
