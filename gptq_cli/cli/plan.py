"""`gptq plan`, which is `gptq quantize --dry-run`: what a run would do, from headers alone."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.cli.plan_view import show_plan
from gptq_cli.cli.quantize import quantize
from gptq_cli.cli.said import said_fields
from gptq_cli.config.resolve import resolve
from gptq_cli.config.schema import FIELDS

SHARED = {*FIELDS, "model", "output", "revision", "config", "as_json", "quiet"}
WithTime = Annotated[
    bool, o.plain("--time", help="measure this device for a few seconds and estimate the time of a run", panel=o.RUN)
]
Devices = Annotated[
    int, o.plain("--devices", help="how many devices share the work; default 1", panel=o.RUN, metavar="N", min=1)
]


def _as_quantize(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with the parameters of `quantize` that decide about its outcome, as typer sees them."""
    known = inspect.signature(quantize, eval_str=True)
    kept = [parameter for name, parameter in known.parameters.items() if name in SHARED]
    kept.append(inspect.Parameter("devices", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=Devices))
    kept.append(inspect.Parameter("time", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=WithTime))
    function.__signature__ = known.replace(parameters=kept)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in kept}
    return function


@_as_quantize
def plan(**said: Any) -> None:
    """Show what quantize would do, without doing it.

    Reads config.json and the headers of the weights; of a Hub id nothing
    else is downloaded. Takes the options of quantize. Sizes are exact,
    memory is an estimate. With --time this device is measured, to estimate
    how long a run takes.

    Example: gptq plan ./Qwen3-0.6B --bits 4
    """
    resolved = resolve(said_fields(said), os.environ, said["config"])
    console = Console(said["as_json"], said["quiet"])
    show_plan(
        console,
        resolved,
        said["model"],
        said["output"],
        said["revision"],
        devices=said["devices"],
        with_time=said["time"],
    )
