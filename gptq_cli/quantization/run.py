"""`gptq quantize`: one checkpoint in, one quantized checkpoint out.

The output holds quantized linears, and beside them other tensors as they were or decoded, settings,
other files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_cli.calibration.corpus import DatasetSource, Documents, load_documents
from gptq_cli.calibration.windows import Windows, calibration_windows, check_token_ids, load_encoder
from gptq_cli.checkpoint.codec import encode
from gptq_cli.checkpoint.decodable import open_decodable, refuse_wrong_numbers
from gptq_cli.checkpoint.locate import ModelSource, locate_model, model_directory
from gptq_cli.checkpoint.quantization_config import describe
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.verify import check_written
from gptq_cli.checkpoint.writer import CheckpointWriter, write_side_files
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Verdict, engine_data
from gptq_cli.config.units import size
from gptq_cli.config.yaml_writer import to_yaml
from gptq_cli.errors import InputError, __version__
from gptq_cli.events import ExpertsCovered, LayerReport, PhaseStarted, Report, RunPlanned, Warned, ignore
from gptq_cli.files import expanded, resolved
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.checks import check_disk, check_memory
from gptq_cli.planning.plan import check_shared, plan_checkpoint
from gptq_cli.planning.run_plan import HEAD, LayerPlan, RunPlan, bounded
from gptq_cli.planning.serving_warnings import judge_plan, remarks
from gptq_cli.quantization.block_loop import do_blocks
from gptq_cli.quantization.identity import Identity, check_agreement, identify, with_calibration
from gptq_cli.quantization.resume import (
    FinishedBlocks,
    SavedBlocks,
    SavingTimes,
    check_resumable,
    finished_output,
    marking_failures,
    telling_what_is_kept,
)
from gptq_cli.quantization.run_record import FallbackLimit, Record, TimeLimit
from gptq_cli.runtime.memory import Memory, device_errors
from gptq_cli.runtime.open_model import STORED_DTYPES, open_stream, resolve_device
from gptq_cli.runtime.ranks import SINGLE_PROCESS, Ranks, Worker
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.storage.durable import write_file
from gptq_cli.storage.manifest import CONFIG_FILE, write_manifest
from gptq_cli.storage.replacing import check_output
from gptq_cli.storage.work_directory import WorkDirectory, working_on, write_run

NOTHING_TO_DO = torch.empty(0, 0, dtype=torch.long)  # instead of token ids


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a script needs to know about a finished run. Sizes in bytes, peaks as seen after each block.

    `source_quantization` tells how a source that is not plain is stored. `resumed_blocks` were finished before; seconds
    and peaks are those of this run. With `already_done` the output was complete before, and a layer's seconds are 0.
    """

    output: Path
    model: str
    commit: str | None
    config: QuantizeConfig
    layers: tuple[LayerReport, ...]
    experts: tuple[ExpertsCovered, ...]
    split_experts: tuple[str, ...]
    engines: tuple[Verdict, ...]
    kept: tuple[str, ...]
    bits_per_weight: float
    tokens: int
    calibration_sha256: str
    seconds: float
    source_quantization: str | None
    bytes_before: int
    bytes_after: int
    peak_host_bytes: int
    peak_device_bytes: int
    resumed_blocks: int
    already_done: bool

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "output": str(self.output),
            "config": self.config.model_dump(mode="json"),
            "layers": [asdict(layer) for layer in self.layers],
            "experts": [asdict(layer) for layer in self.experts],
            "engines": engine_data(self.engines),
        }


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
    report: Report = ignore,
    place: Worker | None = None,
) -> QuantizeResult:
    """Quantize MODEL (a directory or a Hub id) into the directory `output`, which appears complete or not at all.

    Goes on where an earlier call that ended early has come to, unless `resume` is "never"; with "require" it must. An
    output that is what this call would write is left as it is. PausedError when `max_seconds` are over. This is the
    leading process of a team, at `place`, if that is given; the others call `assist`.

    Raises ConfigError, InputError, GateError, ResourceError and ExistsError as their codes say; nothing that existed
    before is touched unless `overwrite` is set and the new checkpoint is complete.
    """
    started = time.perf_counter()
    limit = FallbackLimit(report if max_seconds is None else TimeLimit(report, max_seconds), config)
    record = Record(limit)
    place = place or Worker(SINGLE_PROCESS, resolve_device(config.device))
    team, device = place.team, place.device
    working = working_on(output, record, allow_network_fs=allow_network_fs)
    with working as work, telling_what_is_kept(work, record):
        located, source = _source(model, revision, output, overwrite=overwrite)
        plan_checkpoint(source, config)  # a downloaded model has not been looked at before
        refuse_wrong_numbers(source)
        config = bounded(config, source)
        record(PhaseStarted("source", f"identifying {size(source.nbytes)}"))
        identity = identify(source, located.commit, config, device)
        check_agreement(team, identity)
        finished_output(work.output, source.directory, identity, overwrite=overwrite)
        check_resumable(work, identity, resume, record, model=located.directory, early=True)
        with torch.inference_mode(), device_errors():
            stream = _open_stream(source, config, place)
            plan = _plan(source, config, stream, record)
            record(_planned(model, plan, config))
            _check_room(work, plan, config, stream, place)
            windows, documents = _calibrate(source, config, stream, record)
            source.check_unchanged()
            identity = with_calibration(identity, windows)
            manifest = finished_output(work.output, source.directory, identity, overwrite=overwrite)
            if manifest is None:
                check_resumable(work, identity, resume, record, model=located.directory)
                request = _request(model, work.output, config, located.commit or revision, overwrite)
                write_run(work.path, identity, request)
                team.broadcast(windows.ids)
                origin = _origin(located, documents)
                times = SavingTimes(always=max_seconds is not None)  # it will be stopped between two blocks
                with marking_failures(work):
                    _write(work, plan, config, stream, windows, identity, origin, record, team, times)
                    source.check_unchanged()
                work.publish(source.directory, overwrite=overwrite)
            else:
                team.broadcast(NOTHING_TO_DO)
                record.take_over(manifest)
                limit.check(record.layers)
    return _result(output, located, config, plan, windows, record, time.perf_counter() - started)


