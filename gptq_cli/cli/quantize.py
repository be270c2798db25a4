"""`gptq quantize` and `gptq resume`: prepare a run, carry it out, show the result."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, BeforeValidator, StrictBool, TypeAdapter

from gptq_cli.cli import options as o
from gptq_cli.cli.console import (
    Console,
    engine_lines,
    fitted,
    fitted_lines,
    on_one_line,
    time_line,
)
from gptq_cli.cli.launch import (
    is_first_here,
    is_leader,
    launch_processes,
    parse_devices,
    working,
)
from gptq_cli.cli.progress import Progress
from gptq_cli.config.resolve import Resolved, resolve, to_yaml
from gptq_cli.config.schema import NO_LORA, QuantizeConfig
from gptq_cli.config.serving import LOADS
from gptq_cli.errors import ConfigError, GptqError, InputError, shell_word, shell_words, size
from gptq_cli.files import is_directory, resolved
from gptq_cli.storage.work_directory import (
    RUN,
    output_of,
    read_run,
    refuse_foreign,
    resume_command,
    work_of,
)

if TYPE_CHECKING:
    from gptq_cli.calibration.corpus import DatasetSource
    from gptq_cli.evaluation.perplexity import EvalResult
    from gptq_cli.evaluation.request import EvalRequest
    from gptq_cli.events import LayerReport
    from gptq_cli.planning.checks import PreparedRun, RunOptions
    from gptq_cli.quantization.run import QuantizeResult


SERVING = {  # commands of engines; the first one that loads the output is shown
    "vllm": "vllm serve {}",
    "sglang": "python -m sglang.launch_server --model-path {}",
    "llama.cpp": "python convert_hf_to_gguf.py {} --outfile model.gguf",
}
OTHER_TEXT = "FILE"  # in a command: a text that the user has to choose
EVERYDAY = ("bits", "group_size", "preset", "dataset", "target", "output", "config")

Unfinished = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="the output, or the hidden .OUT.gptq-work beside it",
        show_default=False,
    ),
]


@o.shows_first("model", *EVERYDAY, "dry_run")
@o.takes_settings(*o.run_settings())
def quantize(
    model: o.Model,
    *,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    report: o.WithReport = False,
    evaluate: o.WithEvaluation = False,
    settings: o.Settings,
    devices: o.Devices = None,
    revision: o.Revision = None,
    resume: o.Resume = None,
    max_runtime: o.MaxRuntime = None,
    allow_network_fs: o.AllowNetworkFs = False,
    stream_download: o.StreamDownload = False,
    config: o.ConfigFile = None,
    print_config: o.PrintConfig = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Quantize a model to a GPTQ checkpoint.

    bits  size of layers  KL x 1000
       8            51 %  not measured
       4            26 %  3.8
       3            20 %  15
       2            13 %  78

    The size is that of groups of 128 beside 16 bits. KL is the distance
    from the original of one small model (docs/accuracy.md).

    Options not given here are taken from GPTQ_* variables, then --config,
    then the preset, then the defaults.

    Example: gptq quantize ./Qwen3-0.6B --bits 4
    Example: gptq quantize ./Qwen3-0.6B -b 3 -g 64 --preset best -o ./out
    Example: gptq quantize ./Qwen3-0.6B --config vllm-4bit --dry-run
    """
    console = Console(as_json, quiet)
    resolved = resolve(settings, os.environ, config)
    if print_config:
        return _print_config(console, resolved)
    named = parse_devices(devices)
    if dry_run:
        from gptq_cli.cli.plan_view import show_plan

        return show_plan(console, resolved, model, output, revision, devices=max(1, len(named)))
    console.show_notes(resolved.notes)
    from gptq_cli.config.fields import seconds
    from gptq_cli.planning.checks import RunOptions

    options = RunOptions(
        revision,
        overwrite,
        resume or "auto",
        seconds(max_runtime),
        allow_network_fs,
        stream_download,
    )
    if report:
        from gptq_cli.publish.report import check_report

        check_report()
    if evaluate:
        _check_evaluation(resolved.config, streams=stream_download)
    prepared = _prepare(model, output, resolved.config, options)
    launch_processes(console, prepared, named, Path.cwd())
    console.say_on_screen(f"{model} -> {prepared.output}, loading torch and transformers")
    _carry_out(console, prepared, resolved.config, named, with_page=report, evaluate=evaluate)
    return None


