"""`gptq allocate`: measure which layers need bits, and write a configuration that gives them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import (
    Console,
    aligned,
    fitted,
    indented_lines,
    on_one_line,
    time_line,
    unread_line,
    with_engines,
)
from gptq_cli.cli.launch import launch_processes, working
from gptq_cli.config.fields import Panel, seconds
from gptq_cli.config.layer import BITS
from gptq_cli.config.resolve import resolve
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import counted, one_of, shell_words, size

if TYPE_CHECKING:
    from gptq_cli.allocation.result import AllocateResult
    from gptq_cli.allocation.run import Entry, MeasuredModel
    from gptq_cli.events import Report
    from gptq_cli.planning.checks import PreparedRun
    from gptq_cli.runtime.device import Worker


ConfigOut = Annotated[
    Path | None,
    o.plain(
        "--output",
        "-o",
        help="configuration to write, for gptq quantize --config",
        panel=Panel.OUTPUT,
        metavar="FILE",
    ),
]
Overwrite = Annotated[
    bool,
    o.plain(
        "--overwrite",
        help="replace a configuration at the output",
        panel=Panel.OUTPUT,
    ),
]


MEANINGS = (  # of words in the table
    "bits = average width of the quantized weights",
    "bpw = bits per quantized weight, with all that is stored for it",
    "expected KL = distance from the predictions of the original, in nats a token",
    "mixed = a width for each unit, with the least expected KL at this average",
)


@o.takes_settings(*o.run_settings())
def allocate(
    model: o.Model,
    *,
    output: ConfigOut = None,
    overwrite: Overwrite = False,
    settings: o.Settings,
    devices: o.Devices = None,
    revision: o.Revision = None,
    resume: o.Resume = None,
    max_runtime: o.MaxRuntime = None,
    config: o.ConfigFile = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure which layers need bits, and choose a width for each.

    Prints size and expected KL for averages of bits. With --bits,
    --target-size or --target-kl it chooses a width for each layer, and -o
    writes them as rules that gptq quantize -c takes.

    Example: gptq allocate ./Qwen3-0.6B --bits 3.5 -o allocation.yaml
    """
    console = Console(as_json, quiet)
    resolved = resolve(settings, os.environ, config, bits=BITS[-1])
    console.show_notes(resolved.notes)
    from gptq_cli.allocation.goals import starting_config
    from gptq_cli.cli.launch import parse_devices
    from gptq_cli.planning.checks import RunOptions, prepare_run

    start = starting_config(resolved.config)
    named = parse_devices(devices)
    options = RunOptions(revision, overwrite, resume or "auto", seconds(max_runtime))
    prepared = prepare_run(model, Path(model), start, options, writes=False)
    place = None
    if output is not None:
        from gptq_cli.allocation.result import check_configuration

        place = check_configuration(output, overwrite=overwrite, has_goal=resolved.has_goal)
    launch_processes(console, prepared, named, Path.cwd())
    if resolved.has_goal:
        show_engines_of_goal(console, resolved.config)
    from gptq_cli.allocation.result import allocated_result
    from gptq_cli.allocation.run import measure_model

    with working(console, prepared, named, output) as (worker, progress):
        measured = measure_model(prepared, resolved.config, progress, worker, place)
    if not worker.team.is_leader:
        return
    goal = None
    if resolved.has_goal:
        goal = resolved.config
    _show(console, allocated_result(measured, goal, output))
    if output is not None:
        words = ["gptq", "quantize", model, "--config", str(output)]
        if revision is not None:
            words += ["--revision", revision]
        console.say(f"next: {shell_words(words)}")


