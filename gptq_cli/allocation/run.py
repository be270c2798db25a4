"""`gptq allocate`: measure the harm of each unit, and choose a width for each.

`measure_model` is the measurement from top to bottom. Its result allocates bits for any goal: a
configuration with `dynamic` rules, which `gptq quantize` carries out like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptq_cli.allocation.goals import (
    NO_GOAL,
    about_units,
    allowed_bits,
    at_width,
    fusing_engines,
)
from gptq_cli.allocation.harms import Harms, Measurement, harms_of, reference_width
from gptq_cli.allocation.measure import Measuring, calibrated, open_model, probe_of
from gptq_cli.allocation.rules import with_widths
from gptq_cli.allocation.saved import (
    note_choice,
    read_measurement,
    remove_state,
    write_measurement,
)
from gptq_cli.allocation.solution import Allocation, Allocator, unmeasured
from gptq_cli.allocation.units import Unit, find_units
from gptq_cli.calibration.windows import Windows, check_token_ids
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import LOADS, Verdict
from gptq_cli.events import Noted, PhaseStarted, Report, Warned, WorkKept, ignore
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.checks import PreparedRun
from gptq_cli.planning.plan import plan_checkpoint, refine_plan
from gptq_cli.planning.run_plan import RunPlan, judge_plan
from gptq_cli.quantization.resume import Identity
from gptq_cli.quantization.run import Calibration, how_read, identify_run, request_of
from gptq_cli.quantization.run_state import Limits
from gptq_cli.runtime.device import (
    Worker,
    measuring_dtype,
    report_device,
    report_slow_dtype,
    settle_kernels,
    with_kernels,
)
from gptq_cli.runtime.memory import device_errors
from gptq_cli.storage.manifest import ALLOCATION
from gptq_cli.storage.work_directory import WorkDirectory, read_run, working_on, write_run

REVISION = 7  # counted up if the same model gets another measurement


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
    limits = _limits(prepared, worker)
    with (
        _work_directory(prepared, worker, place, report) as work,
        torch.inference_mode(),
        device_errors(),
    ):
        if worker.team.is_leader:
            report_device(worker.device, goal.device, report, worker.team.size)
            for code, text in prepared.warnings:
                report(Warned(code, text))
        dtype = measuring_dtype(worker.device, goal.dtype, prepared.plan.source)
        stream = open_model(prepared, worker, dtype)
        plan_of = _Plans(prepared, stream).of
        plans = {width: plan_of(at_width(prepared.config, width)) for width in widths}
        fusing = fusing_engines(goal)
        units = find_units(plans, goal.protect, fused=bool(fusing))
        _refuse_unreachable(units, goal, prepared.config, plan_of)
        calibration = calibrated(prepared, worker, report)
        check_token_ids(calibration.windows.ids, stream.vocabulary_rows)
        reference = reference_width(widths)
        probe = probe_of(prepared, worker)
        identity = _identify(prepared, calibration, probe, reference, fusing, worker, report)
        settle_kernels(worker, report)
        kept = Kept.of(prepared, place, work, identity)
        names = [unit.name for unit in units]
        measured = worker.team.broadcast([kept.read(names, report)])[0]
        already_done = measured is not None
        if measured is None:
            _begin(prepared, goal, kept)
            measuring = Measuring(
                prepared,
                plans[reference],
                units,
                calibration,
                probe,
                worker,
                report,
                work,
                identity,
                limits,
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
    if worker.team.is_leader:  # before the measurement, whose dtype may be another
        tokens = goal.nsamples * goal.seqlen
        report_slow_dtype(worker.device, goal.dtype, prepared.plan.source, tokens, report)
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


def _limits(prepared: PreparedRun, worker: Worker) -> Limits:
    """Return the limits of the measurement, which begins now; the leader's end it."""
    if not worker.team.is_leader:
        return Limits(prepared.config)
    return Limits(prepared.config, prepared.options.max_seconds)


class _Plans:
    """The plans of a located model. The last one is kept, since several ask for it in turn."""

    def __init__(self, prepared: PreparedRun, stream: ModelStream) -> None:
        self._source, self._stream = prepared.plan.source, stream
        self._last: tuple[QuantizeConfig, RunPlan] | None = None

    def of(self, config: QuantizeConfig) -> RunPlan:
        """Return the plan of the model under `config`; raise what `plan_checkpoint` raises."""
        if self._last is not None and self._last[0] == config:
            return self._last[1]
        stream = self._stream
        plan = plan_checkpoint(self._source, config)
        linears, stacked = stream.all_linears(), stream.stacked_linears()
        plan = refine_plan(plan, config, linears, stacked, stream.unused)
        self._last = (config, plan)
        return plan


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


def _identify(
    prepared: PreparedRun,
    calibration: Calibration,
    probe: Windows,
    reference: int,
    fusing: Sequence[str],
    worker: Worker,
    report: Report,
) -> Identity:
    """Return everything that the measurement depends on; all processes agree about it."""
    report(PhaseStarted("source", how_read(prepared.plan.source)))
    config = at_width(prepared.config, reference)
    fused = bool(fusing)
    dtype = measuring_dtype(worker.device, config.dtype, prepared.plan.source)
    return identify_run(
        prepared,
        calibration,
        config,
        worker,
        report,
        allocation=REVISION,
        fused_units=fused,
        computed_in=dtype,
        probe_sha256=probe.sha256,
    )


def _begin(prepared: PreparedRun, goal: QuantizeConfig, kept: Kept) -> None:
    """Remove an earlier state if nothing shall resume, and write the call of `gptq resume`.

    The call is that of a run, so `gptq allocate` writes none, and blocks of a run keep theirs.
    """
    work = kept.work
    if work is None:
        return
    if prepared.options.resume == "never":
        remove_state(work)
    if kept.file != work.allocation or work.journal.exists():
        return
    goals = {name: getattr(goal, name) for name in ("bits", *NO_GOAL)}
    config = prepared.config.model_copy(update=goals)
    write_run(work.path, kept.identity, request_of(replace(prepared, config=config), work.output))


def _kept_work(work: WorkDirectory) -> WorkKept | Noted:
    """Return what tells of an unfinished measurement: `gptq resume` knows those of runs only."""
    if read_run(work.path) is not None:
        return WorkKept(work.path, blocks=False)
    return Noted(f"finished work is kept in {work.path}: the same command resumes")


@contextmanager
def _reporting_kept_work(work: WorkDirectory | None, report: Report) -> Iterator[None]:
    """If the body fails, report the work that the next call resumes."""
    try:
        yield
    except BaseException:
        begun = work is not None and work.holds_work() and not work.journal.exists()
        if work is not None and begun:
            report(_kept_work(work))
        raise
