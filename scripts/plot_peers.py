#!/usr/bin/env python3
"""Draw the chart of the README and print the table of docs/accuracy.md.

    python scripts/plot_peers.py docs/benchmarks/peers-*bit-g*.json --png docs/images/peers.png

Reads files of `bench_peers.py --json` with an evaluation. Shows the KL of each tool's output as a
share of GPTQModel's, at the same bits, group size and calibration tokens. If several files hold a
tool with the same setting, the file that is named first counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from common import argument_parser

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots

REFERENCE = "gptqmodel"
TOOLS = {
    "gptqmodel": ("GPTQModel 7.7", "#9aa0a6"),
    "llmcompressor": ("llm-compressor 0.14", "#c5c9ce"),
    "autoround": ("auto-round 0.15", "#6aa384"),
    "autoround_light": ("auto-round 0.16, light", "#a5c9b5"),
    "gptq_cli gptq": ("gptq_cli, preset gptq", "#f4b183"),
    "gptq_cli fast": ("gptq_cli, preset fast", "#e8964f"),
    "gptq_cli balanced": ("gptq_cli, preset balanced (default)", "#2f6fb5"),
    "gptq_cli best": ("gptq_cli, preset best", "#0b3c72"),
}
WITH_FIGURES = ("autoround", "gptq_cli balanced", "gptq_cli best")
INK = "#1f2328"


def by_setting(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one run for each setting, with the tools of all of them."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for run in runs:
        first = found.setdefault(setting(run), run)
        first["quality"] = run["quality"] | first["quality"]
    return [found[key] for key in sorted(found, reverse=True)]


def setting(run: dict[str, Any]) -> tuple[int, int]:
    """Return bits and group size."""
    return int(run["arguments"]["bits"]), int(run["arguments"]["group_size"])


def share(run: dict[str, Any], tool: str) -> float | None:
    """Return the KL of a tool relative to the reference, or None if the tool was not run."""
    if tool not in run["quality"]:
        return None
    relative: float = run["quality"][tool]["kl"] / run["quality"][REFERENCE]["kl"]
    return relative


def table(runs: list[dict[str, Any]]) -> str:
    """Return a table in Markdown: KL times 1000, and its share of GPTQModel's in brackets."""
    heads = [f"{bits} bits, g{group}" for bits, group in map(setting, runs)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for tool, (label, _) in TOOLS.items():
        cells = [cell(run, tool) for run in runs]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(run: dict[str, Any], tool: str) -> str:
    relative = share(run, tool)
    if relative is None:
        return "not run"
    return f"{1000 * run['quality'][tool]['kl']:.2f} ({relative:.2f})"


def chart(runs: list[dict[str, Any]]) -> Figure:
    """Draw a group of bars for each setting."""
    figure, axes = subplots(figsize=(11, 4.2), layout="constrained")
    width = 0.8 / len(TOOLS)
    for number, (tool, (label, colour)) in enumerate(TOOLS.items()):
        offset = (number - (len(TOOLS) - 1) / 2) * width
        lefts, heights = [], []
        for index, run in enumerate(runs):
            relative = share(run, tool)
            if relative is not None:
                lefts.append(index + offset)
                heights.append(relative)
        bars = axes.bar(lefts, heights, width * 0.92, color=colour, label=label)
        if tool in WITH_FIGURES:
            axes.bar_label(bars, fmt="%.2f", fontsize=7, color=INK, padding=1)
    axes.axhline(1, color=INK, linewidth=0.6, linestyle=":")
    labels = [f"{bits} bits\ngroup {group}" for bits, group in map(setting, runs)]
    axes.set_xticks(range(len(runs)), labels)
    axes.set_ylabel("KL to the original, share of GPTQModel's", fontsize=9)
    title = "Lower is better. Small trained Qwen3, same calibration tokens, one reader for all"
    axes.set_title(title, fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of bench_peers.py --json")
    parser.add_argument("--png", type=Path, help="write the chart to this file")
    arguments = parser.parse_args()
    runs = by_setting([json.loads(file.read_text()) for file in arguments.results])
    print(table(runs))
    if arguments.png:
        chart(runs).savefig(arguments.png, dpi=110)


if __name__ == "__main__":
    main()
