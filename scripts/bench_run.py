#!/usr/bin/env python3
"""One `quantize` of a random model of a known shape: seconds, peak memory of device and host, written after each block.

Reads, quantizes and writes as `gptq quantize` does; making the model is not counted. With fewer blocks than the shape
has, `scaled_seconds` are those of a run with all of them: what does not belong to a block, plus blocks times the
median of a block.

    python scripts/bench_run.py --shape llama-3-8b --json FILE [--blocks 8] [--preset best] [--cap-gb 8]
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, write_random_model

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import BlockFinished, Event, Warned
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import texts


class Watch:
    """Writes the figures so far after every block, so that a run that is cut short leaves them."""

    def __init__(self, file: Path, figures: dict[str, Any]) -> None:
        self.file, self.figures = file, figures
        self.figures |= {"finished": False, "block_seconds": [], "warnings": []}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.figures["warnings"].append(f"{event.code}: {event.message}")
        if isinstance(event, BlockFinished):
            self.figures["block_seconds"].append(event.seconds)
            print(
                f"block {event.index}: {event.seconds:.2f} s, host {event.host_bytes / 1e9:.1f} GB",
                flush=True,
            )
            self.save()

    def save(self, **more: Any) -> None:
        cuda = torch.cuda.is_available()
        self.figures |= {
            "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "peak_device_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
            "peak_host_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        } | more
        self.file.write_text(json.dumps(self.figures, indent=2) + "\n")


def settings(arguments: argparse.Namespace) -> QuantizeConfig:
    """128 windows of 2048 tokens unless told otherwise; every byte of the text is a token."""
    size = arguments.nsamples * arguments.seqlen
    fields: dict[str, Any] = {
        "bits": 4, "group_size": arguments.group_size, "preset": arguments.preset, "device": arguments.device,
        "dataset": texts(2 * size), "nsamples": arguments.nsamples, "seqlen": arguments.seqlen,
        "batch_size": arguments.batch_size, "moe_uncovered": "rtn",
    }  # fmt: skip
    if arguments.cap_gb:
        fields["max_vram"] = f"{arguments.cap_gb}GB"
    return QuantizeConfig(**fields)


def run(arguments: argparse.Namespace, folder: Path, watch: Watch) -> None:
    """Make the model, quantize it, and keep what there is to know."""
    shape = SHAPES[arguments.shape]
    blocks = arguments.blocks or shape.blocks
    started = time.perf_counter()
    maker = "cuda" if torch.cuda.is_available() else "cpu"
    with multiprocessing.get_context("spawn").Pool(
        1
    ) as process:  # what it takes is not counted here
        bytes_before = process.apply(write_random_model, (folder / "model", shape, blocks, maker))
    made = time.perf_counter() - started
    watch.save(
        blocks=blocks, of_blocks=shape.blocks, bytes_before=bytes_before, seconds_to_make_it=made
    )
    if torch.cuda.is_available() and arguments.cap_gb:
        torch.cuda.set_per_process_memory_fraction(
            arguments.cap_gb * 1e9 / torch.cuda.mem_get_info()[1]
        )
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    profiler = torch.profiler.profile(activities=activities) if arguments.profile else nullcontext()
    with profiler as profile:
        result = quantize_checkpoint(
            str(folder / "model"), folder / "out", settings(arguments), report=watch
        )
    if arguments.profile:
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        arguments.profile.write_text(profile.key_averages().table(sort_by=key, row_limit=40))
    taken = watch.figures["block_seconds"]
    rest = result.seconds - sum(taken)
    watch.save(
        finished=True,
        seconds=result.seconds,
        scaled_seconds=rest + shape.blocks * statistics.median(taken),
        bytes_after=result.bytes_after,
        tokens=result.tokens,
        relative_error=statistics.mean(layer.relative_error for layer in result.layers),
        rtn_relative_error=statistics.mean(layer.rtn_relative_error for layer in result.layers),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--blocks", type=int, help="as many as the shape has, unless told")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cap-gb", type=float, help="device memory that may be taken at all")
    parser.add_argument(
        "--folder", type=Path, help="where the model is made; a temporary folder unless told"
    )
    parser.add_argument("--profile", type=Path, help="write a table of the longest operations here")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    told = {key: str(value) for key, value in vars(arguments).items() if value is not None}
    watch = Watch(
        arguments.json, {"device_name": device, "torch": torch.__version__, "arguments": told}
    )
    try:
        run(arguments, folder, watch)
    except Exception as error:
        watch.save(error=f"{type(error).__name__}: {error}")
        raise
    finally:
        shutil.rmtree(folder)
    print(json.dumps({key: value for key, value in watch.figures.items() if key != "arguments"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
