"""The output of `gptq plan` and `gptq quantize --dry-run`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from gptq_cli.cli.console import (
    Console,
    aligned,
    engine_lines,
    fitted,
    indented_lines,
    on_one_line,
    row_lines,
    window,
    with_engines,
)
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import AUTO
from gptq_cli.config.resolve import Resolved
from gptq_cli.errors import clock, counted, size
from gptq_cli.planning.estimate import Disk, DownloadPlan, total
from gptq_cli.preview import PlanResult, TextPlan, preview_run

ENGINES_SHOWN = 24  # columns
HEADS = ("bits", "group", "size", "bpw", "CPU", "GPU")


def show_plan(
    console: Console,
    resolved: Resolved,
    model: str,
    output: Path | None,
    revision: str | None,
    *,
    devices: int = 1,
    with_time: bool = False,
    group_sizes: Sequence[int] | None = None,
) -> None:
    """Print the plan of a run on `devices`; with `with_time`, estimate its time.

    With `group_sizes` it is a table of widths and these group sizes.
    """
    console.show_notes(resolved.notes)
    found = preview_run(
        model,
        resolved.config,
        output,
        revision=revision,
        devices=devices,
        with_time=with_time,
        group_sizes=group_sizes,
        report=Progress(console),
    )
    if found.choices:
        table = _table(found, resolved.config.group_size)
        lines = [on_one_line(f"{found.model}: {_source(found)}"), "", *table]
    else:
        lines = [on_one_line(f"{found.model} -> {found.output}"), "", *_lines(found)]
    console.result(found.to_json(), "\n".join(lines), str(found.bytes_after))
    if found.choices:
        console.say("next: add --bits 4 to see the layers of a row")


def _source(found: PlanResult) -> str:
    plan = found.plan
    layers = counted(len(plan.quantized), "layer")
    return f"{size(found.bytes_before)}, {layers} to quantize in {counted(plan.n_blocks, 'block')}"


def _table(found: PlanResult, group_size: int | str) -> list[str]:
    """Return a row for each choice, with a mark at the plan, and what that is made of.

    `group_size` is that of the configuration.
    """
    planned = {(layer.bits, layer.group_size) for layer in found.plan.settings.values()}
    cells = [HEADS]
    for choice in found.choices:
        mark = ""
        if {(choice.bits, choice.group_size)} == planned:
            mark = "* "
        cells.append(
            (
                f"{mark}{choice.bits}",
                str(choice.group_size),
                size(choice.bytes_after),
                f"{choice.bits_per_weight:.2f}",
                size(total(choice.memory.cpu)),
                size(total(choice.memory.accelerator)),
            )
        )
    numbers = aligned(cells, right=range(len(cells[0])))
    rows = with_engines(numbers, [choice.loads for choice in found.choices], ENGINES_SHOWN)
    marked = "* = the defaults"
    if group_size not in {planned_size for _, planned_size in planned}:
        marked = f"* = the defaults with --group-size {AUTO}"
    below = [
        marked,
        f"size of *: {_parts(found.parts)}",
        *_time_lines(found),
        "bpw = bits per quantized weight, with all that is stored for it",
        "CPU, GPU = memory of a run there (estimate, not measured on a GPU)",
    ]
    return [*rows, "", *[fitted(line, indent=8) for line in below]]


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
    smaller = f"{size(before)} of tensors -> {size(after)} ({before / after:.2f}x smaller)"
    lines.append(f"size    {smaller} in {files}, {after:,} bytes")
    lines.append(f"        {_parts(found.parts)}")
    rate = f"{plan.bits_per_weight:.3g} per quantized weight"
    lines.append(f"bits    {rate}, with all that is stored for it")
    lines += _text_lines(found.text)
    lines += _memory_lines(found) + _time_lines(found)
    lines += _disk_lines(found.disk) + _download_lines(found.download)
    return [fitted(line, indent=8) for line in [*lines, *engine_lines(found.engines)]]


def _parts(parts: Mapping[str, int]) -> str:
    """Return what the size is made of, in parts that have tensors."""
    return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in parts.items() if nbytes)


def _memory_lines(found: PlanResult) -> list[str]:
    memory = found.memory
    each = ""
    if found.devices > 1:
        each = f" for each of {found.devices} processes"
    terms = ", ".join(f"{term.what} {size(term.nbytes)}" for term in memory.cpu)
    width = min(78, window(sys.stdout))
    gpu, host = size(total(memory.accelerator)), size(total(memory.accelerator_host))
    return [
        f"memory  about {size(total(memory.cpu))} on the CPU{each} (estimate):",
        *wrap(terms, width, initial_indent=" " * 10, subsequent_indent=" " * 10),
        f"        about {gpu} on a GPU and {host} on its host (estimate, not measured)",
    ]


def _disk_lines(disk: Disk) -> list[str]:
    parts = f"output {size(disk.output)}, saved hidden states {size(disk.states)}"
    if disk.gradients:
        parts += f", gradients {size(disk.gradients)}"
    if disk.measuring:
        parts += f", before that the measurement {size(disk.measuring)}"
    lines = [f"disk    {size(disk.needed)} while it runs", f"          {parts}"]
    if disk.free is not None:
        lines[0] += f", {size(disk.free)} free"
    return lines


def _download_lines(download: DownloadPlan | None) -> list[str]:
    """Return lines about both ways of downloading, or none for a model that is here."""
    if download is None:
        return []
    fetched, whole = size(download.bytes), size(download.peak_disk_bytes)
    streamed = size(download.streamed_peak_disk_bytes)
    return [
        f"fetch   {fetched}, kept in the Hub's cache: {whole} of disk with the run",
        f"        with --stream-download the same bytes, but {streamed} of disk at most",
    ]


def _time_lines(found: PlanResult) -> list[str]:
    """Return lines about the time of a run, or none if no estimate was requested."""
    seconds = found.seconds
    if seconds is None:
        return []
    forwards, hessians = clock(seconds.forward), clock(seconds.hessian)
    solving = clock(seconds.factor + seconds.solve)
    parts = f"forwards {forwards}, Hessians {hessians}, solving {solving}"
    lines = [
        f"time    at least {clock(seconds.total)} (estimate from rates measured on this device):",
        f"          {parts}, reading {clock(seconds.reading)}, start and checks "
        f"{clock(seconds.fixed)}",
    ]
    if found.measuring is not None:
        before = f"before that the measurement of widths {clock(found.measuring.total)}"
        lines.append(f"          {before}, which is part of the time")
    return lines


def _text_lines(texts: Sequence[TextPlan]) -> list[str]:
    """Return a line for each dataset."""
    return [f"text    {text.summary}" for text in texts]
