#!/usr/bin/env python3
"""Measure the quality of settings: quantize a model with each, compare it with the original.

    python scripts/bench_quality.py MODEL --calibration FILE --evaluation FILE ...
        [--windows N ...] [--bits 4 3 2] [--group-size 64 128] [--nsamples 64 ...] [--seqlen 256]
        [--settings gptq balanced ...] [--reference gptq] [--dtype auto] [--keep DIR] [--json FILE]

Prints one JSON object for each run, then tables in Markdown: KL times 1000, its ratio to that of
`--reference` at the same bits, group size and number of windows, top-1 agreement in percent, and
perplexity. KL is the mean over held-out tokens of KL(original || quantized) in nats. The settings
are all presets, and ingredients of them. `--keep` keeps the outputs, for `bench_verdicts.py`.

If FILE of `--json` has rows already, they are not run again, and the tables show all of its rows.
So the same command resumes after it was stopped, and with `--keep` it resumes a quantization, too.
`scripts/real_model.py` makes a real language model; two windows of text say little about it, a few
dozen are enough.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from common import benchmark_parser, name_of, write_json
from held_out import compare, forward, windows_of
from torch import Tensor

from gptq_cli.config.layer import PRESETS
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import __version__
from gptq_cli.evaluation.forward import Forward
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from gptq_cli.solver.quantized_linear import output_energies, round_to_nearest
from gptq_cli.solver.solve import Solution

SIGNED = {"static_groups": True, "signed_scales": True}
DIAGONAL = {"damp_mode": "diagonal", "damp_percent": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {name: {"preset": name} for name in PRESETS}
SETTINGS |= {
    "rtn": {},
    "act-order asym": {"preset": "act-order", "sym": False},
    "signed": SIGNED,
    "signed mse": SIGNED | {"scale_search": "mse"},
    "signed refine 2": SIGNED | {"refine_sweeps": 2},
    "signed diagonal": SIGNED | DIAGONAL,
    "signed diagonal mse": SIGNED | DIAGONAL | {"scale_search": "mse"},
    "signed diagonal refine 2": SIGNED | DIAGONAL | {"refine_sweeps": 2},
    "signed diagonal mse refine 2": SIGNED | DIAGONAL | {"scale_search": "mse", "refine_sweeps": 2},
    "signed diagonal mse refine 4": SIGNED | DIAGONAL | {"scale_search": "mse", "refine_sweeps": 4},
    "balanced, massive tokens in full": {"preset": "balanced", "limit_massive_tokens": False},
    "balanced none": {"preset": "balanced", "scale_search": "none"},
    "balanced, unsigned scales": {"preset": "balanced", "signed_scales": False},
    "balanced, group-aware order": {"preset": "balanced", "static_groups": False},
    "balanced, mean damping 0.05": {"preset": "balanced", "damp_mode": "mean"},
    "balanced, damping 0.02": {"preset": "balanced", "damp_percent": 0.02},
    "balanced, damping 0.1": {"preset": "balanced", "damp_percent": 0.1},
    "balanced, damping 0.2": {"preset": "balanced", "damp_percent": 0.2},
    "balanced, damping 0.5": {"preset": "balanced", "damp_percent": 0.5},
    "balanced, damping 1": {"preset": "balanced", "damp_percent": 1.0},
    "balanced, refine 0": {"preset": "balanced", "refine_sweeps": 0},
    "balanced, refine 2": {"preset": "balanced", "refine_sweeps": 2},
    "balanced, refine 8": {"preset": "balanced", "refine_sweeps": 8},
    "best 0.25": {"preset": "best", "asymmetric_calibration": 0.25},
    "best 0.5": {"preset": "best", "asymmetric_calibration": 0.5},
    "best 0.75": {"preset": "best", "asymmetric_calibration": 0.75},
    "best 1": {"preset": "best", "asymmetric_calibration": 1.0},
    "best, damping 0.1": {"preset": "best", "damp_percent": 0.1},
    "best, damping 0.2": {"preset": "best", "damp_percent": 0.2},
    "best, damping 0.5": {"preset": "best", "damp_percent": 0.5},
    "best none": {"preset": "best", "scale_search": "none"},
    "balanced asym": {"preset": "balanced", "sym": False},
}


@dataclass(frozen=True)
class Text:
    """Windows of a held-out text [windows, seqlen], and the original after its blocks on them."""

    name: str
    batches: list[Tensor]
    original: Forward


def read_texts(arguments: argparse.Namespace) -> list[Text]:
    """Return the evaluation texts; the original runs on each of them once."""
    texts = []
    for file, most in zip(arguments.evaluation, arguments.windows, strict=True):
        batches = windows_of(arguments.model, file, arguments.seqlen, most)
        original = forward(arguments.model, batches, arguments.dtype)
        texts.append(Text(name_of(file), batches, original))
    return texts


def plans(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what identifies each row: bits, group size, windows, and the setting's options."""
    numbers = product(arguments.bits, arguments.group_size, arguments.nsamples)
    found = []
    for (bits, group_size, nsamples), name in product(numbers, arguments.settings):
        plan = {"bits": bits, "group_size": group_size, "nsamples": nsamples}
        found.append(plan | {"setting": name, "options": SETTINGS[name]})
    return found


