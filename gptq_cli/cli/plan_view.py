"""The output of `gptq plan` and `gptq quantize --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.cli.console import (
    Console,
    counted,
    engine_lines,
    fitted,
    indented_lines,
    on_one_line,
    row_data,
    row_lines,
)
from gptq_cli.cli.plan_text import Text, plan_text, text_lines
from gptq_cli.config.resolve import Resolved
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Verdict, engine_data
from gptq_cli.errors import ConfigError, clock, one_of, size
from gptq_cli.inspection.summary import Row, plan_rows
from gptq_cli.json_values import to_json
from gptq_cli.planning.checks import notes_on_groups, notes_on_limits, notes_on_output, with_lora
from gptq_cli.planning.estimate import (
    Disk,
    Estimate,
    Seconds,
    Term,
    estimate_disk,
    estimate_memory,
    estimate_time,
    total,
)
from gptq_cli.planning.plan import plan_checkpoint, with_group_size
from gptq_cli.planning.run_plan import (
    LayerPlan,
    RunPlan,
    bounded,
    default_name,
    judge_plan,
    remarks,
)


@dataclass(frozen=True, slots=True)
class Shown:
    """The parts of the output: a plan, its rows, and its costs on each of `devices`."""

    plan: RunPlan
    quantized: Sequence[Row]
    kept: Sequence[Row]
    devices: int
    memory: Estimate
    disk: Disk
    seconds: Seconds | None
    engines: Sequence[Verdict]
    texts: list[Text]


def show_plan(
    console: Console,
    resolved: Resolved,
    model: str,
    output: Path | None,
    revision: str | None,
    *,
    devices: int = 1,
    with_time: bool = False,
) -> None:
    """Print the plan of a run on `devices`, with its memory, disk space and serving engines.

    With `with_time`, measure the device of the run and estimate its time.
    """
    from gptq_cli.checkpoint.locate import peek_model

    config = resolved.config
    console.show_notes(resolved.notes)
    source, checkpoint = peek_model(model, revision)
    checkpoint = with_lora(checkpoint, config)
    output = output or Path(default_name(model, config))
    if config.allocates:
        config = _before_allocation(console, checkpoint, config)
    given, config = config, with_group_size(checkpoint, config)
    for note in notes_on_groups(given, config):
        console.say(f"note: {note}")
    plan = plan_checkpoint(checkpoint, config)
    seconds = None
    if with_time:
        seconds = _measured_seconds(plan, config, devices)
    memory, disk = estimate_memory(plan, config, devices), estimate_disk(plan, output)
    engines = judge_plan(plan, config)
    quantized, kept = plan_rows(plan)
    texts = plan_text(
        console,
        bounded(config, checkpoint),
        checkpoint.directory,
        has_tokenizer=source.commit is None,
    )
    found = Shown(plan, quantized, kept, devices, memory, disk, seconds, engines, texts)
    _warn(console, found, config, output)
    names = {"model": source.name, "commit": source.commit, "output": output}
    lines = [on_one_line(f"{source.name} -> {output}"), "", *_lines(found)]
    console.result({**names, **_data(found)}, "\n".join(lines), str(plan.layout.nbytes))


def _before_allocation(
    console: Console, checkpoint: Checkpoint, config: QuantizeConfig
) -> QuantizeConfig:
    """Return the widest settings that layers may get, and note what widths and sizes may be."""
    from gptq_cli.allocation.goals import allowed_bits, sizes, starting_config

    start = starting_config(config)
    least, most = sizes(checkpoint, config)
    widths = one_of(allowed_bits(config))
    console.say(f"note: each layer will get {widths} bits, the output {least} to {most} bytes")
    console.say(f"note: `gptq allocate` measures which; this plan has {start.bits} bits everywhere")
    return start


def _warn(console: Console, found: Shown, config: QuantizeConfig, output: Path) -> None:
    for note in notes_on_output(output) + notes_on_limits(found.plan, config, found.devices):
        console.say(f"note: {note}")
    disk = found.disk
    if disk.free is not None and not disk.fits:
        free, needed = size(disk.free), size(disk.needed)
        console.warn("W_DISK", f"{free} are free at `{output}`, but {needed} are needed")
    for code, remark in remarks(found.plan, config):
        console.warn(code, remark)


def _data(found: Shown) -> dict[str, Any]:
    plan, memory = found.plan, found.memory
    return {
        "blocks": plan.n_blocks,
        "quantized": row_data(found.quantized),
        "kept": row_data(found.kept),
        "layers": layer_data(plan),
        "bits_per_weight": plan.bits_per_weight,
        "source_quantization": plan.plain.how,
        "bytes_before": plan.source.nbytes,
        "bytes_after": plan.layout.nbytes,
        "files": {shard.file: shard.size for shard in plan.layout.shards},
        "memory": {
            "estimate": True,
            "cpu": _peak(memory.cpu),
            "accelerator": _peak(memory.accelerator),
            "accelerator_host": _peak(memory.accelerator_host),
        },
        "devices": found.devices,
        "disk": {"needed_bytes": found.disk.needed, "free_bytes": found.disk.free},
        "engines": engine_data(found.engines),
        "seconds": _seconds_data(found.seconds),
        "text": found.texts,
    }


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


def _lines(found: Shown) -> list[str]:
    plan = found.plan
    rows = row_lines([*found.quantized, *found.kept])
    n_quantized = len(found.quantized)
    lines = ["quantized", *indented_lines(rows[:n_quantized])]
    if found.kept:
        lines += ["unchanged", *indented_lines(rows[n_quantized:])]
    lines.append("")
    if plan.plain.how:
        lines.append(f"source  {on_one_line(plan.plain.how)}, decoded while it is read")
    before, after = plan.source.nbytes, plan.layout.nbytes
    files = counted(len(plan.layout.shards), "file")
    smaller = f"{size(before)} -> {size(after)} ({before / after:.2f}x smaller)"
    lines.append(f"size    {smaller} in {files}, {after} bytes")
    rate = f"{plan.bits_per_weight:.3g} per quantized weight"
    lines.append(f"bits    {rate}, with all that is stored for it")
    lines += text_lines(found.texts)
    lines += _memory_lines(found) + _time_lines(found.seconds) + _disk_lines(found.disk)
    return [*lines, *map(fitted, engine_lines(found.engines))]


def _memory_lines(found: Shown) -> list[str]:
    memory = found.memory
    each = ""
    if found.devices > 1:
        each = f" for each of {found.devices} processes"
    terms = ", ".join(f"{term.what} {size(term.nbytes)}" for term in memory.cpu)
    gpu, host = size(total(memory.accelerator)), size(total(memory.accelerator_host))
    return [
        f"memory  about {size(total(memory.cpu))} on the CPU{each} (estimate):",
        *wrap(terms, 78, initial_indent=" " * 10, subsequent_indent=" " * 10),
        f"        about {gpu} on a GPU and {host} on its host (estimate, not measured)",
    ]


def _disk_lines(disk: Disk) -> list[str]:
    if disk.free is None:
        return [f"disk    {size(disk.needed)}"]
    return [f"disk    {size(disk.needed)}, {size(disk.free)} free"]


def _measured_seconds(plan: RunPlan, config: QuantizeConfig, devices: int) -> Seconds:
    """Measure the device of the run and estimate the time of the run.

    Raise ConfigError E_CFG_CONFLICT for several devices.
    """
    from gptq_cli.runtime.open_model import DTYPES, resolve_device
    from gptq_cli.runtime.rates import measure_rates

    if devices > 1:
        message = f"--time measures one device, but --devices is {devices}"
        raise ConfigError("E_CFG_CONFLICT", message, hint="omit --devices or --time")
    widest = max(plan.quantized, key=lambda layer: layer.in_features)
    assert widest.config is not None
    dtype = DTYPES[forward_dtype(plan.source, config.dtype)]
    device = resolve_device(config.device)
    rates = measure_rates(device, dtype, widest.in_features, widest.config, widest.weight.file)
    return estimate_time(plan, config, rates)


def _time_lines(seconds: Seconds | None) -> list[str]:
    """Return lines about the time of a run, or none if no estimate was requested."""
    if seconds is None:
        return []
    forwards, hessians = clock(seconds.forward), clock(seconds.hessian)
    solving = clock(seconds.factor + seconds.solve)
    parts = f"forwards {forwards}, Hessians {hessians}, solving {solving}"
    return [
        f"time    about {clock(seconds.total)} (estimate from rates measured on this device):",
        f"          {parts}, reading {clock(seconds.reading)}",
    ]


def _seconds_data(seconds: Seconds | None) -> dict[str, Any] | None:
    if seconds is None:
        return None
    return {"estimate": True, "total": seconds.total, **to_json(seconds)}


def _peak(terms: tuple[Term, ...]) -> dict[str, Any]:
    return {"peak_bytes": total(terms), "terms": {term.what: term.nbytes for term in terms}}
