"""`gptq quantize`: parse, call the pipeline, show."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, clock, size, visible
from gptq_cli.cli.engines import engine_lines, unread_line
from gptq_cli.cli.progress import Progress
from gptq_cli.cli.said import default_name, said_fields
from gptq_cli.cli.signals import stoppable
from gptq_cli.config.resolve import Resolved, resolve
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.yaml_writer import to_yaml
from gptq_cli.errors import ConfigError, InputError

if TYPE_CHECKING:
    from gptq_cli.pipeline.quantize import QuantizeResult


def quantize(
    model: o.Model,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    format: o.Format = None,
    max_shard_size: o.MaxShardSize = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    sym: o.Sym = None,
    desc_act: o.DescAct = None,
    act_group_aware: o.ActGroupAware = None,
    static_groups: o.StaticGroups = None,
    true_sequential: o.TrueSequential = None,
    signed_scales: o.SignedScales = None,
    scale_search: o.ScaleSearch = None,
    refine_sweeps: o.RefineSweeps = None,
    asymmetric_calibration: o.AsymmetricCalibration = None,
    damp_mode: o.DampMode = None,
    damp_percent: o.DampPercent = None,
    preset: o.Preset = None,
    dynamic: o.Dynamic = None,
    lm_head: o.LmHead = None,
    moe_uncovered: o.MoeUncovered = None,
    on_numeric_fault: o.OnNumericFault = None,
    max_fallbacks: o.MaxFallbacks = None,
    target: o.Target = None,
    allow_requantize: o.AllowRequantize = None,
    dataset: o.Datasets = None,
    dataset_config: o.DatasetConfig = None,
    dataset_split: o.DatasetSplit = None,
    text_column: o.TextColumn = None,
    nsamples: o.NSamples = None,
    seqlen: o.SeqLen = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.DType = None,
    max_vram: o.MaxVram = None,
    max_ram: o.MaxRam = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    resume: o.Resume = None,
    max_runtime: o.MaxRuntime = None,
    allow_network_fs: o.AllowNetworkFs = False,
    config: o.ConfigFile = None,
    print_config: o.PrintConfig = False,
    dry_run: o.DryRun = False,
    report: o.WithReport = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Quantize a model to a GPTQ checkpoint.

    What is not said here comes from GPTQ_* variables, then from --config,
    then from the preset, then from the defaults.

    Example: gptq quantize ./Qwen3-0.6B -b 4 -o ./Qwen3-0.6B-4bit
    """
    console, resolved = Console(as_json, quiet), resolve(said_fields(locals()), os.environ, config)
    if print_config:
        return _print_config(console, resolved)
    if dry_run:
        return _plan(console, resolved, model, output, revision)
    _refuse_missing_path(model)
    for note in resolved.notes:
        console.say(f"note: {note}")
    output = output or Path(default_name(model, resolved.config))
    manner = {"resume": _policy(resume), "max_seconds": seconds(max_runtime), "allow_network_fs": allow_network_fs}
    return run(console, resolved.config, model, output, overwrite=overwrite, page=report, revision=revision, **manner)


def _plan(console: Console, resolved: Resolved, model: str, output: Path | None, revision: str | None) -> None:
    from gptq_cli.cli.plan_view import show_plan

    show_plan(console, resolved, model, output, revision)


def run(
    console: Console,
    config: QuantizeConfig,
    model: str,
    output: Path,
    *,
    overwrite: bool,
    page: bool = False,
    **manner: Any,
) -> None:
    """Quantize, show how it goes, print the result; `manner` are the other arguments of `quantize_checkpoint`.

    With `page` a report of the run is left in the output.
    """
    from gptq_cli.pipeline.preflight import preflight
    from gptq_cli.pipeline.readers import judge_plan
    from gptq_cli.pipeline.report import BlockLog, check_report, save_report

    if page:
        check_report()

    plan = preflight(model, output, config, overwrite=overwrite)  # cheap refusals before the slow import
    if plan is not None and config.target is None and (line := unread_line(judge_plan(plan, config))):
        console.say(f"note: the output {line}")

    from gptq_cli.pipeline.quantize import quantize_checkpoint

    with Progress(console) as progress, stoppable(console):
        log = BlockLog(progress)
        result = quantize_checkpoint(model, output, config, overwrite=overwrite, report=log, **manner)
    if page:
        said = visible(shlex.join(["gptq", *sys.argv[1:]]))
        console.say(f"report: {save_report(output, result.to_json(), log, said)}")
    console.result(result.to_json(), _summary(result, config), str(result.output))


def seconds(duration: str | None) -> float | None:
    """Seconds of "3h30m", "90m" or "45s"; ConfigError E_CFG_RANGE for anything else."""
    if duration is None:
        return None
    match = re.fullmatch(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", duration)
    found = sum(unit * int(part or 0) for unit, part in zip((3600, 60, 1), match.groups(), strict=True)) if match else 0
    if not found:
        message = f"--max-runtime must be a time such as 3h30m, 90m or 45s, got {duration!r}"
        raise ConfigError("E_CFG_RANGE", message, hint="say hours with h, minutes with m, seconds with s")
    return found


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
    return "\n".join([*lines, *engine_lines(result.engines)])


def _coverage(result: QuantizeResult, config: QuantizeConfig) -> str:
    tokens = [seen for layer in result.experts for seen in layer.tokens]
    line = f"tokens {min(tokens)} or more for each of {len(tokens)} experts, median {median(tokens):.0f}"
    uncovered = sum(len(layer.uncovered) for layer in result.experts)
    return f"{line}; {uncovered} without one: {config.moe_uncovered}" if uncovered else line


def _print_config(console: Console, resolved: Resolved) -> None:
    text = to_yaml(resolved.config, resolved.origins).rstrip("\n")
    data = {"config": resolved.config.model_dump(mode="json"), "origins": resolved.origins}
    console.result({**data, "notes": list(resolved.notes)}, text, text)


def _policy(resume: str | None) -> str:
    if resume not in (None, "auto", "require", "never"):
        hint = "leave it out to go on with unfinished work if there is some"
        raise ConfigError("E_CFG_RANGE", f"--resume must be auto, require or never, got {resume!r}", hint=hint)
    return resume or "auto"


def _refuse_missing_path(model: str) -> None:
    """A wrong path fails here in a moment; whatever may be a Hub id is for the pipeline to look up."""
    is_hub_id = re.fullmatch(r"(hf://)?[\w.-]+(/[\w.-]+)?", model) and not model.startswith((".", "~"))
    if not is_hub_id and not Path(model).expanduser().is_dir():
        hint = "give a model directory or a Hub id"
        raise InputError("E_MODEL_NOT_FOUND", f"`{model}` is not a directory", hint=hint)
