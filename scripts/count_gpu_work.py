#!/usr/bin/env python3
"""Count the work of one block on a GPU, and estimate its time from public rates.

    .venv/bin/python scripts/count_gpu_work.py --shape llama-3-8b --preset balanced [--json]
    .venv/bin/python scripts/count_gpu_work.py --shape llama-3-8b --whole-run
    .venv/bin/python scripts/count_gpu_work.py --shape llama-3-8b --memory 16GB

Needs no GPU: the program itself runs on a simulated device (`tests/counting_gpu.py`) whose tensors
have shapes but no numbers, so that a block of full size passes in seconds. Every operation, every
launch of a kernel and every wait of the host is counted by the part of the work that asks for it.
The time is that of a host that launches one operation after the other and a device that carries
them out in order; a part gets the time by which its operations move the end of the device's work.

The floor beside it is the least time of the work itself: of each part, products at their highest
rate or bytes moved once, whichever takes longer. `work_floor.py` lists the rule of each part.

`--whole-run` adds what is done before and after the blocks, as `whole_run.py` lists it. The exit
code is 1 if the tensors of a block take more than `--memory`.

Nothing here is measured. `--rates` shows the rates and where they are from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from threading import current_thread
from typing import Any
from unittest.mock import patch

import torch
from common import argument_parser
from shapes import SHAPES, Shape, write_sparse_model
from whole_run import lines as lines_of_run
from whole_run import whole_run
from work_floor import Text, floor_of_block, floors

from gptq_cli.checkpoint import writer as checkpoint_writer
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config.fields import size_in_bytes
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import BlockFinished, BlockStarted, Event
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.planning.device_rates import H100, DeviceRates, described
from gptq_cli.planning.estimate import gradient_tokens
from gptq_cli.planning.plan import refine_plan
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization import run as quantize_run
from gptq_cli.quantization.block_loop import quantize_all_blocks
from gptq_cli.quantization.gradients import SummedGradients
from gptq_cli.quantization.run_state import (
    BatchState,
    FinishedBlocks,
    Limits,
    Record,
    Run,
    SavingTimes,
)
from gptq_cli.runtime.device import resolve_device
from gptq_cli.runtime.memory import Memory
from gptq_cli.runtime.open_model import open_stream
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from tests.counting_gpu import CountingGpu, Operation, counting_gpu
from tests.families import text_file

PRESETS = ("gptq", "balanced", "best", "max")
BLOCKS = 2  # the first one runs once more, to show its stages; the last one is counted
MEMORY = 80 * 10**9  # bytes of the device, unless `--memory` names others


# Kernels that take columns in turn, and an argument with as many numbers as they round
IN_TURN = {"round_columns_kernel": "values", "fit_codes_kernel": "levels"}


class Clock:
    """The time of a host that launches, and of a device that follows; all by part."""

    def __init__(self, rates: DeviceRates) -> None:
        self.rates = rates
        self.started = False
        self.host = self.device = self.begin = 0.0
        self.parts: dict[str, Counter[str]] = defaultdict(Counter)

    def start(self) -> None:
        """Begin to count, with an idle device."""
        self.started = True
        self.host = self.begin = self.device = max(self.host, self.device)

    def stop(self) -> None:
        """Count nothing from now on."""
        self.started = False

    @property
    def seconds(self) -> float:
        """The seconds between start and stop."""
        return max(self.host, self.device) - self.begin

    def add(self, operation: Operation) -> None:
        """Launch an operation."""
        if not self.started:
            return
        part = self.parts[operation.part]
        part["launches"] += 1
        part["kernels"] += operation.kernel
        part["bytes"] += operation.moved
        part["products"] += 2 * operation.products
        takes = seconds_of(operation, self.rates)
        part["device_seconds"] += takes
        launch = self.rates.torch_launch
        if operation.kernel:
            launch = self.rates.triton_launch
        if _is_behind():
            start = self.device
        else:
            self.host += launch
            part["host_seconds"] += launch
            start = max(self.host, self.device)
        part["seconds"] += start + takes - self.device
        self.device = start + takes

    def wait(self, part: str) -> None:
        """Let the host wait for the device."""
        if not self.started:
            return
        if _is_behind():
            self.parts[part]["waits_behind"] += 1
            return
        self.parts[part]["waits"] += 1
        self.host = max(self.host, self.device)


def _is_behind() -> bool:
    """Return whether a thread runs that the program does not wait for."""
    return current_thread().name.startswith(("writer", "reader"))


def seconds_of(operation: Operation, rates: DeviceRates) -> float:
    """Estimate how long the device takes for an operation."""
    copying = rates.other_copy
    if operation.pinned:
        copying = rates.pinned_copy
    moving = operation.moved / rates.memory + operation.copied / copying
    least = max(moving, rates.least_kernel)
    if operation.kernel:
        return max(least, _kernel_seconds(operation, rates))
    if not operation.products:
        return least
    if operation.name == "linalg_cholesky_ex":
        return max(least, 2 * operation.products / rates.cholesky)
    rate = {"bfloat16": rates.bfloat16, "float16": rates.bfloat16, "tf32": rates.tf32}.get(
        operation.precision, rates.float32
    )
    busy = 1.0
    if operation.result is not None:
        large = _busy(operation.result, 128, rates.multiprocessors)
        small = _busy(operation.result, 64, rates.multiprocessors) * rates.small_tiles
        busy = max(large, small)
    return max(least, 2 * operation.products / rate / busy)


def _busy(result: tuple[int, int, int], side: int, at_once: int) -> float:
    """Return the share of the device that computes numbers of the matrices of a product.

    Their tiles have `side` rows and columns; `at_once` of them are computed together.
    """
    matrices, rows, columns = result
    tiles = matrices * math.ceil(rows / side) * math.ceil(columns / side)
    waves = math.ceil(tiles / at_once)
    return matrices * rows * columns / (waves * at_once * side**2)


def _kernel_seconds(operation: Operation, rates: DeviceRates) -> float:
    """Estimate the arithmetic of a kernel, which is not bound by memory."""
    sizes = operation.sizes or {}
    if operation.name in IN_TURN:
        weights = sizes[IN_TURN[operation.name]]
        return max(sizes["n_columns"] * rates.column, weights / rates.column_rows)
    if operation.name == "best_candidate_kernel":
        return sizes["weights"] * sizes["n_candidates"] / rates.candidates
    return 0.0


# ---------------------------------------------------------------- the run that is counted


class NoFile:
    """Stands for an output file, and forgets what is written to it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        del size

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        del offset, data

    def sync(self) -> None: ...

    def close(self) -> None: ...


