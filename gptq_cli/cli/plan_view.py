"""The output of `gptq plan` and `gptq quantize --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from gptq_cli.api import plan
from gptq_cli.cli.console import (
    Console,
    counted,
    engine_lines,
    fitted,
    indented_lines,
    on_one_line,
    row_lines,
)
from gptq_cli.cli.progress import Progress
from gptq_cli.config.resolve import Resolved
from gptq_cli.errors import clock, size
from gptq_cli.planning.estimate import Disk, Seconds, total
from gptq_cli.preview import PlanResult, TextPlan


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
    """Print the plan of a run on `devices`; with `with_time`, estimate its time."""
    console.show_notes(resolved.notes)
    found = plan(
        model,
        resolved.config,
        output,
        revision=revision,
        devices=devices,
        time=with_time,
        on_event=Progress(console),
    )
    lines = [on_one_line(f"{found.model} -> {found.output}"), "", *_lines(found)]
    console.result(found.to_json(), "\n".join(lines), str(found.bytes_after))


def _lines(found: PlanResult) -> list[str]:
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
    lines += _text_lines(found.text)
    lines += _memory_lines(found) + _time_lines(found.seconds) + _disk_lines(found.disk)
    return [*lines, *map(fitted, engine_lines(found.engines))]


def _memory_lines(found: PlanResult) -> list[str]:
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


def _text_lines(texts: Sequence[TextPlan]) -> list[str]:
    """Return a line for each dataset."""
    return [fitted(f"text    {text.summary}") for text in texts]