def measure(
    arguments: argparse.Namespace, plan: dict[str, Any], texts: list[Text]
) -> dict[str, Any]:
    """Quantize as `plan` says, and compare the output with the original on each text."""
    with tempfile.TemporaryDirectory() as folder:
        output = (arguments.keep or Path(folder)) / folder_name(plan, arguments.seqlen)
        started = time.process_time()
        done = quantize(arguments, plan, output)
        seconds: float | None = time.process_time() - started
        if done.already_done or done.resumed_blocks:
            seconds = None
        on_texts = {}
        for text in texts:
            ran = forward(output, text.batches, arguments.dtype)
            on_texts[text.name] = asdict(compare(text.original, ran, text.batches))
    errors = [layer.relative_error for layer in done.layers]
    strengths = []
    for layer in done.layers:
        if layer.asymmetric_calibration is not None:
            strengths.append(layer.asymmetric_calibration)
    row = plan | {
        "texts": on_texts,
        "layer_error": sum(errors) / len(errors),
        "strengths": strengths,
        "processor_seconds": seconds,
        "bits_per_weight": done.bits_per_weight,
    }
    print(json.dumps(row), flush=True)
    return row


def quantize(arguments: argparse.Namespace, plan: dict[str, Any], output: Path) -> QuantizeResult:
    config = QuantizeConfig(
        bits=plan["bits"],
        group_size=plan["group_size"],
        dataset=str(arguments.calibration),
        nsamples=plan["nsamples"],
        seqlen=arguments.seqlen,
        device="cpu",
        dtype=arguments.dtype,
        **plan["options"],
    )
    solver = only_rounding() if plan["setting"] == "rtn" else nullcontext()
    with solver:
        return quantize_checkpoint(str(arguments.model), output, config)


def folder_name(plan: dict[str, Any], seqlen: int) -> str:
    """Return the name of an output's folder, such as best-0.5-3bit-g64-32x512."""
    setting = plan["setting"].replace(", ", "-").replace(" ", "-")
    windows = f"{plan['nsamples']}x{seqlen}"
    return f"{setting}-{plan['bits']}bit-g{plan['group_size']}-{windows}"


