#!/usr/bin/env python3
"""Quantize the demo model, evaluate it beside the original, and print what changed.

    python scripts/demo.py [--bits 4] [--output demo-output/demo-GPTQ-Int4-g128]

Prints a table of size, perplexity, KL and time, and the path of the checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import DEMO, argument_parser


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bits = arguments.bits
    output = arguments.output or Path("demo-output") / f"demo-GPTQ-Int{bits}-g128"
    output.parent.mkdir(parents=True, exist_ok=True)

    from rich.console import Console
    from rich.table import Table

    from gptq_cli import EvalRequest, QuantizeConfig, evaluate_perplexity, quantize

    model = DEMO / "model"
    text = str(DEMO / "calibration.txt")
    print("quantizing scripts/demo/model", file=sys.stderr)
    config = QuantizeConfig(bits=bits, dataset=text, nsamples=64, seqlen=512)
    done = quantize(model, config, output, overwrite=True)
    print("evaluating both", file=sys.stderr)
    heldout = str(DEMO / "heldout.txt")
    request = EvalRequest(dataset=heldout, seqlen=512, batch_size=8, baseline=str(model))
    measured = evaluate_perplexity(output, request)

    table = Table("", "original", f"{bits} bits", title="The demo model before and after")
    before, after = f"{done.bytes_before / 1e6:.2f} MB", f"{done.bytes_after / 1e6:.2f} MB"
    table.add_row("weights", before, after)
    table.add_row("perplexity", f"{measured.baseline_perplexity:.4f}", f"{measured.perplexity:.4f}")
    table.add_row("KL to the original", "", f"{measured.kl:.5f} nats per token")
    predictions = measured.windows * (measured.seqlen - 1)
    table.add_row("same first choice", "", f"{measured.top1_agreement:.2%} of {predictions}")
    table.add_row("time to quantize", "", f"{done.seconds:.1f} s")
    Console().print(table)
    print(f"The checkpoint is in {output}")


if __name__ == "__main__":
    main()
