"""A measurement of a tiny model, and what it has found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_cli.allocation.goals import starting_config
from gptq_cli.allocation.run import MeasuredModel, Place, measure_model
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import Report, ignore
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.runtime.device import Worker
from tests.runs import config

WIDTHS = [2, 3, 4]
SIZES = {"nsamples": 4, "batch_size": 2, "seqlen": 64}


def goal(**changes: object) -> QuantizeConfig:
    """Return the settings of a measurement of a second; the goal is an average of 3 bits."""
    settings: dict[str, object] = {"bits": 3, "allow_bits": WIDTHS, **SIZES}
    return config(**(settings | changes))


def measure(
    model: Path,
    wanted: QuantizeConfig,
    file: Path,
    report: Report = ignore,
    worker: Worker | None = None,
    **options: Any,
) -> MeasuredModel:
    """Measure a model at the widths that `wanted` allows; keep the measurement beside `file`."""
    start = starting_config(wanted)
    prepared = prepare_run(str(model), file, start, RunOptions(**options), writes=False)
    return measure_model(prepared, wanted, report, worker, Place.beside(file))


def figures(file: Path) -> dict[str, Any]:
    """Return what the measurement beside `file` has found."""
    content = json.loads(file.with_suffix(".json").read_text())
    found: dict[str, Any] = content["measured"]
    return found
