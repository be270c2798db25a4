"""`gptq plan`, alias `gptq quantize --dry-run`: show the plan of a run, made from headers alone."""

from __future__ import annotations

import os
from typing import Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.cli.plan_view import show_plan
from gptq_cli.cli.quantize import EVERYDAY, SETTINGS
from gptq_cli.config.fields import Panel
from gptq_cli.config.resolve import resolve

WithTime = Annotated[
    bool,
    o.plain(
        "--time",
        help="measure this device for a few seconds and estimate the time of a run",
        panel=Panel.RUN,
    ),
]
Devices = Annotated[
    int,
    o.plain(
        "--devices",
        help="number of devices that share the work; default 1",
        panel=Panel.RUN,
        metavar="N",
        min=1,
    ),
]


@o.shows_first("model", *EVERYDAY, "time")
@o.takes_settings(*SETTINGS)
def plan(
    model: o.Model,
    *,
    output: o.Output = None,
    settings: o.Settings,
    devices: Devices = 1,
    time: WithTime = False,
    revision: o.Revision = None,
    config: o.ConfigFile = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what quantize would do, without doing it.

    Reads config.json and the headers of the weights; for a Hub id nothing
    else is downloaded. Accepts the options of quantize. Sizes are exact,
    memory is an estimate. --time measures this device for a few seconds
    and estimates the time of a run.

    Example: gptq plan ./Qwen3-0.6B --bits 4
    """
    resolved = resolve(settings, os.environ, config)
    show_plan(
        Console(as_json, quiet), resolved, model, output, revision, devices=devices, with_time=time
    )
