"""What `gptq plan` and `gptq quantize --dry-run` print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from gptq_cli.cli.console import Console, fitted
from gptq_cli.cli.engines import engine_lines
from gptq_cli.cli.table import row_data, row_lines
from gptq_cli.config.resolve import Resolved
from gptq_cli.config.targets import engine_data
from gptq_cli.config.units import clock, size
from gptq_cli.pipeline.estimate import Term, estimate_disk, estimate_memory, estimate_time, total
from gptq_cli.pipeline.naming import default_name
from gptq_cli.pipeline.overview import plan_rows
from gptq_cli.pipeline.plan import plan_checkpoint
from gptq_cli.pipeline.readers import judge_plan, remarks
from gptq_cli.pipeline.run_plan import RunPlan


def show_plan(
    console: Console, resolved: Resolved, model: str, output: Path | None, revision: str | None, devices: int = 1
) -> None:
    """Print the plan of a run, the reasons for it and what it will take of each of so many devices."""
    from gptq_cli.checkpoint.hub import peek_model

    config = resolved.config
    for note in resolved.notes:
        console.say(f"note: {note}")
    source, checkpoint = peek_model(model, revision)
    found = plan_checkpoint(checkpoint, config)
    output = output or Path(default_name(model, config))
    data = {
        "model": source.name,
        "commit": source.commit,
        "output": str(output),
        **_data(found, resolved, output, devices),
    }
    if output.exists():
        console.say(f"note: `{output}` exists: quantize will refuse it if it is not empty and --overwrite is not given")
    disk = data["disk"]
    if disk["free_bytes"] is not None and disk["free_bytes"] < disk["needed_bytes"]:
        console.warn(
            "W_DISK", f"{size(disk['free_bytes'])} are free at `{output}`, {size(disk['needed_bytes'])} needed"
        )
    for code, remark in remarks(found, config):
        console.warn(code, remark)
    text = "\n".join([f"{source.name} -> {output}", "", *_lines(found, resolved, output, devices)])
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
        "seconds": {"estimate": True, "rates": "assumed", **_seconds(plan, resolved, devices)},
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


def _lines(plan: RunPlan, resolved: Resolved, output: Path, devices: int) -> list[str]:
    quantized, kept = plan_rows(plan)
    rows = row_lines([*quantized, *kept])
    memory, disk = estimate_memory(plan, resolved.config, devices), estimate_disk(plan, output)
    seconds = estimate_time(plan, resolved.config, devices)
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
        *([f"source  {plan.plain.how}, decoded while it is read"] if plan.plain.how else []),
        f"size    {size(plan.source.nbytes)} -> {size(plan.layout.nbytes)} ({smaller:.2f}x smaller) in {files}, "
        f"{plan.layout.nbytes} bytes",
        f"bits    {plan.bits_per_weight:.3g} a quantized weight, with scales, zero points and g_idx",
        f"memory  about {size(total(memory.cpu))} on the CPU{each} (estimate):",
        *wrap(_terms(memory.cpu), 78, initial_indent=" " * 10, subsequent_indent=" " * 10),
        f"        about {size(total(memory.accelerator))} on a GPU and {size(total(memory.accelerator_host))} "
        "on its host (estimate, not measured)",
        f"time    {_about(seconds.total)} on {devices} GPU{'s' * (devices > 1)} "
        "(estimate from assumed rates of an H100)",
        f"disk    {size(disk.needed)}{free}",
        *map(fitted, engine_lines(judge_plan(plan, resolved.config))),
    ]


def _about(seconds: float) -> str:
    return f"about {clock(seconds)}" if seconds >= 1 else "less than a second"


def _seconds(plan: RunPlan, resolved: Resolved, devices: int) -> dict[str, float]:
    found = estimate_time(plan, resolved.config, devices)
    return {"total": found.total, **asdict(found)}


def _terms(terms: tuple[Term, ...]) -> str:
    return ", ".join(f"{term.what} {size(term.nbytes)}" for term in terms)


def _peak(terms: tuple[Term, ...]) -> dict[str, Any]:
    return {"peak_bytes": total(terms), "terms": {term.what: term.nbytes for term in terms}}
