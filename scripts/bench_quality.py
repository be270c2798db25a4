#!/usr/bin/env python3
"""Measure the quality of settings: quantize a model with each, compare it with the original.

    python scripts/bench_quality.py MODEL --calibration FILE --evaluation FILE
        [--bits 4 3 2] [--group-size 64 128] [--settings gptq balanced ...] [--windows N]
        [--json FILE]

Prints one JSON object for each run, then tables in Markdown. KL is the mean over held-out tokens of
KL(original || quantized) in nats; `ratio` is KL over that of preset gptq, the published algorithm,
at the same bits and group size. `scripts/real_model.py` makes a real language model; two windows of
text say little about it, a few dozen are enough.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from common import benchmark_parser, write_json

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import __version__
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.solver.quantized_linear import output_energies, round_to_nearest
from gptq_cli.solver.solve import Solution

SIGNED = {"static_groups": True, "signed_scales": True}
DIAGONAL = {"damp_mode": "diagonal", "damp_percent": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"preset": "gptq"},
    "act-order": {"preset": "act-order"},
    "act-order asym": {"preset": "act-order", "sym": False},
    "signed": SIGNED,
    "signed mse": SIGNED | {"scale_search": "mse"},
    "signed refine 2": SIGNED | {"refine_sweeps": 2},
    "signed diagonal": SIGNED | DIAGONAL,
    "signed diagonal mse": SIGNED | DIAGONAL | {"scale_search": "mse"},
    "signed diagonal refine 2": SIGNED | DIAGONAL | {"refine_sweeps": 2},
    "signed diagonal mse refine 2": SIGNED | DIAGONAL | {"scale_search": "mse", "refine_sweeps": 2},
    "signed diagonal mse refine 4": SIGNED | DIAGONAL | {"scale_search": "mse", "refine_sweeps": 4},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "balanced, massive tokens in full": {"preset": "balanced", "limit_massive_tokens": False},
    "balanced none": {"preset": "balanced", "scale_search": "none"},
    "best 0.25": {"preset": "best", "asymmetric_calibration": 0.25},
    "best 0.5": {"preset": "best", "asymmetric_calibration": 0.5},
    "best 0.75": {"preset": "best", "asymmetric_calibration": 0.75},
    "best": {"preset": "best"},
    "best 1": {"preset": "best", "asymmetric_calibration": 1.0},
    "best none": {"preset": "best", "scale_search": "none"},
    "balanced asym": {"preset": "balanced", "sym": False},
}


def measure(arguments: argparse.Namespace, name: str, bits: int, group_size: int) -> dict[str, Any]:
    """Quantize and evaluate once with the setting `name`."""
    config = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        dataset=str(arguments.calibration),
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
        device="cpu",
        dtype="float32",
        **SETTINGS[name],
    )
    request = EvalRequest(
        dataset=str(arguments.evaluation),
        seqlen=arguments.seqlen,
        batch_size=16,
        max_windows=arguments.windows,
        device="cpu",
        dtype="float32",
        baseline=str(arguments.model),
    )
    solver = only_rounding() if name == "rtn" else nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized"
        with solver:
            done = quantize_checkpoint(str(arguments.model), output, config)
        found = evaluate_perplexity(str(output), request)
    errors = [layer.relative_error for layer in done.layers]
    strengths = []
    for layer in done.layers:
        if layer.asymmetric_calibration is not None:
            strengths.append(layer.asymmetric_calibration)
    row = {
        "bits": bits,
        "group_size": group_size,
        "setting": name,
        "kl": found.kl,
        "top1": found.top1_agreement,
        "perplexity": found.perplexity,
        "original_perplexity": found.baseline_perplexity,
        "layer_error": sum(errors) / len(errors),
        "strengths": strengths,
        "seconds": done.seconds,
        "bits_per_weight": done.bits_per_weight,
    }
    print(json.dumps(row), flush=True)
    return row


def only_rounding() -> AbstractContextManager[object]:
    """Return a context in which runs round every layer to nearest and solve none."""

    def solve(weight: Any, hessian: Any, prepared: Any, config: Any) -> Solution:
        nearest = round_to_nearest(weight, config, prepared.order.group_of_column)
        energy, error = output_energies(weight, hessian, [nearest]).tolist()
        return Solution(nearest, energy, error, error, len(weight), 0, 0)

    def solve_together(weights: Any, *others: Any) -> list[Solution]:
        return [solve(weight, *others) for weight in weights]

    return patch("gptq_cli.quantization.layers.solve_together", solve_together)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one bit width and group size as Markdown."""
    first = rows[0]
    original = f"original perplexity {first['original_perplexity']:.3f}"
    print(f"\n{first['bits']} bits, group {first['group_size']}; {original}\n")
    print("| setting | KL x 1000 | ratio | top-1 | perplexity | layer error | s |")
    print("|---|---|---|---|---|---|---|")
    published = float("nan")
    for row in rows:
        if row["setting"] == "gptq":
            published = row["kl"]
    for row in rows:
        distance = f"{1000 * row['kl']:.2f} | {row['kl'] / published:.3f} | {row['top1']:.2%}"
        errors = f"{row['perplexity']:.3f} | {row['layer_error']:.2e}"
        print(f"| {row['setting']} | {distance} | {errors} | {row['seconds']:.1f} |")


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the inputs and versions of a run."""
    return {
        "model": arguments.model.name,
        "nsamples": arguments.nsamples,
        "seqlen": arguments.seqlen,
        "calibration": arguments.calibration.name,
        "evaluation": arguments.evaluation.name,
        "windows": arguments.windows,
        "python": platform.python_version(),
        "gptq_cli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    names = list(SETTINGS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, help="of the evaluation; default: all of the text")
    arguments = parser.parse_args()
    tables = []
    for bits in arguments.bits:
        for group_size in arguments.group_size:
            rows = [measure(arguments, name, bits, group_size) for name in arguments.settings]
            tables.append(rows)
    all_rows = []
    for rows in tables:
        print_table(rows)
        all_rows += rows
    settings = {name: SETTINGS[name] for name in arguments.settings}
    content = {"run": conditions(arguments), "settings": settings, "rows": all_rows}
    write_json(arguments.json, content)


if __name__ == "__main__":
    main()
