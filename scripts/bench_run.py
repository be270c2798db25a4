#!/usr/bin/env python3
"""Measure one `quantize` of a random model of a known shape: seconds, peaks of device and host.

    python scripts/bench_run.py --shape llama-3-8b --json FILE [--blocks 8] [--preset best]

Reads, quantizes and writes as `gptq quantize` does; making the model is not counted. With fewer
blocks than the shape has, `scaled_seconds` are those of a run with all of them: the time outside
blocks, plus the number of blocks times the median of a block. Prints a line for each block, then
all figures as JSON; the file is written after each block.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, write_json
from shapes import SHAPES, Shape, write_random_model

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import BlockFinished, BlockStarted, Event, Report, Warned
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import text_file


class Watch:
    """The figures of a run, written after every block, so that a run that is cut short has some."""

    def __init__(self, file: Path, figures: dict[str, Any]) -> None:
        self.file, self.figures = file, figures
        self.figures |= {"finished": False, "block_seconds": [], "warnings": []}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.figures["warnings"].append(f"{event.code}: {event.message}")
        if isinstance(event, BlockFinished):
            self.figures["block_seconds"].append(event.seconds)
            host = f"host {event.host_bytes / 1e9:.1f} GB"
            print(f"block {event.index}: {event.seconds:.2f} s, {host}", flush=True)
            self.save()

    def save(self, **more: Any) -> None:
        """Add `more` and the peaks of memory, and write the file."""
        allocated = reserved = 0
        if torch.cuda.is_available():
            allocated = torch.cuda.max_memory_allocated()
            reserved = torch.cuda.max_memory_reserved()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.figures |= {
            "peak_device_bytes": allocated,
            "peak_device_reserved_bytes": reserved,
            "peak_host_resident_bytes": resident,
            **more,
        }
        write_json(self.file, self.figures)


def settings(arguments: argparse.Namespace) -> QuantizeConfig:
    """Return the configuration; the text is long enough, as every byte of it is a token."""
    size = arguments.nsamples * arguments.seqlen
    fields: dict[str, Any] = {
        "bits": 4,
        "group_size": arguments.group_size,
        "preset": arguments.preset,
        "device": arguments.device,
        "dataset": text_file(2 * size),
        "nsamples": arguments.nsamples,
        "seqlen": arguments.seqlen,
        "batch_size": arguments.batch_size,
        "moe_uncovered": "rtn",
    }
    if arguments.cap_gb:
        fields["max_vram"] = f"{arguments.cap_gb}GB"
    return QuantizeConfig(**fields)


def make_model(folder: Path, shape: Shape, blocks: int) -> dict[str, Any]:
    """Write a random model; return its figures.

    A process of its own makes it, so that its memory does not count as the run's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(1) as process:
        bytes_before = process.apply(write_random_model, (folder, shape, blocks, device))
    return {
        "blocks": blocks,
        "of_blocks": shape.blocks,
        "bytes_before": bytes_before,
        "seconds_to_make_it": time.perf_counter() - started,
    }


class Trace:
    """Traces the last block of a run, which is warm, and passes events on.

    Writes the trace for a browser, and a table of the longest operations beside it. `idle_share` is
    the share of the block in which the device did nothing.
    """

    def __init__(self, file: Path, watch: Watch) -> None:
        self.file, self.watch = file, watch
        self._profile: torch.profiler.profile | None = None
        self._started = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, BlockStarted) and event.index == event.n_blocks - 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
            self._started = time.perf_counter()
        if isinstance(event, BlockFinished) and self._profile is not None:
            self._stop(self._profile)
            self._profile = None
        self.watch(event)

    def _stop(self, profile: torch.profiler.profile) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        profile.stop()
        busy = 0.0
        for event in profile.events() or ():
            if event.device_type != torch.autograd.DeviceType.CPU:
                busy += event.time_range.elapsed_us() / 1e6
        key = "self_cpu_time_total"
        idle_share = None
        if busy:
            key, idle_share = "self_cuda_time_total", 1 - busy / seconds
        self.watch.save(traced_seconds=seconds, busy_seconds=busy, idle_share=idle_share)
        table = profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60)
        self.file.with_suffix(".txt").write_text(table)
        profile.export_chrome_trace(str(self.file))


def run(arguments: argparse.Namespace, folder: Path, watch: Watch) -> None:
    """Make the model, quantize it, and save the figures."""
    shape = SHAPES[arguments.shape]
    watch.save(**make_model(folder / "model", shape, arguments.blocks or shape.blocks))
    if torch.cuda.is_available() and arguments.cap_gb:
        share = arguments.cap_gb * 1e9 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(share)
    report: Report = watch
    if arguments.trace:
        report = Trace(arguments.trace, watch)
    config = settings(arguments)
    result = quantize_checkpoint(str(folder / "model"), folder / "out", config, report=report)
    block_seconds = watch.figures["block_seconds"]
    outside_blocks = result.seconds - sum(block_seconds)
    watch.save(
        finished=True,
        seconds=result.seconds,
        scaled_seconds=outside_blocks + shape.blocks * statistics.median(block_seconds),
        bytes_after=result.bytes_after,
        tokens=result.tokens,
        relative_error=statistics.mean(layer.relative_error for layer in result.layers),
        rtn_relative_error=statistics.mean(layer.rtn_relative_error for layer in result.layers),
    )


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--blocks", type=int, help="default: as many as the shape has")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cap-gb", type=float, help="limit of device memory for all of the run")
    parser.add_argument(
        "--folder", type=Path, help="folder for the model; default: a temporary one"
    )
    parser.add_argument(
        "--trace", type=Path, help="trace the last block to this file, NAME.json.gz"
    )
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    device = platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    given = {key: str(value) for key, value in vars(arguments).items() if value is not None}
    figures = {"device_name": device, "torch": torch.__version__, "arguments": given}
    watch = Watch(arguments.json, figures)
    try:
        run(arguments, folder, watch)
    except Exception as error:
        watch.save(error=f"{type(error).__name__}: {error}")
        raise
    finally:
        shutil.rmtree(folder)
    del figures["arguments"]
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
