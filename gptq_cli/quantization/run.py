"""`gptq quantize`: read one checkpoint, write one quantized checkpoint.

`carry_out` is the run from top to bottom; `block_loop.py` is its heart. The output holds the
quantized linears, the other tensors (unchanged, or decoded if the source stores them in another
form), the settings, and the model's other files.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gptq_cli.calibration.windows import (
    Part,
    Windows,
    check_token_ids,
    in_order,
    read_parts,
    shortages,
    windows_of,
)
from gptq_cli.checkpoint.headers import PlainReader, TensorInfo
from gptq_cli.checkpoint.layout import Packing
from gptq_cli.checkpoint.locate import ModelSource, model_directory
from gptq_cli.checkpoint.quantization_config import describe, dialect_of
from gptq_cli.checkpoint.reader import encode_alike, open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import check_written, refuse_wrong_numbers
from gptq_cli.checkpoint.writer import CheckpointWriter, write_side_files
from gptq_cli.config.layer import HEAD
from gptq_cli.config.resolve import to_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Verdict, engine_data
from gptq_cli.errors import InputError, __version__, counted, size, to_json
from gptq_cli.events import (
    BlockFinished,
    ExpertsCovered,
    LayerReport,
    PhaseStarted,
    Report,
    RunPlanned,
    Warned,
    ignore,
)
from gptq_cli.files import ByteCount, is_file, resolved
from gptq_cli.models.stream import Batch, ModelStream
from gptq_cli.planning.checks import (
    PreparedRun,
    RunOptions,
    calibration_sources,
    check_disk,
    check_memory,
    check_sharing,
    prepare_run,
)
from gptq_cli.planning.estimate import gradient_disk, saved_states, streamed_bytes
from gptq_cli.planning.plan import check_shared, refine_plan
from gptq_cli.planning.run_plan import (
    LayerPlan,
    RunPlan,
    about_unused,
    judge_plan,
    remarks,
)
from gptq_cli.quantization.block_loop import quantize_all_blocks
from gptq_cli.quantization.resume import (
    BlockStore,
    Identity,
    check_agreement,
    check_resumable,
    finished_output,
    identify,
    marking_failures,
    reporting_kept_work,
)
from gptq_cli.quantization.run_state import FinishedBlocks, Limits, Record, Run, SavingTimes
from gptq_cli.runtime.device import (
    Worker,
    report_device,
    report_slow_dtype,
    settle_kernels,
    with_kernels,
)
from gptq_cli.runtime.memory import Memory, device_errors
from gptq_cli.runtime.open_model import STORED_DTYPES, open_stream
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.storage.durable import remove, write_file
from gptq_cli.storage.manifest import ALLOCATION, CONFIG_FILE, write_manifest
from gptq_cli.storage.replacing import check_output
from gptq_cli.storage.work_directory import WorkDirectory, working_on, write_run


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """The result of a finished run, for scripts. Sizes are in bytes, peaks are taken after blocks.

    `image_windows` of the calibration windows have images.
    `source_quantization` names the form in which the source stores its weights, None if plain.
    `resumed_blocks` blocks were finished by an earlier run; seconds and peaks are those of this
    run. If `already_done`, an earlier run finished the output, and the seconds of layers are 0.
    """

    output: Path
    model: str
    commit: str | None
    config: QuantizeConfig
    layers: tuple[LayerReport, ...]
    experts: tuple[ExpertsCovered, ...]
    blocks: tuple[BlockFinished, ...]
    split_experts: tuple[str, ...]
    engines: tuple[Verdict, ...]
    kept: tuple[str, ...]
    bits_per_weight: float
    tokens: int
    calibration_sha256: str
    image_windows: int
    seconds: float
    source_quantization: str | None
    bytes_before: int
    bytes_after: int
    peak_host_bytes: int
    peak_device_bytes: int
    resumed_blocks: int
    already_done: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {**to_json(self), "engines": engine_data(self.engines)}


def quantize_checkpoint(
    model: str,
    output: Path,
    config: QuantizeConfig,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    resume: str = "auto",
    max_seconds: float | None = None,
    allow_network_fs: bool = False,
    stream_download: bool = False,
    report: Report = ignore,
    worker: Worker | None = None,
) -> QuantizeResult:
    """Quantize MODEL (a directory or a Hub id) into `output`, which appears complete or not at all.

    `resume` "auto" resumes unfinished work of an earlier call if there is any, "require" fails if
    there is none, "never" starts over. With `stream_download` the blocks of a Hub model are fetched
    when they are needed and dropped when they are done. If `output` already is what this call would
    write, it stays untouched. Nothing that existed before is replaced, unless `overwrite` is set
    and the new checkpoint is complete.

    Raises ConfigError, InputError, GateError, ResourceError or ExistsError with a code; PausedError
    if `max_seconds` are over.
    """
    options = RunOptions(
        revision, overwrite, resume, max_seconds, allow_network_fs, stream_download
    )
    return carry_out(prepare_run(model, output, config, options), report, worker)


def carry_out(
    prepared: PreparedRun, report: Report = ignore, worker: Worker | None = None
) -> QuantizeResult:
    """Quantize the model that `prepare_run` has located and planned; return the result.

    All processes of `worker.team` follow these steps. Only the leader writes the output and calls
    `report`.
    """
    started = time.perf_counter()
    config, options, source = prepared.config, prepared.options, prepared.plan.source
    worker = with_kernels(worker, config)
    ranks = worker.team
    # A limit of time ends the leader; the other processes notice that it is gone.
    record, limits = Record(ignore), Limits(config)
    if ranks.is_leader:
        record, limits = Record(report), Limits(config, options.max_seconds, options.spent_seconds)
    with (
        _work_directory(prepared, record, ranks) as work,
        _downloading(source, work, ranks),
        torch.inference_mode(),
        device_errors(),
    ):
        report_device(worker.device, config.device, record, ranks.size)
        if not prepared.allocated:  # the measurement has warned already
            tokens = config.nsamples * config.seqlen
            report_slow_dtype(worker.device, config.dtype, source, tokens, record)
        refuse_wrong_numbers(source)
        stream = _open_stream(prepared, worker)
        for code, text in prepared.warnings:
            record(Warned(code, text))
        for note in prepared.notes:
            record(PhaseStarted("layers", note))
        plan = _refine_plan(prepared, stream, record)
        if work is not None:
            _check_room(work, plan, stream, config, worker)
        calibration = calibrate(source, config, record, ranks)
        stream = _stream_for(calibration, stream, prepared, worker, record)
        check_token_ids(calibration.windows.ids, stream.vocabulary_rows)
        record(PhaseStarted("source", how_read(source)))
        identity = identify_run(prepared, calibration, config, worker, record)
        settle_kernels(worker, record)
        manifest = None
        if work is not None:
            manifest = finished_output(
                work.output, source.directory, identity, record, overwrite=options.overwrite
            )
        if ranks.broadcast(manifest is not None):
            record.take_over(manifest or {})
            limits.check_fallbacks(record.layers)
        else:
            batches = calibration.batches(config, source.directory)
            run = Run(config, plan, stream, ranks, batches, record, limits)
            with _writing_output(run, work, prepared, calibration, identity):
                _with_gradients(run, work, identity)
                quantize_all_blocks(run)
    return _result(prepared, plan, calibration.windows, record, time.perf_counter() - started)


def _with_gradients(run: Run, work: WorkDirectory | None, identity: Identity) -> None:
    """Give `run` the gradients of its loss-aware layers, if there are any left to quantize."""
    if not run.plan.loss_aware or run.saved.complete:
        return
    from gptq_cli.quantization.gradients import sum_gradients

    sum_gradients(run, work, identity)


@contextmanager
def _work_directory(
    prepared: PreparedRun, record: Record, ranks: Ranks
) -> Iterator[WorkDirectory | None]:
    """Lock and yield the work directory of the output; None if this process writes nothing."""
    if not ranks.is_leader:
        yield None
        return
    allow_network_fs = prepared.options.allow_network_fs
    with working_on(prepared.output, record, allow_network_fs=allow_network_fs) as work:
        check_output(
            prepared.output,
            prepared.located.directory,
            overwrite=prepared.options.overwrite,
            may_be_done=True,
        )
        with reporting_kept_work(work, record):
            yield work


@contextmanager
def _downloading(source: Checkpoint, work: WorkDirectory | None, ranks: Ranks) -> Iterator[None]:
    """End the download of a model that is read meanwhile, and remove what is left of it."""
    if source.download is None:
        yield
        return
    check_sharing(source, ranks.size)
    assert work is not None
    try:
        yield
    finally:
        source.download.close()
        if work.is_held():
            remove(work.download)


def how_read(source: Checkpoint) -> str:
    """Return what is done with the weights before the first block."""
    if source.download is None:
        return f"identifying {size(source.nbytes)}"
    return f"downloading {size(source.nbytes)} block by block"


def _open_stream(prepared: PreparedRun, worker: Worker, *, images: bool = False) -> ModelStream:
    config = prepared.config
    return open_stream(
        prepared.plan.source,
        device=worker.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        host=_host(config, worker),
        images=images,
    )


def _stream_for(
    calibration: Calibration,
    stream: ModelStream,
    prepared: PreparedRun,
    worker: Worker,
    report: Report,
) -> ModelStream:
    """Return `stream`, or one with the vision part if there are images to read.

    Warn of the tensors that it does not use.
    """
    if calibration.windows.images and not stream.takes_images:
        stream = _open_stream(prepared, worker, images=True)
    for code, text in about_unused(stream.unused):
        report(Warned(code, text))
    return stream


def _host(config: QuantizeConfig, worker: Worker) -> Memory:
    return Memory(torch.device("cpu"), None, config.max_ram_bytes, worker.team.local_world_size)


def _check_room(
    work: WorkDirectory, plan: RunPlan, stream: ModelStream, config: QuantizeConfig, worker: Worker
) -> None:
    """Raise ResourceError E_DISK or E_OOM if the disk or the memory cannot hold the run."""
    hidden_bytes = config.nsamples * config.seqlen * stream.hidden_size * stream.dtype.itemsize
    downloaded_bytes = 0
    if plan.source.download is not None:
        downloaded_bytes = streamed_bytes(plan)
    saved_bytes = saved_states(plan, hidden_bytes) + gradient_disk(plan, config)
    check_disk(work, plan.layout.nbytes, saved_bytes, downloaded_bytes)
    host, host_limit = _host(config, worker).free_and_limit()
    device, device_limit = None, None
    if worker.device.type == "cuda":
        device, device_limit = Memory(worker.device, config.max_vram_bytes).free_and_limit()
    limits = [limit for limit in (host_limit, device_limit) if limit]
    check_memory(plan, config, host, device, worker.team.size, limits)


def _refine_plan(prepared: PreparedRun, stream: ModelStream, report: Report) -> RunPlan:
    """Refine the plan with the opened model, report it, and warn of what a user should know."""
    config = prepared.config
    # Images may need tensors that this stream does not use: the warning waits for the text.
    plan = refine_plan(prepared.plan, config, stream.all_linears(), stream.stacked_linears(), ())
    check_shared(plan, stream.shared_linears())
    if outside := stream.outside_linears():
        report(Warned("W_ARCH_KEPT", f"{outside}: they stay unquantized"))
    for code, text in remarks(plan, config):
        report(Warned(code, text))
    for name in stream.biased_experts()[:1]:
        text = f"the experts of `{name}` have biases: no engine is known to load them quantized"
        report(Warned("W_ARCH_EXPERTS", f"{text}, but `gptq eval-ppl` does"))
    report(_planned(prepared.located.name, plan, config))
    return plan


def _result(
    prepared: PreparedRun, plan: RunPlan, windows: Windows, record: Record, seconds: float
) -> QuantizeResult:
    return QuantizeResult(
        output=prepared.output,
        model=prepared.located.name,
        commit=prepared.located.commit,
        config=prepared.config,
        layers=tuple(record.layers),
        experts=tuple(record.experts),
        blocks=tuple(record.blocks),
        split_experts=tuple(plan.split_experts),
        engines=judge_plan(plan, prepared.config),
        kept=tuple(layer.name for layer in plan.kept),
        bits_per_weight=plan.bits_per_weight,
        tokens=windows.tokens,
        calibration_sha256=windows.sha256,
        image_windows=len(windows.images),
        seconds=seconds,
        source_quantization=plan.plain.how,
        bytes_before=plan.source.nbytes,
        bytes_after=plan.layout.nbytes,
        peak_host_bytes=record.host_bytes,
        peak_device_bytes=record.device_bytes,
        resumed_blocks=record.resumed_blocks,
        already_done=record.already_done,
    )


def _planned(model: str, plan: RunPlan, config: QuantizeConfig) -> RunPlanned:
    return RunPlanned(
        model=model,
        n_blocks=plan.n_blocks,
        n_quantized=len(plan.quantized),
        n_kept=len(plan.kept),
        bytes_before=plan.source.nbytes,
        bytes_after=plan.layout.nbytes,
        bits_per_weight=plan.bits_per_weight,
        engines=judge_plan(plan, config),
        target=config.target,
    )


def _origin(
    located: ModelSource, calibration: Calibration, source_quantization: str | None
) -> dict[str, Any]:
    """Return the Hub ids of model and datasets, for a model card; local paths are private: None.

    Several datasets are lists of ids and revisions. `source_quantization` is the form in which the
    model stores its weights, None if they are plain.
    """
    model = None
    if located.commit:
        model = located.name
    names: Any = [name for name, _ in calibration.hub_datasets] or None
    revisions: Any = [revision for _, revision in calibration.hub_datasets] or None
    if len(calibration.hub_datasets) == 1:
        [(names, revisions)] = calibration.hub_datasets
    origin = {
        "model": model,
        "commit": located.commit,
        "dataset": names,
        "dataset_revision": revisions,
    }
    if source_quantization is not None:
        origin["source_quantization"] = source_quantization
    return origin


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration windows of a run, with the Hub datasets and revisions that they are from.

    `identity` is what the datasets are known by, in place of their paths: one or a list of several.
    `template_sha256` is the hash of the chat template that the user gave, None without one.
    """

    windows: Windows
    hub_datasets: tuple[tuple[str, str], ...]
    identity: str | list[str]
    template_sha256: str | None = None

    def batches(self, config: QuantizeConfig, directory: Path) -> tuple[Batch, ...]:
        """Return the token ids [batch_size, seqlen] of each batch, on the host.

        The processor of the model in `directory` makes the inputs of batches with images.
        """
        batches = self.windows.batches(config.batch_size)
        if not self.windows.images:
            return cast(tuple[Tensor, ...], batches)
        from gptq_cli.calibration.images import VisionModel, with_model

        return with_model(batches, VisionModel(directory, config.trust_remote_code))

    def identifying(self, config: QuantizeConfig) -> QuantizeConfig:
        """Return `config` with the content of text and chat template in place of their paths."""
        known: dict[str, Any] = {}
        if config.dataset is not None:
            known["dataset"] = self.identity
        if self.template_sha256 is not None:
            known["chat_template"] = f"sha256 {self.template_sha256}"
        return config.model_copy(update=known)