def show_engines_of_goal(console: Console, goal: QuantizeConfig) -> None:
    """Show notes about the engines that the widths of a goal exclude, before they are measured.

    A user who has chosen a target gets none, because only widths that it loads are allowed. If the
    chosen widths exclude the same engines, the plan of the run does not name them again.
    """
    from gptq_cli.allocation.goals import allowed_bits, engines_of_goal

    unread = unread_line(engines_of_goal(goal))
    if goal.target is not None or unread is None:
        return
    console.is_new(unread)
    widths = one_of(allowed_bits(goal))
    console.show_notes(
        [
            f"layers may get {widths} bits; an output with all of these {unread}",
            "with --target ENGINE, layers get only widths that this engine loads",
        ]
    )


def allocated(
    console: Console,
    prepared: PreparedRun,
    goal: QuantizeConfig,
    worker: Worker,
    report: Report,
) -> PreparedRun:
    """Return `prepared` with the widths that meet the goal, which it measures and shows."""
    from gptq_cli.allocation.run import allocate_run

    prepared, measured, chosen = allocate_run(prepared, goal, report, worker)
    if worker.team.is_leader:
        for line in [*_chosen_lines(chosen), *_picture(measured, chosen)]:
            console.say(line)
    return prepared


def _show(console: Console, result: AllocateResult) -> None:
    measured, chosen = result.measured, result.chosen
    from gptq_cli.allocation.goals import about_units

    why = about_units(measured.fusing, measured.base.target)
    count = counted(len(measured.units), "unit")
    lines = [fitted(on_one_line(f"{measured.model}: {count}; {why}")), "", *_table(result)]
    if chosen is not None:
        lines += ["", *_chosen_lines(chosen), *_picture(measured, chosen)]
    lines += ["", time_line(measured.seconds)]
    if result.output is not None:
        lines.append(on_one_line(f"written to {result.output}"))
    short: str | Path = ""
    if result.output is not None:
        short = result.output
    console.result(result.to_json(), "\n".join(lines), short)


def _table(result: AllocateResult) -> list[str]:
    """Return the frontier as lines of a table, with the uniform widths between, and its words."""
    entries = []
    known = set()
    for width, entry in result.uniform.items():
        entries.append((entry, f"all {width} bits"))
        known.add(entry.allocation.widths)
    for entry in result.frontier:
        if entry.allocation.widths not in known:
            entries.append((entry, "mixed"))
    entries.sort(key=lambda pair: (pair[0].allocation.bits, pair[1]))
    rows = [("bits", "size", "bpw", "expected KL", "widths")]
    for entry, what in entries:
        allocation = entry.allocation
        rows.append(
            (
                f"{allocation.bits:.2f}",
                size(allocation.nbytes),
                f"{entry.bits_per_weight:.2f}",
                f"{allocation.kl:.4g}",
                what,
            )
        )
    loads = [entry.loads for entry, _ in entries]
    return [
        *with_engines(aligned(rows, right={0, 1, 2, 3}), loads),
        "",
        *[fitted(line, indent=8) for line in MEANINGS],
    ]


def _chosen_lines(entry: Entry) -> list[str]:
    allocation = entry.allocation
    sizes = f"{size(allocation.nbytes)} ({allocation.nbytes:,} bytes)"
    line = f"chosen: {allocation.bits:.4g} bits on average, {sizes}"
    gap = ""
    if allocation.kl > allocation.bound * (1 + 1e-6):
        gap = f", the least possible is {allocation.bound:.4g} or more"
    return [line, f"expected KL {allocation.kl:.4g}{gap}"]


def _picture(measured: MeasuredModel, chosen: Entry) -> list[str]:
    """Return a line for each kind of unit, with the width in each block."""
    blocks = [unit.block for unit in measured.units]
    first, last = min(blocks), max(blocks)
    rows: dict[str, list[str]] = {}
    for unit, width in zip(measured.units, chosen.allocation.widths, strict=True):
        row = rows.setdefault(unit.kind, [" "] * (last - first + 1))
        row[unit.block - first] = str(width)
    cells = [(kind, "".join(row)) for kind, row in rows.items()]
    return [f"bits of each unit in blocks {first} to {last}:", *indented_lines(aligned(cells))]
