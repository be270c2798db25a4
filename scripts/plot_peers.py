#!/usr/bin/env python3
"""The chart of the README and the table of docs/accuracy.md, from what scripts/bench_peers.py has written.

    python scripts/plot_peers.py docs/benchmarks/peers-*bit-g*.json --png docs/images/peers.png

KL of each tool's output as a share of GPTQModel's, at the same bits, group size and calibration tokens. Of a tool that
was run twice with a setting, the file that is named first counts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REFERENCE = "gptqmodel"
NAMES = {
    "gptqmodel": "GPTQModel 7.7",
    "llmcompressor": "llm-compressor 0.14",
    "autoround": "auto-round 0.15",
    "gptq_cli gptq": "gptq_cli, preset gptq",
    "gptq_cli fast": "gptq_cli, preset fast",
    "gptq_cli balanced": "gptq_cli, preset balanced (default)",
    "gptq_cli best": "gptq_cli, preset best",
}
COLOURS = dict(
    zip(
        NAMES,
        ("#9aa0a6", "#c5c9ce", "#6aa384", "#f4b183", "#e8964f", "#2f6fb5", "#0b3c72"),
        strict=True,
    )
)
INK = "#1f2328"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of bench_peers.py --json with an evaluation"
    )
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    runs = by_setting([json.loads(file.read_text()) for file in arguments.results])
    print(table(runs))
    if arguments.png:
        picture(runs).savefig(arguments.png, dpi=110)


def by_setting(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run for each setting, with the tools of all of them."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for run in runs:
        first = found.setdefault(setting(run), run)
        first["quality"] = run["quality"] | first["quality"]
    return [found[key] for key in sorted(found, reverse=True)]


def setting(run: dict[str, Any]) -> tuple[int, int]:
    """Bits and group size."""
    return int(run["arguments"]["bits"]), int(run["arguments"]["group_size"])


def share(run: dict[str, Any], name: str) -> float | None:
    """None if the tool was not run."""
    found = run["quality"].get(name)
    return found["kl"] / run["quality"][REFERENCE]["kl"] if found else None


def cell(run: dict[str, Any], name: str) -> str:
    part = share(run, name)
    return "not run" if part is None else f"{1000 * run['quality'][name]['kl']:.2f} ({part:.2f})"


def table(runs: list[dict[str, Any]]) -> str:
    """KL times 1000, and in brackets its share of GPTQModel's, in Markdown."""
    heads = [f"{bits} bits, g{group}" for bits, group in map(setting, runs)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in NAMES:
        cells = [cell(run, name) for run in runs]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: list[dict[str, Any]]) -> plt.Figure:
    """Bars in groups, one for each setting."""
    figure, axes = plt.subplots(figsize=(11, 4.2), layout="constrained")
    width = 0.8 / len(NAMES)
    for place, name in enumerate(NAMES):
        heights = {
            index: part for index, run in enumerate(runs) if (part := share(run, name)) is not None
        }
        lefts = [index + (place - (len(NAMES) - 1) / 2) * width for index in heights]
        bars = axes.bar(
            lefts, list(heights.values()), width * 0.92, color=COLOURS[name], label=NAMES[name]
        )
        if name in ("autoround", "gptq_cli balanced", "gptq_cli best"):
            axes.bar_label(bars, fmt="%.2f", fontsize=7, color=INK, padding=1)
    axes.axhline(1, color=INK, linewidth=0.6, linestyle=":")
    axes.set_xticks(
        range(len(runs)), [f"{bits} bits\ngroup {group}" for bits, group in map(setting, runs)]
    )
    axes.set_ylabel("KL to the original, share of GPTQModel's", fontsize=9)
    axes.set_title(
        "Lower is better. Small trained Qwen3, same calibration tokens, one reader for all",
        fontsize=10,
        color=INK,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


if __name__ == "__main__":
    main()
