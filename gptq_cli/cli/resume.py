"""`gptq resume`: the command that began a work directory, once more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, BeforeValidator, StrictBool, TypeAdapter

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.cli.quantize import run
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.files import is_directory, resolved
from gptq_cli.shell import shell_word

Directory = Annotated[
    Path, typer.Argument(metavar="WORKDIR", help="the hidden .OUT.gptq-work beside the output", show_default=False)
]


@o.takes_settings("trust_remote_code")
def resume(
    directory: Directory,
    *,
    overwrite: o.Overwrite = False,
    devices: o.Devices = None,
    settings: o.Settings,
    max_runtime: o.MaxRuntime = None,
    allow_network_fs: o.AllowNetworkFs = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Go on with a quantization that ended early.

    The model and all settings are those of the command that began it,
    and OUT is beside WORKDIR. Code that comes with the model runs only
    if --trust-remote-code is given again. Repeating the command that
    began the run does the same.

    Example: gptq resume .Qwen3-0.6B-4bit.gptq-work
    """
    trust_remote_code = bool(settings.get("trust_remote_code"))
    started_in, directory = Path.cwd(), resolved(directory)
    begun, output = _read(directory)
    if begun.config.trust_remote_code and not trust_remote_code:
        raise InputError(
            "E_REMOTE_CODE", f"the run in `{directory}` needs Python code that comes with `{begun.model}`",
            hint=f"read that code, then: gptq resume {shell_word(str(directory))} --trust-remote-code",
        )  # fmt: skip
    if is_directory(begun.directory):
        os.chdir(begun.directory)
    run(
        Console(as_json, quiet),
        begun.config.model_copy(update={"trust_remote_code": trust_remote_code}),
        begun.model,
        output,
        devices=devices,
        directory=started_in,
        revision=begun.revision,
        overwrite=overwrite or (begun.overwrite and begun.output == output),
        resume="auto",
        max_runtime=max_runtime,
        allow_network_fs=allow_network_fs,
    )


class _Begun(BaseModel):
    """What run.json says of the command that began a run."""

    model: str
    output: Path
    config: Annotated[QuantizeConfig, BeforeValidator(TypeAdapter(dict[str, Any]).validate_python)]
    revision: str | None
    overwrite: StrictBool
    directory: Path


def _read(directory: Path) -> tuple[_Begun, Path]:
    """The run of a work directory, and the output that the directory belongs to by its place.

    InputError E_RESUME_NOTHING if there is none, ExistsError E_WORK_UNSAFE if somebody else may have written it.
    """
    from gptq_cli.checkpoint.run_file import read_run
    from gptq_cli.checkpoint.work_directory import RUN, output_of, refuse_foreign

    output = output_of(directory)
    if output is None or not (directory / RUN).is_file():
        hint = _unfinished_at(directory) or "give the hidden directory .OUT.gptq-work beside an unfinished output"
        raise InputError("E_RESUME_NOTHING", f"`{directory}` holds no unfinished run", hint=hint)
    refuse_foreign(directory)
    try:
        return _Begun.model_validate((read_run(directory) or {})["request"]), output
    except (ConfigError, KeyError, ValueError):
        raise InputError(
            "E_RESUME_NOTHING", f"`{directory / RUN}` is not as this version of gptq writes it",
            hint="repeat the command that began the run, with --resume never if another version began it",
        ) from None  # fmt: skip


def _unfinished_at(output: Path) -> str | None:
    from gptq_cli.checkpoint.run_file import read_run
    from gptq_cli.checkpoint.work_directory import WorkDirectory

    work = WorkDirectory(output).path
    return f"did you mean gptq resume {shell_word(str(work))}?" if read_run(work) else None