class NoHash:
    """Stands for a hash that costs nothing."""

    def __init__(self, data: object = b"") -> None:
        del data

    def update(self, data: object) -> None:
        del data

    def hexdigest(self) -> str:
        return ""


class NoStore:
    """Stands for the finished blocks on the disk, of which there are none."""

    n_finished = 0
    times = SavingTimes(now=lambda: 0.0)  # never due before the last block

    def read(self) -> list[BatchState]:
        return []

    def read_back(self) -> None: ...

    def save(self, block: int, batches: list[BatchState] | None) -> None:
        del block, batches


class NoGradientStore:
    """Stands for the files of a pass for gradients over `tokens` tokens, which is not counted."""

    def __init__(self, layers: Sequence[LayerPlan], tokens: int) -> None:
        self.tokens = tokens
        self.layers = {layer.name: layer.out_features for layer in layers}

    def read(self, name: str) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        """Return what any file of the pass holds: sums and energies, here those of all layers."""
        del name
        sums = {layer: torch.zeros(rows, rows) for layer, rows in self.layers.items()}
        return sums, {layer: torch.ones(self.tokens) for layer in self.layers}


def count(
    shape: Shape, rates: DeviceRates, *, memory: int = MEMORY, **settings: Any
) -> dict[str, Any]:
    """Return the counts and the estimate of one block of `shape`, quantized with `settings`.

    The device has `memory` bytes, by which the program cuts the work; it may still take more.
    """
    usual = {"bits": 4, "device": "cuda", "dataset": text_file(), "moe_uncovered": "rtn"}
    config = QuantizeConfig(**(usual | settings))
    clock = Clock(rates)
    with tempfile.TemporaryDirectory() as folder, counting_gpu(memory) as gpu:
        gpu.on_operation, gpu.on_wait = clock.add, clock.wait
        model = Path(folder) / "model"
        write_sparse_model(model, shape, BLOCKS)
        peak = quantize_counted(model, Path(folder) / "out", config, clock, gpu)
    text = Text(config.nsamples * config.seqlen, config.seqlen)
    return figures(clock, peak, floors(shape, config.base, text, rates))


