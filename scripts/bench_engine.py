#!/usr/bin/env python3
"""Measure the parts of quantizing one block on this device, beside the least that they could take.

    python scripts/bench_engine.py [--shape small] [--device auto] [--runs 5] [--json FILE]

Quantizes a random model of the shape with the block loop of the program, so that rows, experts and
batches are cut as in any run, and takes the time of the functions that do each part. A part is
measured alone: the device finishes one before the next one begins. Figures are medians over as many
blocks as `--runs`; the first block, which warms up, is left out. On a CPU, times are processor time
of one thread, which neighbours hardly change.

The floor of a part is the one of `count_gpu_work.py` (see `work_floor.py`), at the rates of
products and of copying that are measured first. `other` has no floor: it is what belongs to no
part, such as saving a block. `model` is the time of all blocks of the shape. Prints a line for each
part, the sum, and the part that loses most against its floor as the next bottleneck.
"""

from __future__ import annotations

import argparse
import inspect
import math
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any
from unittest.mock import patch

import torch
from common import benchmark_parser, write_json
from shapes import SHAPES, Shape, write_random_model
from torch import Tensor
from work_floor import Text, floors

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import BlockFinished, BlockStarted, Event
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning import estimate
from gptq_cli.planning.device_rates import H100, DeviceRates
from gptq_cli.quantization import block_loop, layers, run
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver import solve
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.numerics import feedback_precision
from tests.families import text_file

