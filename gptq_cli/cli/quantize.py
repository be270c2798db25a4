"""`gptq quantize` and `gptq resume`: parse, call the program, show."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, BeforeValidator, StrictBool, TypeAdapter

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, engine_lines, fitted, on_one_line
from gptq_cli.cli.launch import (
    is_leader,
    is_one_of_several,
    launch,
    member,
    parse_devices,
    stoppable,
)
from gptq_cli.cli.progress import Progress
from gptq_cli.config.finding import clock, size
from gptq_cli.config.resolve import Resolved, resolve, to_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.files import is_directory, resolved
from gptq_cli.shell import shell_word, shell_words

if TYPE_CHECKING:
    from gptq_cli.planning.checks import RunOptions
    from gptq_cli.quantization.run import QuantizeResult


# The kernel that runs quantized linears matters only when a checkpoint is evaluated.
SETTINGS = [name for name in o.configurable_fields() if name != "backend"]

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="WORKDIR", help="the hidden .OUT.gptq-work beside the output", show_default=False
    ),
]


@o.takes_settings(*SETTINGS)
def quantize(
    model: o.Model,
    *,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    report: o.WithReport = False,
    settings: o.Settings,
    devices: o.Devices = None,
    revision: o.Revision = None,
    resume: o.Resume = None,
    max_runtime: o.MaxRuntime = None,
    allow_network_fs: o.AllowNetworkFs = False,
    config: o.ConfigFile = None,
    print_config: o.PrintConfig = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Quantize a model to a GPTQ checkpoint.

    Options not given here are taken from GPTQ_* variables, then --config,
    then the preset, then the defaults.

    Example: gptq quantize ./Qwen3-0.6B -b 4 -o ./Qwen3-0.6B-4bit
    """
    console = Console(as_json, quiet)
    resolved = resolve(settings, os.environ, config)
    if print_config:
        return _print_config(console, resolved)
    if dry_run:
        from gptq_cli.cli.plan_view import show_plan

        return show_plan(
            console, resolved, model, output, revision, devices=max(1, len(parse_devices(devices)))
        )
    for note in resolved.notes:
        console.say(f"note: {note}")
    from gptq_cli.planning.checks import RunOptions
    from gptq_cli.quantization.run_record import seconds

    options = RunOptions(
        revision, overwrite, resume or "auto", seconds(max_runtime), allow_network_fs
    )
    return run(console, model, output, resolved.config, options, report=report, devices=devices)


def run(
    console: Console,
    model: str,
    output: Path | None,
    config: QuantizeConfig,
    options: RunOptions,
    *,
    report: bool = False,
    devices: str | None = None,
    directory: Path | None = None,
) -> None:
    """Quantize, show how it goes, print the result.

    Several `devices` (as --devices takes them) share the work, a process each, started in `directory` (by default the
    current one). With `report` a page about the run is written into the output.
    """
    from gptq_cli.planning.checks import check_shares, prepare_run
    from gptq_cli.planning.run_plan import default_name
    from gptq_cli.publish.report import check_report
    from gptq_cli.storage.manifest import REPORT_PAGE

    named = parse_devices(devices)
    if report:
        check_report()
    output = output or Path(default_name(model, config))
    prepared = prepare_run(model, output, config, options, writes=is_leader())
    if len(named) > 1 and not is_one_of_several():
        check_shares(-(-config.nsamples // config.batch_size), len(named))
        sys.exit(launch(named, as_json=console.as_json, directory=directory or Path.cwd()))
    from gptq_cli.api import quantize_with_report
    from gptq_cli.quantization.run import carry_out

    with stoppable(console), member(config.device, named, as_json=console.as_json) as worker:
        if not worker.team.is_leader:
            carry_out(prepared, worker=worker)
            return None
        with Progress(console) as progress:
            if report:
                command = shell_words(["gptq", *sys.argv[1:]])
                result = quantize_with_report(prepared, command, progress, worker)
            else:
                result = carry_out(prepared, progress, worker)
    if report:
        console.say(f"report: {result.output / REPORT_PAGE}")
    return console.result(result.to_json(), _summary(result, config), result.output)


def _summary(result: QuantizeResult, config: QuantizeConfig) -> str:
    sizes = f"{size(result.bytes_before)} -> {size(result.bytes_after)}"
    lines = [
        f"{result.output}",
        f"size   {sizes} ({result.bytes_before / result.bytes_after:.2f}x smaller)",
    ]
    if result.layers:
        mine = math.fsum(layer.relative_error for layer in result.layers) / len(result.layers)
        rtn = math.fsum(layer.rtn_relative_error for layer in result.layers) / len(result.layers)
        lines.append(
            f"error  {mine:.2e} mean of {len(result.layers)} layers, round-to-nearest {rtn:.2e}"
        )
    if result.experts:
        lines.append(_coverage(result, config))
    rounded = [layer.name for layer in result.layers if layer.fallback]
    if rounded:
        lines.append(
            f"rtn    {len(rounded)} of {len(result.layers)} layers were rounded to nearest, first {rounded[0]}"
        )
    lines.append(
        "done   before, by the same command"
        if result.already_done
        else f"time   {clock(result.seconds)}"
    )
    return "\n".join([*map(on_one_line, lines), *map(fitted, engine_lines(result.engines))])


def _coverage(result: QuantizeResult, config: QuantizeConfig) -> str:
    tokens = [seen for layer in result.experts for seen in layer.tokens]
    line = f"tokens {min(tokens)} or more for each of {len(tokens)} experts, median {median(tokens):.0f}"
    uncovered = sum(len(layer.uncovered) for layer in result.experts)
    return f"{line}; {uncovered} without one: {config.moe_uncovered}" if uncovered else line


def _print_config(console: Console, resolved: Resolved) -> None:
    text = to_yaml(resolved.config, resolved.origins).rstrip("\n")
    data = {"config": resolved.config.model_dump(mode="json"), "origins": resolved.origins}
    console.document({**data, "notes": list(resolved.notes)}, text)


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
    from gptq_cli.planning.checks import RunOptions
    from gptq_cli.quantization.run_record import seconds

    options = RunOptions(
        revision=begun.revision,
        overwrite=overwrite or (begun.overwrite and begun.output == output),
        max_seconds=seconds(max_runtime),
        allow_network_fs=allow_network_fs,
    )
    config = begun.config.model_copy(update={"trust_remote_code": trust_remote_code})
    run(
        Console(as_json, quiet),
        begun.model,
        output,
        config,
        options,
        devices=devices,
        directory=started_in,
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
    from gptq_cli.storage.work_directory import RUN, output_of, read_run, refuse_foreign

    output = output_of(directory)
    if output is None or not (directory / RUN).is_file():
        hint = (
            _unfinished_at(directory)
            or "give the hidden directory .OUT.gptq-work beside an unfinished output"
        )
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
    from gptq_cli.storage.work_directory import WorkDirectory, read_run

    work = WorkDirectory(output).path
    return f"did you mean gptq resume {shell_word(str(work))}?" if read_run(work) else None
