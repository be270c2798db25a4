#!/usr/bin/env python3
"""Measure what allocation of bits is worth: KL at the bytes of one width, and between two widths.

    python scripts/bench_allocation.py MODEL --calibration FILE --evaluation FILE ... --work DIR
        [--widths 2 3 4] [--averages 2.5 3 3.5 4] [--allow-bits 2 3 4 8] [--group-size 64]
        [--dtype auto] [--autoround PYTHON] [--json FILE] [--png FILE]

Allocates widths of `--allow-bits`, quantizes and evaluates for each average of bits, and quantizes
and evaluates with one of `--widths` for all layers. With the Python of an environment that has
auto-round, the widths that its search finds are quantized by gptq, too. Prints one JSON object for
each run, then a table in Markdown. KL is the mean over held-out tokens of KL(original || quantized)
in nats, for each text of evaluation; the chart shows the first one. `ratios` are KLs relative to
the uniform width of the same bytes, or to the geometric mean of the two uniform widths beside the
average. `measuring` and `quantizing` are seconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from common import ROOT, benchmark_parser, write_json

from gptq_cli.allocation.goals import starting_config
from gptq_cli.allocation.run import MeasuredModel, Place, measure_model
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.quantization.run import quantize_checkpoint

UNIFORM, ALLOCATED = "one width for all layers", "allocated"
AUTOROUND = "widths of auto-round"


def measured(arguments: argparse.Namespace, goal: QuantizeConfig) -> tuple[MeasuredModel, float]:
    """Return the measured model, and the processor time of the measurement."""
    started = time.process_time()
    start = starting_config(goal)
    place = Place.beside(arguments.work / "allocation.yaml")
    prepared = prepare_run(str(arguments.model), place.output, start, RunOptions(), writes=False)
    found = measure_model(prepared, goal, place=place)
    return found, time.process_time() - started


def quantized(arguments: argparse.Namespace, name: str, config: QuantizeConfig) -> dict[str, Any]:
    """Quantize and evaluate once; keep the result of an earlier call."""
    known = arguments.work / f"{name}.json"
    if known.exists():
        earlier: dict[str, Any] = json.loads(known.read_text())
        return earlier
    output = arguments.work / name
    started = time.process_time()
    done = quantize_checkpoint(str(arguments.model), output, config)
    seconds = time.process_time() - started
    row: dict[str, Any] = {"name": name, "bytes": done.bytes_after, "quantizing": seconds}
    row |= {"kl": [], "top1": [], "perplexity": []}
    for text in arguments.evaluation:
        request = EvalRequest(
            dataset=str(text),
            seqlen=arguments.seqlen,
            batch_size=arguments.batch_size,
            max_windows=arguments.windows,
            device="cpu",
            dtype="float32",
            baseline=str(arguments.model),
        )
        found = evaluate_perplexity(str(output), request)
        row["kl"].append(found.kl)
        row["top1"].append(found.top1_agreement)
        row["perplexity"].append(found.perplexity)
    known.write_text(json.dumps(row))
    return row


def settings(arguments: argparse.Namespace, **changes: Any) -> QuantizeConfig:
    """Return the settings of a run."""
    return QuantizeConfig(
        group_size=arguments.group_size,
        dataset=str(arguments.calibration),
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
        device="cpu",
        dtype=arguments.dtype,
        preset=arguments.preset,
        **changes,
    )


def allocated(arguments: argparse.Namespace, average: float) -> dict[str, Any]:
    """Allocate, quantize and evaluate for an average of bits."""
    goal = settings(arguments, bits=average, allow_bits=arguments.allow_bits)
    found, seconds = measured(arguments, goal)
    if not found.already_done:
        (arguments.work / "measuring.json").write_text(json.dumps(seconds))
    chosen = found.choose(goal).allocation
    row = quantized(arguments, f"mixed-{average:g}", found.configured(chosen.widths))
    return row | {"expected": chosen.kl}


def searched(arguments: argparse.Namespace, average: float) -> dict[str, Any]:
    """Quantize and evaluate with the widths that auto-round finds for an average of bits."""
    file = arguments.work / "autoround.json"
    if not file.exists():
        lists = [",".join(map(str, some)) for some in (arguments.allow_bits, arguments.averages)]
        script = ROOT / "scripts" / "peers" / "search_autoround.py"
        command = [arguments.autoround, script, arguments.model, arguments.calibration, file]
        subprocess.run([*map(str, command), str(arguments.group_size), *lists], check=True)
    rules = {}
    for layer, bits in json.loads(file.read_text())[f"{average:g}"].items():
        rules[f"+:{re.escape(layer)}$"] = {"bits": bits}
    return quantized(arguments, f"autoround-{average:g}", settings(arguments, dynamic=rules))


def ratios_of(
    arguments: argparse.Namespace, row: dict[str, Any], rows: list[dict[str, Any]]
) -> list[float]:
    """Return the KL of a row on each text relative to uniform widths with the same average."""
    uniform = {other["bits"]: other["kl"] for other in rows if other["kind"] == UNIFORM}
    below = max(width for width in arguments.widths if width <= row["bits"])
    above = min(width for width in arguments.widths if width >= row["bits"])
    share = 0.0
    if above > below:
        share = (row["bits"] - below) / (above - below)
    ratios = []
    for kl, narrow, wide in zip(row["kl"], uniform[below], uniform[above], strict=True):
        ratios.append(kl / (narrow ** (1 - share) * wide**share))
    return ratios


def show(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    rows.sort(key=lambda row: (row["bits"], row["kind"] != UNIFORM, row["name"]))
    print("\n| | bits | bytes | text | KL x 1000 | ratio | top-1 | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        row["ratios"] = ratios_of(arguments, row, rows)
        for number, text in enumerate(arguments.evaluation):
            cells = (
                row["name"],
                f"{row['bits']:g}",
                f"{row['bytes']:,}",
                text.stem,
                f"{1000 * row['kl'][number]:.2f}",
                f"{row['ratios'][number]:.2f}",
                f"{100 * row['top1'][number]:.1f}",
                f"{row['perplexity'][number]:.2f}",
            )
            print("| " + " | ".join(cells) + " |")


def draw(file: Path, rows: list[dict[str, Any]]) -> None:
    """Draw the KL against the size of the output."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.pyplot import subplots
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = subplots(figsize=(6.4, 3.6), layout="constrained")
    colours = {UNIFORM: "#9aa0a6", ALLOCATED: "#2f6fb5", AUTOROUND: "#d9822b"}
    for kind, colour in colours.items():
        points = [row for row in rows if row["kind"] == kind]
        if not points:
            continue
        sizes = [row["bytes"] / 1e6 for row in points]
        axes.plot(sizes, [row["kl"][0] for row in points], "o-", color=colour, label=kind)
    for bits in sorted({row["bits"] for row in rows}):
        alike = [row for row in rows if row["bits"] == bits]
        top = max(alike, key=lambda row: row["kl"][0])
        place = (top["bytes"] / 1e6, top["kl"][0])
        axes.annotate(f"{bits:g} bits", place, (5, 5), textcoords="offset points")
    axes.set(yscale="log", xlabel="size in MB", ylabel="KL to the original")
    axes.margins(x=0.1, y=0.1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    figure.savefig(file, dpi=160)


def all_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Carry out all runs, or the one that `arguments.only` names."""
    rows = []

    def is_wanted(name: str) -> bool:
        return arguments.only in (None, name)

    for width in arguments.widths:
        if is_wanted(f"all-{width}"):
            row = quantized(arguments, f"all-{width}", settings(arguments, bits=width))
            rows.append({"bits": width, "kind": UNIFORM, **row})
    for average in arguments.averages:
        if is_wanted(f"mixed-{average:g}"):
            rows.append({"bits": average, "kind": ALLOCATED, **allocated(arguments, average)})
        if arguments.autoround and is_wanted(f"autoround-{average:g}"):
            rows.append({"bits": average, "kind": AUTOROUND, **searched(arguments, average)})
    return rows


def main() -> None:
    """Carry out all runs and print a table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory of outputs, kept")
    parser.add_argument("--widths", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--allow-bits", type=int, nargs="*", default=[2, 3, 4, 8])
    parser.add_argument("--averages", type=float, nargs="*", default=[2.5, 3, 3.5, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, help="of each evaluation text; default: all")
    parser.add_argument("--dtype", default="auto", help="of the runs; evaluations are in float32")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--batch-size", type=int, default=16, help="of the evaluation")
    parser.add_argument("--autoround", metavar="PYTHON", help="of an environment with auto-round")
    parser.add_argument("--png", type=Path, help="draw KL against size into this file")
    parser.add_argument("--only", help="one run alone, such as all-3 or mixed-2.5; no table")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = all_rows(arguments)
    if arguments.only is not None:
        print(json.dumps(rows))
        return
    show(arguments, rows)
    measuring = json.loads((arguments.work / "measuring.json").read_text())
    print(f"\nmeasuring: {measuring:.1f} s of processor time")
    if arguments.json:
        write_json(arguments.json, {"measuring": measuring, "rows": rows})
    if arguments.png:
        draw(arguments.png, rows)


if __name__ == "__main__":
    main()