def identify_run(
    prepared: PreparedRun,
    calibration: Calibration,
    config: QuantizeConfig,
    worker: Worker,
    report: Report,
    **extra: Any,
) -> Identity:
    """Return the identity of a run with `config`, with the fields `extra` of its kind.

    Raises what `identify` raises, and InputError E_RANK_MISMATCH if the processes do not agree.
    """
    identity = identify(
        prepared.plan.source,
        prepared.located.commit,
        calibration.identifying(config),
        worker.device,
        calibration.windows.sha256,
        hashed=worker.team.first_here,
        scan=prepared.scan,
        report=report,
    )
    identity |= extra
    check_agreement(worker.team, identity)
    return identity


def calibrate(
    source: Checkpoint, config: QuantizeConfig, report: Report, ranks: Ranks
) -> Calibration:
    """Tokenize the calibration text on the leader, which sends the windows to the other ranks."""
    if not ranks.is_leader:
        import gptq_cli.calibration.images  # noqa: F401  # a process takes classes that it knows

        return ranks.broadcast()
    number = counted(config.nsamples, "window")
    report(PhaseStarted("calibration", f"{number} of {config.seqlen} tokens"))
    parts = read_parts(source.directory, config, calibration_sources(config))
    hub_datasets, windows, known = [], [], []
    template_sha256 = None
    for part in parts:
        report_text(part, report)
    for refused in shortages(parts, config):
        raise refused
    for part in parts:
        windows.append(part.draw(config.seed))
        known.append(part.identity(windows[-1]))
        documents = part.documents
        if documents.revision:
            hub_datasets.append((documents.name, documents.revision))
        if documents.chats is not None:
            template_sha256 = documents.chats.sha256
    identity: str | list[str] = known
    if len(known) == 1:
        identity = known[0]
    rows = in_order(windows, config.seed)
    drawn = windows_of(rows, packed=config.pack)
    calibration = Calibration(drawn, tuple(hub_datasets), identity, template_sha256)
    return ranks.broadcast(calibration)


