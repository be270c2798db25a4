#!/usr/bin/env python3
"""Times the parts of quantizing one block on the device at hand, beside what the hardware could do at best.

Each part's floor is its least work over a rate measured in the same run: 16-bit, TF32 and float32 products, copying,
the disk. Times are medians and for one block; `model` scales them by the blocks of the shape. Tokens that are not run
are scaled for linearly. On a CPU it is processor time of one thread, whatever neighbours do; the disk's is by the wall
clock. The part that loses most against its floor is named as the next bottleneck.

    python scripts/bench_engine.py [--shape small] [--device auto] [--runs 5] [--preset balanced] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from shapes import SHAPES, Shape
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_cli.checkpoint.codec import encode
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.solver import solve as solver
from gptq_cli.solver.factor import HessianFactor, prepare
from gptq_cli.solver.grid import choose_grid, split_groups
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.numerics import feedback_precision
from gptq_cli.solver.quantized_linear import output_energies, round_to_nearest
from gptq_cli.solver.refine import refine

SEQLEN = 2048
TOKENS_AT_ONCE = 8 * SEQLEN
PARTS = (
    "forward", "hessian", "factor", "search", "columns", "feedback", "refine", "errors", "dequantize", "pack",
    "read", "write",
)  # fmt: skip


class Bench:
    """Medians of timed calls on one device."""

    def __init__(self, device: str, runs: int) -> None:
        self.device, self.runs = torch.device(device), runs
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        if not self.on_gpu:
            torch.set_num_threads(1)

    def seconds(
        self, call: Callable[[], object], *, runs: int | None = None, wall: bool = False
    ) -> float:
        """Median seconds of `call`, after one that is not counted."""
        taken, clock = [], time.perf_counter if wall or self.on_gpu else time.process_time
        for _ in range(1 + (runs or self.runs)):
            self._wait()
            started = clock()
            call()
            self._wait()
            taken.append(clock() - started)
        return statistics.median(taken[1:])

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=dtype or self.dtype)


def rates(bench: Bench, folder: Path) -> dict[str, float]:
    """Operations or bytes a second at best: products, copying (read and written) and the disk."""
    size = 8192 if bench.on_gpu else 1024
    wide, half = bench.random(size, size, dtype=torch.float32), bench.random(size, size)
    found = {}
    for name, matrix in (("gemm", half), ("gemm_fp32", wide), ("gemm_tf32", wide)):
        out = torch.empty_like(matrix)
        with feedback_precision(wide) if name == "gemm_tf32" else nullcontext():
            found[name] = 2 * size**3 / bench.seconds(lambda m=matrix, o=out: torch.mm(m, m, out=o))
    numbers = bench.random(
        2**26 if bench.on_gpu else 2**24, dtype=torch.float32
    )  # more than caches hold
    other = torch.empty_like(numbers)
    found["copy"] = 2 * numbers.nbytes / bench.seconds(lambda: other.copy_(numbers))
    spd = wide @ wide.T
    spd.diagonal().add_(spd.diagonal().mean())
    found["cholesky"] = size**3 / 3 / bench.seconds(lambda: torch.linalg.cholesky_ex(spd))
    tensor = torch.zeros(2**28 if bench.on_gpu else 2**25, dtype=torch.uint8)
    found["disk_write"] = tensor.nbytes / bench.seconds(
        lambda: _write({"x": tensor}, folder / "rate"), runs=2, wall=True
    )
    found["disk_read"] = tensor.nbytes / bench.seconds(
        lambda: _read(folder / "rate", torch.device("cpu")), runs=2, wall=True
    )
    return found


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, file)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _read(file: Path, device: torch.device) -> None:
    with file.open("rb") as stream:  # out of the page cache, where the system lets go
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 -- not a dict
            tensors.get_tensor(name).to(device).clone()


def forward_seconds(bench: Bench, shape: Shape, tokens: int) -> float:
    """One block over all tokens, by as many as fit at once."""
    batch = max(1, min(tokens, TOKENS_AT_ONCE) // SEQLEN)
    settings = replace(shape, vocabulary=32).config(1)
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=bench.dtype).model.eval()
    hidden = bench.random(batch, min(SEQLEN, tokens), shape.hidden)
    with torch.inference_mode():
        return (
            bench.seconds(lambda: model(inputs_embeds=hidden, use_cache=False))
            * tokens
            / (hidden.numel() / shape.hidden)
        )


def forward_floor(shape: Shape, tokens: int, rates: dict[str, float]) -> float:
    """Products with the weights that a token meets, and causal attention over a window."""
    used = [
        (i, o, copies if copies == 1 else shape.experts_per_token) for i, o, copies in shape.inputs
    ]
    weights = sum(i * sum(o) * copies for i, o, copies in used)
    attention = 2 * min(SEQLEN, tokens) * shape.heads * shape.head_dim
    return (2 * weights + attention) * tokens / rates["gemm"]


def stage_parts(
    bench: Bench,
    in_features: int,
    outs: list[int],
    tokens: int,
    config: LayerConfig,
    rates: dict[str, float],
) -> dict[str, tuple[float, float]]:
    """Seconds and floor of each part, for linears that share one Hessian."""
    at_once = min(tokens, TOKENS_AT_ONCE)
    inputs = bench.random(at_once, in_features)
    inputs *= torch.exp(0.5 * torch.randn(in_features, device=bench.device)).to(inputs.dtype)
    accumulator = HessianAccumulator(in_features, bench.device)
    accumulator.add(inputs)
    hessian = accumulator.hessian.clone()
    found = {
        "hessian": (
            bench.seconds(lambda: accumulator.add(inputs)) * tokens / at_once,
            in_features**2 * tokens / rates["gemm"],
        ),
        "factor": (
            bench.seconds(lambda: prepare(hessian, config, tokens)), in_features**3 / 3 / rates["gemm_fp32"],
        ),
    }  # fmt: skip
    weight = bench.random(sum(outs), in_features).mul_(in_features**-0.5)
    return found | weight_parts(
        bench, weight, hessian, prepare(hessian, config, tokens), config, rates
    )


def weight_parts(
    bench: Bench,
    weight: Tensor,
    hessian: Tensor,
    prepared: HessianFactor,
    config: LayerConfig,
    rates: dict[str, float],
) -> dict[str, tuple[float, float]]:
    """Seconds and floor of what is done to the rows of linears that share one Hessian."""
    n, in_features = weight.numel(), weight.shape[1]
    product, copy, tf32 = (
        2 * n * in_features,
        rates["copy"],
        max(rates["gemm_tf32"], rates["gemm_fp32"]),
    )
    group_of = prepared.order.group_of_column
    group_size = config.columns_per_group(in_features)
    groups = split_groups(weight.float(), group_of, group_size)
    solution = solver.solve(weight, hessian, prepared, replace(config, refine_sweeps=0))
    quantized, nearest = solution.quantized, round_to_nearest(weight, config, group_of)
    packed = sum(tensor.nbytes for tensor in encode(quantized, "gptq").values())
    alive, sweeps = weight.float(), config.refine_sweeps

    def refined() -> None:
        if sweeps:
            refine(alive, hessian, prepared, quantized, sweeps=sweeps, signed=config.signed_scales)

    columns, feedback = solve_parts(bench, alive, prepared, config)
    return {
        "search": (bench.seconds(lambda: choose_grid(groups, config)), 4 * n / copy),
        "columns": (columns, 16 * n / copy),
        "feedback": (feedback, product / 2 / tf32),
        "refine": (
            bench.seconds(refined, runs=2),
            (1 + sweeps) * product / tf32 if sweeps else 0.0,
        ),
        "errors": (
            bench.seconds(lambda: output_energies(weight, hessian, (quantized, nearest)), runs=2),
            3 * product / 2 / rates["gemm_fp32"],
        ),
        "dequantize": (bench.seconds(lambda: quantized.dequantize(weight.dtype)), 3 * n / copy),
        "pack": (bench.seconds(lambda: encode(quantized, "gptq")), (n + packed) / copy),
    }


def solve_parts(
    bench: Bench, weight: Tensor, prepared: HessianFactor, config: LayerConfig
) -> tuple[float, float]:
    """Seconds of all column blocks without the products between them, and of those products alone."""
    order, width = prepared.order, solver.COLUMN_BLOCK
    if not order.static_grid:
        return float("nan"), float("nan")
    rounding = solver._Rounding.of(weight, prepared, replace(config, scale_search="none"))
    blocks = list(rounding.blocks(width))
    whole = [rounding.block(start, stop) for start, stop in blocks]

    def rounded() -> None:
        for block in whole:
            solver._round_block(replace(block, values=block.values.clone()), rounding.grid)

    def fed() -> None:
        for start, stop in blocks:
            rounding.block(start, stop)

    return bench.seconds(rounded), bench.seconds(fed)


def disk_parts(
    bench: Bench, shape: Shape, config: LayerConfig, folder: Path, rates: dict[str, float]
) -> dict[str, Any]:
    """Reading the block's weights to the device and writing what replaces them, neither hidden behind other work."""
    weights = {name: torch.zeros(size, dtype=bench.dtype) for name, size in shape.block_tensors(0)}
    _write(weights, folder / "block")
    before = sum(tensor.nbytes for tensor in weights.values())
    after = int(
        before
        / weights[next(iter(weights))].itemsize
        * (config.bits + 16 / max(config.group_size, 1))
        / 8
    )
    packed = {"x": torch.zeros(after, dtype=torch.uint8, device=bench.device)}
    return {
        "read": (
            bench.seconds(lambda: _read(folder / "block", bench.device), runs=2, wall=True),
            before / rates["disk_read"],
        ),
        "write": (
            bench.seconds(lambda: _write(packed, folder / "packed"), runs=2, wall=True),
            after / rates["disk_write"],
        ),
    }


