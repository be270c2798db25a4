#!/usr/bin/env python3
"""Estimate the seconds of a run on 1 to 64 devices; none of it is measured.

    python scripts/scale_out.py [--preset balanced] [--json FILE]

Uses the cost model of `gptq plan --time` at the rates that `count_gpu_work.py --rates` shows.
Prints a row of Markdown for each model and number of devices: total, forward, Hessian, factor,
solve, network, reading, start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import benchmark_parser, write_json
from shapes import SHAPES, Shape

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.planning.device_rates import H100, cost_model
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.planning.seconds import Calibration, Seconds, estimate_seconds

DEVICES = (1, 2, 4, 8, 16, 64)
DEVICES_OF_A_NODE = 8
MODELS = {
    "8B": "llama-3-8b",
    "70B": "llama-3-70b",
    "405B": "llama-3-405b",
    "1T mixture": "mixture-1t",
}


def layers_of(shape: Shape, config: QuantizeConfig) -> Iterator[LayerPlan]:
    """Plan all linears of a model; those that share an input get one parent module."""
    for block in range(shape.blocks):
        for stage, (columns, rows_of_linears, copies) in enumerate(shape.inputs):
            for copy in range(copies):
                parent = f"mlp.experts.{copy}" if copies > 1 else f"stage_{stage}"
                for number, rows in enumerate(rows_of_linears):
                    name = f"model.layers.{block}.{parent}.linear_{stage}_{number}"
                    size = 2 * rows * columns
                    tensor = TensorInfo(name, "BF16", (rows, columns), Path("none"), 0, size)
                    yield LayerPlan(name, block, rows, columns, config.base, "", tensor)


def estimate(shape: Shape, devices: int, preset: str) -> dict[str, float]:
    """Estimate the seconds of each part of a run, and the total."""
    batch_size = 8 if devices <= 16 else 2  # small batches, so that every device has one
    config = QuantizeConfig(bits=4, preset=preset, batch_size=batch_size)
    layers = list(layers_of(shape, config))
    text = Calibration(
        tokens=config.nsamples * config.seqlen,
        experts_per_token=shape.experts_per_token or 1,
        batches=config.nsamples // batch_size,
        state_bytes=2 * shape.hidden,
        features=shape.hidden,
    )
    n_bytes = sum(2 * layer.out_features * layer.in_features for layer in layers)
    rates = cost_model(H100, config.base)
    if devices > DEVICES_OF_A_NODE:
        rates = replace(rates, network=H100.between_machines)
    seconds = estimate_seconds(layers, text, devices, n_bytes, rates)
    seconds = seconds.plus(Seconds(fixed=rates.ready))
    parts = asdict(seconds)
    del parts["beside"], parts["saving"]  # of the files of a run, of which there are none here
    return {"total": seconds.total, **parts}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--preset", default="balanced")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model, shape in MODELS.items():
        for devices in DEVICES:
            seconds = estimate(SHAPES[shape], devices, arguments.preset)
            rows.append({"model": model, "devices": devices, **seconds})
            cells = " | ".join(f"{part:.0f}" for part in seconds.values())
            print(f"| {model} | {devices} | {cells} |", flush=True)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
