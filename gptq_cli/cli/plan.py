"""`gptq plan`, alias `gptq quantize --dry-run`: show the plan of a run, made from headers alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.cli.launch import parse_devices
from gptq_cli.cli.plan_view import show_plan
from gptq_cli.cli.quantize import EVERYDAY
from gptq_cli.config.fields import AUTO, Panel
from gptq_cli.config.resolve import Resolved, resolve
from gptq_cli.planning.plan import USUAL_GROUP_SIZES

WithTime = Annotated[
    bool,
    o.plain(
        "--time",
        help="measure this device for a few seconds and estimate the time of a run",
        panel=Panel.RUN,
    ),
]
Devices = Annotated[
    str | None,
    o.plain(
        "--devices",
        help="number of devices that share the work, or their list as for quantize; default 1",
        panel=Panel.RUN,
        metavar="N",
    ),
]


@o.shows_first("model", *EVERYDAY, "time")
@o.takes_settings(*o.run_settings())
def plan(
    model: o.Model,
    *,
    output: o.Output = None,
    settings: o.Settings,
    devices: Devices = None,
    time: WithTime = False,
    revision: o.Revision = None,
    config: o.ConfigFile = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what quantize would do, without doing it.

    Without --bits it is a table of widths and group sizes. Reads config.json
    and the headers of the weights; for a Hub id nothing else is downloaded.
    Accepts the options of quantize. Sizes are exact, memory is an estimate.
    --time measures this device for a few seconds and estimates the time of
    a run.

    Example: gptq plan ./Qwen3-0.6B
    Example: gptq plan ./Qwen3-0.6B --bits 4 --time
    """
    resolved = resolve(settings, os.environ, config)
    show_plan(
        Console(as_json, quiet),
        resolved,
        model,
        output,
        revision,
        devices=_number_of(devices),
        with_time=time,
        group_sizes=_group_sizes(resolved),
    )


def _number_of(devices: str | None) -> int:
    """Return the number of devices; raise what `parse_devices` raises for a wrong list."""
    if devices is None:
        return 1
    if devices.isdecimal() and int(devices) > 0:
        return int(devices)
    return len(parse_devices(devices))


def _group_sizes(resolved: Resolved) -> Sequence[int] | None:
    """Return the group sizes of a table of widths, None if the user has chosen a width."""
    if resolved.origins["bits"] != "default" or resolved.config.allocates:
        return None
    if resolved.origins["group_size"] == "default" or resolved.config.group_size == AUTO:
        return USUAL_GROUP_SIZES
    return [int(resolved.config.group_size)]
