"""The report of a run: what is kept of it beside the weights, and the page made from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.durable import json_bytes, write_file
from gptq_cli.checkpoint.manifest import REPORT_DATA, REPORT_PAGE
from gptq_cli.checkpoint.source import read_json
from gptq_cli.errors import InputError
from gptq_cli.files import is_file, resolved
from gptq_cli.pipeline.events import BlockFinished, Event, Report
from gptq_cli.version import __version__

VERSION = 1
MEASURED = ("perplexity", "windows", "seqlen")
COMPARED = ("baseline_perplexity", "kl", "top1_agreement")
UNSAID = ("dataset_config", "dataset_split", "dataset_revision", *COMPARED)  # null where there is none


class BlockLog:
    """Passes events on and keeps the time and memory of each block."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.blocks: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, BlockFinished):
            self.blocks.append(asdict(event))
        self._report(event)


def check_report() -> None:
    """InputError E_REPORT if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("E_REPORT", "reports need matplotlib", hint="install it: pip install 'gptq_cli[report]'")


def save_report(output: Path, result: Mapping[str, Any], log: BlockLog, command: str) -> Path:
    """Keep the data of a finished run in its output, and the page made of it, whose path is returned."""
    data = {"report": VERSION, "version": __version__, "command": command, "name": resolved(output).name}
    data |= {key: value for key, value in result.items() if key != "output"} | {"blocks": log.blocks}
    write_file(output / REPORT_DATA, json_bytes(data, indent=1))
    return write_page(output, output / REPORT_PAGE)


def write_page(directory: Path, page: Path, *, evaluation: Path | None = None, png: Path | None = None) -> Path:
    """The page of the run that made `directory`, with the result of `gptq eval-ppl --json` if a file of it is given.

    InputError E_REPORT if there is no data of a run, or it or the evaluation is of another kind.
    """
    check_report()
    file = directory / REPORT_DATA
    if not is_file(file):
        hint = "quantize with --report"
        raise InputError("E_REPORT", f"`{directory}` holds no {REPORT_DATA}", hint=hint)
    run = read_json(file)
    if not isinstance(run, dict) or run.get("report") != VERSION:
        raise InputError(
            "E_REPORT", f"`{file}` is not the data of a report of version {VERSION}", hint="quantize again"
        )
    run["evaluation"] = read_evaluation(evaluation) if evaluation else None
    from gptq_cli.report.page import picture, render

    write_file(page, render(run).encode("utf-8", "backslashreplace"))  # names need not be UTF-8
    if png is not None:
        write_file(png, picture(run))
    return page


def read_evaluation(file: Path) -> dict[str, Any]:
    """What `gptq eval-ppl --json` has written into `file`; InputError E_REPORT if it is something else."""
    if not is_file(file):
        hint = "write one: gptq eval-ppl MODEL --json > FILE"
        raise InputError("E_REPORT", f"there is no file `{file}`", hint=hint)
    content = read_json(file)
    found: dict[str, Any] = dict.fromkeys(UNSAID) | (content if isinstance(content, dict) else {})
    numbers = MEASURED if found["baseline_perplexity"] is None else MEASURED + COMPARED
    numeric = all(isinstance(found.get(key), int | float) for key in numbers)
    if not numeric or not all(isinstance(found.get(key), str) for key in ("dataset", "dtype")):
        hint = "write one: gptq eval-ppl MODEL --json > FILE"
        raise InputError("E_REPORT", f"`{file}` is not the result of an evaluation", hint=hint)
    return found