def quantize_counted(
    model: Path, output: Path, config: QuantizeConfig, clock: Clock, gpu: CountingGpu
) -> int:
    """Quantize `model` and count its last block; return the most bytes that were allocated."""
    started_at: list[int] = []

    def report(event: Event) -> None:
        if isinstance(event, BlockStarted) and event.index == BLOCKS - 1:
            gpu.most_bytes = gpu.held_bytes
            clock.start()
        elif isinstance(event, BlockFinished) and event.index == BLOCKS - 1:
            clock.stop()
            started_at.append(gpu.most_bytes)

    device = resolve_device("cuda")
    prepared = prepare_run(str(model), output, config, RunOptions())
    with (
        torch.inference_mode(),
        patch.object(checkpoint_writer, "OpenFile", NoFile),
        patch.object(checkpoint_writer, "sha256", NoHash),
    ):
        host = Memory(torch.device("cpu"))
        stream = open_stream(
            prepared.plan.source,
            device=device,
            dtype=config.dtype,
            trust_remote_code=False,
            host=host,
        )
        plan = refine_plan(
            prepared.plan, config, stream.all_linears(), stream.stacked_linears(), ()
        )
        ids = torch.zeros(config.nsamples, config.seqlen, dtype=torch.long)
        batches = ids.split(config.batch_size)
        run = Run(config, plan, stream, SINGLE_PROCESS, batches, Record(report), Limits(config))
        run.saved = FinishedBlocks(SINGLE_PROCESS, plan.n_steps, NoStore())
        if plan.loss_aware:
            run.gradients = gradients_of(run)
        with CheckpointWriter(output, plan.layout) as writer:
            run.keep = partial(quantize_run._write_layers, writer, plan.packing)
            quantize_all_blocks(run)
    return started_at[0]


def gradients_of(run: Run) -> SummedGradients:
    """Return gradients that are read as those of a pass that is complete."""
    tokens = gradient_tokens(run.plan, run.config)
    store: Any = NoGradientStore(run.plan.loss_aware, tokens)
    sizes = [len(batch.flatten()) for batch in run.batches]
    return SummedGradients(SINGLE_PROCESS, run.stream.device, store, tokens, sizes)


def figures(clock: Clock, peak: int, least: dict[str, float]) -> dict[str, Any]:
    """Return what was counted beside the floor of each part in `least`, largest part first."""
    parts: dict[str, dict[str, float]] = {}
    for name, part in sorted(clock.parts.items(), key=lambda item: -item[1]["seconds"]):
        parts[name] = {
            "seconds": part["seconds"],
            "floor_seconds": least.get(name, 0.0),
            "device_seconds": part["device_seconds"],
            "host_seconds": part["host_seconds"],
            "launches": part["launches"],
            "kernels": part["kernels"],
            "waits": part["waits"],
            "waits_behind": part["waits_behind"],
            "bytes": part["bytes"],
            "products": part["products"],
        }
    found: dict[str, Any] = {
        "block_seconds": clock.seconds,
        "floor_seconds": floor_of_block(least),
    }
    for figure in ("launches", "kernels", "waits", "waits_behind", "bytes", "products"):
        found[figure] = sum(part[figure] for part in parts.values())
    return found | {"peak_device_bytes": peak, "parts": parts}


def table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of what was counted."""
    yield "part             ms    floor   device     host  launches  Triton  waits"
    keys = ("seconds", "floor_seconds", "device_seconds", "host_seconds")
    for name, part in found["parts"].items():
        in_ms = " ".join(f"{part[key] * 1e3:8.1f}" for key in keys)
        counts = f"{part['launches']:9} {part['kernels']:7} {part['waits']:6}"
        work = f"{part['products'] / 1e12:8.2f} TFLOP {part['bytes'] / 1e9:7.1f} GB"
        yield f"{name:10} {in_ms} {counts} {work}"
    waits = f"{found['waits']} waits, {found['waits_behind']} more of other threads"
    launches = f"{found['launches']} launches, {found['kernels']} of them of Triton"
    peak = f"peak {found['peak_device_bytes'] / 1e9:.1f} GB of tensors"
    time = f"{found['block_seconds']:.2f} s (estimated from public rates of an H100, not measured)"
    floor = f"its floor is {found['floor_seconds']:.2f} s"
    yield f"a block takes {time}; {floor}: {launches}; {waits}; {peak}"


def all_cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each shape with each preset."""
    for shape, preset in product(arguments.shape, arguments.preset):
        yield case_of(shape, preset, arguments.group_size, arguments.memory)


def case_of(shape: str, preset: str, group_size: int, memory: int) -> dict[str, Any]:
    """Return what is counted of one block, and the estimate of a whole run."""
    settings: dict[str, Any] = {"preset": preset, "group_size": group_size}
    found = count(SHAPES[shape], H100, memory=memory, **settings)
    config = QuantizeConfig(bits=4, **settings)
    run = whole_run(SHAPES[shape], config, H100, found["block_seconds"])
    return {"shape": shape, "preset": preset, "memory": memory, **found, "run": run}


