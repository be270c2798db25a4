"""What can be refused before torch is loaded: an output in the way, a checkpoint or a plan that cannot work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gptq_cli.calibration.corpus import DatasetSource, check_source
from gptq_cli.checkpoint.locate import model_directory
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.units import size
from gptq_cli.errors import ResourceError
from gptq_cli.files import expanded, file_errors, files_below
from gptq_cli.planning.estimate import DEVICE_SHARE, LIBRARIES, STATES, Term, estimate_memory, total
from gptq_cli.planning.memory_limit import Limit
from gptq_cli.planning.plan import plan_run
from gptq_cli.planning.run_plan import RunPlan
from gptq_cli.storage.replacing import check_output
from gptq_cli.storage.work_directory import WorkDirectory, refuse_locked


def preflight(model: str, output: Path, config: QuantizeConfig, *, overwrite: bool) -> None:
    """Raise whatever output, headers, rules and a dataset's path tell against a run; a Hub id is looked at after its
    download."""
    directory = model_directory(model)
    check_output(output, directory or expanded(model), overwrite=overwrite, may_be_done=True)
    refuse_locked(output)
    if directory is not None:
        plan_run(directory, config)
    check_source(DatasetSource(config.dataset, config.dataset_config, config.dataset_split, config.text_column))


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
        _check_fit([term for term in estimate.cpu if term.what != LIBRARIES], host_bytes, "host", on_host)
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
