"""`gptq verify`: list the defects of a GPTQ checkpoint, from gptq or another tool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_cli.cli.console import Console, fitted, joined
from gptq_cli.cli.options import AsJson, Quiet, plain
from gptq_cli.cli.progress import Progress
from gptq_cli.errors import GateError, counted, size

if TYPE_CHECKING:
    from gptq_cli.checkpoint.defects import Defect
    from gptq_cli.checkpoint.verify import Verification

SHOWN = 5  # defects of one code in the human report


def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="GPTQ checkpoint", show_default=False)
    ],
    full: Annotated[
        bool,
        plain(
            "--full",
            help="read every byte: check that all numbers are finite, all hashes match and no "
            "parameter of the model is missing",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that a GPTQ checkpoint is sound and means the same to every engine.

    The checkpoint may come from gptq or another tool. The check compares
    the files with index and headers, and the configuration with the
    tensors. It examines the shapes, zero points, groups and scales of each
    quantized layer. With --full it also compares the tensors with all
    parameters that transformers would load, and tells if it cannot build
    the model. Exit code 4 if there is a defect.

    Example: gptq verify ./Qwen3-0.6B-GPTQ-Int4-g128 --full
    """
    console = Console(as_json, quiet)
    from gptq_cli.api import verify

    with Progress(console) as progress:
        found = verify(directory, full=full, on_event=progress)
    if found.ok:
        console.result(found.to_json(), fitted(f"{directory}: {_checked(found)}"), "ok")
        return
    count = len(found.defects)
    message = f"`{directory}` has {counted(count, 'defect')}"
    error = GateError("E_VERIFY", message, hint=_remedy(found.defects))
    console.refused(found.to_json(), joined(_lines(found.defects)), str(count), error)


def _remedy(defects: Sequence[Defect]) -> str:
    """Return the hint of the worst defect: the first that changes numbers, if there is one."""
    worst = min(defects, key=lambda defect: defect.effect != "numbers")
    return worst.hint or "download the checkpoint again, or quantize again; do not serve it"


def _checked(found: Verification) -> str:
    modules = f"{found.modules} weights in codes ({found.format})"
    if found.bits:
        bits = " and ".join(map(str, found.bits))
        modules = f"{found.modules} modules of {bits} bits ({found.format})"
    parts = f"{modules} in {found.tensors} tensors, {size(found.nbytes)}"
    read = "headers, groups, zero points and scales"
    if found.full:
        read = "every byte"
    elif not found.bits:
        read = "headers"
    if found.hashed:
        read += f", {found.hashed} hashes"
    if found.unchecked:
        read += f"; did not look for missing parameters: {found.unchecked}"
    return f"ok, {parts}; read {read}"


def _lines(defects: Sequence[Defect]) -> list[str]:
    """Return the first defects of each code, then the number of further ones."""
    seen: Counter[str] = Counter()
    lines = []
    for defect in defects:
        seen[defect.code] += 1
        if seen[defect.code] <= SHOWN:
            lines.append(str(defect))
    for code, count in seen.items():
        if count > SHOWN:
            lines.append(f"{code} {count - SHOWN} more, see --json")
    return lines
