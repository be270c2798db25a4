"""Checks that refuse a run before its work: output, checkpoint, plan, disk and memory.

`prepare_run` is the part of a run before torch is loaded. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gptq_cli.calibration.corpus import DatasetSource, check_source
from gptq_cli.calibration.loading import check_cached, check_reach, is_out_of_reach
from gptq_cli.checkpoint.decoded import with_adapters
from gptq_cli.checkpoint.headers import WeightScan
from gptq_cli.checkpoint.locate import (
    ModelSource,
    hub_id,
    locate_model,
    model_directory,
    peek_model,
)
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.corpora import BUILT_IN, DEFAULT_DATASET
from gptq_cli.config.fields import AUTO
from gptq_cli.config.schema import NO_LORA, QuantizeConfig
from gptq_cli.errors import ConfigError, GptqError, InputError, ResourceError, shell_word, size
from gptq_cli.files import expanded, file_errors, files_below, status_of
from gptq_cli.planning.estimate import (
    DEVICE_SHARE,
    LIBRARIES,
    STATES,
    Limit,
    Term,
    estimate_least_memory,
    estimate_memory,
    total,
    without,
)
from gptq_cli.planning.plan import USUAL_GROUP_SIZES, plan_checkpoint, with_group_size
from gptq_cli.planning.run_plan import RunPlan, bounded, default_name
from gptq_cli.storage.manifest import read_manifest
from gptq_cli.storage.replacing import check_output
from gptq_cli.storage.work_directory import WorkDirectory, read_run, refuse_locked

RESUME = ("auto", "require", "never")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a run that do not change a byte of the output.

    `resume` is "auto", "require" or "never"; without `max_seconds` the run may take any time.
    `spent_seconds` of them were over before it began. With `stream_download` the weights of a Hub
    model are fetched when they are read.
    """

    revision: str | None = None
    overwrite: bool = False
    resume: str = "auto"
    max_seconds: float | None = None
    allow_network_fs: bool = False
    stream_download: bool = False
    spent_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that is located and planned, as far as that needs no torch.

    `config` has windows and a group size that fit the model; `plan` is made from headers. `notes`
    and `warnings`, which have codes, tell what was chosen for the user. If `allocated`, the widths
    of layers were chosen by the measurement in the work directory. `scan` reads the weights
    meanwhile, if `scanning` has begun that.
    """

    model: str
    output: Path
    config: QuantizeConfig
    options: RunOptions
    located: ModelSource
    plan: RunPlan
    notes: tuple[str, ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    allocated: bool = False
    scan: WeightScan | None = None


@contextmanager
def scanning(prepared: PreparedRun, *, reads: bool = True) -> Iterator[PreparedRun]:
    """Read and hash the weights of a run in threads, while the body imports torch and begins.

    `reads` is false for a process that leaves this to another one on its machine.
    """
    source = prepared.plan.source
    if source.download is not None or not reads:
        yield prepared
        return
    with WeightScan(source.tensors.values(), hashed=prepared.located.commit is None) as scan:
        yield replace(prepared, scan=scan)


def prepare_run(
    model: str, output: Path, config: QuantizeConfig, options: RunOptions, *, writes: bool = True
) -> PreparedRun:
    """Locate the model, open its headers and plan the run; raise the first error of these steps.

    A model of the Hub is downloaded, now or while it is read. `writes` is false for a process that
    does not write the output, because it is one of several.
    """
    if options.resume not in RESUME:
        raise ConfigError(
            "E_CFG_RANGE",
            f"--resume must be auto, require or never, got {options.resume!r}",
            hint="leave it out to resume unfinished work if there is any",
        )
    directory = model_directory(model)
    if directory is None:
        hub_id(model)  # a wrong path fails here in a moment
    if writes:
        check_output(
            output, directory or expanded(model), overwrite=options.overwrite, may_be_done=True
        )
        refuse_locked(output)
    if directory is None:
        # A wrong dataset fails before a download; for a local model its own faults come first.
        _with_text(config, output, options)
    located, source = _located(model, output, options)
    if writes and directory is None:
        check_output(output, located.directory, overwrite=options.overwrite, may_be_done=True)
    source = with_lora(source, config)
    given, config = config, with_group_size(source, config)
    plan = plan_checkpoint(source, config)
    notes = notes_on_groups(given, config)
    config, warnings = _with_text(config, output, options)
    config = bounded(config, source)
    return PreparedRun(model, output, config, options, located, plan, notes, warnings)


def default_output(
    model: str, config: QuantizeConfig, start: QuantizeConfig, revision: str | None = None
) -> Path:
    """Return the directory for the output of a run of `config` whose user has named none.

    `start` has the widths with which the run is planned. In place of the group size `auto` the name
    has the number, for which the headers of the model are read. Raises what reading them raises.
    """
    if config.group_size == AUTO:
        _, checkpoint = peek_model(model, revision)
        sized = with_group_size(with_lora(checkpoint, config), start)
        config = config.model_copy(update={"group_size": sized.group_size})
    return Path(default_name(model, config))


def _located(model: str, output: Path, options: RunOptions) -> tuple[ModelSource, Checkpoint]:
    if options.stream_download:
        from gptq_cli.checkpoint.streaming import stream_model

        return stream_model(model, options.revision, WorkDirectory(output).download)
    located = locate_model(model, options.revision)
    return located, open_checkpoint(located.directory)


def refuse_streaming(config: QuantizeConfig, options: RunOptions) -> None:
    """Raise ConfigError E_CFG_CONFLICT for a run that reads the model twice if it is streamed."""
    if options.stream_download and config.allocates:
        raise ConfigError(
            "E_CFG_CONFLICT",
            "--stream-download drops the weights that are done, but an allocation of bits reads "
            "them twice: to measure, then to quantize",
            hint="omit --stream-download, or give whole --bits",
        )
    some_are_aware = any(changes.get("loss_aware") for changes in config.dynamic.values())
    if options.stream_download and (config.loss_aware or some_are_aware):
        raise ConfigError(
            "E_CFG_CONFLICT",
            "--stream-download drops the weights that are done, but a loss-aware run reads them "
            "three times: for gradients forward and backward, then to quantize",
            hint="omit --stream-download, or use --no-loss-aware",
        )


def with_lora(source: Checkpoint, config: QuantizeConfig) -> Checkpoint:
    """Return `source` with the adapters of the configuration, which are merged while it is read.

    Raises InputError E_LORA for an adapter that does not fit, and for one that lies beside the
    model if the configuration does not say which of the two is meant.
    """
    chosen = config.lora
    if isinstance(chosen, str):
        chosen = [chosen]
    beside = any(code == "W_CKPT_ADAPTER" for code, _ in source.remarks)
    if chosen is None and beside:
        directory = shell_word(str(source.directory))
        raise InputError(
            "E_LORA",
            f"`{source.directory}` holds a model and an adapter: which is meant is not clear",
            hint=f"merge the adapter with --lora {directory}, or leave it out with --lora none",
        )
    if chosen is None or chosen == [NO_LORA]:
        return source
    return with_adapters(source, chosen)


def _with_text(
    config: QuantizeConfig, output: Path, options: RunOptions
) -> tuple[QuantizeConfig, tuple[tuple[str, str], ...]]:
    """Return `config` with the text that the run reads, and warnings about it.

    If the user chose no text and the Hub gives no answer, it is the text that comes with the
    program. A run that has begun keeps its text. Raises the errors of
    `check_source`, and E_HUB_NETWORK or E_HUB_OFFLINE for text that cannot be had.
    """
    begun = None
    if options.resume != "never":
        begun = _text_of_unfinished(output)
    built_in = config.model_copy(update={"dataset": BUILT_IN})
    if config.dataset is None and begun == BUILT_IN:
        return built_in, ()
    try:
        _check_text(config)
    except InputError as refused:
        if config.dataset is not None or begun or not is_out_of_reach(refused):
            raise
        text = (
            f"{refused}; the run calibrates on `{BUILT_IN}`, the old prose that comes with gptq, "
            f"but {DEFAULT_DATASET} or your own text is better: --dataset FILE"
        )
        return built_in, (("W_DATA_BUILT_IN", text),)
    return config, ()


def _text_of_unfinished(output: Path) -> str | None:
    """Return the dataset of the unfinished run at an output, None if there is no such run."""
    run = read_run(WorkDirectory(output).path)
    if run is None:
        return None
    config = run["request"].get("config")
    if isinstance(config, dict) and isinstance(config.get("dataset"), str):
        return str(config["dataset"])
    return DEFAULT_DATASET


def calibration_sources(config: QuantizeConfig) -> list[tuple[DatasetSource, int]]:
    """Return the datasets of a run, each with the number of windows that it has to give.

    Raises the errors of `mixture.sources_of` if there are several.
    """
    dataset = config.dataset
    if isinstance(dataset, list) and len(dataset) > 1:
        from gptq_cli.calibration.mixture import sources_of

        return sources_of(config, dataset)
    if isinstance(dataset, list):
        dataset = dataset[0]
    source = DatasetSource(
        dataset,
        config.dataset_config,
        config.dataset_split,
        config.text_column,
        chat_template=config.chat_template,
    )
    return [(source, config.nsamples)]


def _check_text(config: QuantizeConfig) -> None:
    for source, _ in calibration_sources(config):
        check_source(source)
        if source.hub_id is not None:
            check_reach(source.hub_id, source.name)
            if source.dataset is None:
                check_cached(source.hub_id, source.name)


def check_shares(n_batches: int, n_processes: int) -> None:
    """ConfigError E_CFG_RANKS if there are fewer calibration batches than processes."""
    if n_batches < n_processes:
        batches = f"{n_batches} calibration batches"
        if n_batches == 1:
            batches = "1 calibration batch"
        raise ConfigError(
            "E_CFG_RANKS",
            f"{n_processes} processes cannot share {batches}",
            hint="use fewer processes, a smaller --batch-size or more --nsamples",
        )


def check_sharing(source: Checkpoint, n_processes: int) -> None:
    """ConfigError E_CFG_CONFLICT if several processes would download the same blocks."""
    if source.download is not None and n_processes > 1:
        raise ConfigError(
            "E_CFG_CONFLICT",
            f"--stream-download serves one process, but there are {n_processes}",
            hint="omit --stream-download, or use one device",
        )


def check_disk(
    work: WorkDirectory, output_bytes: int, saved_bytes: int, downloaded_bytes: int = 0
) -> None:
    """ResourceError E_DISK if the output and the saved hidden states do not fit on the disk.

    `downloaded_bytes` of the model are there at once, if it is downloaded while it is read. The
    bytes that an earlier run has written to `work` count as free.
    """
    free = 0
    with file_errors(work.path):
        for path in files_below(work.path):
            free += path.lstat().st_blocks * 512
        disk = os.statvfs(work.path)
    free += disk.f_bavail * disk.f_frsize
    needed = output_bytes + saved_bytes + downloaded_bytes
    if needed > free:
        parts = f"{size(output_bytes)} of output, {size(saved_bytes)} of hidden states"
        if downloaded_bytes:
            parts += f", {size(downloaded_bytes)} of downloaded blocks"
        message = (
            f"`{work.output.parent}` has {size(free)} free, {size(needed)} are needed: {parts}"
        )
        raise ResourceError(
            "E_DISK",
            message,
            hint="free some space, write to another disk with -o, or use fewer --nsamples",
        )


def check_temporary(directory: Path, nbytes: int) -> None:
    """ResourceError E_DISK if `nbytes` of a measurement do not fit into a temporary directory."""
    with file_errors(directory):
        disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if nbytes > free:
        message = f"`{directory}` has {size(free)} free, {size(nbytes)} of hidden states are needed"
        hint = "set TMPDIR to a directory on another disk, or use fewer --nsamples"
        raise ResourceError("E_DISK", message, hint=hint)


def check_memory(
    plan: RunPlan,
    config: QuantizeConfig,
    host_bytes: int,
    device_bytes: int | None,
    devices: int = 1,
    limits: Sequence[Limit] = (),
) -> None:
    """ResourceError E_OOM if the run does not fit into the free memory.

    `host_bytes` are free on the host, `device_bytes` on the accelerator, None for a run on the CPU.
    `limits` are those of the user that allow less than is free. One batch that waits inside a block
    is counted, and hidden states where they will lie.
    """
    estimate = estimate_least_memory(plan, config, devices)
    on_host = on_device = None
    for limit in limits:
        if limit.option == "--max-ram":
            on_host = limit
        else:
            on_device = limit
    if device_bytes is None:
        _check_fit(without(LIBRARIES, estimate.cpu), host_bytes, "host", on_host)
        return
    _check_fit(without(STATES, estimate.accelerator), device_bytes, "device", on_device)
    states = [term for term in estimate.accelerator if term.what == STATES]
    if total(states) * DEVICE_SHARE > device_bytes:
        _check_fit(states, host_bytes, "host", on_host)


def _check_fit(terms: Sequence[Term], free: int, where: str, limit: Limit | None) -> None:
    """ResourceError E_OOM if these terms take more than is free; the hint names options."""
    needed = total(terms)
    if needed <= free:
        return
    hint = "use a smaller --batch-size, --seqlen or --nsamples"
    available = f"{size(free)} are free"
    if limit is not None:
        available = f"{limit}, and {size(limit.free)} are free"
        larger_limit = limit.way_out(needed)
        if larger_limit is not None and free:
            hint = f"allow more: {larger_limit}, or {hint}"
        elif larger_limit is not None:
            hint = f"allow more: {larger_limit}"
    parts = ", ".join(f"{term.what} {size(term.nbytes)}" for term in terms)
    message = f"about {size(needed)} of {where} memory are needed; {available}: {parts}"
    raise ResourceError("E_OOM", message, hint=hint)


def notes_on_groups(given: QuantizeConfig, config: QuantizeConfig) -> tuple[str, ...]:
    """Return a note about the group size that was chosen, if the user has left it open."""
    if given.group_size == config.group_size:
        return ()
    sizes = ", ".join(map(str, USUAL_GROUP_SIZES))
    return (
        f"group_size {given.group_size} is {config.group_size}, the largest of {sizes} that fits",
    )


def notes_on_output(output: Path) -> list[str]:
    """Return a note about the fate of an output that exists."""
    if status_of(output, writing=True) is None:
        return []
    manifest = None
    with suppress(GptqError):  # if the manifest cannot be read, the run will tell
        manifest = read_manifest(output)
    if manifest is None:
        refused = "unless it is empty or --overwrite is given"
        return [f"`{output}` exists: quantize will refuse it {refused}"]
    return [
        f"`{output}` exists: if this run would write the same, quantize will keep it; "
        "if not, quantize will refuse it unless --overwrite is given"
    ]


def notes_on_limits(plan: RunPlan, config: QuantizeConfig, devices: int) -> list[str]:
    """Return a note for each of --max-ram and --max-vram that is less than the run would like.

    By the rule of `check_memory` a run is refused if it does not even fit with one batch that
    waits inside a block. Between the two a run fits, but fewer batches wait.
    """
    likes = estimate_memory(plan, config, devices)
    needs = estimate_least_memory(plan, config, devices)
    notes = []
    if config.max_ram_bytes is not None and not config.device.startswith("cuda"):
        allowed = config.max_ram_bytes // devices
        notes += _note_on_limit("--max-ram", "the CPU", allowed, needs.cpu, likes.cpu)
    if config.max_vram_bytes is not None and config.device != "cpu":
        needed = without(STATES, needs.accelerator)  # which may lie on the host instead
        allowed = config.max_vram_bytes
        notes += _note_on_limit("--max-vram", "a GPU", allowed, needed, likes.accelerator)
    return notes


def _note_on_limit(
    option: str, device: str, allowed: int, needed: Sequence[Term], wanted: Sequence[Term]
) -> list[str]:
    least, most = size(total(needed)), size(total(wanted))
    if total(needed) > allowed:
        return [f"{option} allows {size(allowed)}, but a run on {device} needs about {least}"]
    if total(wanted) > allowed:
        fewer = "fewer batches will wait inside a block, which is slower"
        return [f"{option} allows {size(allowed)} of the {most} on {device}: {fewer}"]
    return []
