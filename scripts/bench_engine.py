#!/usr/bin/env python3
"""Measure the parts of quantizing one block on this device, beside the best the hardware could do.

    python scripts/bench_engine.py [--shape small] [--device auto] [--runs 5] [--json FILE]

The floor of a part is its least work over a rate measured in the same run: 16-bit, TF32 and float32
products, copying, the disk. Times are medians for one block; `model` is the time of all blocks of
the shape. If not all tokens are run, the time is scaled linearly. On a CPU, times are processor
time of one thread, which neighbours hardly change; those of the disk are wall time. Prints a line
for each part, the sum, and the part that loses most against its floor as the next bottleneck.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import benchmark_parser, write_json
from safetensors import safe_open
from safetensors.torch import save_file
from shapes import SHAPES, Shape, bytes_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_cli.checkpoint.layout import GPTQ
from gptq_cli.checkpoint.reader import encode
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.solver import solve
from gptq_cli.solver.factor import HessianFactor, prepare
from gptq_cli.solver.grid import choose_grid, split_groups
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.numerics import feedback_precision
from gptq_cli.solver.quantized_linear import output_energies, round_to_nearest
from gptq_cli.solver.refine import refine

SEQLEN = 2048
TOKENS_AT_ONCE = 8 * SEQLEN
PARTS = (
    "forward",
    "hessian",
    "factor",
    "search",
    "columns",
    "feedback",
    "refine",
    "errors",
    "dequantize",
    "pack",
    "read",
    "write",
)
# Seconds and floor of each part by its name.
Figures = dict[str, tuple[float, float]]


# ---------------------------------------------------------------- clock and rates


class Bench:
    """A device with a clock for calls on it."""

    def __init__(self, device: str, runs: int) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device, self.runs = torch.device(device), runs
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        if not self.on_gpu:
            torch.set_num_threads(1)

    def seconds(
        self, call: Callable[[], object], *, runs: int | None = None, wall: bool = False
    ) -> float:
        """Return the median seconds of `call`, after one call that is not counted."""
        clock = time.perf_counter if wall or self.on_gpu else time.process_time
        self._timed(call, clock)
        return statistics.median(self._timed(call, clock) for _ in range(runs or self.runs))

    def _timed(self, call: Callable[[], object], clock: Callable[[], float]) -> float:
        self._wait()
        started = clock()
        call()
        self._wait()
        return clock() - started

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=dtype or self.dtype)


def measure_rates(bench: Bench, folder: Path) -> dict[str, float]:
    """Return operations or bytes a second of products, copying (both ways) and the disk."""
    # enough to fill a GPU, and more than the caches hold
    size, n_numbers, disk_bytes = 1024, 2**24, 2**25
    if bench.on_gpu:
        size, n_numbers, disk_bytes = 8192, 2**26, 2**28
    wide, half = bench.random(size, size, dtype=torch.float32), bench.random(size, size)
    rates = {"gemm": product_rate(bench, half), "gemm_fp32": product_rate(bench, wide)}
    with feedback_precision(wide):
        rates["gemm_tf32"] = product_rate(bench, wide)
    numbers = bench.random(n_numbers, dtype=torch.float32)
    other = torch.empty_like(numbers)
    rates["copy"] = 2 * numbers.nbytes / bench.seconds(lambda: other.copy_(numbers))
    spd = wide @ wide.T
    spd.diagonal().add_(spd.diagonal().mean())
    rates["cholesky"] = size**3 / 3 / bench.seconds(lambda: torch.linalg.cholesky_ex(spd))
    file = folder / "rate"
    tensors = {"x": torch.zeros(disk_bytes, dtype=torch.uint8)}
    rates["disk_write"] = disk_bytes / disk_seconds(bench, lambda: _write(tensors, file))
    cpu = torch.device("cpu")
    rates["disk_read"] = disk_bytes / disk_seconds(bench, lambda: _read(file, cpu))
    return rates


def product_rate(bench: Bench, matrix: Tensor) -> float:
    """Return operations a second of a product of square matrices."""
    out = torch.empty_like(matrix)
    return 2 * len(matrix) ** 3 / bench.seconds(lambda: torch.mm(matrix, matrix, out=out))


def disk_seconds(bench: Bench, call: Callable[[], object]) -> float:
    return bench.seconds(call, runs=2, wall=True)


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, file)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _read(file: Path, device: torch.device) -> None:
    with file.open("rb") as stream:  # drops the file from the page cache, if the system does so
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 -- not a dict
            tensors.get_tensor(name).to(device).clone()


# ---------------------------------------------------------------- parts of a block


def forward_seconds(bench: Bench, shape: Shape, tokens: int) -> float:
    """Return the seconds of one block over all tokens, in batches of as many as fit at once."""
    batch = max(1, min(tokens, TOKENS_AT_ONCE) // SEQLEN)
    settings = replace(shape, vocabulary=32).config(1)
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=bench.dtype).model.eval()
    hidden = bench.random(batch, min(SEQLEN, tokens), shape.hidden)
    tokens_at_once = hidden.numel() / shape.hidden
    with torch.inference_mode():
        seconds = bench.seconds(lambda: model(inputs_embeds=hidden, use_cache=False))
    return seconds * tokens / tokens_at_once


def forward_floor(shape: Shape, tokens: int, rates: dict[str, float]) -> float:
    """Return the least seconds of products with the weights of a token, and causal attention."""
    weights = 0
    for in_features, outs, copies in shape.inputs:
        used = 1 if copies == 1 else shape.experts_per_token
        weights += in_features * sum(outs) * used
    attention = 2 * min(SEQLEN, tokens) * shape.heads * shape.head_dim
    return (2 * weights + attention) * tokens / rates["gemm"]


@dataclass
class LayerBench:
    """The benchmark of one layer: the device, its rates, and how the layer is quantized."""

    bench: Bench
    rates: dict[str, float]
    config: LayerConfig

    def stage_parts(self, in_features: int, outs: list[int], tokens: int) -> Figures:
        """Measure the parts of linears that share one Hessian."""
        bench, rates = self.bench, self.rates
        at_once = min(tokens, TOKENS_AT_ONCE)
        inputs = bench.random(at_once, in_features)
        inputs *= torch.exp(0.5 * torch.randn(in_features, device=bench.device)).to(inputs.dtype)
        accumulator = HessianAccumulator(in_features, bench.device)
        accumulator.add(inputs)
        hessian = accumulator.hessian.clone()
        adding = bench.seconds(lambda: accumulator.add(inputs)) * tokens / at_once
        factoring = bench.seconds(lambda: prepare(hessian, self.config, tokens))
        prepared = prepare(hessian, self.config, tokens)
        weight = bench.random(sum(outs), in_features).mul_(in_features**-0.5)
        return {
            "hessian": (adding, in_features**2 * tokens / rates["gemm"]),
            "factor": (factoring, in_features**3 / 3 / rates["gemm_fp32"]),
            **self.grid_parts(weight, prepared),
            **self.solved_parts(weight, hessian, prepared),
        }

    def grid_parts(self, weight: Tensor, prepared: HessianFactor) -> Figures:
        """Measure the search for scales, and the column blocks without and with only products."""
        n, in_features = weight.numel(), weight.shape[1]
        tf32 = max(self.rates["gemm_tf32"], self.rates["gemm_fp32"])
        group_size = self.config.columns_per_group(in_features)
        groups = split_groups(weight.float(), prepared.order.group_of_column, group_size)
        search = self.bench.seconds(lambda: choose_grid(groups, self.config))
        columns, feedback = column_seconds(self.bench, weight.float(), prepared, self.config)
        return {
            "search": (search, 4 * n / self.rates["copy"]),
            "columns": (columns, 16 * n / self.rates["copy"]),
            "feedback": (feedback, n * in_features / tf32),
        }

    def solved_parts(self, weight: Tensor, hessian: Tensor, prepared: HessianFactor) -> Figures:
        """Measure what follows the columns: refinement, errors, dequantizing and packing."""
        bench, config, copy = self.bench, self.config, self.rates["copy"]
        n, in_features = weight.numel(), weight.shape[1]
        fp32 = self.rates["gemm_fp32"]
        tf32 = max(self.rates["gemm_tf32"], fp32)
        unrefined = replace(config, refine_sweeps=0)
        quantized = solve.solve(weight, hessian, prepared, unrefined).quantized
        nearest = round_to_nearest(weight, config, prepared.order.group_of_column)
        packed_bytes = bytes_of(encode(quantized, GPTQ, sym=True))
        original, sweeps = weight.float(), config.refine_sweeps

        def refine_all() -> None:
            refine(
                original, hessian, prepared, quantized, sweeps=sweeps, signed=config.signed_scales
            )

        def measure_errors() -> None:
            output_energies(weight, hessian, (quantized, nearest))

        refining, refining_floor = 0.0, 0.0
        if sweeps:
            refining = bench.seconds(refine_all, runs=2)
            refining_floor = (1 + sweeps) * 2 * n * in_features / tf32
        dequantizing = bench.seconds(lambda: quantized.dequantize(weight.dtype))
        packing = bench.seconds(lambda: encode(quantized, GPTQ, sym=True))
        return {
            "refine": (refining, refining_floor),
            "errors": (bench.seconds(measure_errors, runs=2), 3 * n * in_features / fp32),
            "dequantize": (dequantizing, 3 * n / copy),
            "pack": (packing, (n + packed_bytes) / copy),
        }


def column_seconds(
    bench: Bench, weight: Tensor, prepared: HessianFactor, config: LayerConfig
) -> tuple[float, float]:
    """Return the seconds of all column blocks without the products between them, and of these."""
    if not prepared.order.static_grid:
        return float("nan"), float("nan")
    rounding = solve._Rounding.of(weight, prepared, replace(config, scale_search="none"))
    blocks = list(rounding.blocks(solve.COLUMN_BLOCK))
    with_feedback = [rounding.block(start, stop) for start, stop in blocks]

    def round_blocks() -> None:
        for block in with_feedback:
            solve._round_block(replace(block, values=block.values.clone()), rounding.grid)

    def feed_errors_back() -> None:
        for start, stop in blocks:
            rounding.block(start, stop)

    return bench.seconds(round_blocks), bench.seconds(feed_errors_back)


def disk_parts(
    bench: Bench, shape: Shape, config: LayerConfig, folder: Path, rates: dict[str, float]
) -> Figures:
    """Measure reading the weights of a block and writing the packed ones, hidden behind nothing."""
    weights = {name: torch.zeros(size, dtype=bench.dtype) for name, size in shape.block_tensors(0)}
    _write(weights, folder / "block")
    bytes_before = bytes_of(weights)
    bits = config.bits + 16 / max(config.group_size, 1)
    bytes_after = int(bytes_before / bench.dtype.itemsize * bits / 8)
    packed = {"x": torch.zeros(bytes_after, dtype=torch.uint8, device=bench.device)}
    reading = disk_seconds(bench, lambda: _read(folder / "block", bench.device))
    writing = disk_seconds(bench, lambda: _write(packed, folder / "packed"))
    return {
        "read": (reading, bytes_before / rates["disk_read"]),
        "write": (writing, bytes_after / rates["disk_write"]),
    }


# ---------------------------------------------------------------- the whole block


def measure(
    bench: Bench, shape: Shape, tokens: int, config: LayerConfig, folder: Path
) -> dict[str, Any]:
    """Return the rates, seconds and floor of each part of a block, and the next bottleneck."""
    rates = measure_rates(bench, folder)
    seconds, floors = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)

    def add(figures: Figures, copies: int = 1) -> None:
        for name, (taken, floor) in figures.items():
            seconds[name] += copies * taken
            floors[name] += copies * floor

    forward = forward_seconds(bench, shape, tokens)
    add({"forward": (forward, forward_floor(shape, tokens, rates))})
    layer_bench = LayerBench(bench, rates, config)
    for in_features, outs, copies in shape.inputs:
        seen = tokens
        if copies > 1:
            seen = max(1, tokens * shape.experts_per_token // copies)
        add(layer_bench.stage_parts(in_features, outs, seen), copies)
    add(disk_parts(bench, shape, config, folder, rates))
    rows: dict[str, dict[str, float | None]] = {}
    for name in PARTS:
        rows[name] = {"seconds": seconds[name], "floor": floors[name], "times_floor": None}
        if floors[name]:
            rows[name]["times_floor"] = seconds[name] / floors[name]
    bottleneck = max(PARTS, key=lambda name: seconds[name] - floors[name])
    return {"rates": rates, "block": rows, "next_bottleneck": bottleneck}


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--device", default="auto")
    about = "calibration tokens; default: 262144 on a GPU, else 16384"
    parser.add_argument("--tokens", type=int, help=about)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    bench, shape = Bench(arguments.device, arguments.runs), SHAPES[arguments.shape]
    tokens = arguments.tokens or (262144 if bench.on_gpu else 16384)
    settings = QuantizeConfig(
        bits=arguments.bits, group_size=arguments.group_size, preset=arguments.preset
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(bench, shape, tokens, settings.base, Path(folder))
    rows = found["block"]
    total = floor = 0.0
    for name, row in rows.items():
        in_ms = f"{row['seconds'] * 1e3:10.2f} ms a block   floor {row['floor'] * 1e3:9.3f} ms"
        print(f"{name:10} {in_ms}")
        total += shape.blocks * row["seconds"]
        floor += shape.blocks * row["floor"]
    print(f"all        {total:10.2f} s for {shape.blocks} blocks   floor {floor:9.2f} s")
    print(f"next bottleneck: {found['next_bottleneck']}")
    content = {
        "device": torch.cuda.get_device_name() if bench.on_gpu else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": arguments.shape,
        "tokens": tokens,
        "preset": arguments.preset,
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "runs": arguments.runs,
        **found,
        "model": {"blocks": shape.blocks, "seconds": total, "floor": floor},
    }
    write_json(arguments.json, content)


if __name__ == "__main__":
    sys.exit(main())