def _prepare(
    model: str, output: Path | None, config: QuantizeConfig, options: RunOptions
) -> PreparedRun:
    """Check and plan a run; of several processes only the first one may write."""
    from gptq_cli.planning.checks import default_output, prepare_run, refuse_streaming

    refuse_streaming(config, options)
    start = config
    if config.allocates:
        from gptq_cli.allocation.goals import starting_config

        start = starting_config(config)
    output = output or default_output(model, config, start, options.revision)
    return prepare_run(model, output, start, options, writes=is_leader())


def _carry_out(
    console: Console,
    prepared: PreparedRun,
    goal: QuantizeConfig,
    devices: list[str],
    *,
    with_page: bool,
    evaluate: bool,
) -> None:
    """Carry out a run on `devices`, with widths that are measured if `goal` allocates; show it."""
    from gptq_cli.planning.checks import scanning

    if goal.allocates:
        from gptq_cli.cli.allocate import show_engines_of_goal

        show_engines_of_goal(console, goal)
    with (
        scanning(prepared, reads=is_first_here()) as prepared,
        working(console, prepared, devices, prepared.output) as (worker, progress),
    ):
        from gptq_cli.quantization.run import carry_out

        if goal.allocates:
            from gptq_cli.cli.allocate import allocated

            prepared = allocated(console, prepared, goal, worker, progress)
        result = carry_out(prepared, progress, worker)
    if worker.team.is_leader:
        _finish(console, result, prepared, with_page=with_page, evaluate=evaluate)


def _finish(
    console: Console,
    result: QuantizeResult,
    prepared: PreparedRun,
    *,
    with_page: bool,
    evaluate: bool,
) -> None:
    """Report a run that is complete, measure its output if this was asked for, and show both."""
    measured = None
    page = _report(console, result, None, with_page=with_page)
    if evaluate:
        from gptq_cli.api import evaluate_perplexity

        request = _evaluation_of(prepared)
        _note_same_text(console, result, prepared)
        with Progress(console) as progress:
            measured = evaluate_perplexity(result.output, request, on_event=progress)
        page = _report(console, result, measured, with_page=with_page)
    if page is not None:
        console.say(f"report: {page}")
    lines = [
        on_one_line(str(result.output)),
        *fitted_lines(_summary(result, prepared.config), indent=7),
        *map(fitted, engine_lines(result.engines)),
    ]
    data = {**result.to_json(), "evaluation": None}
    if measured is not None:
        from gptq_cli.cli.eval_ppl import summary_of

        lines += fitted_lines(summary_of(measured), indent=12)
        data["evaluation"] = measured.to_json()
    console.result(data, "\n".join(lines), result.output)
    if prepared.options.stream_download and not prepared.located.is_complete:
        again = f"what measures against it downloads {size(result.bytes_before)} again"
        console.say(f"note: the original was not kept on the disk: {again}")
    if measured is None:
        _note_other_text(console, prepared)
    for line in _next_steps(result, prepared, measured):
        console.say(f"next: {line}")


def _report(
    console: Console, result: QuantizeResult, measured: EvalResult | None, *, with_page: bool
) -> Path | None:
    """Write the data about a run into its output, and the page; return the path of the page.

    If the user did not ask for the page, a failure is a warning: the checkpoint is complete.
    """
    from gptq_cli.storage.manifest import REPORT_PAGE, write_report_data

    evaluation = None
    if measured is not None:
        evaluation = measured.to_json()
    try:
        command = shell_words(["gptq", *sys.argv[1:]])
        write_report_data(result.output, result.to_json(), command, evaluation)
        if not with_page:
            return None
        from gptq_cli.publish.report import write_page

        return write_page(result.output, result.output / REPORT_PAGE)
    except GptqError as error:
        if with_page:
            raise
        console.warn("W_REPORT", f"the checkpoint is complete, but not its report: {error}")
        return None


