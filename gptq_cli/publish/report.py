"""The page about a run, made from the data that the run has left beside the weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.model_files import read_json
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.files import UNREADABLE, is_file
from gptq_cli.publish.report_data import Damaged, checked_choice, checked_evaluation, checked_run
from gptq_cli.storage.durable import write_file
from gptq_cli.storage.manifest import (
    ALLOCATION,
    REPORT_DATA,
    REPORT_PAGE,
    REPORT_VERSION,
    read_sealed,
)
from gptq_cli.storage.replacing import check_file

AGAIN = "quantize again, with --overwrite"
MEASURE = "write one: gptq eval-ppl MODEL --json > FILE"
PAGE_MARK = b'<meta name="generator" content="gptq_cli">'
PNG_MARK = b"Software\0gptq_cli"


def check_report() -> None:
    """Raise InputError E_REPORT if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError(
            "E_REPORT", "reports need matplotlib", hint="install it: pip install matplotlib"
        )


def write_page(
    directory: Path, page: Path, *, evaluation: Path | None = None, png: Path | None = None
) -> Path:
    """Write the page of the run that made `directory`, and its heat maps to `png`; return `page`.

    `evaluation` is a file with the result of `gptq eval-ppl --json`; without one the page has the
    evaluation of the run, if it was made with --eval. Raises InputError E_REPORT if
    the data of the run or the evaluation is missing or wrong; ConfigError E_CFG_CONFLICT if both
    outputs are one file; ExistsError E_OUT_FOREIGN if one exists that gptq has not written.
    """
    check_report()
    run = read_run(directory)
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
    """Return the data of the run that made `directory`, with the frontier that it chose from.

    Raises InputError E_REPORT if the data is missing or damaged.
    """
    file = directory / REPORT_DATA
    if not is_file(file):
        hint = f"gptq quantize writes it: {AGAIN}"
        raise InputError("E_REPORT", f"`{directory}` holds no {REPORT_DATA}", hint=hint)
    content = _json(file, AGAIN)
    if not isinstance(content, dict) or content.get("report") != REPORT_VERSION:
        message = f"`{file}` is not the data of a report of version {REPORT_VERSION}"
        raise InputError("E_REPORT", message, hint=AGAIN)
    try:
        run = checked_run(content)
    except Damaged as error:
        raise _damaged(file, error) from None
    return {**run, "choice": _choice(directory / ALLOCATION)}


def _choice(file: Path) -> dict[str, Any] | None:
    """Return the choice of widths that `file` holds; None if the run had no goal."""
    if not is_file(file):
        return None
    content = read_sealed(file)
    if content is None:
        raise _damaged(file, Damaged("its checksum is wrong"))
    if "choice" not in content:
        return None
    try:
        return checked_choice(content["choice"])
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
