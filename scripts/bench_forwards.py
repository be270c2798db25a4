#!/usr/bin/env python3
"""Forwards and wall time of the block loop: batches that wait inside a block against running it again for each stage.

Quantizes one random Llama in both ways, alternating, each time in a fresh process; prints medians. Executions are those
of linear layers; 1.00 for each batch is the least possible. Both ways must write the same bytes.

    python scripts/bench_forwards.py [--runs 5] [--hidden 512] [--blocks 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gptq_cli.config.schema import QuantizeConfig  # noqa: E402
from gptq_cli.events import BlockFinished, Event  # noqa: E402
from gptq_cli.quantization.run import quantize_checkpoint  # noqa: E402
from gptq_cli.runtime import memory  # noqa: E402
from tests.families import save_model, texts  # noqa: E402

WINDOWS, SEQLEN, BATCH_SIZE = 64, 256, 4
WAYS = ("replay", "lockstep")


def make_model(directory: str, hidden: int, blocks: int) -> None:
    """Save a random Llama of `blocks` blocks."""
    logging.disable_progress_bar()
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": blocks,
        "head_dim": 64,
    }
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    save_model(Path(directory), "llama", max_position_embeddings=SEQLEN, **shape, **heads)


def quantize(model: str, output: str, way: str) -> dict[str, Any]:
    """One run: seconds in the block loop and of it in the solver, of processors in all, executions per batch, peak."""
    executions, forward = [0], nn.Linear.forward

    def count(self: nn.Linear, inputs: Tensor) -> Tensor:
        executions[0] += 1
        return forward(self, inputs)

    nn.Linear.forward = count  # type: ignore[method-assign]
    if way == "replay":
        memory.free_bytes = lambda _device: 0
    events: list[Event] = []
    processor = time.process_time()
    config = QuantizeConfig(
        bits=4,
        dataset=texts(WINDOWS * SEQLEN * 2),
        seqlen=SEQLEN,
        nsamples=WINDOWS,
        batch_size=BATCH_SIZE,
        device="cpu",
    )
    result = quantize_checkpoint(model, Path(output), config, report=events.append)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "way": way,
        "seconds": sum(event.seconds for event in events if isinstance(event, BlockFinished)),
        "solver_seconds": sum(layer.seconds for layer in result.layers),
        "cpu_seconds": time.process_time() - processor,
        "executions": executions[0] / len(result.layers) / (WINDOWS // BATCH_SIZE),
        "peak_resident_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "sha256": hashlib.sha256((Path(output) / "model.safetensors").read_bytes()).hexdigest(),
    }


def measure(runs: int, hidden: int, blocks: int) -> list[dict[str, Any]]:
    """All runs, alternating; the first of each way is not counted."""
    rows = []
    processes = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, processes:
        processes.apply(make_model, (f"{folder}/model", hidden, blocks))
        for number in range(runs + 1):
            for way in WAYS:
                row = processes.apply(
                    quantize, (f"{folder}/model", f"{folder}/{way}-{number}", way)
                )
                rows += [row] if number else []
                print(
                    f"{way:9}  {row['seconds']:6.2f} s  {row['executions']:.2f} executions",
                    flush=True,
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = measure(arguments.runs, arguments.hidden, arguments.blocks)
    keys = ("seconds", "solver_seconds", "cpu_seconds", "executions", "peak_resident_bytes")
    medians = {
        way: {key: statistics.median(r[key] for r in rows if r["way"] == way) for key in keys}
        for way in WAYS
    }
    slow, fast = medians["replay"], medians["lockstep"]
    outside = [way["seconds"] - way["solver_seconds"] for way in (slow, fast)]
    ratios = {key: slow[key] / fast[key] for key in keys} | {
        "without_solver": outside[0] / outside[1]
    }
    same = len({row["sha256"] for row in rows}) == 1
    for way, median in medians.items():
        print(way, {key: round(value, 2) for key, value in median.items()})
    print(
        {key: round(value, 2) for key, value in ratios.items()},
        "same bytes" if same else "BYTES DIFFER",
    )
    if arguments.json:
        machine = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        shape = {
            "hidden": arguments.hidden,
            "blocks": arguments.blocks,
            "windows": WINDOWS,
            "seqlen": SEQLEN,
        }
        content = {
            "command": " ".join(["python", *sys.argv]),
            **machine,
            **shape,
            "batch_size": BATCH_SIZE,
        }
        content |= {
            "medians": medians,
            "replay_over_lockstep": ratios,
            "same_bytes": same,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