def report_text(part: Part, report: Report) -> None:
    """Report the text of a dataset, and chats in it that are not read."""
    report(PhaseStarted("text", part.summary))
    if part.documents.beside:
        report(Warned("W_DATA_CHATS", part.documents.about_chats))


def request_of(prepared: PreparedRun, output: Path) -> dict[str, Any]:
    """Return the call that resumes this run from anywhere."""
    directory = model_directory(prepared.model)
    model = prepared.model
    if directory is not None:
        model = str(resolved(directory))
    return {
        "model": model,
        "output": str(output),
        "config": prepared.config.model_dump(mode="json"),
        "revision": prepared.located.commit or prepared.options.revision,
        "overwrite": prepared.options.overwrite,
        "allocated": prepared.allocated,
        "stream_download": prepared.options.stream_download,
        "directory": str(Path.cwd()),  # a dataset may be a path relative to it
    }


@contextmanager
def _writing_output(
    run: Run,
    work: WorkDirectory | None,
    prepared: PreparedRun,
    calibration: Calibration,
    identity: Identity,
) -> Iterator[None]:
    """Save the blocks that the body quantizes; then write the rest of the output and publish it.

    If `work` is None, another process does this.
    """
    plan, record, options = run.plan, run.record, prepared.options
    if work is None:
        run.saved = FinishedBlocks(run.ranks, plan.n_steps)
        yield
        return
    request = request_of(prepared, work.output)
    check_resumable(
        work,
        identity,
        options.resume,
        record,
        model=prepared.located.directory,
        request=request,
    )
    plan.source.check_unchanged()  # since it was opened; again after the last byte was copied
    write_run(work.path, identity, request)
    # A run with a time limit stops between two blocks, so it saves each of them.
    times = SavingTimes(always=options.max_seconds is not None)
    with marking_failures(work):
        with CheckpointWriter(work.stage, plan.layout) as writer:
            with BlockStore(work, identity, writer, record, plan.n_steps, times) as store:
                run.limits.check_fallbacks(record.layers)  # those of resumed blocks
                run.saved = FinishedBlocks(run.ranks, plan.n_steps, store)
                run.keep = partial(_write_layers, writer, plan.packing)
                if plan.source.download is None:
                    writer.copy_beside(_unchanged(plan))
                else:
                    plan.source.download.take = partial(copy_others, writer, plan)
                yield
            record(PhaseStarted("copy", counted(len(plan.copied), "other tensor")))
            copy_others(writer, plan, report=record)
            writer.finish(record)
        work.refuse_gone()
        hashes = identity["source"]["files"]
        write_beside(work.stage, plan, run.config, calibration.windows.sha256, hashes)
        if prepared.allocated and is_file(work.allocation):
            write_file(work.stage / ALLOCATION, work.allocation.read_bytes())
        check_written(work.stage)
        origin = _origin(prepared.located, calibration, plan.plain.how)
        manifest = {"identity": identity, "origin": origin, **record.for_manifest()}
        if dialect_of(run.config.format) is not None:  # which has no quantize_config.json
            manifest["meta"] = _notes(plan, calibration.windows.sha256)
        write_manifest(work.stage, manifest, record, writer.file_hashes)
        plan.source.check_unchanged()
    # A refusal to publish says nothing about the finished work, so it is not marked as failed.
    work.publish(plan.source.directory, overwrite=options.overwrite)


