"""`gptq allocate`: measure which layers need bits, and write a configuration that gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, aligned, indented_lines, on_one_line
from gptq_cli.cli.quantize import SETTINGS, launch_processes, working
from gptq_cli.config.fields import Panel, seconds
from gptq_cli.config.resolve import resolve, shortened_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import engine_data
from gptq_cli.errors import ConfigError, ExistsError, clock, size
from gptq_cli.json_values import to_json

if TYPE_CHECKING:
    from gptq_cli.allocation.harms import Harms
    from gptq_cli.allocation.run import Entry, MeasuredModel, Place
    from gptq_cli.allocation.units import Unit
    from gptq_cli.events import Report
    from gptq_cli.planning.checks import PreparedRun
    from gptq_cli.runtime.ranks import Worker

SUFFIXES = (".yaml", ".yml")
MOST_BITS = 8  # without a goal the average has no other limit

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


@o.takes_settings(*SETTINGS)
def allocate(
    model: o.Model,
    *,
    output: ConfigOut = None,
    overwrite: o.Overwrite = False,
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
    resolved = resolve(settings, os.environ, config, bits=MOST_BITS)
    console.show_notes(resolved.notes)
    has_goal = resolved.config.allocates or resolved.origins["bits"] != "default"
    from gptq_cli.allocation.goals import starting_config
    from gptq_cli.cli.launch import parse_devices
    from gptq_cli.planning.checks import RunOptions, prepare_run

    start = starting_config(resolved.config)
    named = parse_devices(devices)
    options = RunOptions(revision, overwrite, resume or "auto", seconds(max_runtime))
    prepared = prepare_run(model, Path(model), start, options, writes=False)
    place = None
    if output is not None:
        place = _check_output(output, overwrite=overwrite, has_goal=has_goal)
    launch_processes(console, prepared, named, Path.cwd())
    from gptq_cli.allocation.run import measure_model

    chosen = None
    with working(console, prepared, named) as (worker, progress):
        measured = measure_model(prepared, resolved.config, progress, worker, place)
    if not worker.team.is_leader:
        return
    if has_goal:
        chosen = measured.choose(resolved.config)
    if output is not None and chosen is not None:
        _write(output, measured, chosen)
    _show(console, measured, chosen, output)


def _check_output(output: Path, *, overwrite: bool, has_goal: bool) -> Place:
    """Return the place of the measurement beside `output`; refuse to write what was not asked."""
    from gptq_cli.allocation.run import Place

    if not has_goal:
        message = f"there is no goal, so `{output}` cannot have a width for each layer"
        hint = "add a goal: --bits 3.5, --target-size 4GB or --target-kl 0.02"
        raise ConfigError("E_ALLOC_GOAL", message, hint=hint)
    if output.suffix not in SUFFIXES:
        message = f"`{output}` must be a YAML file"
        raise ConfigError("E_CFG_FILE", message, hint=f"name it {output.with_suffix('.yaml')}")
    if output.exists() and not overwrite:
        raise ExistsError("E_OUT_EXISTS", f"`{output}` exists", hint="replace it: --overwrite")
    place = Place.beside(output)
    if place.result is not None:
        _check_result(place.result, overwrite=overwrite)
    return place


def _check_result(file: Path, *, overwrite: bool) -> None:
    """Refuse to write the measurement over a file that is none, whose name nobody has given."""
    from gptq_cli.allocation.saved import may_write_measurement

    if may_write_measurement(file):
        return
    code = "E_OUT_EXISTS"
    if overwrite:
        code = "E_OUT_FOREIGN"
    message = f"`{file}` would hold the measurement, but it exists and is no measurement of gptq"
    raise ExistsError(code, message, hint="choose another -o, or move this file")


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


def _write(output: Path, measured: MeasuredModel, chosen: Entry) -> None:
    """Write the configuration of the chosen widths."""
    from gptq_cli.storage.durable import write_file

    allocation = chosen.allocation
    head = (
        f"# gptq allocate: {allocation.bits:.4g} bits on average, {allocation.nbytes} bytes,\n"
        f"# expected KL {allocation.kl:.3g}; gptq quantize MODEL --config {output.name} uses it\n"
    )
    config = measured.configured(allocation.widths)
    write_file(output, (head + shortened_yaml(config)).encode())


def _show(
    console: Console, measured: MeasuredModel, chosen: Entry | None, output: Path | None
) -> None:
    frontier, uniform = measured.frontier(), measured.uniform()
    lines = [on_one_line(f"{measured.model}: {len(measured.units)} units"), ""]
    lines += aligned(_rows(frontier, uniform), right={0, 1, 2, 3})
    config = None
    if chosen is not None:
        lines += ["", *_chosen_lines(chosen), *_picture(measured, chosen)]
        config = measured.configured(chosen.allocation.widths)
    lines += ["", f"time {clock(measured.seconds)}"]
    data = {
        "output": to_json(output),
        "model": measured.model,
        "units": list(map(_unit_data, measured.units, measured.harms)),
        "frontier": list(map(_entry_data, frontier)),
        "uniform": {str(width): _entry_data(entry) for width, entry in uniform.items()},
        "chosen": None if chosen is None else _chosen_data(measured, chosen),
        "config": to_json(config),
        "probe_tokens": measured.probe_tokens,
        "seconds": measured.seconds,
    }
    short: str | Path = ""
    if output is not None:
        short = output
    console.result(data, "\n".join(lines), short)


def _rows(frontier: Sequence[Entry], uniform: Mapping[int, Entry]) -> list[tuple[str, ...]]:
    """Return the frontier as rows of a table, with the uniform widths between."""
    entries = []
    known = set()
    for width, entry in uniform.items():
        entries.append((entry, f"all {width} bits"))
        known.add(entry.allocation.widths)
    for entry in frontier:
        if entry.allocation.widths not in known:
            entries.append((entry, "mixed"))
    entries.sort(key=lambda pair: (pair[0].allocation.bits, pair[1]))
    rows: list[tuple[str, ...]] = [
        ("bits", "size", "per weight", "expected KL", "widths", "loads in")
    ]
    for entry, what in entries:
        allocation = entry.allocation
        rows.append(
            (
                f"{allocation.bits:.2f}",
                size(allocation.nbytes),
                f"{entry.bits_per_weight:.2f}",
                f"{allocation.kl:.4g}",
                what,
                ", ".join(entry.loads) or "no engine",
            )
        )
    return rows


def _chosen_lines(entry: Entry) -> list[str]:
    allocation = entry.allocation
    sizes = f"{size(allocation.nbytes)} ({allocation.nbytes} bytes)"
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


def _unit_data(unit: Unit, harms: Harms) -> dict[str, Any]:
    return {
        "name": unit.name,
        "block": unit.block,
        "layers": list(unit.layers),
        "weights": unit.n_weights,
        "bytes": _by_width(unit.nbytes),
        "harm": _by_width(harms),
    }


def _by_width(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(width): value for width, value in values.items()}


def _chosen_data(measured: MeasuredModel, chosen: Entry) -> dict[str, Any]:
    names = [unit.name for unit in measured.units]
    return _entry_data(chosen) | {"widths": dict(zip(names, chosen.allocation.widths, strict=True))}


def _entry_data(entry: Entry) -> dict[str, Any]:
    return entry.to_json() | {"engines": engine_data(entry.engines)}
