"""`run.json` of a work directory: which run its work belongs to, and the call that goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.durable import write_json
from gptq_cli.checkpoint.manifest import read_sealed, sealed
from gptq_cli.checkpoint.work_directory import RUN
from gptq_cli.shell import shell_word


def write_run(work: Path, identity: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Note in the work directory what its run is, and the arguments of the call that repeats it."""
    write_json(work / RUN, sealed({"identity": identity, "request": request}))


def mark_failed(work: Path, code: str) -> None:
    """Note that the run has ended with `code`, and would end so again."""
    run = read_run(work)
    if run is not None:
        write_json(work / RUN, sealed({**run, "failed": code}))


def read_run(work: Path) -> dict[str, Any] | None:
    """The `identity` and the `request` of `write_run`, and `failed` if the run was marked; None if they are not there
    as they were written. The checksum is no signature: what is in the request may still be anything.
    """
    run = read_sealed(work / RUN)
    if run is None or not isinstance(run.get("identity"), dict) or not isinstance(run.get("request"), dict):
        return None
    return run


def resume_command(work: Path) -> str:
    """The command that goes on with the run of a work directory."""
    run = read_run(work) or {"request": {}}
    config = run["request"].get("config")
    trusts = isinstance(config, dict) and config.get("trust_remote_code")
    return f"gptq resume {shell_word(str(work))}" + (" --trust-remote-code" if trusts else "")
