"""`run.json` of a work directory: which run its work belongs to, and the call that goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.durable import write_json
from gptq_cli.checkpoint.journal import digest
from gptq_cli.checkpoint.work_directory import RUN


def write_run(work: Path, identity: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Note in the work directory what its run is, and the arguments of the call that repeats it."""
    content = {"identity": identity, "request": request}
    write_json(work / RUN, {**content, "checksum": digest(content)})


def read_run(work: Path) -> dict[str, Any] | None:
    """The `identity` and the `request` of `write_run`; None if they are not there as they were written."""
    try:
        content: dict[str, Any] = json.loads((work / RUN).read_bytes())
        checksum = content.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if checksum == digest(content) else None
