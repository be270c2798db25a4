#!/usr/bin/env python3
"""How much of a run each of several processes does, counted: forwards of blocks, and products where rows are solved.

    python scripts/count_shares.py [--sizes 1 2 4] [--json FILE]

Tiny models, gloo on the CPU; rows are shared out in parts of 16 instead of 1024, since the layers are as much smaller.
`most` is the share of the process that does most, 1/N at best.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.families import save_model  # noqa: E402
from tests.quantization.ranks import ROWS, RUNS, team  # noqa: E402
from tests.quantization.test_ranks import DENSE, MIXTURE, SETTINGS  # noqa: E402
from tests.quantization.test_routed_experts import save_mixture  # noqa: E402
from tests.runs import config, digest  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            "dense, preset best": (
                save_model(folder / "dense", num_hidden_layers=2),
                config(**SETTINGS, **DENSE),
            ),
            "mixture of 8 experts": (
                save_mixture(folder / "mixture", "qwen3_moe", num_experts=8),
                config(**SETTINGS, **MIXTURE),
            ),
        }
        for kind, (model, settings) in models.items():
            trees = []
            for size in arguments.sizes:
                output = folder / f"{model.name}-{size}"
                work, said, codes = team(size, model, output, settings)
                if any(said) or any(codes):
                    sys.exit(f"{kind}, {size} processes: {said}, {codes}")
                trees.append(digest(output))
                for what in (RUNS, ROWS):
                    counts = [done[what] for done in work]
                    row = {
                        "model": kind,
                        "processes": size,
                        "work": what,
                        "counts": counts,
                        "total": sum(counts),
                    }
                    rows.append(
                        row
                        | {"most": max(counts) / sum(counts), "same_bytes": trees[0] == trees[-1]}
                    )
                    print(
                        f"| {kind} | {size} | {what} | {sum(counts)} | {rows[-1]['most']:.3f} |",
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