def _source(model: str, revision: str | None, output: Path, *, overwrite: bool) -> tuple[ModelSource, Checkpoint]:
    """The model, which may be downloaded first; refused, before and after, if `output` is no place for this run."""
    check_output(output, model_directory(model) or expanded(model), overwrite=overwrite, may_be_done=True)
    located = locate_model(model, revision)
    check_output(output, located.directory, overwrite=overwrite, may_be_done=True)
    return located, open_checkpoint(located.directory)


def _open_stream(source: Checkpoint, config: QuantizeConfig, place: Worker) -> ModelStream:
    return open_stream(
        source, device=place.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code,
        host=_host(config, place),
    )  # fmt: skip


def _host(config: QuantizeConfig, place: Worker) -> Memory:
    return Memory(torch.device("cpu"), None, config.max_ram_bytes, place.team.local_world_size)


def _check_room(work: WorkDirectory, plan: RunPlan, config: QuantizeConfig, stream: ModelStream, place: Worker) -> None:
    """ResourceError E_DISK or E_OOM if disk or memory will not suffice."""
    check_disk(work, plan.layout.nbytes, (1 + plan.asymmetric) * _hidden_bytes(config, stream))
    host, host_limit = _host(config, place).free_and_limit()
    device, device_limit = None, None
    if place.device.type == "cuda":
        device, device_limit = Memory(place.device, config.max_vram_bytes).free_and_limit()
    limits = [limit for limit in (host_limit, device_limit) if limit]
    check_memory(plan, config, host, device, place.team.size, limits)


def _plan(source: Checkpoint, config: QuantizeConfig, stream: ModelStream, report: Report) -> RunPlan:
    """The plan with the model at hand, and warnings of what stays or will not be loaded."""
    outside = stream.outside_linears()
    plan = plan_checkpoint(source, config, stream.all_linears(), stream.stacked_linears(), stream.unused)
    check_shared(plan, stream.shared_linears())
    if outside:
        report(Warned("W_ARCH_KEPT", f"{outside}: they stay as they are"))
    for code, text in remarks(plan, config):
        report(Warned(code, text))
    for name in stream.biased_experts()[:1]:
        says = f"the experts of `{name}` have biases: no engine is known to load them quantized, `gptq eval-ppl` does"
        report(Warned("W_ARCH_EXPERTS", says))
    return plan


