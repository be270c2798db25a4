"""`gptq dequantize`: a GPTQ checkpoint as plain weights again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel
from gptq_cli.config.resolve import check_flags
from gptq_cli.config.units import size

DTYPE = "auto|bfloat16|float16|float32"


def dequantize(
    model: o.Model,
    output: Annotated[Path, o.plain("--output", "-o", help="directory to write", metavar="DIR", panel=Panel.OUTPUT)],
    dtype: Annotated[
        str,
        o.plain(
            "--dtype",
            help="of all floats; default auto: as config.json says, and what is not quantized is copied",
            metavar=DTYPE,
            panel=Panel.OUTPUT,
        ),
    ] = "auto",
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn a GPTQ checkpoint back into plain weights.

    They are those that the quantized model computes with, not the
    original's: what rounding has changed stays changed. One linear is in
    memory at a time.

    Example: gptq dequantize ./out -o ./out-bf16 --dtype bfloat16
    """
    check_flags({"dtype": dtype})
    console = Console(as_json, quiet)
    from gptq_cli.pipeline.rewrite import dequantize_checkpoint

    with Progress(console) as progress:
        found = dequantize_checkpoint(model, output, dtype, overwrite=overwrite, report=progress)
    sizes = f"{size(found.bytes_before)} -> {size(found.bytes_after)}"
    console.result(found.to_json(), f"{output}\n{found.layers} layers dequantized, {sizes}", output)
