"""`gptq convert` and `gptq dequantize`: write a quantized checkpoint in another format, or as plain
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, on_one_line
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel
from gptq_cli.config.layer import FORMATS
from gptq_cli.errors import size

SHOWN = 5  # corrected defects in the human report

DTYPE = "auto|bfloat16|float16|float32"


def convert(
    model: o.Model,
    to: Annotated[
        str, o.plain("--to", help="format to write", metavar="|".join(FORMATS), panel=Panel.OUTPUT)
    ],
    output: Annotated[
        Path,
        o.plain("--output", "-o", help="directory to write", metavar="DIR", panel=Panel.OUTPUT),
    ],
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a quantized checkpoint in another format, without a loss.

    Codes and scales stay as they are, so the decoded weights keep every
    bit; unquantized tensors are copied. If only some engines read a part
    (settings in quantize_config.json alone, a missing g_idx, another file
    name), it is corrected for all of them, even if --to is the format of
    the checkpoint. Layers that the format cannot store are refused.

    Example: gptq convert ./out --to compressed-tensors -o ./out-ct
    """
    console = Console(as_json, quiet)
    from gptq_cli.api import convert

    with Progress(console) as progress:
        found = convert(model, to, output, overwrite=overwrite, on_event=progress)
    done = f"{found.layers} layers are now in format {to}"
    if found.corrected:
        lines = [str(output), f"{done}, corrected:"]
    else:
        lines = [str(output), f"{done}, nothing else has changed"]
    lines += [on_one_line(f"  {defect}") for defect in found.corrected[:SHOWN]]
    if len(found.corrected) > SHOWN:
        lines.append(f"  {len(found.corrected) - SHOWN} more, see --json")
    data = {**found.to_json(), "format": to, "corrected": found.corrected}
    console.result(data, "\n".join(lines), output)


def dequantize(
    model: o.Model,
    output: Annotated[
        Path,
        o.plain("--output", "-o", help="directory to write", metavar="DIR", panel=Panel.OUTPUT),
    ],
    dtype: Annotated[
        str,
        o.plain(
            "--dtype",
            help="dtype of the written weights; auto = the dtype in config.json, with all other "
            "tensors copied unchanged; default auto",
            metavar=DTYPE,
            panel=Panel.OUTPUT,
        ),
    ] = "auto",
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn a quantized checkpoint back into plain weights.

    The weights are those that the quantized model computes with, not those
    of the original: rounding is not undone. Only one linear layer is in
    memory at a time.

    Example: gptq dequantize ./out -o ./out-bf16 --dtype bfloat16
    """
    console = Console(as_json, quiet)
    from gptq_cli.api import dequantize

    with Progress(console) as progress:
        found = dequantize(model, output, dtype, overwrite=overwrite, on_event=progress)
    sizes = f"{size(found.bytes_before)} -> {size(found.bytes_after)}"
    console.result(found.to_json(), f"{output}\n{found.layers} layers dequantized, {sizes}", output)
