"""`gptq quantize`: one checkpoint in, one quantized checkpoint out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_cli import __version__
from gptq_cli.calibration.corpus import DatasetSource, load_documents
from gptq_cli.calibration.sampling import Windows, calibration_windows, check_token_ids
from gptq_cli.checkpoint.durable import publish, work_directory, write_file
from gptq_cli.checkpoint.gptq_format import encode
from gptq_cli.checkpoint.hub import locate_model
from gptq_cli.checkpoint.quantization_config import describe
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.writer import CheckpointWriter, write_side_files
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.yaml_writer import to_yaml
from gptq_cli.engine.layer import QuantizedLinear
from gptq_cli.models.stream import ModelStream
from gptq_cli.models.tokenizer import load_encoder
from gptq_cli.pipeline.blocks import quantize_blocks
from gptq_cli.pipeline.events import LayerReport, PhaseStarted, Report, RunPlanned, ignore
from gptq_cli.pipeline.memory import Memory
from gptq_cli.pipeline.plan import HEAD, LayerPlan, RunPlan, plan_checkpoint
from gptq_cli.pipeline.preflight import preflight
from gptq_cli.pipeline.record import Record
from gptq_cli.pipeline.setup import CONFIG_FILE, bounded_seqlen, memory_errors, open_stream, resolve_device


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a script needs to know about a finished run. Sizes in bytes, peaks as seen after each block."""

    output: Path
    model: str
    commit: str | None
    config: QuantizeConfig
    layers: tuple[LayerReport, ...]
    kept: tuple[str, ...]
    bits_per_weight: float
    tokens: int
    calibration_sha256: str
    seconds: float
    bytes_before: int
    bytes_after: int
    peak_host_bytes: int
    peak_device_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "output": str(self.output),
            "config": self.config.model_dump(mode="json"),
            "layers": [asdict(layer) for layer in self.layers],
        }


def quantize_checkpoint(
    model: str,
    output: Path,
    config: QuantizeConfig,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> QuantizeResult:
    """Quantize MODEL (a directory or a Hub id) into the directory `output`, which appears complete or not at all.

    Raises ConfigError, InputError, GateError, ResourceError and ExistsError as their codes say; nothing that existed
    before is touched unless `overwrite` is set and the new checkpoint is complete.
    """
    started = time.perf_counter()
    record = Record(report)
    preflight(model, output, config, overwrite=overwrite)
    device = resolve_device(config.device)
    located = locate_model(model, revision)
    source = open_checkpoint(located.directory)
    plan_checkpoint(source, config)  # a downloaded model has not been looked at before
    seqlen = bounded_seqlen(config.seqlen, said="seqlen" in config.model_fields_set, checkpoint=source)
    config = config.model_copy(update={"seqlen": seqlen})
    with torch.inference_mode(), memory_errors():
        stream = open_stream(source, device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        plan = plan_checkpoint(source, config, stream.all_linears())
        record(_planned(model, plan))
        windows = _calibrate(source, config, stream, record)
        with work_directory(output) as work:
            _write(work, plan, config, stream, windows, record)
            publish(work, output, overwrite=overwrite)
    return QuantizeResult(
        output=output,
        model=located.name,
        commit=located.commit,
        config=config,
        layers=tuple(record.layers),
        kept=tuple(layer.name for layer in plan.kept),
        bits_per_weight=plan.bits_per_weight,
        tokens=windows.tokens,
        calibration_sha256=windows.sha256,
        seconds=time.perf_counter() - started,
        bytes_before=source.nbytes,
        bytes_after=plan.layout.nbytes,
        peak_host_bytes=record.host_bytes,
        peak_device_bytes=record.device_bytes,
    )


def _planned(model: str, plan: RunPlan) -> RunPlanned:
    return RunPlanned(
        model=model,
        n_blocks=plan.n_blocks,
        n_quantized=len(plan.quantized),
        n_kept=len(plan.kept),
        bytes_before=plan.source.nbytes,
        bytes_after=plan.layout.nbytes,
        bits_per_weight=plan.bits_per_weight,
    )


def _calibrate(source: Checkpoint, config: QuantizeConfig, stream: ModelStream, report: Report) -> Windows:
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
    return windows


def _write(
    work: Path, plan: RunPlan, config: QuantizeConfig, stream: ModelStream, windows: Windows, report: Report
) -> None:
    with CheckpointWriter(work, plan.layout) as writer:

        def keep(layer: LayerPlan, linear: QuantizedLinear) -> None:
            for suffix, tensor in encode(linear, config.format).items():
                writer.write(f"{layer.name}.{suffix}", tensor)

        batches: list[Tensor] = list(torch.as_tensor(windows.ids).split(config.batch_size))
        memory = Memory(stream.device, config.max_vram_bytes, config.max_ram_bytes)
        memory.enforce()
        quantize_blocks(
            stream, plan, batches, true_sequential=config.true_sequential, memory=memory, keep=keep, report=report
        )
        report(PhaseStarted("copy", f"{len(plan.copied)} other tensors"))
        for tensor in plan.copied:
            writer.copy(tensor)
        writer.finish()
    names = [layer.name for layer in plan.quantized]
    kept = [layer.name for layer in plan.kept if layer.name != HEAD]
    write_side_files(
        plan.source,
        work,
        describe(config, names, kept),
        {"quantizer": [f"gptq_cli:{__version__}"], "calibration_sha256": windows.sha256},
        untie=HEAD in names,
    )
    write_file(work / CONFIG_FILE, to_yaml(config).encode())
    open_checkpoint(work)  # the headers of what was written agree with each other and with the files