def _write_layers(
    writer: CheckpointWriter, packing: Packing, solved: Sequence[tuple[LayerPlan, QuantizedLinear]]
) -> None:
    """Write solved layers that share their groups, if they have equal shapes and settings.

    On CUDA equal layers are encoded together, in few launches.
    """
    by_kind: dict[Hashable, list[tuple[LayerPlan, QuantizedLinear]]] = {}
    for layer, linear in solved:
        kind: Hashable = layer.name
        if linear.codes.is_cuda:
            kind = (layer.out_features, layer.in_features, layer.config)
        by_kind.setdefault(kind, []).append((layer, linear))
    for alike in by_kind.values():
        config = alike[0][0].config
        assert config is not None
        encoded = encode_alike([linear for _, linear in alike], packing, sym=config.sym)
        for (layer, _), tensors in zip(alike, encoded, strict=True):
            for part, tensor in tensors.items():
                writer.write(f"{layer.name}.{part}", tensor)


def _unchanged(plan: RunPlan) -> list[TensorInfo]:
    """Return the tensors whose bytes are copied; a decoded one would be held in memory as well."""
    decoded = {tensor.name for tensor in plan.decoded}
    return [tensor for tensor in plan.copied if tensor.name not in decoded]


def copy_others(
    writer: CheckpointWriter, plan: RunPlan, prefix: str = "", report: Report = ignore
) -> None:
    """Write the tensors of `plan.copied` with this prefix that are not written yet.

    A tensor is decoded if the source stores it in another form. Raises InputError E_CKPT_NONFINITE
    if a decoded tensor is not finite in its dtype.
    """
    decoded = {tensor.name for tensor in plan.decoded}
    transposed = _decoded_transposed(plan)
    wanted = [tensor for tensor in plan.copied if tensor.name.startswith(prefix)]
    count = ByteCount(report, sum(tensor.nbytes for tensor in wanted))
    reader = open_reader(plan.source)
    for tensor in wanted:
        if writer.is_written(tensor.name):
            count.passed(tensor.nbytes)
            continue
        plan.source.fetch(tensor.name)
        if tensor.name not in decoded:
            writer.copy(tensor, count)
            continue
        weight = _decoded(reader, tensor)
        if tensor.name in transposed:
            weight = weight.T.contiguous()
        writer.write(tensor.name, weight)
        count.passed(tensor.nbytes)


