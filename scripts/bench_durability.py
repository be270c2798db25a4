#!/usr/bin/env python3
"""Measure what durability costs a run: the seconds of each part that protects its output.

    python scripts/bench_durability.py [--runs 3] [--json FILE]

Quantizes a random Llama (4 blocks, hidden 1024) on 64 windows of 512 tokens. `save` makes each
block survive a crash: fsync of its tensors, hidden states with their hash, journal. `finish` is the
last fsync and the check of everything written, `manifest` hashes all files of the output,
`identify` those of the model, `verify` reads the output as engines do. Prints the seconds of each
run, then the medians and their share of the wall time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import benchmark_parser, median_of, save_random_model, write_json

from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.quantization import run
from gptq_cli.quantization.run_state import FinishedBlocks
from gptq_cli.storage import durable
from tests.families import text_file

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
FSYNC = "of these in fsync"  # is a part of the other parts
PARTS: dict[str, tuple[Any, str]] = {
    "save": (FinishedBlocks, "finished"),
    "finish": (CheckpointWriter, "finish"),
    "manifest": (run, "write_manifest"),
    "identify": (run, "identify"),
    "verify": (run, "check_written"),
    FSYNC: (durable.disk, "fsync"),
}


def timed(seconds: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with a clock: the time of each call is added to `seconds[name]`."""

    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds[name] += time.perf_counter() - started

    return call


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    seconds: Counter[str] = Counter()
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, timed(seconds, name, getattr(owner, attribute)))
    dataset = text_file(4 * 64 * 512)
    config = QuantizeConfig(bits=4, dataset=dataset, nsamples=64, seqlen=512, device="cpu")
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        model = Path(folder) / "model"
        save_random_model(model, "llama", **SHAPE)
        for number in range(arguments.runs):
            seconds.clear()
            started = time.perf_counter()
            run.quantize_checkpoint(str(model), Path(folder) / f"out-{number}", config)
            runs.append({"wall": time.perf_counter() - started, **seconds})
            print(runs[-1], flush=True)
    medians = {name: median_of(runs, name) for name in runs[0]}
    protecting = sum(medians[name] for name in PARTS if name != FSYNC)
    medians["share"] = protecting / medians["wall"]
    print(json.dumps(medians, indent=2))
    write_json(arguments.json, {"runs": runs, "medians": medians})


if __name__ == "__main__":
    main()
