"""`gptq report`: write an HTML report about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.errors import size


def report(
    directory: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="output of gptq quantize", show_default=False),
    ],
    output: Annotated[
        Path | None,
        o.plain(
            "--output", "-o", help="file to write; default gptq_report.html in OUT", metavar="FILE"
        ),
    ] = None,
    png: Annotated[
        Path | None, o.plain("--png", help="write the heat map to this file too", metavar="FILE")
    ] = None,
    evaluation: Annotated[
        Path | None,
        o.plain("--evaluation", help="result of gptq eval-ppl --json to show", metavar="FILE"),
    ] = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write an HTML report about a run: errors, time, memory, the command.

    The report is one HTML file without scripts and without other files.
    It is made from the gptq_report.json that quantize writes into OUT.

    Example: gptq report ./out --evaluation ppl.json
    """
    from gptq_cli.publish.report import write_page
    from gptq_cli.storage.manifest import REPORT_PAGE

    page = write_page(directory, output or directory / REPORT_PAGE, evaluation=evaluation, png=png)
    n_bytes = page.stat().st_size
    text = f"{page}\n{size(n_bytes)}, open it in a browser"
    Console(as_json, quiet).result({"output": page, "bytes": n_bytes}, text, page)
