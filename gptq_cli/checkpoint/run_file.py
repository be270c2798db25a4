"""`run.json` of a work directory: which run its work belongs to, and the call that goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.durable import write_json
from gptq_cli.checkpoint.manifest import read_sealed, sealed
from gptq_cli.checkpoint.work_directory import RUN


def write_run(work: Path, identity: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Note in the work directory what its run is, and the arguments of the call that repeats it."""
    write_json(work / RUN, sealed({"identity": identity, "request": request}))


def read_run(work: Path) -> dict[str, Any] | None:
    """The `identity` and the `request` of `write_run`; None if they are not there as they were written."""
    return read_sealed(work / RUN)
