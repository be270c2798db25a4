"""`gptq verify`: what is wrong with a GPTQ checkpoint, ours or another tool's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_cli.cli.console import Console, fitted, joined
from gptq_cli.cli.options import AsJson, Quiet, plain
from gptq_cli.config.finding import size
from gptq_cli.errors import GateError

if TYPE_CHECKING:
    from gptq_cli.checkpoint.quantization_config import Defect
    from gptq_cli.checkpoint.verify import Verification

SHOWN = 5  # defects of one code in the human report


def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="GPTQ checkpoint", show_default=False)
    ],
    full: Annotated[
        bool, plain("--full", help="read every byte: all numbers finite, all hashes right")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check that a GPTQ checkpoint is whole and means the same to every reader.

    Ours or another tool's: files against index and headers, the configuration
    against what is stored, and of each quantized module the shapes, zero points,
    groups and scales. Exit code 4 if anything is wrong.

    Example: gptq verify ./Qwen3-0.6B-GPTQ-Int4-g128 --full
    """
    console = Console(as_json, quiet)
    from gptq_cli.checkpoint.locate import local_model
    from gptq_cli.checkpoint.verify import verify_checkpoint

    found = verify_checkpoint(local_model(directory), full=full)
    if found.ok:
        console.result(_data(found), fitted(f"{directory}: {_checked(found)}"), "ok")
        return
    count = len(found.defects)
    hint = _remedy(found.defects)
    message = f"`{directory}` has {count} defect{'s' if count > 1 else ''}"
    console.refused(
        _data(found),
        joined(_lines(found.defects)),
        str(count),
        GateError("E_VERIFY", message, hint=hint),
    )


def _data(found: Verification) -> dict[str, Any]:
    defects = [asdict(defect) for defect in found.defects]
    return {**{key: getattr(found, key) for key in found.__slots__}, "defects": defects}


def _remedy(defects: Sequence[Defect]) -> str:
    """What helps against the worst defect: one that changes numbers, if there is one."""
    worst = next((defect for defect in defects if defect.effect == "numbers"), defects[0])
    return worst.hint or "download the checkpoint again, or quantize again; do not serve it"


def _checked(found: Verification) -> str:
    bits = " and ".join(map(str, found.bits))
    read = "every byte" if found.full else "headers, groups, zero points and scales"
    hashes = f", {found.hashed} hashes" if found.hashed else ""
    parts = f"{found.modules} modules of {bits} bits ({found.format}) in {found.tensors} tensors, {size(found.nbytes)}"
    return f"ok, {parts}; read {read}{hashes}"


def _lines(defects: Sequence[Defect]) -> list[str]:
    """The first defects of each code, and how many more there are."""
    seen: Counter[str] = Counter()
    lines = []
    for defect in defects:
        seen[defect.code] += 1
        if seen[defect.code] <= SHOWN:
            lines.append(str(defect))
    more = [
        f"{code} {count - SHOWN} more, see --json" for code, count in seen.items() if count > SHOWN
    ]
    return lines + more
