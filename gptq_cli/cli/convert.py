"""`gptq convert`: a GPTQ checkpoint in the other version of its format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from gptq_cli.checkpoint.stored import FORMATS
from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, on_one_line
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel
from gptq_cli.config.finding import shown
from gptq_cli.errors import ConfigError

SHOWN = 5  # corrected defects in the human report


def convert(
    model: o.Model,
    to: Annotated[str, o.plain("--to", help="format to write", metavar="|".join(FORMATS), panel=Panel.OUTPUT)],
    output: Annotated[Path, o.plain("--output", "-o", help="directory to write", metavar="DIR", panel=Panel.OUTPUT)],
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Convert a GPTQ checkpoint between the formats gptq and gptq_v2.

    The formats differ in how they store zero points; codes, scales and
    all that is not quantized are copied byte for byte. What only some
    readers take (settings in quantize_config.json alone, a missing g_idx,
    a name of the file) is written as all take it, also with --to the
    format that the checkpoint has.

    Example: gptq convert ./out --to gptq_v2 -o ./out-v2
    """
    if to not in FORMATS:
        raise ConfigError("E_CFG_RANGE", f"--to must be {' or '.join(FORMATS)}, got {shown(to)}")
    console = Console(as_json, quiet)
    from gptq_cli.pipeline.rewrite import convert_checkpoint

    with Progress(console) as progress:
        found = convert_checkpoint(model, output, to, overwrite=overwrite, report=progress)
    done = f"{found.layers} layers are now in format {to}"
    lines = [str(output), f"{done}, corrected:" if found.corrected else f"{done}, nothing else has changed"]
    lines += [on_one_line(f"  {defect}") for defect in found.corrected[:SHOWN]]
    if len(found.corrected) > SHOWN:
        lines.append(f"  {len(found.corrected) - SHOWN} more, see --json")
    corrected = [asdict(defect) for defect in found.corrected]
    data = {**found.to_json(), "format": to, "corrected": corrected}
    console.result(data, "\n".join(lines), output)