def _check_evaluation(config: QuantizeConfig, *, streams: bool = False) -> None:
    """Raise ConfigError E_CFG_CONFLICT for a run whose original will not be on the disk."""
    if streams:
        message = "--eval needs the original on the disk, but --stream-download does not keep it"
        raise ConfigError("E_CFG_CONFLICT", message, hint="omit --eval or --stream-download")
    if config.lora not in (None, NO_LORA, [NO_LORA]):
        message = "--eval compares with the model as it is stored, but --lora merges an adapter"
        hint = "omit --eval, and compare with the merged model: gptq eval-ppl OUT --baseline MERGED"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)


def _evaluation_of(prepared: PreparedRun) -> EvalRequest:
    """Return the request that compares the output of a run with its original.

    Its text is the first one of the calibration, if that is on this machine. A file is read no
    further than the calibration may have read it.
    """
    from gptq_cli.evaluation.request import EvalRequest

    config, baseline = prepared.config, prepared.model
    if prepared.options.revision is not None:  # which names no baseline
        baseline = str(prepared.located.directory)
    request = EvalRequest(
        baseline=baseline,
        device=config.device,
        dtype=config.dtype,
        backend=config.backend,
        trust_remote_code=config.trust_remote_code,
    )
    source = _own_text(prepared)
    if source is None:
        return request
    return replace(
        request,
        dataset=source.name,
        seqlen=config.seqlen,
        max_windows=config.nsamples,
        text_column=list(source.columns) or None,
        chat_template=source.chat_template,
    )


def _note_same_text(console: Console, result: QuantizeResult, prepared: PreparedRun) -> None:
    """Tell if --eval measures on the text of the calibration, and how to measure on another."""
    file = _own_file(prepared)
    if file is None:
        return
    words = ["gptq", "eval-ppl", str(result.output), "--baseline", prepared.model]
    command = f"{shell_words(words)} --dataset {OTHER_TEXT}"
    same = f"--eval measures on `{file.name}`, which the calibration has read"
    console.show_notes([f"{same}; to measure on other text: {command}"])


def _note_other_text(console: Console, prepared: PreparedRun) -> None:
    """Tell what OTHER_TEXT stands for, if the command that measures the output names it."""
    file = _own_file(prepared)
    if file is not None:
        kind = f"text of the same kind as `{file.name}`, but which the calibration has not read"
        console.show_notes([f"{OTHER_TEXT} stands for {kind}"])


def _own_text(prepared: PreparedRun) -> DatasetSource | None:
    """Return the first text of a run if it is on this machine, else None.

    If it holds chats, it has the chat template of the run.
    """
    from gptq_cli.calibration.corpus import holds_chats, is_path
    from gptq_cli.config.corpora import BUILT_IN
    from gptq_cli.planning.checks import calibration_sources

    source, _ = calibration_sources(prepared.config)[0]
    if prepared.config.chat_template is not None and holds_chats(source):
        source = replace(source, chat_template=prepared.config.chat_template)
    if is_path(source.name) or source.name == BUILT_IN:
        return source
    return None


def _own_file(prepared: PreparedRun) -> DatasetSource | None:
    """Return the first text of a run if it is a file or folder of the user, else None.

    The built-in corpus, which is none, has another text for evaluations.
    """
    from gptq_cli.config.corpora import BUILT_IN

    source = _own_text(prepared)
    if source is None or source.name == BUILT_IN:
        return None
    return source


def _next_steps(
    result: QuantizeResult, prepared: PreparedRun, measured: EvalResult | None
) -> list[str]:
    """Return a command that measures the output, unless it was measured, and one that serves it."""
    output = shell_word(str(result.output))
    loads = [verdict.engine for verdict in result.engines if verdict.outcome in LOADS]
    target = (prepared.config.target or "").partition("@")[0].partition("/")[0]
    serving = f'gptq generate {output} "Why is the sky blue?"'
    for engine in (target, *SERVING):
        if engine in SERVING and engine in loads:
            serving = SERVING[engine].format(output)
            break
    if measured is not None:
        return [serving]
    return [_measuring(result, prepared), serving]


