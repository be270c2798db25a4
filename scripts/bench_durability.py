#!/usr/bin/env python3
"""What it costs a run that nothing is lost and nothing wrong is published: seconds in each of the parts that see to it.

    python scripts/bench_durability.py [--runs 3] [--json FILE]

Quantizes a random Llama (4 blocks, hidden 1024) on 64 windows of 512 tokens. `save` makes each block survive: fsync of
its tensors, hidden states with their hash, journal. `finish` is the last fsync and reading back what was written,
`manifest` hashes all files of the output, `identify` those of the model, `verify` looks at the output as readers do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gptq_cli.checkpoint.writer import CheckpointWriter  # noqa: E402
from gptq_cli.config.schema import QuantizeConfig  # noqa: E402
from gptq_cli.quantization import run as pipeline  # noqa: E402
from gptq_cli.quantization.resume import FinishedBlocks  # noqa: E402
from gptq_cli.storage import durable  # noqa: E402
from tests.families import save_model, texts  # noqa: E402

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
}
SHAPE |= {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 2048}
PARTS = {
    "save": (FinishedBlocks, "finished"),
    "finish": (CheckpointWriter, "finish"),
    "manifest": (pipeline, "write_manifest"),
    "identify": (pipeline, "identify"),
    "verify": (pipeline, "_verify"),
    "of these in fsync": (durable.disk, "fsync"),
}


def timed(seconds: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds[name] += time.perf_counter() - started

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds: Counter[str] = Counter()
    for name, (owner, function) in PARTS.items():
        setattr(owner, function, timed(seconds, name, getattr(owner, function)))
    config = QuantizeConfig(
        bits=4, dataset=texts(4 * 64 * 512), nsamples=64, seqlen=512, device="cpu"
    )
    runs = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        model = save_model(Path(folder) / "model", **SHAPE)
        for number in range(arguments.runs):
            seconds.clear()
            started = time.perf_counter()
            pipeline.quantize_checkpoint(str(model), Path(folder) / f"out-{number}", config)
            runs.append({"wall": time.perf_counter() - started, **seconds})
            print(runs[-1], flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    medians["share"] = (
        sum(medians[name] for name in PARTS if name != "of these in fsync") / medians["wall"]
    )
    print(json.dumps(medians, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": runs, "medians": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