def _result(
    output: Path,
    located: ModelSource,
    config: QuantizeConfig,
    plan: RunPlan,
    windows: Windows,
    record: Record,
    seconds: float,
) -> QuantizeResult:
    return QuantizeResult(
        output=output,
        model=located.name,
        commit=located.commit,
        config=config,
        layers=tuple(record.layers),
        experts=tuple(record.experts),
        split_experts=tuple(plan.split_experts),
        engines=judge_plan(plan, config),
        kept=tuple(layer.name for layer in plan.kept),
        bits_per_weight=plan.bits_per_weight,
        tokens=windows.tokens,
        calibration_sha256=windows.sha256,
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


def _origin(located: ModelSource, documents: Documents) -> dict[str, str | None]:
    """What the run took from the Hub, for a model card; None for what lies on this machine, whose path is nobody's."""
    dataset = documents.name if documents.revision else None
    return {
        "model": located.name if located.commit else None,
        "commit": located.commit,
        "dataset": dataset,
        "dataset_revision": documents.revision,
    }


def _calibrate(
    source: Checkpoint, config: QuantizeConfig, stream: ModelStream, report: Report
) -> tuple[Windows, Documents]:
    report(PhaseStarted("calibration", f"{config.nsamples} windows of {config.seqlen} tokens"))
    encoder = load_encoder(source.directory, trust_remote_code=config.trust_remote_code)
    documents = load_documents(
        DatasetSource(
            dataset=config.dataset,
            config=config.dataset_config,
            split=config.dataset_split,
            text_column=config.text_column,
            purpose="calibration",
        )
    )
    windows = calibration_windows(
        documents,
        encoder,
        seqlen=config.seqlen,
        nsamples=config.nsamples,
        seed=config.seed,
        bos_token_id=encoder.bos_token_id,
    )
    check_token_ids(windows.ids, stream.vocabulary_rows)
    return windows, documents


def _hidden_bytes(config: QuantizeConfig, stream: ModelStream) -> int:
    return config.nsamples * config.seqlen * stream.hidden_size * stream.dtype.itemsize


def _request(model: str, output: Path, config: QuantizeConfig, revision: str | None, overwrite: bool) -> dict[str, Any]:
    """The call that goes on with this run from anywhere."""
    directory = model_directory(model)
    return {
        "model": model if directory is None else str(resolved(directory)),
        "output": str(output),
        "config": config.model_dump(mode="json"),
        "revision": revision,
        "overwrite": overwrite,
        "directory": str(Path.cwd()),  # a dataset may be a path relative to it
    }


def _write(
    work: WorkDirectory,
    plan: RunPlan,
    config: QuantizeConfig,
    stream: ModelStream,
    windows: Windows,
    identity: Identity,
    origin: dict[str, str | None],
    record: Record,
    team: Ranks,
    times: SavingTimes,
) -> None:
    """Everything of the output but its name."""
    with CheckpointWriter(work.stage, plan.layout) as writer:
        with SavedBlocks(work, identity, writer, record, plan.n_steps, team, times) as saved:

            def keep(layer: LayerPlan, linear: QuantizedLinear) -> None:
                for suffix, tensor in encode(linear, config.format).items():
                    writer.write(f"{layer.name}.{suffix}", tensor)

            team.broadcast(saved.first)
            do_blocks(stream, plan, config, windows.ids, keep, saved, record, team)
        record(PhaseStarted("copy", f"{len(plan.copied)} other tensors"))
        copy_others(writer, plan)
        record(PhaseStarted("verify", size(plan.layout.nbytes)))
        writer.finish()
    work.refuse_gone()
    write_beside(work.stage, plan, config, windows.sha256, identity["source"]["files"])
    check_written(work.stage)
    layers = [{key: value for key, value in asdict(layer).items() if key != "seconds"} for layer in record.layers]
    experts = [asdict(covered) for covered in record.experts]
    write_manifest(work.stage, {"identity": identity, "origin": origin, "layers": layers, "experts": experts})


def assist(model: str, config: QuantizeConfig, place: Worker, *, revision: str | None = None) -> None:
    """Do this process's share of what another one does with `quantize_checkpoint`; nothing is written here."""
    team, device = place.team, place.device
    located = locate_model(model, revision)
    source = open_decodable(located.directory)
    config = bounded(config, source)
    check_agreement(team, identify(source, located.commit, config, device, hashed=team.first_here))
    with torch.inference_mode(), device_errors():
        stream = _open_stream(source, config, place)
        plan = _plan(source, config, stream, ignore)
        ids: Tensor = team.broadcast()
        if ids.numel():
            finished = FinishedBlocks(team, team.broadcast(), plan.n_steps)
            do_blocks(stream, plan, config, ids.cpu(), lambda *_: None, finished, ignore, team)


def copy_others(writer: CheckpointWriter, plan: RunPlan) -> None:
    """Write every tensor of `plan.copied`; InputError E_CKPT_NONFINITE if a decoded one is not finite in its dtype."""
    decoded = {tensor.name for tensor in plan.decoded}
    turned = {layer.weight.name for layer in plan.kept if layer.transposed and plan.plain.is_packed(layer.weight.name)}
    reader = open_reader(plan.source)
    for tensor in plan.copied:
        if tensor.name not in decoded:
            writer.copy(tensor)
            continue
        weight = reader.read(tensor.name).to(STORED_DTYPES[tensor.dtype])
        if not bool(weight.isfinite().all()):
            raise InputError(
                "E_CKPT_NONFINITE", f"`{tensor.name}` has values that are not finite as {tensor.dtype}",
                hint="the checkpoint is damaged: download it again",
            )  # fmt: skip
        writer.write(tensor.name, weight.T.contiguous() if tensor.name in turned else weight)


def write_beside(
    directory: Path, plan: RunPlan, config: QuantizeConfig, calibration_sha256: str, hashes: Mapping[str, str]
) -> None:
    """config.json and its like, the configuration of the run, and the files that the source has beside its weights.

    `hashes` are those by which the source is identified; InputError E_SOURCE_CHANGED if a file has another one.
    """
    names = [layer.name for layer in plan.quantized]
    kept = [layer.name for layer in plan.kept if layer.name != HEAD]
    meta: dict[str, Any] = {"quantizer": [f"gptq_cli:{__version__}"], "calibration_sha256": calibration_sha256}
    meta |= {"source_quantization": plan.plain.how} if plan.plain.how else {}
    described = describe(config, names, kept)
    write_side_files(plan.source, directory, described, meta, untie=HEAD in names, hashes=hashes)
    write_file(directory / CONFIG_FILE, to_yaml(config).encode())
