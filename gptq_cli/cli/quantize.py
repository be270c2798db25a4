"""`gptq quantize`: parse, call the pipeline, show."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, fitted, on_one_line
from gptq_cli.cli.engines import engine_lines
from gptq_cli.cli.launch import is_one_of_several, launch, leads, member, parse_devices
from gptq_cli.cli.progress import Progress
from gptq_cli.cli.signals import stoppable
from gptq_cli.config.resolve import Resolved, resolve
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.units import clock, size
from gptq_cli.config.yaml_writer import to_yaml
from gptq_cli.shell import shell_words

if TYPE_CHECKING:
    from gptq_cli.pipeline.quantize import QuantizeResult


# The kernel that runs quantized linears matters only when a checkpoint is evaluated.
SETTINGS = [name for name in o.configurable_fields() if name != "backend"]


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

        return show_plan(console, resolved, model, output, revision, devices=max(1, len(parse_devices(devices))))
    for note in resolved.notes:
        console.say(f"note: {note}")
    manner: dict[str, Any] = {
        "resume": resume or "auto",
        "max_runtime": max_runtime,
        "allow_network_fs": allow_network_fs,
    }
    manner |= {"overwrite": overwrite, "revision": revision}
    return run(console, resolved.config, model, output, devices=devices, page=report, **manner)


def run(
    console: Console,
    config: QuantizeConfig,
    model: str,
    output: Path | None,
    *,
    devices: str | None = None,
    directory: Path | None = None,
    page: bool = False,
    **manner: Any,
) -> None:
    """Quantize, show how it goes, print the result; `manner` are the other arguments of `pipeline.run.quantize`.

    `devices`, as `--devices` takes them: several share the work, a process each, started in `directory` (by default the
    current one). With `page` a report of the run is left in the output.
    """
    from gptq_cli.checkpoint.manifest import REPORT_PAGE
    from gptq_cli.pipeline.run import carry_out, refuse_early

    named = parse_devices(devices)
    if leads():  # the others never look at the output
        output = refuse_early(model, config, output, report=page, **manner)
    if len(named) > 1 and not is_one_of_several():
        sys.exit(launch(named, as_json=console.as_json, directory=directory or Path.cwd()))
    command = shell_words(["gptq", *sys.argv[1:]])
    with stoppable(console), member(config.device, named, as_json=console.as_json) as place:
        if not place.team.leads:
            from gptq_cli.pipeline.quantize import assist

            return assist(model, config, place, revision=manner["revision"])
        assert output is not None
        with Progress(console) as progress:
            result = carry_out(
                model, config, output, report=page, command=command, on_event=progress, place=place, **manner
            )
    if page:
        console.say(f"report: {result.output / REPORT_PAGE}")
    return console.result(result.to_json(), _summary(result, config), result.output)


def _summary(result: QuantizeResult, config: QuantizeConfig) -> str:
    sizes = f"{size(result.bytes_before)} -> {size(result.bytes_after)}"
    lines = [f"{result.output}", f"size   {sizes} ({result.bytes_before / result.bytes_after:.2f}x smaller)"]
    if result.layers:
        mine = math.fsum(layer.relative_error for layer in result.layers) / len(result.layers)
        rtn = math.fsum(layer.rtn_relative_error for layer in result.layers) / len(result.layers)
        lines.append(f"error  {mine:.2e} mean of {len(result.layers)} layers, round-to-nearest {rtn:.2e}")
    if result.experts:
        lines.append(_coverage(result, config))
    rounded = [layer.name for layer in result.layers if layer.fallback]
    if rounded:
        lines.append(
            f"rtn    {len(rounded)} of {len(result.layers)} layers were rounded to nearest, first {rounded[0]}"
        )
    lines.append("done   before, by the same command" if result.already_done else f"time   {clock(result.seconds)}")
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
