#!/usr/bin/env python3
"""Quantizes the embedded demo model to 4 bits, evaluates both, and prints what changed.

python scripts/demo.py [--bits 4] [--output demo-output/demo-GPTQ-Int4-g128]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or Path("demo-output") / f"demo-GPTQ-Int{arguments.bits}-g128"
    output.parent.mkdir(parents=True, exist_ok=True)

    from rich.console import Console
    from rich.table import Table

    from gptq_cli import EvalRequest, QuantizeConfig, evaluate_perplexity, quantize

    model = DEMO / "model"
    config = QuantizeConfig(
        bits=arguments.bits, dataset=str(DEMO / "calibration.txt"), nsamples=64, seqlen=512
    )
    print(
        f"quantizing {model.relative_to(Path.cwd()) if model.is_relative_to(Path.cwd()) else model}",
        file=sys.stderr,
    )
    done = quantize(model, config, output, overwrite=True)
    print("evaluating both", file=sys.stderr)
    request = EvalRequest(
        dataset=str(DEMO / "heldout.txt"), seqlen=512, batch_size=8, baseline=str(model)
    )
    measured = evaluate_perplexity(output, request)

    table = Table("", "original", f"{arguments.bits} bits", title="The demo model before and after")
    table.add_row(
        "weights", f"{done.bytes_before / 1e6:.2f} MB", f"{done.bytes_after / 1e6:.2f} MB"
    )
    table.add_row("perplexity", f"{measured.baseline_perplexity:.4f}", f"{measured.perplexity:.4f}")
    table.add_row("KL to the original", "", f"{measured.kl:.5f} nats per token")
    table.add_row(
        "same first choice",
        "",
        f"{measured.top1_agreement:.2%} of {measured.windows * (measured.seqlen - 1)}",
    )
    table.add_row("time to quantize", "", f"{done.seconds:.1f} s")
    Console().print(table)
    print(f"The checkpoint is in {output}")


if __name__ == "__main__":
    main()