def _measuring(result: QuantizeResult, prepared: PreparedRun) -> str:
    """Return the command that measures the output, on text of this machine if the run had some.

    In place of a file that the calibration has read it names OTHER_TEXT.
    """
    words = ["gptq", "eval-ppl", str(result.output), "--baseline", prepared.model]
    source = _own_text(prepared)
    if source is not None:
        text = source.name
        if _own_file(prepared) is not None:
            text = OTHER_TEXT
        words += ["--dataset", text, "--seqlen", str(prepared.config.seqlen)]
        for column in source.columns:
            words += ["--text-column", column]
        if source.chat_template is not None:
            words += ["--chat-template", _beside(result.output, source.chat_template)]
    return shell_words(words)


def _beside(output: Path, name: str) -> str:
    """Return the file or folder `name` as an absolute path if `output` is one, else unchanged.

    `gptq resume` runs in the folder of the first command, but its user may be in another one.
    """
    from gptq_cli.files import expanded

    if output.is_absolute():
        return str(Path.cwd() / expanded(name))
    return name


def _summary(result: QuantizeResult, config: QuantizeConfig) -> list[str]:
    sizes = f"{size(result.bytes_before)} -> {size(result.bytes_after)}"
    smaller = f"{result.bytes_before / result.bytes_after:.2f}x smaller"
    lines = [f"size   {sizes} ({smaller})"]
    if result.layers:
        lines += _error_lines(result.layers)
    if result.experts:
        lines.append(_coverage(result, config))
    if result.already_done:
        lines.append("done   already, by an earlier run of the same command")
    else:
        lines.append(time_line(result.seconds, 6))
    return lines


def _error_lines(layers: Sequence[LayerReport]) -> list[str]:
    """Return a line about the mean output error, and one about layers that were not solved."""
    error = math.fsum(layer.relative_error for layer in layers) / len(layers)
    rtn = math.fsum(layer.rtn_relative_error for layer in layers) / len(layers)
    mean = f"{error:.2e} mean output error of {len(layers)} layers"
    baseline = f"round-to-nearest {rtn:.2e}"
    if any(layer.rtn_rows for layer in layers):
        baseline += " on a sample of rows"
    lines = [f"error  {mean}, {baseline}", *_strength_lines(layers), *_loss_lines(layers)]
    rounded = [layer.name for layer in layers if layer.fallback]
    if rounded:
        count = f"{len(rounded)} of {len(layers)} layers"
        lines.append(f"rtn    {count} were rounded to nearest, first {rounded[0]}")
    return lines


def _strength_lines(layers: Sequence[LayerReport]) -> list[str]:
    """Return a line about the part of earlier errors that layers make up for, if they do."""
    strengths = []
    for layer in layers:
        if layer.asymmetric_calibration is not None:
            strengths.append(layer.asymmetric_calibration)
    if not strengths:
        return []
    mean = math.fsum(strengths) / len(strengths)
    between = f"from {min(strengths):.0%} to {max(strengths):.0%}"
    return [f"follow each layer makes up for {mean:.0%} of earlier errors on average, {between}"]


def _loss_lines(layers: Sequence[LayerReport]) -> list[str]:
    """Return a line about what rounding with gradients gained, if any layer was rounded so."""
    ratios = [layer.loss_ratio for layer in layers if layer.loss_ratio is not None]
    if not ratios:
        return []
    mean = math.fsum(ratios) / len(ratios)
    text = f"gradients lower the expected increase of the model's loss by {1 - mean:.0%}"
    return [f"loss   {text}, mean of {len(ratios)} layers"]


def _coverage(result: QuantizeResult, config: QuantizeConfig) -> str:
    """Return a line about the tokens of the experts."""
    tokens: list[int] = []
    n_uncovered = 0
    for layer in result.experts:
        tokens += layer.tokens
        n_uncovered += len(layer.uncovered)
    counts = f"{min(tokens)} or more for each of {len(tokens)} experts"
    line = f"tokens {counts}, median {median(tokens):.0f}"
    if n_uncovered:
        line += f"; {n_uncovered} without one: {config.moe_uncovered}"
    return line


