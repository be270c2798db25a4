#!/usr/bin/env python3
"""Host memory against the number of experts: quantizes mixtures of 8 and 64 experts a block and compares their peaks.

What counts is private resident memory, as in bench_memory.py. One block of the larger mixture has 151 MB of float32
weights; the Hessians of all its experts would be 168 MB, those of one are 2.6 MB.

    python scripts/bench_experts.py [--experts 8 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bench_memory import flags, quantize_and_watch, save_random_model

HIDDEN, INTERMEDIATE = 768, 256
SHAPE = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs=2, default=[8, 64])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        words = [*flags(Path(folder)), "--preset", "gptq", "--moe-uncovered", "rtn"]
        for n_experts in arguments.experts:
            model = Path(folder) / f"model-{n_experts}"
            save_random_model(model, "qwen3_moe", num_experts=n_experts, **SHAPE)
            peak, seconds = quantize_and_watch(model, Path(folder) / f"out-{n_experts}", words)
            rows.append(
                {
                    "experts": n_experts,
                    "block_experts_bytes": n_experts * 3 * HIDDEN * INTERMEDIATE * 4,
                    "all_hessians_bytes": n_experts * (HIDDEN**2 + INTERMEDIATE**2) * 4,
                    "peak_bytes": peak,
                    "seconds": seconds,
                }
            )
            print(" ".join(f"{key} {value:,.0f}" for key, value in rows[-1].items()), flush=True)
    few, many = rows
    more = many["peak_bytes"] - few["peak_bytes"]
    held = more / (many["block_experts_bytes"] - few["block_experts_bytes"])
    print(f"peak grows by {more / 1e6:.0f} MB, {held:.2f} times the weights that a block has more")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "growth_by_weights": held}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
