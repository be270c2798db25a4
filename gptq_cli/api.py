"""The functions of the package, for the command line and for Python callers.

They refuse what they can before torch is imported. A configuration is a `QuantizeConfig`, or a dict
such as Optimum writes, or nothing but settings: `quantize(model, bits=4)`. The result of each
function has a method `to_json`, which returns what the command prints with --json. Every expected
failure raises a GptqError: ConfigError, InputError, GateError, ResourceError, ExistsError or
PausedError, with `code`, `hint` and the `exit_code` of the command. `on_event` is called in the
thread of the call with each of `gptq_cli.events` when it happens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from gptq_cli.arguments import checked
from gptq_cli.errors import ConfigError, one_of, shown, suggestion
from gptq_cli.events import Noted, Report, Warned, ignore
from gptq_cli.files import file_errors

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gptq_cli.allocation.result import AllocateResult
    from gptq_cli.checkpoint.verify import Verification
    from gptq_cli.config.resolve import Resolved
    from gptq_cli.config.schema import QuantizeConfig
    from gptq_cli.config.settings import (
        CompareSettings,
        EvalSettings,
        GenerateSettings,
        Settings,
    )
    from gptq_cli.evaluation.comparison import CompareResult
    from gptq_cli.evaluation.generate import GenerateResult
    from gptq_cli.evaluation.perplexity import EvalResult
    from gptq_cli.evaluation.request import EvalRequest, GenerateRequest
    from gptq_cli.inspection.layer_statistics import LayerView
    from gptq_cli.inspection.rewriting import Rewritten
    from gptq_cli.inspection.summary import Inspection
    from gptq_cli.preview import PlanResult
    from gptq_cli.publish.push import PushResult
    from gptq_cli.quantization.run import QuantizeResult

    Config = QuantizeConfig | Mapping[str, Any]
    Request = TypeVar("Request", EvalRequest, GenerateRequest)


@file_errors()
@checked
def quantize(
    model: str | Path,
    config: Config | None = None,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    resume: str = "auto",
    max_runtime: str | None = None,
    allow_network_fs: bool = False,
    stream_download: bool = False,
    report: bool = False,
    command: str = "gptq_cli.quantize",
    on_event: Report = ignore,
    **settings: Unpack[Settings],
) -> QuantizeResult:
    """Quantize `model` (a directory or a Hub id) into the directory `output`.

    The output appears complete or not at all. `config` is a QuantizeConfig, or a dict of settings
    such as Optimum writes, over which `settings` take precedence. The other arguments are the
    options of `gptq quantize`: `output` defaults to NAME-GPTQ-Int4-g128 in the current directory,
    `resume` is "auto", "require" or "never", and `max_runtime` is a time such as "3h30m", after
    which PausedError is raised; the same call then resumes the run. With `stream_download` the
    weights of a Hub model are fetched block by block and dropped behind the run. The output gets a
    gptq_report.json about the run and its `command`, and with `report` an HTML page that shows it.
    `on_event` is called in this thread with each of `gptq_cli.events` when it happens; if it
    raises, the run ends, but finished blocks are kept.

    Every expected failure raises a GptqError: ConfigError, InputError, GateError, ResourceError,
    ExistsError or PausedError, with `code`, `hint` and the `exit_code` of the command.

    >>> from gptq_cli import events, quantize
    >>> def show(event):
    ...     if isinstance(event, events.BlockFinished):
    ...         print(f"block {event.index + 1} of {event.n_blocks}: {event.name}")
    >>> text = {"dataset": "calibration.txt", "nsamples": 8, "seqlen": 64}
    >>> result = quantize("Qwen3-0.6B", text, bits=4, group_size=32, on_event=show)
    block 1 of 2: model.layers.0
    block 2 of 2: model.layers.1
    >>> result.output
    PosixPath('Qwen3-0.6B-GPTQ-Int4-g32')
    >>> all(layer.relative_error < layer.rtn_relative_error for layer in result.layers)
    True
    """
    from gptq_cli.config.fields import seconds
    from gptq_cli.planning.checks import (
        RunOptions,
        default_output,
        prepare_run,
        refuse_streaming,
        scanning,
    )
    from gptq_cli.publish.report import check_report, write_page
    from gptq_cli.storage.manifest import REPORT_PAGE, write_report_data

    resolved = _configured(config, settings, on_event)
    if report:
        check_report()
    options = RunOptions(
        revision, overwrite, resume, seconds(max_runtime), allow_network_fs, stream_download
    )
    goal = resolved.config
    refuse_streaming(goal, options)
    start = goal
    if goal.allocates:
        from gptq_cli.allocation.goals import starting_config

        start = starting_config(goal)
    output = Path(output or default_output(str(model), goal, start, revision))
    with scanning(prepare_run(str(model), output, start, options)) as prepared:
        from gptq_cli.runtime.device import with_kernels

        worker = with_kernels(None, prepared.config)
        # This imports transformers, while kernels compile.
        from gptq_cli.quantization.run import carry_out

        if goal.allocates:
            from gptq_cli.allocation.run import allocate_run

            prepared, _, _ = allocate_run(prepared, goal, on_event, worker)
        result = carry_out(prepared, on_event, worker)
    write_report_data(prepared.output, result.to_json(), command)
    if report:
        write_page(prepared.output, prepared.output / REPORT_PAGE)
    return result


@file_errors()
@checked
def plan(
    model: str | Path,
    config: Config | None = None,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    devices: int = 1,
    time: bool = False,
    on_event: Report = ignore,
    **settings: Unpack[Settings],
) -> PlanResult:
    """Return what `quantize` with the same arguments would write and need, without doing it.

    Only headers are read; for a Hub id nothing else is downloaded. Sizes are exact, in bytes; the
    memory of each of `devices` processes is an estimate. With `time`, this device is measured for
    a few seconds, and `seconds` of the result estimates a run. Notes and warnings are events.

    Raises what `quantize` raises before its work.

    >>> from gptq_cli import plan
    >>> planned = plan("Qwen3-0.6B", bits=4, group_size=32, dataset="calibration.txt", seqlen=64)
    >>> planned.plan.n_blocks, len(planned.plan.quantized)
    (2, 14)
    >>> planned.bytes_after < planned.bytes_before
    True
    >>> [verdict.outcome for verdict in planned.engines if verdict.engine == "vllm"]
    ['yes']
    """
    from gptq_cli.preview import preview_run

    if devices < 1:
        message = f"devices must be a whole number of 1 or more, got {devices}"
        raise ConfigError("E_CFG_RANGE", message)
    return preview_run(
        str(model),
        _configured(config, settings, on_event).config,
        _path_or_none(output),
        revision=revision,
        devices=devices,
        with_time=time,
        report=on_event,
    )


@file_errors()
@checked
def allocate(
    model: str | Path,
    config: Config | None = None,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    resume: str = "auto",
    max_runtime: str | None = None,
    on_event: Report = ignore,
    **settings: Unpack[Settings],
) -> AllocateResult:
    """Measure which layers of `model` need bits, and choose a width for each.

    The goal is `bits` as an average, `target_size` or `target_kl`; without one, nothing is chosen,
    and the result has the frontier alone. `output` is a YAML file that gets the choice as rules,
    and beside it the measurement, with which a later call with another goal measures nothing.
    A QuantizeConfig always has `bits`, so it always has a goal.

    Raises what `quantize` raises before its work, and ConfigError E_ALLOC_GOAL if no choice of
    widths meets the goal.

    >>> from gptq_cli import allocate, quantize
    >>> text = {"dataset": "calibration.txt", "nsamples": 4, "seqlen": 64, "group_size": 32}
    >>> found = allocate("Qwen3-0.6B", text, bits=3.5)
    >>> found.chosen.allocation.bits <= 3.5
    True
    >>> found.widths["model.layers.0.self_attn.o_proj"] in (2, 3, 4, 8)
    True
    >>> quantize("Qwen3-0.6B", found.config, "mixed").output
    PosixPath('mixed')
    """
    from gptq_cli.allocation.goals import starting_config
    from gptq_cli.config.fields import seconds
    from gptq_cli.config.layer import BITS
    from gptq_cli.planning.checks import RunOptions, prepare_run

    resolved = _configured(config, settings, on_event, bits=BITS[-1])

    options = RunOptions(revision, overwrite, resume, seconds(max_runtime))
    start = starting_config(resolved.config)
    prepared = prepare_run(str(model), Path(model), start, options, writes=False)
    from gptq_cli.allocation.result import allocated_result, check_configuration
    from gptq_cli.allocation.run import measure_model

    place, file, goal = None, _path_or_none(output), None
    if resolved.has_goal:
        goal = resolved.config
    if file is not None:
        place = check_configuration(file, overwrite=overwrite, has_goal=resolved.has_goal)
    measured = measure_model(prepared, resolved.config, on_event, place=place)
    return allocated_result(measured, goal, file)


@overload
def inspect(
    model: str | Path,
    *,
    layer: None = None,
    revision: str | None = None,
    on_event: Report = ignore,
) -> Inspection: ...
@overload
def inspect(
    model: str | Path,
    *,
    layer: str,
    revision: str | None = None,
    on_event: Report = ignore,
) -> LayerView: ...
@file_errors()
@checked
def inspect(
    model: str | Path,
    *,
    layer: str | None = None,
    revision: str | None = None,
    on_event: Report = ignore,
) -> Inspection | LayerView:
    """Return what a checkpoint holds, or the numbers of one `layer`.

    The checkpoint may be quantized or not, by gptq or another tool. For a Hub id only the headers
    are downloaded. `layer` is a name or the end of one; its checkpoint must be on this machine or
    is downloaded.

    Raises InputError if there is no such checkpoint or it cannot be read, ConfigError E_LAYER if
    there is not exactly one such layer.

    >>> from gptq_cli import inspect
    >>> found = inspect("Qwen3-0.6B-GPTQ-Int4-g128")
    >>> found.format, len(found.modules), found.defects
    ('gptq', 14, ())
    >>> round(found.bits_per_weight, 2)
    4.45
    >>> view = inspect("Qwen3-0.6B-GPTQ-Int4-g128", layer="0.mlp.up_proj")
    >>> view.shape, view.packed.bits
    ((128, 128), 4)
    """
    if layer is not None:
        from gptq_cli.checkpoint.locate import locate_model
        from gptq_cli.checkpoint.verify import open_decodable

        directory = locate_model(str(model), revision).directory
        checkpoint = open_decodable(directory)
        from gptq_cli.inspection.layer_statistics import view_layer

        return view_layer(checkpoint, layer)
    from gptq_cli.checkpoint.locate import peek_model
    from gptq_cli.inspection.summary import inspect_checkpoint

    source, checkpoint = peek_model(str(model), revision)
    for code, remark in checkpoint.remarks:
        on_event(Warned(code, remark))
    found = inspect_checkpoint(checkpoint)
    return dataclasses.replace(found, model=source.name, commit=source.commit)


@file_errors()
@checked
def compare(
    a: str | Path,
    b: str | Path,
    text: str | Path | None = None,
    *,
    max_windows: int | None = None,
    on_event: Report = ignore,
    **settings: Unpack[CompareSettings],
) -> CompareResult:
    """Return the distance of checkpoint `a` from the reference `b`, quantized or not.

    The weight error of a tensor is |A-B|^2 / |B|^2. With `text`, which is a dataset, a file or a
    folder, both models run, and the result has KL and top-1 agreement, also for each window.
    `settings` are seqlen, device, dtype and the other fields of `EvalRequest`.

    Raises InputError E_COMPARE for checkpoints that have nothing in common, ConfigError
    E_CFG_CONFLICT for settings without a text.

    >>> from gptq_cli import compare
    >>> found = compare("Qwen3-0.6B-GPTQ-Int4-g128", "Qwen3-0.6B", "heldout.txt", seqlen=64)
    >>> len(found.weights.different)
    14
    >>> 0 < found.weights.mean_error < 0.02
    True
    >>> len(found.predictions.per_window) == found.predictions.windows
    True
    """
    from gptq_cli.evaluation.request import EvalRequest

    request = None
    _check_known(settings, EvalRequest, taken=("dataset", "baseline"))
    if text is not None:
        request = EvalRequest(
            dataset=str(text), baseline=str(b), max_windows=max_windows, **settings
        )
    else:
        _refuse_alone({**settings, "max_windows": max_windows})
    from gptq_cli.evaluation.comparison import compare_models

    return compare_models(str(a), str(b), request, on_event)


@file_errors()
@checked
def verify(directory: str | Path, *, full: bool = False, on_event: Report = ignore) -> Verification:
    """Return whether a GPTQ checkpoint is sound and means the same to every engine.

    The checkpoint may come from gptq or another tool. `defects` of the result lists what is wrong;
    nothing is raised for it. With `full` every byte is read, and each parameter of the model must
    be stored; `unchecked` of the result tells why if transformers does not know the parameters.

    Raises InputError E_MODEL_NOT_FOUND if there is no such directory.

    >>> from gptq_cli import verify
    >>> found = verify("Qwen3-0.6B-GPTQ-Int4-g128", full=True)
    >>> found.ok, found.modules, found.bits
    (True, 14, (4,))
    """
    from gptq_cli.checkpoint.locate import local_model
    from gptq_cli.checkpoint.verify import verify_checkpoint

    path = local_model(Path(directory))
    if not full:
        return verify_checkpoint(path, report=on_event)
    from gptq_cli.checkpoint.completeness import verify_whole

    return verify_whole(path, on_event)


@file_errors()
@checked
def convert(
    model: str | Path,
    to: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    on_event: Report = ignore,
) -> Rewritten:
    """Write a quantized checkpoint in the format `to`, without a loss.

    Codes and scales stay as they are, so the decoded weights keep every bit.

    Raises ConfigError E_CFG_FORMAT if `to` cannot store a layer, E_CFG_NOTHING_TO_DO if nothing
    would change; InputError if the checkpoint cannot be decoded; ExistsError for an output that
    exists.

    >>> from gptq_cli import convert, inspect
    >>> convert("Qwen3-0.6B-GPTQ-Int4-g128", "compressed-tensors", "converted").layers
    14
    >>> inspect("converted").format
    'compressed-tensors'
    """
    from gptq_cli.config.fields import format_hint
    from gptq_cli.config.layer import FORMATS

    if to not in FORMATS:
        message = f"--to must be {one_of(FORMATS)}, got {shown(to)}"
        raise ConfigError("E_CFG_RANGE", message, hint=format_hint(to))
    from gptq_cli.inspection.convert import convert_checkpoint

    return convert_checkpoint(str(model), Path(output), to, overwrite=overwrite, report=on_event)


@file_errors()
@checked
def dequantize(
    model: str | Path,
    output: str | Path,
    dtype: str = "auto",
    *,
    overwrite: bool = False,
    on_event: Report = ignore,
) -> Rewritten:
    """Write a quantized checkpoint as plain weights, those with which its model computes.

    `dtype` is "auto", "bfloat16", "float16" or "float32"; auto stands for the dtype in
    config.json, with all other tensors copied unchanged.

    Raises InputError if the checkpoint cannot be decoded or a weight does not fit the dtype;
    ExistsError for an output that exists.

    >>> from gptq_cli import compare, dequantize
    >>> dequantize("Qwen3-0.6B-GPTQ-Int4-g128", "plain", "float32").layers
    14
    >>> compare("plain", "Qwen3-0.6B-GPTQ-Int4-g128").weights.different
    ()
    """
    from gptq_cli.config.resolve import check_flags

    check_flags({"dtype": dtype})
    from gptq_cli.inspection.dequantize import dequantize_checkpoint

    return dequantize_checkpoint(
        str(model), Path(output), dtype, overwrite=overwrite, report=on_event
    )


@file_errors()
@checked
def evaluate_perplexity(
    model: str | Path,
    request: EvalRequest | None = None,
    *,
    on_event: Report = ignore,
    **fields: Unpack[EvalSettings],
) -> EvalResult:
    """Return the perplexity of `model`, a directory or a Hub id, quantized or not.

    `fields` are those of an EvalRequest, and change those of `request`. The result also holds the
    protocol. With a `baseline`, it holds the baseline's perplexity, the KL divergence from it in
    nats per token, and the share of tokens with the same first choice. `on_event` is called, and
    GptqError is raised, as in `quantize`.

    >>> from gptq_cli import evaluate_perplexity
    >>> measured = evaluate_perplexity(
    ...     "Qwen3-0.6B-GPTQ-Int4-g128", dataset="heldout.txt", seqlen=64, baseline="Qwen3-0.6B"
    ... )
    >>> 0 < measured.kl < 0.1
    True
    >>> abs(measured.perplexity / measured.baseline_perplexity - 1) < 0.1
    True
    """
    from gptq_cli.evaluation.request import EvalRequest

    if request is None:
        request = EvalRequest()
    request = _changed(request, EvalRequest, fields)
    from gptq_cli.evaluation.perplexity import evaluate_perplexity as evaluate

    return evaluate(str(model), request, on_event)


@file_errors()
@checked
def generate(
    model: str | Path,
    request: GenerateRequest | str,
    *,
    on_text: Callable[[str], object] | None = None,
    on_event: Report = ignore,
    **fields: Unpack[GenerateSettings],
) -> GenerateResult:
    """Return the text that `model`, a directory or a Hub id, quantized or not, writes.

    `request` is a prompt, or a GenerateRequest; `fields` change fields of it. `on_text` is called
    with each piece of the text as soon as it is written. `on_event` is called, and GptqError is
    raised, as in `quantize`.

    >>> from gptq_cli import generate
    >>> result = generate("Qwen3-0.6B-GPTQ-Int4-g128", "the quick brown", max_new_tokens=5)
    >>> result.tokens, result.chat
    (5, True)
    """
    from gptq_cli.evaluation.request import GenerateRequest

    if isinstance(request, str):
        request = GenerateRequest(request)
    request = _changed(request, GenerateRequest, fields)
    from gptq_cli.evaluation.generate import generate_text

    return generate_text(str(model), request, on_text or _discard, on_event)


@file_errors()
@checked
def push(
    directory: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    evaluation: str | Path | None = None,
    card: str | Path | None = None,
    public: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    on_event: Report = ignore,
) -> PushResult:
    """Upload a checkpoint with a model card to `repo` (NAMESPACE/NAME) on the Hub, in one commit.

    The checkpoint is verified first. `base_model` is the Hub id of the original model, if the
    checkpoint does not name it; `evaluation` a file with the result of an evaluation as JSON;
    `card` a file that replaces the generated card. With `dry_run` nothing is sent.

    Raises ConfigError for names that the Hub would refuse, GateError E_VERIFY for a checkpoint with
    defects, InputError E_HUB_* if the Hub refuses or cannot be reached.

    >>> from gptq_cli import push
    >>> found = push("Qwen3-0.6B-GPTQ-Int4-g128", "me/small", base_model="a/b", dry_run=True)
    >>> found.published, "model.safetensors" in found.files
    (None, True)
    >>> print(found.card.splitlines()[1])
    base_model: a/b
    """
    from gptq_cli.publish.push import prepare_push, push_upload

    upload = prepare_push(
        Path(directory),
        repo,
        base_model=base_model,
        evaluation=_path_or_none(evaluation),
        card=_path_or_none(card),
        report=on_event,
    )
    if dry_run:
        return upload.result(public=public)
    return push_upload(upload, public=public, overwrite=overwrite, progress=False, report=on_event)


def _configured(
    config: Config | None,
    settings: Mapping[str, Any],
    report: Report,
    *,
    bits: int | None = None,
) -> Resolved:
    """Return the configuration of a call, and report the notes about it."""
    from gptq_cli.config.resolve import resolve_arguments

    resolved = resolve_arguments(config, settings, bits=bits)
    for note in resolved.notes:
        report(Noted(note))
    return resolved


def _changed(request: Request, kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """Return the request with other fields; raise ConfigError for a wrong one."""
    if not isinstance(request, kind):
        message = f"request must be of type {kind.__name__}, got {shown(request)}"
        raise ConfigError("E_CFG_TYPE", message, hint="give its fields as keyword arguments")
    _check_known(fields, kind)
    return dataclasses.replace(request, **fields)


def _check_known(
    fields: Mapping[str, Any], kind: type[EvalRequest | GenerateRequest], taken: Sequence[str] = ()
) -> None:
    """Raise ConfigError E_CFG_UNKNOWN_KEY for a field that `kind` lacks, or that is `taken`."""
    known = {field.name for field in dataclasses.fields(kind)} - set(taken)
    for name in fields:
        if name not in known:
            message = f"{name} is not a known key"
            raise ConfigError("E_CFG_UNKNOWN_KEY", message, hint=suggestion(name, known))


def _refuse_alone(options: Mapping[str, Any]) -> None:
    """Raise ConfigError E_CFG_CONFLICT for an option that needs a text to compare on."""
    for option, value in options.items():
        if value is not None:
            name = option.replace("_", "-")
            hint = f"add --text, or omit --{name}"
            raise ConfigError("E_CFG_CONFLICT", f"--{name} needs --text", hint=hint)


def _path_or_none(path: str | Path | None) -> Path | None:
    if path is None:
        return None
    return Path(path)


def _discard(text: str) -> None:
    """Do nothing with `text`."""
    del text
