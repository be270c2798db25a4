"""The report of a run: its data, kept beside the weights, and the page that shows the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.model_files import read_json
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
    """A listener that passes events on and records time and memory of each block."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.blocks: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, BlockFinished):
            self.blocks.append(asdict(event))
        self._report(event)


def check_report() -> None:
    """Raise InputError E_REPORT if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError(
            "E_REPORT", "reports need matplotlib", hint="install it: pip install 'gptq_cli[report]'"
        )


def save_report(output: Path, result: Mapping[str, Any], log: BlockLog, command: str) -> Path:
    """Write the data of a finished run and its page into `output`; return the path of the page."""
    data = {
        "report": VERSION,
        "version": __version__,
        "command": command,
        "name": resolved(output).name,
        **result,
        "blocks": log.blocks,
    }
    data.pop("output", None)  # the directory may be moved
    write_file(output / REPORT_DATA, json_bytes(data, indent=1))
    return write_page(output, output / REPORT_PAGE)


def write_page(
    directory: Path, page: Path, *, evaluation: Path | None = None, png: Path | None = None
) -> Path:
    """Write the page of the run that made `directory`, and its heat maps to `png`; return `page`.

    `evaluation` is a file with the result of `gptq eval-ppl --json`. Raises InputError E_REPORT if
    the data of the run or the evaluation is missing or wrong; ConfigError E_CFG_CONFLICT if both
    outputs are one file; ExistsError E_OUT_FOREIGN if one exists that gptq has not written.
    """
    check_report()
    run = {**read_run(directory), "evaluation": None}
    if evaluation is not None:
        run["evaluation"] = read_evaluation(evaluation)
    _check_targets(directory, page, png)
    from gptq_cli.publish.report_page import picture, render

    image = None
    try:
        text = render(run)
        if png is not None:
            image = picture(run)
    except Damaged as error:
        raise _damaged(directory / REPORT_DATA, error) from None
    write_file(page, text.encode())
    if png is not None and image is not None:
        write_file(png, image)
    return page


def _check_targets(directory: Path, page: Path, png: Path | None) -> None:
    """Refuse to replace files that gptq has not written."""
    if page != directory / REPORT_PAGE:
        check_file(page, PAGE_MARK)
    if png is None:
        return
    if page.absolute() == png.absolute():
        message = f"the page and the picture would both be written to `{page}`"
        raise ConfigError("E_CFG_CONFLICT", message, hint="choose another --png")
    check_file(png, PNG_MARK)


def read_run(directory: Path) -> dict[str, Any]:
    """Return the data of the run that made `directory`.

    Raises InputError E_REPORT if the data is missing or damaged.
    """
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
    """Return the result of `gptq eval-ppl --json` in `file`.

    Raises InputError E_REPORT if the file is missing or holds something else.
    """
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