def _print_config(console: Console, resolved: Resolved) -> None:
    text = to_yaml(resolved.config, resolved.origins).rstrip("\n")
    data = {"config": resolved.config, "origins": resolved.origins, "notes": resolved.notes}
    console.document(data, text)


@o.takes_settings("trust_remote_code")
def resume(
    unfinished: Unfinished,
    *,
    overwrite: o.Overwrite = False,
    evaluate: o.WithEvaluation = False,
    devices: o.Devices = None,
    settings: o.Settings,
    max_runtime: o.MaxRuntime = None,
    allow_network_fs: o.AllowNetworkFs = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Resume a quantization that ended early.

    The model and all settings are those of the command that began the run.
    The finished work is beside OUT. Code that comes with the model runs only
    if --trust-remote-code is given again. Repeating the first command
    resumes the run too.

    Example: gptq resume ./Qwen3-0.6B-4bit
    Example: gptq resume .Qwen3-0.6B-4bit.gptq-work
    """
    trust_remote_code = bool(settings.get("trust_remote_code"))
    started_in = Path.cwd()
    work = work_of(resolved(unfinished, writing=True))
    begun, output = _read(work)
    if begun.config.trust_remote_code and not trust_remote_code:
        code = f"Python code that comes with `{begun.model}`"
        raise InputError(
            "E_REMOTE_CODE",
            f"the run in `{work}` needs {code}",
            hint=f"read that code, then: {resume_command(work)}",
        )
    named = parse_devices(devices)
    if is_directory(begun.directory):
        os.chdir(begun.directory)
    from gptq_cli.config.fields import seconds
    from gptq_cli.planning.checks import RunOptions

    options = RunOptions(
        revision=begun.revision,
        overwrite=overwrite or (begun.overwrite and begun.output == output),
        max_seconds=seconds(max_runtime),
        allow_network_fs=allow_network_fs,
        stream_download=begun.stream_download,
    )
    config = begun.config.model_copy(update={"trust_remote_code": trust_remote_code})
    if evaluate:
        _check_evaluation(config, streams=begun.stream_download)
    console = Console(as_json, quiet)
    prepared = _prepare(begun.model, output, config, options)
    prepared = replace(prepared, allocated=begun.allocated)
    launch_processes(console, prepared, named, started_in)
    _carry_out(console, prepared, config, named, with_page=False, evaluate=evaluate)


def _nothing_to_resume(work: Path, output: Path | None) -> InputError:
    """Return the error about a work directory without a run, whose output may be complete."""
    from gptq_cli.storage.manifest import read_manifest

    if output is not None and read_manifest(output) is not None:
        message = f"`{output}` is complete, so there is nothing to resume"
        hint = f"use it as it is; gptq verify {shell_word(str(output))} checks it"
        return InputError("E_RESUME_NOTHING", message, hint=hint)
    message = f"`{work}` holds no unfinished run"
    if not is_directory(work):
        message = f"there is no unfinished run: `{work}` does not exist"
    hint = "give the output of a run that ended early, or the hidden .OUT.gptq-work beside it"
    return InputError("E_RESUME_NOTHING", message, hint=hint)


class _Begun(BaseModel):
    """The command that began a run, as run.json holds it."""

    model: str
    output: Path
    config: Annotated[QuantizeConfig, BeforeValidator(TypeAdapter(dict[str, Any]).validate_python)]
    revision: str | None
    overwrite: StrictBool
    allocated: StrictBool = False
    stream_download: StrictBool = False
    directory: Path


def _read(work: Path) -> tuple[_Begun, Path]:
    """Read the run of a work directory; return it with the output that the place implies.

    Raise InputError E_RESUME_NOTHING if there is none, and ExistsError E_WORK_UNSAFE if another
    user may have written it.
    """
    output = output_of(work)
    if output is None or not (work / RUN).is_file():
        raise _nothing_to_resume(work, output)
    refuse_foreign(work)
    try:
        return _Begun.model_validate((read_run(work) or {})["request"]), output
    except (ConfigError, KeyError, ValueError):
        message = f"`{work / RUN}` was not written by this version of gptq"
        hint = "repeat the command that began the run; if another version began it, add"
        raise InputError("E_RESUME_NOTHING", message, hint=f"{hint} --resume never") from None
