"""Carry out a measurement: with gradients, or with copies if the model allows no gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor

from gptq_cli.allocation.copies import Copying, probe_shape
from gptq_cli.allocation.first_order import HarmPass
from gptq_cli.allocation.harms import Measurement
from gptq_cli.allocation.saved import MeasuredBlocks, begin_copies, has_begun_copies
from gptq_cli.allocation.units import Unit
from gptq_cli.calibration.windows import Windows
from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import InputError, counted
from gptq_cli.events import PhaseStarted, Report, Resumed, ignore
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.checks import PreparedRun, check_disk, check_temporary
from gptq_cli.planning.measuring import (
    QUICK,
    calibration_windows,
    measuring_disk,
    probe_windows,
    quick_plan,
)
from gptq_cli.planning.run_plan import RunPlan
from gptq_cli.quantization.resume import Identity
from gptq_cli.quantization.reverse_pass import NoGradientError, PassStore, pieces_of
from gptq_cli.quantization.run import Calibration, calibrate
from gptq_cli.quantization.run_state import Limits, Record, Run, SavingTimes
from gptq_cli.runtime.device import Worker
from gptq_cli.runtime.memory import Memory
from gptq_cli.runtime.open_model import DTYPES, open_stream
from gptq_cli.storage.durable import remove
from gptq_cli.storage.manifest import digest
from gptq_cli.storage.work_directory import WorkDirectory


@dataclass(frozen=True, slots=True)
class Measuring:
    """A measurement that has not ended; `plan` is that of the reference width.

    What is finished of it is in `work`; processes without one write nothing.
    """

    prepared: PreparedRun
    plan: RunPlan
    units: Sequence[Unit]
    calibration: Calibration
    probe: Windows  # of a measurement with gradients
    worker: Worker
    report: Report
    work: WorkDirectory | None
    identity: Identity
    limits: Limits  # of the whole measurement

    def carry_out(self, stream: ModelStream) -> Measurement:
        """Measure with gradients; if the model allows none, with copies of the probe."""
        begun = None
        if self.worker.team.is_leader:
            begun = self.work is not None and has_begun_copies(self.work, self.identity)
        if not self.worker.team.broadcast(begun):
            try:
                return self._with_gradients(stream)
            except NoGradientError as error:
                self.report(PhaseStarted("probe", f"copies for each unit, because {error}"))
                if self.work is not None:
                    begin_copies(self.work, self.identity)
                    remove(self.work.harms)
        return self._with_copies()

    def _with_gradients(self, stream: ModelStream) -> Measurement:
        n_windows = probe_windows(self.prepared.config)
        self._report_probe(n_windows, self.prepared.config.seqlen)
        run = self._run(stream, self.limits)
        pieces = pieces_of(cast(Sequence[Tensor], self.probe.batches(n_windows)))
        with self._store() as store:
            self._check_disk(store)
            return HarmPass(run, self.units, pieces, store, self.report).measure()

    def _check_disk(self, store: PassStore | None) -> None:
        """Raise ResourceError E_DISK if the disk cannot hold what the pass keeps in `store`."""
        needed = measuring_disk(self.plan, self.prepared.config)
        if self.work is not None:
            check_disk(self.work, 0, needed)
        elif store is not None:
            check_temporary(store.directory, needed)

    @contextmanager
    def _store(self) -> Iterator[PassStore | None]:
        """Yield the files of the pass; without a work directory they are temporary."""
        with ExitStack() as stack:
            if not self.worker.team.is_leader:
                yield None
                return
            if self.work is not None:
                directory = self.work.harms
            else:
                directory = Path(stack.enter_context(TemporaryDirectory(prefix="gptq-"))) / "pass"
            store = PassStore(directory, digest(self.identity), self.report)
            stack.callback(store.close)
            yield store

    def _with_copies(self) -> Measurement:
        config = self.prepared.config
        # In 16 bits, any change at all changes the last bits of everything behind it; the KL of
        # that is as large as the harm of a unit at 4 bits.
        dtype: str = config.dtype
        if dtype == "auto":
            dtype = "float32"
        stream = open_model(self.prepared, self.worker, dtype)
        n_tokens, seqlen = config.nsamples * config.seqlen, config.seqlen
        shape = probe_shape(n_tokens, len(self.units), seqlen)
        self._report_probe(*shape)
        probe = drawn_probe(self.prepared, self.worker, *shape)
        run = self._run(stream, Limits(config))
        calibrated_in = DTYPES[forward_dtype(self.prepared.plan.source, config.dtype)]
        copying = Copying(run, self.units, probe, calibrated_in, self.report, self.limits)
        if self.work is None:
            return copying.carry_out()
        times = SavingTimes(always=self.limits.has_end)
        with MeasuredBlocks(self.work, self.identity, times, self.report) as saved:
            if saved.n_finished:
                self.report(Resumed(saved.n_finished, stream.n_blocks, self.work.path))
            return copying.carry_out(saved)

    def _report_probe(self, n_windows: int, length: int) -> None:
        windows, units = counted(n_windows, "window"), counted(len(self.units), "unit")
        self.report(PhaseStarted("probe", f"{windows} of {length} tokens for {units}"))

    def _run(self, stream: ModelStream, limits: Limits) -> Run:
        """Return the run that rounds every layer quickly, and keeps nothing."""
        config = self.prepared.config.model_copy(update=QUICK | {"true_sequential": False})
        batches = _batches(self.calibration.windows, _n_batches(self.prepared.config))
        plan, team = quick_plan(self.plan), self.worker.team
        return Run(config, plan, stream, team, batches, Record(ignore), limits)


def open_model(prepared: PreparedRun, worker: Worker, dtype: str) -> ModelStream:
    """Return the located model, whose forward passes compute in `dtype`."""
    config = prepared.config
    host = Memory(torch.device("cpu"), None, config.max_ram_bytes, worker.team.local_world_size)
    return open_stream(
        prepared.plan.source,
        device=worker.device,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        host=host,
    )


def calibrated(prepared: PreparedRun, worker: Worker, report: Report) -> Calibration:
    """Return the calibration windows of the measurement."""
    config = prepared.config
    fewer = config.model_copy(update={"nsamples": calibration_windows(config)})
    calibration = calibrate(prepared.plan.source, fewer, report, worker.team)
    if calibration.windows.images:
        raise InputError(
            "E_DATA_IMAGE",
            "widths are measured on text, but the dataset holds images",
            hint="allocate on text, then quantize with that file: --config FILE --dataset IMAGES",
        )
    return calibration


def probe_of(prepared: PreparedRun, worker: Worker) -> Windows:
    """Return the text of a measurement with gradients."""
    config = prepared.config
    return drawn_probe(prepared, worker, probe_windows(config), config.seqlen)


def drawn_probe(prepared: PreparedRun, worker: Worker, n_windows: int, length: int) -> Windows:
    """Return windows of text beside those of the calibration."""
    drawn = {"nsamples": n_windows, "seqlen": length, "seed": prepared.config.seed + 1}
    config = prepared.config.model_copy(update=drawn)
    return calibrate(prepared.plan.source, config, ignore, worker.team).windows


def _batches(windows: Windows, n_batches: int) -> Sequence[Tensor]:
    """Return `n_batches` of windows, or more if windows have lengths of their own: no padding."""
    if windows.lengths is None:
        return torch.tensor_split(windows.ids.cpu(), n_batches)
    batches = windows.batches(max(1, len(windows.lengths) // n_batches))
    return cast(tuple[Tensor, ...], batches)  # of text


def _n_batches(config: QuantizeConfig) -> int:
    """Return the number of calibration batches of the run."""
    return -(-config.nsamples // config.batch_size)