def measure(
    bench: Bench, shape: Shape, tokens: int, config: LayerConfig, folder: Path
) -> dict[str, Any]:
    """Rates, and for each part seconds and floor of a block."""
    measured = rates(bench, folder)
    parts = {name: [0.0, 0.0] for name in PARTS}
    parts["forward"] = [
        forward_seconds(bench, shape, tokens),
        forward_floor(shape, tokens, measured),
    ]
    for in_features, outs, copies in shape.inputs:
        seen = tokens if copies == 1 else max(1, tokens * shape.experts_per_token // copies)
        for name, figures in stage_parts(bench, in_features, outs, seen, config, measured).items():
            parts[name] = [
                total + copies * figure for total, figure in zip(parts[name], figures, strict=True)
            ]
    for name, figures in disk_parts(bench, shape, config, folder, measured).items():
        parts[name] = list(figures)
    rows = {
        name: {"seconds": s, "floor": f, "times_floor": s / f if f else None}
        for name, (s, f) in parts.items()
    }
    return {
        "rates": measured,
        "block": rows,
        "next_bottleneck": max(parts, key=lambda p: parts[p][0] - parts[p][1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--tokens", type=int, default=None, help="calibration tokens; 262144 on a GPU, else 16384"
    )
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    bench, shape = Bench(device, arguments.runs), SHAPES[arguments.shape]
    tokens = arguments.tokens or (262144 if bench.on_gpu else 16384)
    settings = QuantizeConfig(
        bits=arguments.bits, group_size=arguments.group_size, preset=arguments.preset
    )
    config = settings.for_layer("any")
    assert config is not None
    with tempfile.TemporaryDirectory() as folder:
        found = measure(bench, shape, tokens, config, Path(folder))
    for name, row in found["block"].items():
        print(
            f"{name:10} {row['seconds'] * 1e3:10.2f} ms a block   floor {row['floor'] * 1e3:9.3f} ms"
        )
    total, floor = (
        sum(row[key] for row in found["block"].values()) for key in ("seconds", "floor")
    )
    print(
        f"all        {total * shape.blocks:10.2f} s for {shape.blocks} blocks   floor {floor * shape.blocks:9.2f} s"
    )
    print(f"next bottleneck: {found['next_bottleneck']}")
    if arguments.json:
        machine = {"device": torch.cuda.get_device_name() if bench.on_gpu else platform.machine()}
        machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        model = {
            "blocks": shape.blocks,
            "seconds": total * shape.blocks,
            "floor": floor * shape.blocks,
        }
        run = {
            "shape": arguments.shape,
            "tokens": tokens,
            "preset": arguments.preset,
            "bits": arguments.bits,
        }
        run |= {"group_size": arguments.group_size, "runs": arguments.runs}
        arguments.json.write_text(
            json.dumps(machine | run | found | {"model": model}, indent=2) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