def all_tables(cases: Sequence[dict[str, Any]], *, whole_runs: bool) -> Iterator[str]:
    """Yield the lines of the tables of all cases, with the parts of whole runs if asked for."""
    for case in cases:
        yield f"{case['shape']}, {case['preset']}"
        yield from table(case)
        if whole_runs:
            yield from lines_of_run(case["run"], SHAPES[case["shape"]].blocks)


def all_markdown(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of all cases, and one of the parts of each shape."""
    yield from markdown(cases)
    for shape in dict.fromkeys(case["shape"] for case in cases):
        yield ""
        yield from markdown_of_parts(cases, shape)


def table_of_rates(rates: DeviceRates) -> Iterator[str]:
    """Yield a line for each rate: its value, its source, and what is to be confirmed."""
    for rate in described(rates):
        confirm = "; to be confirmed on a GPU"
        if rate.known:
            confirm = ""
        yield f"{rate.name:20} {rate.value:9.3g}  {rate.source}{confirm}"


def markdown(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table with a row for each counted block, as the documents have it."""
    yield "| shape | preset | block, s | floor, s | launches | waits | peak memory, GB | run, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases:
        times = f"{case['block_seconds']:.2f} | {case['floor_seconds']:.2f}"
        counts = f"{case['launches']:,} | {case['waits']}"
        peak, run = case["peak_device_bytes"] / 1e9, case["run"]["run_seconds"]
        name = f"{case['shape']} | {case['preset']}"
        yield f"| {name} | {times} | {counts} | {peak:.1f} | {run:.0f} |"


def markdown_of_parts(cases: Sequence[dict[str, Any]], shape: str) -> Iterator[str]:
    """Yield a table with a row for each part of the blocks of `shape`, a column for each preset."""
    found = {case["preset"]: case for case in cases if case["shape"] == shape}
    header = "".join(f" {preset}, ms | floor |" for preset in found)
    yield f"| part |{header}"
    yield "|---" * (1 + 2 * len(found)) + "|"
    names: dict[str, None] = {}
    for case in reversed(found.values()):  # the last preset has all parts
        names |= dict.fromkeys(case["parts"])
    for name in names:
        cells = "".join(_cells(case["parts"].get(name)) for case in found.values())
        yield f"| {name} |{cells}"
    blocks = "".join(_cells({**case, "seconds": case["block_seconds"]}) for case in found.values())
    yield f"| block |{blocks}"


def _cells(part: Mapping[str, Any] | None) -> str:
    """Return the cells of a part: milliseconds and floor."""
    if part is None:
        return "  |  |"
    return f" {part['seconds'] * 1e3:,.0f} | {part['floor_seconds'] * 1e3:,.0f} |"


def exit_code(cases: Sequence[dict[str, Any]]) -> int:
    """Return 1 if the tensors of a block do not fit into the memory, and say so."""
    code = 0
    for case in cases:
        if case["peak_device_bytes"] > case["memory"]:
            name = f"{case['shape']} with preset {case['preset']}"
            print(f"error: a block of {name} takes more memory", file=sys.stderr)
            code = 1
    return code


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-3-8b"])
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["balanced"])
    parser.add_argument("--group-size", type=int, default=128)
    about = "memory of the GPU, such as 16GB (default: 80GB); its other rates stay those of an H100"
    parser.add_argument("--memory", type=size_in_bytes, default=MEMORY, metavar="SIZE", help=about)
    about = "show the figures that --json has printed into this file; count nothing"
    parser.add_argument("--figures", type=Path, metavar="FILE", help=about)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--markdown", action="store_true", help="print tables for the documents")
    parser.add_argument("--whole-run", action="store_true", help="show the parts of a whole run")
    parser.add_argument("--rates", action="store_true", help="print the rates and their sources")
    arguments = parser.parse_args()
    if arguments.rates:
        print("\n".join(table_of_rates(H100)))
        return 0
    if arguments.figures:
        content = json.loads(arguments.figures.read_text())
        cases = content.get("cases", [content])
    else:
        cases = list(all_cases(arguments))
    if arguments.json:
        content = {"cases": cases}
        if len(cases) == 1:
            content = cases[0]
        print(json.dumps({**content, "rates": asdict(H100)}, indent=2))
    elif arguments.markdown:
        print("\n".join(all_markdown(cases)))
    else:
        print("\n".join(all_tables(cases, whole_runs=arguments.whole_run)))
    return exit_code(cases)


if __name__ == "__main__":
    sys.exit(main())
