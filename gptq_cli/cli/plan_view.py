"""What `gptq plan` and `gptq quantize --dry-run` print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from gptq_cli.cli.console import Console, engine_lines, fitted, on_one_line, row_data, row_lines
from gptq_cli.config.finding import clock, size
from gptq_cli.config.resolve import Resolved
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import engine_data
from gptq_cli.errors import ConfigError
from gptq_cli.files import status_of
from gptq_cli.inspection.summary import plan_rows
from gptq_cli.planning.estimate import (
    Seconds,
    Term,
    estimate_disk,
    estimate_memory,
    estimate_time,
    forward_dtype,
    total,
)
from gptq_cli.planning.plan import plan_checkpoint
from gptq_cli.planning.run_plan import RunPlan, default_name, judge_plan, remarks


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
    """Print the plan of a run, the reasons for it and what it takes of each of so many devices.

    With `with_time` the device of the run is measured first, to estimate how long the run takes on it.
    """
    from gptq_cli.checkpoint.locate import peek_model

    config = resolved.config
    for note in resolved.notes:
        console.say(f"note: {note}")
    source, checkpoint = peek_model(model, revision)
    found = plan_checkpoint(checkpoint, config)
    output = output or Path(default_name(model, config))
    seconds = None
    if with_time:
        seconds = _measured_seconds(found, config, devices)
    data = {
        "model": source.name,
        "commit": source.commit,
        "output": str(output),
        **_data(found, resolved, output, devices),
        "seconds": _seconds_data(seconds),
    }
    if status_of(output, writing=True) is not None:
        console.say(
            f"note: `{output}` exists: quantize will refuse it if it is not empty and --overwrite is not given"
        )
    disk = data["disk"]
    if disk["free_bytes"] is not None and disk["free_bytes"] < disk["needed_bytes"]:
        console.warn(
            "W_DISK",
            f"{size(disk['free_bytes'])} are free at `{output}`, {size(disk['needed_bytes'])} needed",
        )
    for code, remark in remarks(found, config):
        console.warn(code, remark)
    text = "\n".join(
        [
            on_one_line(f"{source.name} -> {output}"),
            "",
            *_lines(found, resolved, output, devices, seconds),
        ]
    )
    console.result(data, text, str(found.layout.nbytes))


def _data(plan: RunPlan, resolved: Resolved, output: Path, devices: int) -> dict[str, Any]:
    config = resolved.config
    quantized, kept = plan_rows(plan)
    memory, disk = estimate_memory(plan, config, devices), estimate_disk(plan, output)
    return {
        "blocks": plan.n_blocks,
        "quantized": row_data(quantized),
        "kept": row_data(kept),
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
        "devices": devices,
        "disk": {"needed_bytes": disk.needed, "free_bytes": disk.free},
        "engines": engine_data(judge_plan(plan, resolved.config)),
    }


def layer_data(plan: RunPlan) -> list[dict[str, Any]]:
    """Every linear of a plan as plain JSON values."""
    return [
        {
            "name": layer.name,
            "block": layer.block,
            "shape": [layer.out_features, layer.in_features],
            "bits": layer.config.bits if layer.config else None,
            "group_size": layer.config.group_size if layer.config else None,
            "why": layer.why,
        }
        for layer in plan.layers
    ]


def _lines(
    plan: RunPlan, resolved: Resolved, output: Path, devices: int, seconds: Seconds | None
) -> list[str]:
    quantized, kept = plan_rows(plan)
    rows = row_lines([*quantized, *kept])
    memory, disk = estimate_memory(plan, resolved.config, devices), estimate_disk(plan, output)
    each = f" for each of {devices} processes" if devices > 1 else ""
    files = f"{len(plan.layout.shards)} file" + ("s" if len(plan.layout.shards) > 1 else "")
    free = f", {size(disk.free)} free" if disk.free is not None else ""
    smaller = plan.source.nbytes / plan.layout.nbytes
    return [
        "quantized",
        *(f"  {line}" for line in rows[: len(quantized)]),
        *(["stays as it is"] if kept else []),
        *(f"  {line}" for line in rows[len(quantized) :]),
        "",
        *(
            [f"source  {on_one_line(plan.plain.how)}, decoded while it is read"]
            if plan.plain.how
            else []
        ),
        f"size    {size(plan.source.nbytes)} -> {size(plan.layout.nbytes)} ({smaller:.2f}x smaller) in {files}, "
        f"{plan.layout.nbytes} bytes",
        f"bits    {plan.bits_per_weight:.3g} a quantized weight, with scales, zero points and g_idx",
        f"memory  about {size(total(memory.cpu))} on the CPU{each} (estimate):",
        *wrap(_terms(memory.cpu), 78, initial_indent=" " * 10, subsequent_indent=" " * 10),
        f"        about {size(total(memory.accelerator))} on a GPU and {size(total(memory.accelerator_host))} "
        "on its host (estimate, not measured)",
        *_time_lines(seconds),
        f"disk    {size(disk.needed)}{free}",
        *map(fitted, engine_lines(judge_plan(plan, resolved.config))),
    ]


def _measured_seconds(plan: RunPlan, config: QuantizeConfig, devices: int) -> Seconds:
    """Measure the device of the run and estimate its time; ConfigError E_CFG_CONFLICT for several devices."""
    from gptq_cli.runtime.open_model import DTYPES, resolve_device
    from gptq_cli.runtime.rates import measure_rates

    if devices > 1:
        message = f"--time measures one device, but --devices is {devices}"
        raise ConfigError("E_CFG_CONFLICT", message, hint="leave out --devices or --time")
    widest = max(plan.quantized, key=lambda layer: layer.in_features)
    assert widest.config is not None
    dtype = DTYPES[forward_dtype(plan, config)]
    device = resolve_device(config.device)
    rates = measure_rates(device, dtype, widest.in_features, widest.config, widest.weight.file)
    return estimate_time(plan, config, rates)


def _time_lines(seconds: Seconds | None) -> list[str]:
    """Lines about the time of a run; none if it was not asked for."""
    if seconds is None:
        return []
    solving = clock(seconds.factor + seconds.solve)
    parts = (
        f"forwards {clock(seconds.forward)}, Hessians {clock(seconds.hessian)}, solving {solving}"
    )
    return [
        f"time    about {clock(seconds.total)} (estimate from rates measured on this device):",
        f"          {parts}, reading {clock(seconds.reading)}",
    ]


def _seconds_data(seconds: Seconds | None) -> dict[str, float | bool] | None:
    if seconds is None:
        return None
    return {"estimate": True, "total": seconds.total, **asdict(seconds)}


def _terms(terms: tuple[Term, ...]) -> str:
    return ", ".join(f"{term.what} {size(term.nbytes)}" for term in terms)


def _peak(terms: tuple[Term, ...]) -> dict[str, Any]:
    return {"peak_bytes": total(terms), "terms": {term.what: term.nbytes for term in terms}}
