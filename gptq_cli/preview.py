"""The plan of a run with all that it costs, from headers alone, as `gptq plan` shows it.

Only the measured time of a run needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_cli.calibration.corpus import (
    DatasetSource,
    check_source,
    is_path,
    windows_need,
)
from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.checkpoint.layout import TensorSpec
from gptq_cli.checkpoint.locate import peek_model
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.fields import AUTO
from gptq_cli.config.leftovers import is_head
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import LOADS, Verdict, engine_data
from gptq_cli.errors import ConfigError, InputError, one_of, size, to_json
from gptq_cli.events import Noted, Report, Warned, ignore
from gptq_cli.inspection.summary import Row, plan_rows, row_data
from gptq_cli.planning.checks import (
    calibration_sources,
    notes_on_groups,
    notes_on_limits,
    notes_on_output,
    with_lora,
)
from gptq_cli.planning.estimate import (
    Disk,
    DownloadPlan,
    Estimate,
    Term,
    estimate_disk,
    estimate_download,
    estimate_within_limits,
    gradient_tokens,
    total,
)
from gptq_cli.planning.measuring import measuring_disk, measuring_seconds, with_measuring
from gptq_cli.planning.plan import plan_checkpoint, with_group_size
from gptq_cli.planning.run_plan import (
    LayerPlan,
    RunPlan,
    bounded,
    default_name,
    judge_plan,
    remarks,
)
from gptq_cli.planning.seconds import Rates, Seconds, estimate_time

if TYPE_CHECKING:
    import torch

    from gptq_cli.calibration.windows import Part

NO_TOKENIZER = ("E_TOKENIZER", "E_REMOTE_CODE")
USUAL_BITS = (8, 4, 3, 2)
EMBEDDINGS = ("wte", "wpe", "tok_embeddings", "word_embeddings")


@dataclass(frozen=True, slots=True)
class TextPlan:
    """One dataset of the calibration text: what it holds, and what the run needs of it.

    What is not known before the run is None: text of the Hub is not fetched, and text of this
    machine is counted if the model's tokenizer is here, too. `whole` tells whether all of the
    text was counted. The tokens of chats with images are not counted, nor those
    that a window cuts off a chat.
    """

    dataset: str
    chats: int | None
    chats_with_images: int | None
    tokens: int | None
    whole: bool | None
    windows: int
    needed_tokens: int | None
    summary: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What a run with another width or group size would write and need; see PlanResult."""

    bits: int
    group_size: int
    bytes_after: int
    bits_per_weight: float
    memory: Estimate
    engines: tuple[Verdict, ...]

    @property
    def loads(self) -> list[str]:
        """The engines that load the output."""
        return [verdict.engine for verdict in self.engines if verdict.outcome in LOADS]

    def to_json(self) -> dict[str, Any]:
        """Return the choice as plain JSON values."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "cpu_bytes": total(self.memory.cpu),
            "accelerator_bytes": total(self.memory.accelerator),
            "loads": self.loads,
        }


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What a run would write, and what it needs.

    `quantized` and `kept` are the rows of the layers and of all other tensors; `memory` is an
    estimate for each of `devices` processes, `seconds` one from rates measured on this device, or
    None; `measuring` is the part of them that measures widths, if the run does. `download` is None
    for a model that is on this machine. `engines` tells for each serving engine whether it will
    load the output. `choices` are other widths and group sizes, if they were asked for.
    """

    model: str
    commit: str | None
    output: Path
    plan: RunPlan
    quantized: tuple[Row, ...]
    kept: tuple[Row, ...]
    devices: int
    memory: Estimate
    disk: Disk
    download: DownloadPlan | None
    seconds: Seconds | None
    engines: tuple[Verdict, ...]
    text: tuple[TextPlan, ...]
    choices: tuple[Choice, ...] = ()
    measuring: Seconds | None = None

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of the output's tensors: layers (all of the blocks), embeddings, head, others.

        A head that shares the tensor of the embeddings takes none of its own.
        """
        parts = dict.fromkeys(("layers", "embeddings", "head", "others"), 0)
        for spec in self.plan.layout.specs.values():
            parts[_part_of(spec, self.plan.blocks)] += spec.nbytes
        return parts

    @property
    def bytes_before(self) -> int:
        """The bytes of the source's tensors."""
        return self.plan.source.nbytes

    @property
    def bytes_after(self) -> int:
        """The bytes of the safetensors files of the output, exactly."""
        return self.plan.layout.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, with all that is stored for it."""
        return self.plan.bits_per_weight

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        plan, memory = self.plan, self.memory
        return {
            "model": self.model,
            "commit": self.commit,
            "output": str(self.output),
            "blocks": plan.n_blocks,
            "quantized": row_data(self.quantized),
            "kept": row_data(self.kept),
            "layers": layer_data(plan),
            "bits_per_weight": self.bits_per_weight,
            "source_quantization": plan.plain.how,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "parts": self.parts,
            "choices": [choice.to_json() for choice in self.choices],
            "files": {shard.file: shard.size for shard in plan.layout.shards},
            "memory": {
                "estimate": True,
                "cpu": _peak(memory.cpu),
                "accelerator": _peak(memory.accelerator),
                "accelerator_host": _peak(memory.accelerator_host),
            },
            "devices": self.devices,
            "disk": {"needed_bytes": self.disk.needed, "free_bytes": self.disk.free},
            "download": to_json(self.download),
            "engines": engine_data(self.engines),
            "seconds": _seconds_data(self.seconds, self.measuring),
            "text": to_json(self.text),
        }


def _part_of(spec: TensorSpec, blocks: str) -> str:
    """Return the part of a model that a tensor of the output belongs to."""
    owner = spec.stored_name.rpartition(".")[0]
    leaf = owner.rpartition(".")[2]
    if spec.stored_name.startswith(f"{blocks}."):
        return "layers"
    if is_head(spec.stored_name):
        return "head"
    if "embed" in leaf or leaf in EMBEDDINGS:
        return "embeddings"
    return "others"


def preview_run(
    model: str,
    config: QuantizeConfig,
    output: Path | None = None,
    *,
    revision: str | None = None,
    devices: int = 1,
    with_time: bool = False,
    group_sizes: Sequence[int] | None = None,
    report: Report = ignore,
) -> PlanResult:
    """Return the plan of a run on `devices`, with its memory, disk space and serving engines.

    With `with_time`, measure the device of the run and estimate its time. With `group_sizes`, the
    result has choices: each usual width with each of these group sizes that fits; if the one of
    `config` does not fit, the plan has the largest that does. Notes and warnings are reported.
    Raises what `prepare_run` raises for model, settings and text; ConfigError
    E_CFG_CONFLICT if the time of several devices is asked for.
    """
    source, checkpoint = peek_model(model, revision)
    checkpoint = with_lora(checkpoint, config)
    named, mixed = config, None
    if config.allocates:
        config, mixed = _before_allocation(checkpoint, config, report)
    choices = _choices(checkpoint, config, group_sizes or (), devices)
    if choices and config.group_size not in {choice.group_size for choice in choices}:
        config = config.model_copy(update={"group_size": AUTO})
    given, config = config, with_group_size(checkpoint, config)
    for note in notes_on_groups(given, config):
        report(Noted(note))
    if output is None:
        named = named.model_copy(update={"group_size": config.group_size})
        output = Path(default_name(model, named))
    plan = plan_checkpoint(checkpoint, config)
    seconds = measuring = None
    if with_time:
        bound = bounded(config, checkpoint)
        allocates = named.allocates
        seconds, measuring = _seconds(plan, bound, devices, report, allocates=allocates)
    disk = _disk(plan, config, output, allocates=named.allocates)
    download = None
    if not source.is_complete:
        download = estimate_download(plan, disk)
    quantized, kept = plan_rows(plan)
    has_tokenizer = source.commit is None
    text = plan_text(bounded(config, checkpoint), checkpoint.directory, has_tokenizer, report)
    images = any(part.chats_with_images for part in text)
    memory = estimate_within_limits(plan, config, devices, images=images)
    if named.allocates:
        memory = with_measuring(memory, plan, config, devices)
    result = PlanResult(
        model=source.name,
        commit=source.commit,
        output=output,
        plan=plan,
        quantized=tuple(quantized),
        kept=tuple(kept),
        devices=devices,
        memory=memory,
        disk=disk,
        download=download,
        seconds=seconds,
        engines=_engines(checkpoint, plan, config, mixed),
        text=text,
        choices=tuple(choices),
        measuring=measuring,
    )
    _warn(result, config, report)
    return result


def _disk(plan: RunPlan, config: QuantizeConfig, output: Path, *, allocates: bool) -> Disk:
    """Return the bytes on the disk, with those of the measurement if the run allocates bits."""
    disk = estimate_disk(plan, config, output)
    if allocates:
        return replace(disk, measuring=measuring_disk(plan, config))
    return disk


def _choices(
    checkpoint: Checkpoint, config: QuantizeConfig, group_sizes: Sequence[int], devices: int
) -> list[Choice]:
    """Return each usual width with each of `group_sizes`, as far as a run would not be refused."""
    found = []
    for bits in USUAL_BITS:
        for group_size in group_sizes:
            changed = config.model_copy(update={"bits": bits, "group_size": group_size})
            with suppress(ConfigError):
                found.append(_choice(checkpoint, changed, devices))
    return found


def _choice(checkpoint: Checkpoint, config: QuantizeConfig, devices: int) -> Choice:
    plan = plan_checkpoint(checkpoint, config)
    return Choice(
        bits=int(config.bits),
        group_size=int(config.group_size),
        bytes_after=plan.layout.nbytes,
        bits_per_weight=plan.bits_per_weight,
        memory=estimate_within_limits(plan, config, devices),
        engines=judge_plan(plan, config),
    )


def _before_allocation(
    checkpoint: Checkpoint, config: QuantizeConfig, report: Report
) -> tuple[QuantizeConfig, QuantizeConfig]:
    """Return settings with widths that meet the goal, and some with all widths that are allowed.

    The first are an example, which is noted: the run measures before it chooses widths. It may
    choose any of them, so engines are judged by the second.
    """
    from gptq_cli.allocation.goals import (
        about_units,
        allowed_bits,
        at_width,
        fusing_engines,
        sizes,
        starting_config,
    )
    from gptq_cli.allocation.rules import with_widths
    from gptq_cli.allocation.solution import unmeasured
    from gptq_cli.allocation.units import find_units

    least, most = sizes(checkpoint, config)
    start, widths = starting_config(config), allowed_bits(config)
    base = with_group_size(checkpoint, start)
    for note in notes_on_groups(start, base):
        report(Noted(note))
    plans = {width: plan_checkpoint(checkpoint, at_width(base, width)) for width in widths}
    fusing = fusing_engines(config)
    units = find_units(plans, config.protect, fused=bool(fusing))

    def size_of(chosen: Sequence[int]) -> int:
        return plan_checkpoint(checkpoint, with_widths(base, units, chosen)).layout.nbytes

    example = unmeasured(units, config, size_of)
    ends = f"{size(least)} to {size(most)}"
    report(Noted(f"each layer will get {one_of(widths)} bits, the output {ends}"))
    report(Noted(about_units(fusing, config.target)))
    average = f"{example.bits:.3g} bits on average"
    report(Noted(f"the run measures which; this plan is an example with {average}"))
    in_turn = [widths[number % len(widths)] for number in range(len(units))]
    return with_widths(base, units, example.widths), with_widths(base, units, in_turn)


def _engines(
    checkpoint: Checkpoint, plan: RunPlan, config: QuantizeConfig, mixed: QuantizeConfig | None
) -> tuple[Verdict, ...]:
    """Return the verdicts on the output of `plan`, or on any that an allocation may make."""
    if mixed is None:
        return judge_plan(plan, config)
    return judge_plan(plan_checkpoint(checkpoint, mixed), mixed)


def _warn(result: PlanResult, config: QuantizeConfig, report: Report) -> None:
    notes = notes_on_output(result.output)
    notes += _notes_on_stacks(result.plan)
    notes += _notes_on_gradients(result.plan, config)
    notes += notes_on_limits(result.plan, config, result.devices)
    for note in notes:
        report(Noted(note))
    disk = result.disk
    if disk.free is not None and not disk.fits:
        free, needed = size(disk.free), size(disk.needed)
        text = f"{free} are free at `{result.output}`, but {needed} are needed"
        report(Warned("W_DISK", text))
    for code, remark in remarks(result.plan, config):
        report(Warned(code, remark))


def _notes_on_gradients(plan: RunPlan, config: QuantizeConfig) -> list[str]:
    """Return a note about the pass that takes gradients before the first block, if there is one."""
    if not plan.loss_aware:
        return []
    tokens = f"{gradient_tokens(plan, config):,} tokens"
    return [f"the run first takes gradients of {tokens}, so it reads the model two more times"]


def _notes_on_stacks(plan: RunPlan) -> list[str]:
    """Return a note about stacks of matrices that the run may quantize, but the plan keeps."""
    if not plan.unknown:
        return []
    first = plan.unknown[0]
    named = f"`{first.name}` {list(first.shape)}"
    if len(plan.unknown) > 1:
        named += f" and {len(plan.unknown) - 1} more"
    text = f"headers do not tell whether {named} hold linear layers"
    return [f"{text}: the plan keeps them, but the run asks the model, and may quantize them"]


def _seconds(
    plan: RunPlan, config: QuantizeConfig, devices: int, report: Report, *, allocates: bool
) -> tuple[Seconds, Seconds | None]:
    """Measure the device of the run, and estimate the time of the run.

    If it allocates bits, the second part is the time of the measurement, which the first includes.
    Report W_SLOW_DTYPE as the run would. Raise ConfigError E_CFG_CONFLICT for several devices.
    """
    from gptq_cli.runtime.device import measuring_dtype, report_slow_dtype, resolve_device

    if devices > 1:
        message = f"--time measures one device, but --devices is {devices}"
        raise ConfigError("E_CFG_CONFLICT", message, hint="omit --devices or --time")
    device = resolve_device(config.device)
    report_slow_dtype(device, config.dtype, plan.source, config.nsamples * config.seqlen, report)
    seconds = estimate_time(plan, config, _measured_rates(plan, config.dtype, device))
    if not allocates:
        return seconds, None
    dtype = measuring_dtype(device, config.dtype, plan.source)
    measuring = measuring_seconds(plan, config, _measured_rates(plan, dtype, device))
    return seconds.plus(measuring), measuring


def _measured_rates(plan: RunPlan, dtype: str, device: torch.device) -> Rates:
    """Measure `device` with work like that of the widest layer, forwards in `dtype`."""
    from gptq_cli.runtime.open_model import DTYPES
    from gptq_cli.runtime.rates import measure_rates

    widest = max(plan.quantized, key=lambda layer: layer.in_features)
    assert widest.config is not None
    exact = DTYPES[forward_dtype(plan.source, dtype)]
    return measure_rates(device, exact, widest.in_features, widest.config, widest.weight.file)


# ---------------------------------------------------------------- calibration text


def plan_text(
    config: QuantizeConfig, directory: Path, has_tokenizer: bool, report: Report
) -> tuple[TextPlan, ...]:
    """Return the text of each dataset; notes about it are reported.

    Raises the errors of `check_source` and `read_parts`, but a text that is too short is a note;
    and those of `ImagePart.draw` for images.
    """
    sources = calibration_sources(config)
    for source, _ in sources:
        check_source(source)
    if has_tokenizer and all(is_path(source.name) for source, _ in sources):
        from gptq_cli.calibration.windows import read_parts, shortages

        try:
            parts = read_parts(directory, config, sources)
            counted = tuple(_counted(part, config.seed, report) for part in parts)
            for refused in shortages(parts, config):
                report(Noted(f"quantize will refuse the text: {refused}; {refused.hint}"))
            return counted
        except InputError as error:
            if error.code not in NO_TOKENIZER:
                raise
            report(Noted(f"the text is not counted: {error}"))
    return tuple(_uncounted(source, n_windows, config) for source, n_windows in sources)


def _counted(part: Part, seed: int, report: Report) -> TextPlan:
    """Return what a text holds; images of the chats that the run draws are read, as it does."""
    documents = part.documents
    if documents.beside:
        report(Warned("W_DATA_CHATS", documents.about_chats))
    if part.n_with_images and part.shortage is None:
        part.draw(seed)
    return TextPlan(
        dataset=documents.name,
        chats=part.n_chats,
        chats_with_images=part.n_with_images,
        tokens=part.pool.tokens,
        whole=part.pool.whole,
        windows=part.nsamples,
        needed_tokens=part.needed_tokens,
        summary=part.summary,
    )


def _uncounted(source: DatasetSource, n_windows: int, config: QuantizeConfig) -> TextPlan:
    needed = None
    windows = f"{n_windows} documents of up to {config.seqlen} tokens are needed"
    if config.pack:
        needed = n_windows * config.seqlen
        windows = f"{windows_need(n_windows, config.seqlen, needed)} tokens at most"
    summary = f"{source.name}, not read yet; {windows}"
    return TextPlan(source.name, None, None, None, None, n_windows, needed, summary)


# ---------------------------------------------------------------- as JSON values


def layer_data(plan: RunPlan) -> list[dict[str, Any]]:
    """Return every linear layer of a plan as plain JSON values."""
    return list(map(_layer_data, plan.layers))


def _layer_data(layer: LayerPlan) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": layer.name,
        "block": layer.block,
        "shape": [layer.out_features, layer.in_features],
        "bits": None,
        "group_size": None,
        "why": layer.why,
    }
    if layer.config is not None:
        data |= {"bits": layer.config.bits, "group_size": layer.config.group_size}
    return data


def _peak(terms: Sequence[Term]) -> dict[str, Any]:
    return {"peak_bytes": total(terms), "terms": {term.what: term.nbytes for term in terms}}


def _seconds_data(seconds: Seconds | None, measuring: Seconds | None) -> dict[str, Any] | None:
    if seconds is None:
        return None
    part = None
    if measuring is not None:
        part = measuring.total
    return {"estimate": True, "total": seconds.total, **to_json(seconds), "measuring": part}
