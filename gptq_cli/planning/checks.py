"""What can be refused before torch is loaded: an output in the way, a checkpoint or a plan that cannot work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.calibration.corpus import DatasetSource, check_source
from gptq_cli.checkpoint.locate import ModelSource, hub_id, locate_model, model_directory
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.finding import size
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, ResourceError
from gptq_cli.files import expanded, file_errors, files_below
from gptq_cli.planning.estimate import (
    DEVICE_SHARE,
    LIBRARIES,
    STATES,
    Limit,
    Term,
    estimate_memory,
    total,
)
from gptq_cli.planning.plan import plan_checkpoint
from gptq_cli.planning.run_plan import RunPlan, bounded
from gptq_cli.storage.replacing import check_output
from gptq_cli.storage.work_directory import WorkDirectory, refuse_locked

RESUME = ("auto", "require", "never")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is done; nothing of it changes a byte of the output.

    `resume` is "auto", "require" or "never"; `max_seconds` None means that the run has all the time.
    """

    revision: str | None = None
    overwrite: bool = False
    resume: str = "auto"
    max_seconds: float | None = None
    allow_network_fs: bool = False


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run of which everything is known that can be known without torch.

    `config` has windows for which the model has positions; `plan` is what headers tell.
    """

    model: str
    output: Path
    config: QuantizeConfig
    options: RunOptions
    located: ModelSource
    plan: RunPlan


def prepare_run(
    model: str, output: Path, config: QuantizeConfig, options: RunOptions, *, writes: bool = True
) -> PreparedRun:
    """Locate the model, open its headers and plan the run; raise whatever these, or the output, tell against it.

    Downloads a model of the Hub. `writes` is false for a process of several that does not touch the output.
    """
    if options.resume not in RESUME:
        hint = "leave it out to resume unfinished work if there is any"
        raise ConfigError(
            "E_CFG_RANGE",
            f"--resume must be auto, require or never, got {options.resume!r}",
            hint=hint,
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
        _check_text(config)
    located = locate_model(model, options.revision)
    if writes and directory is None:
        check_output(output, located.directory, overwrite=options.overwrite, may_be_done=True)
    source = open_checkpoint(located.directory)
    plan = plan_checkpoint(source, config)
    _check_text(config)
    return PreparedRun(model, output, bounded(config, source), options, located, plan)


def _check_text(config: QuantizeConfig) -> None:
    check_source(
        DatasetSource(
            config.dataset, config.dataset_config, config.dataset_split, config.text_column
        )
    )


def check_shares(n_batches: int, n_processes: int) -> None:
    """ConfigError E_CFG_RANKS if there is not a calibration batch for each process."""
    if n_batches < n_processes:
        raise ConfigError(
            "E_CFG_RANKS",
            f"{n_processes} processes cannot share {n_batches} calibration batches",
            hint="use fewer processes, a smaller --batch-size or more --nsamples",
        )


def check_disk(work: WorkDirectory, output_bytes: int, hidden_bytes: int) -> None:
    """ResourceError E_DISK if the disk has no room for the output and two sets of hidden states.

    What an earlier run has written to `work` already counts as free.
    """
    with file_errors(work.path):
        written = sum(path.lstat().st_blocks * 512 for path in files_below(work.path))
        disk = os.statvfs(work.path)
    free = disk.f_bavail * disk.f_frsize + written
    needed = output_bytes + 2 * hidden_bytes
    if needed > free:
        parts = f"{size(output_bytes)} of output, {size(2 * hidden_bytes)} of hidden states"
        raise ResourceError(
            "E_DISK", f"`{work.output.parent}` has {size(free)} free, {size(needed)} are needed: {parts}",
            hint="free some space, write to another disk with -o, or use fewer --nsamples",
        )  # fmt: skip


def check_memory(
    plan: RunPlan,
    config: QuantizeConfig,
    host_bytes: int,
    device_bytes: int | None,
    devices: int = 1,
    limits: Sequence[Limit] = (),
) -> None:
    """ResourceError E_OOM if what must live at once will not fit into so much free memory of the host and, unless that
    is None, of the accelerator.

    `limits` are those of the user that leave less than is free. Of batches that may wait inside a block one is
    counted, and hidden states where they will lie.
    """
    one_waits = config.model_copy(update={"true_sequential": False})
    estimate = estimate_memory(plan, one_waits, devices)
    of_option = {limit.option: limit for limit in limits}
    on_host, on_device = of_option.get("--max-ram"), of_option.get("--max-vram")
    if device_bytes is None:
        _check_fit(
            [term for term in estimate.cpu if term.what != LIBRARIES], host_bytes, "host", on_host
        )
        return
    states = [term for term in estimate.accelerator if term.what == STATES]
    work = [term for term in estimate.accelerator if term.what != STATES]
    _check_fit(work, device_bytes, "device", on_device)
    if total(states) * DEVICE_SHARE > device_bytes:
        _check_fit(states, host_bytes, "host", on_host)


def _check_fit(terms: Sequence[Term], free: int, where: str, limit: Limit | None) -> None:
    needed = total(terms)
    if needed > free:
        parts = ", ".join(f"{term.what} {size(term.nbytes)}" for term in terms)
        room = f"{limit}, and {size(limit.free)} are free" if limit else f"{size(free)} are free"
        more = limit.way_out(needed) if limit else None
        hint = less = "use a smaller --batch-size, --seqlen or --nsamples"
        if more:
            hint = f"allow more: {more}" + (f", or {less}" if free else "")
        raise ResourceError(
            "E_OOM", f"about {size(needed)} of {where} memory are needed; {room}: {parts}", hint=hint
        )  # fmt: skip
