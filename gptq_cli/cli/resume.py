"""`gptq resume`: the command that began a work directory, once more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.cli.quantize import run
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.units import shell_word
from gptq_cli.errors import InputError

Directory = Annotated[
    Path, typer.Argument(metavar="WORKDIR", help="the hidden .OUT.gptq-work beside the output", show_default=False)
]


def resume(
    directory: Directory,
    devices: o.Devices = None,
    max_runtime: o.MaxRuntime = None,
    allow_network_fs: o.AllowNetworkFs = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Go on with a quantization that ended early.

    The model, the output and all settings are those of the command that
    began it. Repeating that command does the same.

    Example: gptq resume .Qwen3-0.6B-4bit.gptq-work
    """
    from gptq_cli.checkpoint.run_file import read_run

    begun = read_run(directory)
    if begun is None:
        hint = _unfinished_at(directory) or "give the hidden directory .OUT.gptq-work beside an unfinished output"
        raise InputError("E_RESUME_NOTHING", f"`{directory}` holds no unfinished run", hint=hint)
    request = begun["request"]
    if Path(request["directory"]).is_dir():
        os.chdir(request["directory"])
    run(
        Console(as_json, quiet),
        QuantizeConfig(**request["config"]),
        request["model"],
        Path(request["output"]),
        devices=devices,
        revision=request["revision"],
        overwrite=request["overwrite"],
        resume="auto",
        max_runtime=max_runtime,
        allow_network_fs=allow_network_fs,
    )


def _unfinished_at(output: Path) -> str | None:
    from gptq_cli.checkpoint.run_file import read_run
    from gptq_cli.checkpoint.work_directory import WorkDirectory

    work = WorkDirectory(output).path
    return f"did you mean gptq resume {shell_word(str(work))}?" if read_run(work) else None
