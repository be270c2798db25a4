#!/usr/bin/env python3
"""Quality by setting: quantizes a model in several ways and measures each against the original on held-out text.

    python scripts/bench_quality.py MODEL --calibration FILE --evaluation FILE
        [--bits 4 3 2] [--group-size 64 128] [--settings gptq balanced ...] [--json FILE]

KL is the mean over tokens of KL(original || quantized) in nats; `ratio` is KL over that of preset gptq at the same bits
and group size, the published algorithm.
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
    "balanced none": {"preset": "balanced", "scale_search": "none"},
    "best 0.5": {"preset": "best", "asymmetric_calibration": 0.5},
    "best": {"preset": "best"},
    "best 1": {"preset": "best", "asymmetric_calibration": 1.0},
    "best none": {"preset": "best", "scale_search": "none"},
    "balanced asym": {"preset": "balanced", "sym": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME"
    )
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = [
        measure(arguments, name, bits, group_size)
        for bits in arguments.bits
        for group_size in arguments.group_size
        for name in arguments.settings
    ]
    for row in rows:
        print_row(row, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(described(arguments, rows), indent=1) + "\n")


def measure(arguments: argparse.Namespace, name: str, bits: int, group_size: int) -> dict[str, Any]:
    """Quantize and evaluate once."""
    config = QuantizeConfig(
        bits=bits, group_size=group_size, dataset=str(arguments.calibration), nsamples=arguments.nsamples,
        seqlen=arguments.seqlen, device="cpu", dtype="float32", **SETTINGS[name],
    )  # fmt: skip
    request = EvalRequest(
        dataset=str(arguments.evaluation), seqlen=arguments.seqlen, batch_size=16, device="cpu", dtype="float32",
        baseline=str(arguments.model),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized"
        with only_rounding() if name == "rtn" else nullcontext():
            done = quantize_checkpoint(str(arguments.model), output, config)
        found = evaluate_perplexity(str(output), request)
    errors = [layer.relative_error for layer in done.layers]
    row = {
        "bits": bits,
        "group_size": group_size,
        "setting": name,
        "kl": found.kl,
        "top1": found.top1_agreement,
    }
    row |= {"perplexity": found.perplexity, "original_perplexity": found.baseline_perplexity}
    row |= {
        "layer_error": sum(errors) / len(errors),
        "seconds": done.seconds,
        "bits_per_weight": done.bits_per_weight,
    }
    print(json.dumps(row), flush=True)
    return row


def only_rounding() -> AbstractContextManager[object]:
    """Runs in this context round every layer to nearest where they would solve it."""

    def solve(weight: Any, hessian: Any, prepared: Any, config: Any) -> Solution:
        nearest = round_to_nearest(weight, config, prepared.order.group_of_column)
        energy, error = output_energies(weight, hessian, [nearest])
        return Solution(nearest, energy, error, error)

    def solve_together(weights: Any, *others: Any) -> list[Solution]:
        return [solve(weight, *others) for weight in weights]

    return patch("gptq_cli.quantization.layers.solve_together", solve_together)


def print_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A line of a table in Markdown."""
    same = [
        other
        for other in rows
        if (other["bits"], other["group_size"]) == (row["bits"], row["group_size"])
    ]
    if row is same[0]:
        print(
            f"\n{row['bits']} bits, group {row['group_size']}; original perplexity {row['original_perplexity']:.3f}\n"
        )
        print(
            "| setting | KL x 1000 | ratio | top-1 | perplexity | layer error | s |\n|---|---|---|---|---|---|---|"
        )
    published = next((other["kl"] for other in same if other["setting"] == "gptq"), float("nan"))
    figures = f"{1000 * row['kl']:.2f} | {row['kl'] / published:.3f} | {row['top1']:.2%} | {row['perplexity']:.3f}"
    print(f"| {row['setting']} | {figures} | {row['layer_error']:.2e} | {row['seconds']:.1f} |")


def described(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with what they were measured with."""
    versions = {
        "gptq_cli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    run = {
        "model": arguments.model.name,
        "nsamples": arguments.nsamples,
        "seqlen": arguments.seqlen,
    }
    run |= {"calibration": arguments.calibration.name, "evaluation": arguments.evaluation.name}
    settings = {name: SETTINGS[name] for name in arguments.settings}
    return {
        "run": run | {"python": platform.python_version(), **versions},
        "settings": settings,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
