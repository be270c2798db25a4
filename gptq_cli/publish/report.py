"""The report of a run: what is kept of it beside the weights, and the page made from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.source import read_json
from gptq_cli.errors import ConfigError, InputError, __version__
from gptq_cli.events import BlockFinished, Event, Report
from gptq_cli.files import UNREADABLE, is_file, resolved
from gptq_cli.publish.report_data import Damaged, checked_evaluation, checked_run
from gptq_cli.storage.durable import json_bytes, write_file
from gptq_cli.storage.manifest import REPORT_DATA, REPORT_PAGE
from gptq_cli.storage.replacing import check_file

VERSION = 1
AGAIN = "quantize again with --report"
MEASURE = "write one: gptq eval-ppl MODEL --json > FILE"
PAGE_MARK = b'<meta name="generator" content="gptq_cli">'
PNG_MARK = b"Software\0gptq_cli"


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
        raise InputError(
            "E_REPORT", "reports need matplotlib", hint="install it: pip install 'gptq_cli[report]'"
        )


def save_report(output: Path, result: Mapping[str, Any], log: BlockLog, command: str) -> Path:
    """Keep the data of a finished run in its output, and the page made of it, whose path is returned."""
    data = {
        "report": VERSION,
        "version": __version__,
        "command": command,
        "name": resolved(output).name,
    }
    data |= {key: value for key, value in result.items() if key != "output"} | {
        "blocks": log.blocks
    }
    write_file(output / REPORT_DATA, json_bytes(data, indent=1))
    return write_page(output, output / REPORT_PAGE)


def write_page(
    directory: Path, page: Path, *, evaluation: Path | None = None, png: Path | None = None
) -> Path:
    """The page of the run that made `directory`, with the result of `gptq eval-ppl --json` if a file of it is given.

    InputError E_REPORT if there is no data of a run, or it or the evaluation is of another kind; ExistsError
    E_OUT_FOREIGN if a file is in the way that is no page or picture of gptq.
    """
    check_report()
    run = read_run(directory) | {"evaluation": read_evaluation(evaluation) if evaluation else None}
    if page != directory / REPORT_PAGE:
        check_file(page, PAGE_MARK)
    if png is not None:
        if page.absolute() == png.absolute():
            message = f"the page and the picture are both to be `{page}`"
            raise ConfigError("E_CFG_CONFLICT", message, hint="choose another --png")
        check_file(png, PNG_MARK)
    from gptq_cli.publish.report_page import picture, render

    try:
        text, image = render(run), picture(run) if png else None
    except Damaged as error:
        raise _damaged(directory / REPORT_DATA, error) from None
    write_file(page, text.encode())
    if png is not None and image is not None:
        write_file(png, image)
    return page


def read_run(directory: Path) -> dict[str, Any]:
    """What a run has left of itself in `directory`; InputError E_REPORT if that is nothing, or damaged."""
    file = directory / REPORT_DATA
    if not is_file(file):
        raise InputError(
            "E_REPORT", f"`{directory}` holds no {REPORT_DATA}", hint="quantize with --report"
        )
    content = _json(file, AGAIN)
    if not isinstance(content, dict) or content.get("report") != VERSION:
        raise InputError(
            "E_REPORT", f"`{file}` is not the data of a report of version {VERSION}", hint=AGAIN
        )
    try:
        return checked_run(content)
    except Damaged as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Damaged) -> InputError:
    return InputError("E_REPORT", f"`{file}` is damaged: {error}", hint=AGAIN)


def read_evaluation(file: Path) -> dict[str, Any]:
    """What `gptq eval-ppl --json` has written into `file`; InputError E_REPORT if it is something else."""
    if not is_file(file):
        raise InputError("E_REPORT", f"there is no file `{file}`", hint=MEASURE)
    try:
        return checked_evaluation(_json(file, MEASURE))
    except Damaged as error:
        raise InputError(
            "E_REPORT", f"`{file}` is not the result of an evaluation: {error}", hint=MEASURE
        ) from None


def _json(file: Path, hint: str) -> Any:
    try:
        return read_json(file)
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        raise InputError("E_REPORT", str(error), hint=hint) from None