def _decoded_transposed(plan: RunPlan) -> set[str]:
    """Return the tensors that are decoded as [O, I], but which the output stores as [I, O]."""
    names = set()
    for layer in plan.kept:
        if layer.transposed and plan.plain.is_packed(layer.weight.name):
            names.add(layer.weight.name)
    return names


def _decoded(reader: PlainReader, tensor: TensorInfo) -> Tensor:
    weight = reader.read(tensor.name).to(STORED_DTYPES[tensor.dtype])
    if not bool(weight.isfinite().all()):
        raise InputError(
            "E_CKPT_NONFINITE",
            f"`{tensor.name}` has values that are not finite as {tensor.dtype}",
            hint="the checkpoint is damaged: download it again",
        )
    return weight


def write_beside(
    directory: Path,
    plan: RunPlan,
    config: QuantizeConfig,
    calibration_sha256: str,
    hashes: Mapping[str, str],
) -> None:
    """Write the JSON files, the configuration of the run, and the other files of the source.

    Raises InputError E_SOURCE_CHANGED if a file of the source no longer has its hash in `hashes`.
    """
    described, quantize_config = _describe(plan, config, calibration_sha256)
    untie = plan.head is not None
    write_side_files(plan.source, directory, described, quantize_config, untie=untie, hashes=hashes)
    write_file(directory / CONFIG_FILE, to_yaml(config).encode())


def _describe(
    plan: RunPlan, config: QuantizeConfig, calibration_sha256: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the entries of config.json, and the content of quantize_config.json if there is one.

    Notes of this tool stand in quantize_config.json only, because some readers fail on them in
    config.json.
    """
    dialect = dialect_of(config.format)
    if dialect is not None:
        return dialect.describe(plan.linears), None
    kept = [layer.name for layer in plan.kept if layer.name != HEAD]
    copied = [tensor.name for tensor in plan.copied]
    described = describe(config, plan.settings, kept, copied)
    notes = _notes(plan, calibration_sha256)
    return {"quantization_config": described}, described | {"meta": notes}


def _notes(plan: RunPlan, calibration_sha256: str) -> dict[str, Any]:
    """Return the notes about the origin of an output, which no engine reads."""
    meta: dict[str, Any] = {
        "quantizer": [f"gptq_cli:{__version__}"],
        "calibration_sha256": calibration_sha256,
    }
    if plan.source.adapters:
        meta["lora"] = [adapter.provenance() for adapter in plan.source.adapters]
    if plan.plain.how:
        meta["source_quantization"] = plan.plain.how
    return meta
