"""`gptq allocate`: measure the harm of each unit, and choose a width for each.

`measure_model` is the measurement from top to bottom. Its result allocates bits for any goal: a
configuration with `dynamic` rules, which `gptq quantize` carries out like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from gptq_cli.allocation.copies import Copying, probe_shape
from gptq_cli.allocation.first_order import HarmPass
from gptq_cli.allocation.goals import (
    NO_GOAL,
    about_units,
    allowed_bits,
    at_width,
    fusing_engines,
)
from gptq_cli.allocation.harms import Harms, Measurement, harms_of, reference_width
from gptq_cli.allocation.rules import with_widths
from gptq_cli.allocation.saved import (
    MeasuredBlocks,
    note_choice,
    read_measurement,
    remove_state,
    write_measurement,
)
from gptq_cli.allocation.solution import Allocation, Allocator, unmeasured
from gptq_cli.allocation.units import Unit, find_units
from gptq_cli.calibration.windows import Windows, check_token_ids
from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import LOADS, Verdict
from gptq_cli.errors import InputError, counted
from gptq_cli.events import PhaseStarted, Report, Resumed, Warned, WorkKept, ignore
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.checks import PreparedRun, check_disk
from gptq_cli.planning.measuring import (
    QUICK,
    calibration_windows,
    measuring_disk,
    probe_windows,
)
from gptq_cli.planning.plan import plan_checkpoint, refine_plan
from gptq_cli.planning.run_plan import RunPlan, judge_plan
from gptq_cli.quantization.resume import Identity
from gptq_cli.quantization.reverse_pass import NoGradientError, PassStore, pieces_of
from gptq_cli.quantization.run import Calibration, calibrate, how_read, identify_run, request_of
from gptq_cli.quantization.run_state import Limits, Record, Run, SavingTimes
from gptq_cli.runtime.device import (
    Worker,
    report_device,
    report_slow_dtype,
    settle_kernels,
    with_kernels,
)
from gptq_cli.runtime.memory import Memory, device_errors
from gptq_cli.runtime.open_model import DTYPES, open_stream
from gptq_cli.storage.durable import remove
from gptq_cli.storage.manifest import ALLOCATION, Journal, digest
from gptq_cli.storage.work_directory import WorkDirectory, read_run, working_on, write_run

REVISION = 6  # counted up if the same model gets another measurement


@dataclass(frozen=True, slots=True)
class Place:
    """Where a measurement is kept.

    The work directory of `output` holds the state of one that has not ended. `result` gets the
    finished measurement; None stands for a file in the work directory, which then stays for the run
    that follows. `known` are other files that may hold it already.
    """

    output: Path
    result: Path | None = None
    known: tuple[Path, ...] = ()

    @classmethod
    def beside(cls, configuration: Path) -> Place:
        """Return the place for a configuration file: a file of JSON of the same name."""
        return cls(configuration, configuration.with_suffix(".json"))

    @classmethod
    def of_output(cls, output: Path) -> Place:
        """Return the place for a quantized output, which holds its measurement when finished."""
        return cls(output, known=(output / ALLOCATION,))


@dataclass(frozen=True, slots=True)
class Entry:
    """An allocation, the engines that load it, and bits with all that is stored for them."""

    allocation: Allocation
    engines: tuple[Verdict, ...]
    bits_per_weight: float

    @property
    def loads(self) -> list[str]:
        """The names of the engines that load the output."""
        return [verdict.engine for verdict in self.engines if verdict.outcome in LOADS]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON values, without widths and engines."""
        return {
            "bits": self.allocation.bits,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.allocation.nbytes,
            "expected_kl": self.allocation.kl,
            "least_kl": self.allocation.bound,
        }


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A model whose units were measured: it allocates bits for any goal.

    `harms` has the harm of each of `units` by width, `base` the settings beside the widths. The
    parts of what `fusing` engines fuse are one unit; without such an engine, each linear is one. If
    `already_done`, an earlier call has measured.
    """

    model: str
    base: QuantizeConfig
    widths: tuple[int, ...]
    units: tuple[Unit, ...]
    fusing: tuple[str, ...]
    harms: tuple[Harms, ...]
    plan_of: Callable[[QuantizeConfig], RunPlan]
    probe_tokens: int
    seconds: float
    already_done: bool

    def configured(self, chosen: Sequence[int]) -> QuantizeConfig:
        """Return the configuration that gives each unit its width."""
        return with_widths(self.base, self.units, chosen)

    def choose(self, goal: QuantizeConfig) -> Entry:
        """Return the allocation of least harm for a goal; raise E_ALLOC_GOAL if there is none."""
        return self._entry(self._allocator().solve(goal))

    def frontier(self) -> list[Entry]:
        """Return the allocations of least harm in steps of average bits."""
        return list(map(self._entry, self._allocator().frontier()))

    def uniform(self) -> dict[int, Entry]:
        """Return the allocation of one width to all units, for each width."""
        allocator = self._allocator()
        return {width: self._entry(allocator.uniform(width)) for width in self.widths}

    def _allocator(self) -> Allocator:
        def size_of(chosen: Sequence[int]) -> int:
            return self.plan_of(self.configured(chosen)).layout.nbytes

        return Allocator(self.units, self.harms, size_of)

    def _entry(self, allocation: Allocation) -> Entry:
        config = self.configured(allocation.widths)
        plan = self.plan_of(config)
        return Entry(allocation, judge_plan(plan, config), plan.bits_per_weight)


def measure_model(
    prepared: PreparedRun,
    goal: QuantizeConfig,
    report: Report = ignore,
    worker: Worker | None = None,
    place: Place | None = None,
) -> MeasuredModel:
    """Measure the located model of `prepared` at the widths that `goal` allows.

    Without a `place` nothing is kept on the disk. Raises ConfigError E_TARGET or E_ALLOC_GOAL for
    widths that the target does not take, E_ALLOC_GOAL before the text is read for a goal of bits
    or bytes that no choice of widths meets, and what a run raises for model, text and device;
    PausedError if the time of the run is over.
    """
    started = time.perf_counter()
    widths = allowed_bits(goal)
    worker = with_kernels(worker, prepared.config)
    with (
        _work_directory(prepared, worker, place, report) as work,
        torch.inference_mode(),
        device_errors(),
    ):
        if worker.team.is_leader:
            report_device(worker.device, goal.device, report, worker.team.size)
            tokens = goal.nsamples * goal.seqlen
            report_slow_dtype(worker.device, goal.dtype, prepared.plan.source, tokens, report)
            for code, text in prepared.warnings:
                report(Warned(code, text))
        stream = _open(prepared, worker, prepared.config.dtype)
        plan_of = partial(_plan, prepared, stream)
        plans = {width: plan_of(at_width(prepared.config, width)) for width in widths}
        fusing = fusing_engines(goal)
        units = find_units(plans, goal.protect, fused=bool(fusing))
        _refuse_unreachable(units, goal, prepared.config, plan_of)
        calibration = _calibration(prepared, worker, report)
        check_token_ids(calibration.windows.ids, stream.vocabulary_rows)
        reference = reference_width(widths)
        identity = _identify(prepared, calibration, reference, fusing, worker, report)
        settle_kernels(worker, report)
        kept = Kept.of(prepared, place, work, identity)
        names = [unit.name for unit in units]
        measured = worker.team.broadcast([kept.read(names, report)])[0]
        already_done = measured is not None
        if measured is None:
            if work is not None and kept.file == work.allocation:
                _note_begun(prepared, goal, work, identity)
            measuring = Measuring(
                prepared, plans[reference], units, calibration, worker, report, work, identity
            )
            with _reporting_kept_work(work, report):
                measured = measuring.carry_out(stream)
        kept.write(measured)
    return MeasuredModel(
        model=prepared.located.name,
        base=prepared.config,
        widths=tuple(widths),
        units=tuple(units),
        fusing=tuple(fusing),
        harms=tuple(harms_of(units, measured, reference)),
        plan_of=plan_of,
        probe_tokens=measured.tokens,
        seconds=time.perf_counter() - started,
        already_done=already_done,
    )


def allocate_run(
    prepared: PreparedRun,
    goal: QuantizeConfig,
    report: Report = ignore,
    worker: Worker | None = None,
) -> tuple[PreparedRun, MeasuredModel, Entry]:
    """Return `prepared` with the widths that meet the goal, and what was measured and chosen.

    `prepared` is that of `starting_config`. The time that the measurement takes counts as time of
    the run. The output will hold the measurement with the frontier and the choice. Raises what
    `measure_model` and `MeasuredModel.choose` raise.
    """
    worker = with_kernels(worker, prepared.config)
    place = Place.of_output(prepared.output)
    measured = measure_model(prepared, goal, report, worker, place)
    chosen = measured.choose(goal)
    with _work_directory(prepared, worker, place, report) as work:
        if work is not None:
            note_choice(work.allocation, _choice_data(measured, chosen))
    config = measured.configured(chosen.allocation.widths)
    options = replace(prepared.options, spent_seconds=measured.seconds)
    plan = plan_checkpoint(prepared.plan.source, config)
    run = replace(prepared, config=config, plan=plan, options=options, warnings=(), allocated=True)
    return run, measured, chosen


def _choice_data(measured: MeasuredModel, chosen: Entry) -> dict[str, Any]:
    """Return a choice beside the frontier and the uniform widths, for the report of the run."""
    return {
        "units": about_units(measured.fusing, measured.base.target),
        "frontier": [entry.to_json() for entry in measured.frontier()],
        "uniform": [entry.to_json() for entry in measured.uniform().values()],
        "chosen": chosen.to_json(),
    }


@dataclass(frozen=True, slots=True)
class Kept:
    """The file of a finished measurement, and others that may have it; none if nothing is kept."""

    file: Path | None
    others: tuple[Path, ...]
    work: WorkDirectory | None
    identity: Identity

    @classmethod
    def of(
        cls,
        prepared: PreparedRun,
        place: Place | None,
        work: WorkDirectory | None,
        identity: Identity,
    ) -> Kept:
        """Return the files of `place`; with --resume never, they are written but not read."""
        if place is None or work is None:
            return cls(None, (), None, identity)
        file = place.result or work.allocation
        others: tuple[Path, ...] = (file, *place.known)
        if prepared.options.resume == "never":
            others = ()
        return cls(file, others, work, identity)

    def read(self, units: Sequence[str], report: Report) -> Measurement | None:
        """Return the measurement of `units` if an earlier call has finished it."""
        return read_measurement(self.others, self.identity, units, report)

    def write(self, measured: Measurement) -> None:
        """Write the measurement, and remove the state that it needs no more."""
        if self.file is not None and self.work is not None:
            write_measurement(self.file, self.identity, measured)
            remove_state(self.work)


@contextmanager
def _work_directory(
    prepared: PreparedRun, worker: Worker, place: Place | None, report: Report
) -> Iterator[WorkDirectory | None]:
    """Lock and yield the work directory; None if this process keeps nothing."""
    if place is None or not worker.team.is_leader:
        yield None
        return
    allow = prepared.options.allow_network_fs
    keep = place.result is None
    with working_on(place.output, report, allow_network_fs=allow, keep=keep) as work:
        yield work


def _open(prepared: PreparedRun, worker: Worker, dtype: str) -> ModelStream:
    config = prepared.config
    host = Memory(torch.device("cpu"), None, config.max_ram_bytes, worker.team.local_world_size)
    return open_stream(
        prepared.plan.source,
        device=worker.device,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        host=host,
    )


def _plan(prepared: PreparedRun, stream: ModelStream, config: QuantizeConfig) -> RunPlan:
    plan = plan_checkpoint(prepared.plan.source, config)
    return refine_plan(plan, config, stream.all_linears(), stream.stacked_linears(), stream.unused)


def _refuse_unreachable(
    units: Sequence[Unit],
    goal: QuantizeConfig,
    base: QuantizeConfig,
    plan_of: Callable[[QuantizeConfig], RunPlan],
) -> None:
    """Raise ConfigError E_ALLOC_GOAL for a goal that no choice of widths meets."""

    def size_of(chosen: Sequence[int]) -> int:
        return plan_of(with_widths(base, units, chosen)).layout.nbytes

    unmeasured(units, goal, size_of)


def _calibration(prepared: PreparedRun, worker: Worker, report: Report) -> Calibration:
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


def _batches(windows: Windows, n_batches: int) -> Sequence[Tensor]:
    """Return `n_batches` of windows, or more if windows have lengths of their own: no padding."""
    if windows.lengths is None:
        return torch.tensor_split(windows.ids.cpu(), n_batches)
    batches = windows.batches(max(1, len(windows.lengths) // n_batches))
    return cast(tuple[Tensor, ...], batches)  # of text


def _identify(
    prepared: PreparedRun,
    calibration: Calibration,
    reference: int,
    fusing: Sequence[str],
    worker: Worker,
    report: Report,
) -> Identity:
    """Return everything that the measurement depends on; all processes agree about it."""
    report(PhaseStarted("source", how_read(prepared.plan.source)))
    config = at_width(prepared.config, reference)
    fused = bool(fusing)
    return identify_run(
        prepared, calibration, config, worker, report, allocation=REVISION, fused_units=fused
    )


def _note_begun(
    prepared: PreparedRun, goal: QuantizeConfig, work: WorkDirectory, identity: Identity
) -> None:
    """Write the call that `gptq resume` repeats, unless blocks of a run wait for theirs."""
    if work.journal.exists():
        return
    goals = {name: getattr(goal, name) for name in ("bits", *NO_GOAL)}
    config = prepared.config.model_copy(update=goals)
    write_run(work.path, identity, request_of(replace(prepared, config=config), work.output))


@dataclass(frozen=True, slots=True)
class Measuring:
    """A measurement that has not ended; `plan` is that of the reference width.

    What is finished of it is in `work`; processes without one write nothing.
    """

    prepared: PreparedRun
    plan: RunPlan
    units: Sequence[Unit]
    calibration: Calibration
    worker: Worker
    report: Report
    work: WorkDirectory | None
    identity: Identity

    def carry_out(self, stream: ModelStream) -> Measurement:
        """Measure with gradients; if the model allows none, with copies of the probe."""
        begun = None
        if self.worker.team.is_leader:
            begun = self._has_begun_copies()
        if not self.worker.team.broadcast(begun):
            try:
                return self._with_gradients(stream)
            except NoGradientError as error:
                self.report(PhaseStarted("probe", f"copies for each unit, because {error}"))
                if self.work is not None:
                    remove(self.work.harms)
        return self._with_copies()

    def _has_begun_copies(self) -> bool:
        """Return whether an earlier call has found that the model allows no gradients."""
        if self.work is None:
            return False
        journal = Journal(self.work.allocation_journal, digest(self.identity))
        return bool(journal.entries)

    def _with_gradients(self, stream: ModelStream) -> Measurement:
        config = self.prepared.config
        n_windows = probe_windows(config)
        probe = self._probe(n_windows, config.seqlen)
        limits = Limits(config, self.prepared.options.max_seconds)
        run = self._run(stream, limits)
        pieces = pieces_of(cast(Sequence[Tensor], probe.batches(n_windows)))
        with self._store() as store:
            if self.work is not None:
                check_disk(self.work, 0, measuring_disk(self.plan, config))
            return HarmPass(run, self.units, pieces, store, self.report).measure()

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
        stream = _open(self.prepared, self.worker, dtype)
        n_tokens, seqlen = config.nsamples * config.seqlen, config.seqlen
        probe = self._probe(*probe_shape(n_tokens, len(self.units), seqlen))
        run = self._run(stream, Limits(config))
        limits = Limits(config, self.prepared.options.max_seconds)
        calibrated_in = DTYPES[forward_dtype(self.prepared.plan.source, config.dtype)]
        copying = Copying(run, self.units, probe, calibrated_in, self.report, limits)
        if self.work is None:
            return copying.carry_out()
        times = SavingTimes(always=limits.has_end)
        with MeasuredBlocks(self.work, self.identity, times) as saved:
            if saved.n_finished:
                self.report(Resumed(saved.n_finished, stream.n_blocks, self.work.path))
            return copying.carry_out(saved)

    def _probe(self, n_windows: int, length: int) -> Windows:
        """Return windows of text beside those of the calibration."""
        windows, units = counted(n_windows, "window"), counted(len(self.units), "unit")
        self.report(PhaseStarted("probe", f"{windows} of {length} tokens for {units}"))
        config = self.prepared.config
        drawn = {"nsamples": n_windows, "seqlen": length, "seed": config.seed + 1}
        config = config.model_copy(update=drawn)
        return calibrate(self.prepared.plan.source, config, ignore, self.worker.team).windows

    def _run(self, stream: ModelStream, limits: Limits) -> Run:
        """Return the run that rounds every layer quickly, and keeps nothing."""
        config = self.prepared.config.model_copy(update=QUICK | {"true_sequential": False})
        batches = _batches(self.calibration.windows, _n_batches(self.prepared.config))
        plan, team = _quickly(self.plan), self.worker.team
        return Run(config, plan, stream, team, batches, Record(ignore), limits)


@contextmanager
def _reporting_kept_work(work: WorkDirectory | None, report: Report) -> Iterator[None]:
    """If the body fails, report the work that the next call resumes."""
    try:
        yield
    except BaseException:
        begun = work is not None and work.holds_work() and not work.journal.exists()
        if work is not None and begun and read_run(work.path) is not None:
            report(WorkKept(work.path, blocks=False))
        raise


def _n_batches(config: QuantizeConfig) -> int:
    """Return the number of calibration batches of the run."""
    return -(-config.nsamples // config.batch_size)


def _quickly(plan: RunPlan) -> RunPlan:
    """Return `plan` with the settings of quick rounding for every layer."""
    layers = []
    for layer in plan.layers:
        if layer.config is not None:
            layer = replace(layer, config=replace(layer.config, **QUICK))
        layers.append(layer)
    return replace(plan, layers=tuple(layers))