def only_rounding() -> AbstractContextManager[object]:
    """Return a context in which runs round every layer to nearest and solve none."""

    def solve_together(
        weights: list[Tensor], hessian: Tensor, _: object, config: Any
    ) -> list[Solution]:
        hessians = hessian.flatten(0, -3)  # [experts, I, I]
        weights_of_an_expert = len(weights) // len(hessians)
        solutions = []
        for number, weight in enumerate(weights):
            nearest = round_to_nearest(weight, config)
            of_expert = hessians[number // weights_of_an_expert]
            energy, error = output_energies(weight, of_expert, [nearest]).tolist()
            solutions.append(Solution(nearest, energy, error, error, len(weight), 0, 0))
        return solutions

    return patch("gptq_cli.quantization.layers.solve_together", solve_together)


def print_tables(rows: list[dict[str, Any]], seqlen: int, reference: str) -> None:
    """Print a table in Markdown for each group size and number of calibration windows."""
    tables: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault((row["group_size"], row["nsamples"]), []).append(row)
    for (group_size, nsamples), members in tables.items():
        print(f"\ngroup size {group_size}, {nsamples} windows of {seqlen} tokens")
        for name, quality in members[0]["texts"].items():
            print(f"original perplexity on {name}: {quality['original_perplexity']:.2f}")
        print("\n" + "\n".join(table(members, reference)))


def table(rows: list[dict[str, Any]], reference: str) -> list[str]:
    """Return the lines of a table: a row for each setting, columns for bits and texts."""
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    texts = list(rows[0]["texts"])
    cells = {(row["setting"], row["bits"]): row for row in rows}
    heads = [f"{bits} bits, {text}" for bits, text in product(widths, texts)]
    heads += [f"processor s, {bits} bits" for bits in widths]
    lines = [f"| setting | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in dict.fromkeys(row["setting"] for row in rows):
        found = []
        for bits, text in product(widths, texts):
            compared = cells.get((reference, bits))
            found.append(quality_cell(cells.get((name, bits)), compared, text))
        found += [seconds_cell(cells.get((name, bits))) for bits in widths]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return lines


def quality_cell(row: dict[str, Any] | None, reference: dict[str, Any] | None, text: str) -> str:
    """Return KL times 1000, its ratio to the reference if that was run, top-1, perplexity."""
    if row is None:
        return ""
    quality = row["texts"][text]
    ratio = ""
    if reference is not None:
        ratio = f" ({quality['kl'] / reference['texts'][text]['kl']:.2f})"
    distance = f"{1000 * quality['kl']:.1f}{ratio}, {100 * quality['top1']:.1f}"
    return f"{distance}, {quality['perplexity']:.2f}"


def seconds_cell(row: dict[str, Any] | None) -> str:
    """Return the processor seconds, or nothing if the quantization was not run in one piece."""
    if row is None or row["processor_seconds"] is None:
        return ""
    return f"{row['processor_seconds']:.1f}"


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the inputs and versions that all rows of a file share."""
    return {
        "model": arguments.model.name,
        "seqlen": arguments.seqlen,
        "dtype": arguments.dtype,
        "calibration": name_of(arguments.calibration),
        "evaluation": [name_of(file) for file in arguments.evaluation],
        "windows": arguments.windows,
        "python": platform.python_version(),
        "gptq_cli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def rows_before(file: Path | None, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that `file` has already; exit if they were measured in another way."""
    if file is None or not file.exists():
        return []
    content = json.loads(file.read_text())
    for name, value in run.items():
        before = content["run"].get(name)
        if before != value:
            raise SystemExit(f"{file} has rows with {name} {before}, not {value}: use another file")
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def is_measured(plan: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    return any(plan.items() <= row.items() for row in rows)


def windows_for_each(arguments: argparse.Namespace) -> list[int | None]:
    """Return the number of windows for each evaluation text, None for all of them."""
    given = arguments.windows or [None]
    if len(given) == 1:
        given = given * len(arguments.evaluation)
    if len(given) != len(arguments.evaluation):
        raise SystemExit("--windows must be one number, or one for each text of --evaluation")
    return list(given)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, nargs="+", help="of each text; default: all")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, nargs="+", default=[64, 128])
    names = list(SETTINGS)
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--reference", choices=names, default="gptq", metavar="NAME")
    parser.add_argument("--nsamples", type=int, nargs="+", default=[64])
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--dtype", default="auto", help="of the forwards; default: the model's own")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the outputs in this folder")
    arguments = parser.parse_args()
    arguments.windows = windows_for_each(arguments)
    run = conditions(arguments)
    rows = rows_before(arguments.json, run)
    left = [plan for plan in plans(arguments) if not is_measured(plan, rows)]
    texts = read_texts(arguments) if left else []
    for plan in left:
        rows.append(measure(arguments, plan, texts))
        write_json(arguments.json, {"run": run, "rows": rows})
    print_tables(rows, arguments.seqlen, arguments.reference)


if __name__ == "__main__":
    main()
