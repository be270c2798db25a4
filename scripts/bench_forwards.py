#!/usr/bin/env python3
"""Compare two ways to run a block: batches that pause inside it, and a replay for each stage.

    python scripts/bench_forwards.py [--runs 5] [--hidden 512] [--blocks 4] [--json FILE]

Quantizes one random Llama in both ways, alternating, each time in a fresh process. Executions are
those of a linear layer for each batch; 1.00 is the least possible. Prints a line for each run, the
medians of both ways and their ratios; the exit code is 1 if the ways write different bytes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import benchmark_parser, median_of, save_random_model, write_json
from torch import Tensor, nn

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import BlockFinished, Event
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.runtime import memory
from tests.families import text_file

WINDOWS, SEQLEN, BATCH_SIZE = 64, 256, 4
WAYS = ("replay", "lockstep")
FIGURES = ("seconds", "solver_seconds", "cpu_seconds", "executions", "peak_resident_bytes")


def save_llama(directory: Path, hidden: int, blocks: int) -> None:
    """Save a random Llama with heads of 64."""
    shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 3 * hidden}
    shape |= {"num_hidden_layers": blocks, "head_dim": 64, "max_position_embeddings": SEQLEN}
    shape |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    save_random_model(directory, "llama", **shape)


def quantize(model: str, output: str, way: str) -> dict[str, Any]:
    """Quantize once, in a process that is not used again, and return the figures of the run."""
    executions = 0
    forward = nn.Linear.forward

    def count(self: nn.Linear, inputs: Tensor) -> Tensor:
        nonlocal executions
        executions += 1
        return forward(self, inputs)

    nn.Linear.forward = count  # type: ignore[method-assign]
    if way == "replay":
        memory.WAITING_SHARE = {"cpu": 0.0}  # of free memory for paused batches
    events: list[Event] = []
    processor = time.process_time()
    config = QuantizeConfig(
        bits=4,
        dataset=text_file(WINDOWS * SEQLEN * 2),
        seqlen=SEQLEN,
        nsamples=WINDOWS,
        batch_size=BATCH_SIZE,
        device="cpu",
    )
    result = quantize_checkpoint(model, Path(output), config, report=events.append)
    processor = time.process_time() - processor
    return {
        "way": way,
        "seconds": sum(event.seconds for event in events if isinstance(event, BlockFinished)),
        "solver_seconds": sum(layer.seconds for layer in result.layers),
        "cpu_seconds": processor,
        "executions": executions / len(result.layers) / (WINDOWS // BATCH_SIZE),
        "peak_resident_bytes": peak_resident_bytes(),
        "sha256": hashlib.sha256((Path(output) / "model.safetensors").read_bytes()).hexdigest(),
    }


def peak_resident_bytes() -> int:
    """Return VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    kilobytes = status.partition("VmHWM:")[2].split()[0]
    return int(kilobytes) * 1024


def measure(runs: int, hidden: int, blocks: int) -> list[dict[str, Any]]:
    """Return the figures of all runs but the first of each way, which warms caches."""
    rows = []
    processes = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, processes:
        save_llama(Path(folder) / "model", hidden, blocks)
        for number in range(runs + 1):
            for way in WAYS:
                arguments = (f"{folder}/model", f"{folder}/{way}-{number}", way)
                row = processes.apply(quantize, arguments)
                if number:
                    rows.append(row)
                figures = f"{row['seconds']:6.2f} s  {row['executions']:.2f} executions"
                print(f"{way:9}  {figures}", flush=True)
    return rows


def median_figures(rows: list[dict[str, Any]], way: str) -> dict[str, float]:
    """Return the median of each figure over the runs of one way."""
    of_way = [row for row in rows if row["way"] == way]
    return {figure: median_of(of_way, figure) for figure in FIGURES}


def ratios_of(replay: dict[str, float], lockstep: dict[str, float]) -> dict[str, float]:
    """Return each figure of the replay over that of batches that pause."""
    ratios = {figure: replay[figure] / lockstep[figure] for figure in FIGURES}
    outside_replay = replay["seconds"] - replay["solver_seconds"]
    outside_lockstep = lockstep["seconds"] - lockstep["solver_seconds"]
    return ratios | {"without_solver": outside_replay / outside_lockstep}


def print_figures(label: str, figures: dict[str, float]) -> None:
    print(label, {name: round(figure, 2) for name, figure in figures.items()})


def main() -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    arguments = parser.parse_args()
    rows = measure(arguments.runs, arguments.hidden, arguments.blocks)
    replay, lockstep = median_figures(rows, "replay"), median_figures(rows, "lockstep")
    ratios = ratios_of(replay, lockstep)
    same_bytes = len({row["sha256"] for row in rows}) == 1
    print_figures("replay", replay)
    print_figures("lockstep", lockstep)
    print_figures("replay / lockstep", ratios)
    print("same bytes" if same_bytes else "BYTES DIFFER")
    content = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "hidden": arguments.hidden,
        "blocks": arguments.blocks,
        "windows": WINDOWS,
        "seqlen": SEQLEN,
        "batch_size": BATCH_SIZE,
        "medians": {"replay": replay, "lockstep": lockstep},
        "replay_over_lockstep": ratios,
        "same_bytes": same_bytes,
        "rows": rows,
    }
    write_json(arguments.json, content)
    return int(not same_bytes)


if __name__ == "__main__":
    sys.exit(main())