SEQLEN = 2048
LEAST_WINDOWS = 4
OTHER = "other"
# What does each part: where the program looks for a function, and its name
TIMED: dict[str, list[tuple[object, str]]] = {
    "forward": [(block_loop.Passage, "inputs"), (block_loop.Passage, "finish")],
    "hessian": [
        (block_loop, "gather_inputs"),
        (Ranks, "sum_hessians"),
        (layers.Inputs, "of"),
        (layers.Inputs, "of_experts"),
    ],
    "shift": [(HessianAccumulator, "_add_halves"), (HessianAccumulator, "_add_rows")],
    "factor": [(layers, "prepare")],
    "follow": [(layers, "follow_original")],
    "search": [(solve, "choose_grid")],
    "columns": [(layers, "solve_together")],
    "refine": [(solve, "refine")],
    "errors": [(solve, "measured"), (solve, "_measured_by_expert"), (solve, "check_decoded")],
    "put back": [(layers.LayerSolver, "put_back"), (layers.LayerSolver, "put_back_together")],
    "pack": [(run, "_write_layers")],
    "copy": [(ModelStream, "_load"), (ModelStream, "linear_weight")],
}


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

    def seconds(self, call: Callable[[], object], *, runs: int | None = None) -> float:
        """Return the median seconds of `call`, after one call that is not counted."""
        self._timed(call)
        return statistics.median(self._timed(call) for _ in range(runs or self.runs))

    def now(self) -> float:
        """Return the time at which the device has done all that it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=dtype or self.dtype)

    def _timed(self, call: Callable[[], object]) -> float:
        started = self.now()
        call()
        return self.now() - started


def measure_rates(bench: Bench) -> DeviceRates:
    """Return the rates of products and of copying; others stay those that are assumed of an H100.

    On a CPU steps on single weights cost nothing, so that their parts keep the floor of memory.
    """
    size, n_numbers = 1024, 2**24
    if bench.on_gpu:  # enough to fill it, and more than its caches hold
        size, n_numbers = 8192, 2**26
    wide, half = bench.random(size, size, dtype=torch.float32), bench.random(size, size)
    float32 = product_rate(bench, wide)
    with feedback_precision(wide):
        tf32 = product_rate(bench, wide)
    numbers = bench.random(n_numbers, dtype=torch.float32)
    other = torch.empty_like(numbers)
    memory = 2 * numbers.nbytes / bench.seconds(lambda: other.copy_(numbers))
    measured = replace(
        H100, bfloat16=product_rate(bench, half), tf32=tf32, float32=float32, memory=memory
    )
    if not bench.on_gpu:
        return replace(measured, pinned_copy=memory, column_rows=math.inf, candidates=math.inf)
    pinned = torch.empty(n_numbers, pin_memory=True)
    copying = bench.seconds(lambda: numbers.copy_(pinned, non_blocking=True))
    return replace(measured, pinned_copy=pinned.nbytes / copying)


def product_rate(bench: Bench, matrix: Tensor) -> float:
    """Return operations a second of a product of square matrices."""
    out = torch.empty_like(matrix)
    return 2 * len(matrix) ** 3 / bench.seconds(lambda: torch.mm(matrix, matrix, out=out))


# ---------------------------------------------------------------- parts of a block


class Stopwatch:
    """Adds up the seconds of the parts of each block; a part inside another one counts alone.

    Only the main thread is watched: the forwards of batches, which run in threads of their own, are
    a part of the function that waits for them.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._running: list[str] = []  # empty while no block is measured
        self._since = 0.0
        self._block: Counter[str] = Counter()
        self.blocks: list[Counter[str]] = []

    def __call__(self, event: Event) -> None:
        """Begin to measure with the second block, and note the parts of each block."""
        if isinstance(event, BlockStarted) and event.index:
            self._running, self._block = [OTHER], Counter()
            self._since = self._bench.now()
        elif isinstance(event, BlockFinished) and self._running:
            self._charge()
            self._running = []
            self.blocks.append(self._block)

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Charge the time of the body to a part, except for the parts inside it."""
        if not self._running or current_thread() is not main_thread():
            yield
            return
        self._charge()
        self._running.append(part)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def timed(self, part: str, function: Any) -> Any:
        """Return `function`, with its time charged to a part; it may be a generator."""
        if isinstance(function, classmethod):
            return classmethod(self.timed(part, function.__func__))
        if inspect.isgeneratorfunction(function):
            return self._timed_steps(part, function)

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self.measuring(part):
                return function(*arguments, **named)

        return call

    def _timed_steps(self, part: str, function: Any) -> Any:
        end = object()

        @wraps(function)
        def steps(*arguments: Any, **named: Any) -> Iterator[Any]:
            generator = function(*arguments, **named)
            while True:
                with self.measuring(part):
                    item = next(generator, end)
                if item is end:
                    return
                yield item

        return steps

    def _charge(self) -> None:
        now = self._bench.now()
        self._block[self._running[-1]] += now - self._since
        self._since = now


def measure_blocks(bench: Bench, shape: Shape, config: QuantizeConfig) -> list[Counter[str]]:
    """Quantize a random model and return the seconds of the parts of each block but the first."""
    watch = Stopwatch(bench)
    few_words = replace(shape, vocabulary=512)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as changed:
        model = Path(folder) / "model"
        write_random_model(model, few_words, bench.runs + 1, bench.device.type)
        for part, functions in TIMED.items():
            for owner, name in functions:
                timed = watch.timed(part, vars(owner)[name])
                changed.enter_context(patch.object(owner, name, timed))
        run.quantize_checkpoint(str(model), Path(folder) / "out", config, report=watch)
    return watch.blocks


def measure(bench: Bench, shape: Shape, config: QuantizeConfig) -> dict[str, Any]:
    """Return the rates, seconds and floor of each part of a block, and the next bottleneck."""
    rates = measure_rates(bench)
    text = Text(config.nsamples * config.seqlen, config.seqlen)
    least = floors(shape, config.base, text, rates)
    blocks = measure_blocks(bench, shape, config)
    rows: dict[str, dict[str, float | None]] = {}
    names = dict.fromkeys([*least, *sorted(set().union(*blocks))])
    for name in names:
        seconds = statistics.median(block[name] for block in blocks)
        floor = least.get(name, 0.0)
        rows[name] = {"seconds": seconds, "floor": floor, "times_floor": None}
        if floor:
            rows[name]["times_floor"] = seconds / floor
    lost = {name: row["seconds"] - row["floor"] for name, row in rows.items()}
    kinds = ("bfloat16", "tf32", "float32", "memory", "pinned_copy")
    return {
        "rates": {kind: getattr(rates, kind) for kind in kinds},
        "block": rows,
        "next_bottleneck": max(lost, key=lambda name: lost[name]),
    }


# ---------------------------------------------------------------- the command


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--device", default="auto")
    about = "calibration tokens; default: 262144 on a GPU, else 16384"
    parser.add_argument("--tokens", type=int, help=about)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5, help="blocks that are measured")
    parser.add_argument("--rows", type=int, help="rows that are solved at a time, in place of ours")
    return parser.parse_args()


def settings(arguments: argparse.Namespace, bench: Bench, tokens: int) -> QuantizeConfig:
    """Return the configuration; the text is long enough, as every byte of it is a token."""
    seqlen = min(SEQLEN, tokens // LEAST_WINDOWS)
    fields: dict[str, Any] = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "preset": arguments.preset,
        "device": bench.device.type,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "dataset": text_file(2 * tokens),
        "nsamples": tokens // seqlen,
        "seqlen": seqlen,
        "moe_uncovered": "rtn",
    }
    return QuantizeConfig(**fields)


def main() -> None:
    arguments = parse()
    bench, shape = Bench(arguments.device, arguments.runs), SHAPES[arguments.shape]
    tokens = arguments.tokens or (262144 if bench.on_gpu else 16384)
    if arguments.rows:
        estimate.ROWS_OF_A_PART[bench.device.type] = (arguments.rows, arguments.rows)
    found = measure(bench, shape, settings(arguments, bench, tokens))
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
        "rows": arguments.rows or estimate.ROWS_OF_A_PART[bench.device.type],
        **found,
        "model": {"blocks": shape.blocks, "seconds": total, "floor": floor},
    }
    write_json(arguments.json, content)


if __name__ == "__main__":
    sys.exit(main())
