"""The time of a whole run: its blocks as counted, and what is done before and after them.

The parts of a run, beside its blocks, and what would make each of them shorter:

start     Python imports torch and transformers, while the model is read and hashed; kernels are
          compiled from the moment on at which torch is there
source    the rest of the kernels is compiled, or the rest of the model is hashed, whichever takes
          longer: kernels of an earlier run are cached, and a model of the Hub has known hashes, so
          its numbers are only checked
saving    hidden states are written for a run that resumes, in a twentieth of the time at most
beside    while blocks are quantized, a thread copies the tensors that are not quantized, makes the
          output durable, reads it back and hashes it: what of this takes longer than the blocks
verify    the tensors of the last block are made durable, and are read back one by one
gradients a loss-aware run takes gradients first: it reads the model twice, meanwhile computes, and
          writes and hashes what it keeps
manifest  one thread hashes the rest of a file, from the first tensor of the last block on
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapes import Shape, write_sparse_model

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.planning.device_rates import DeviceRates, cost_model
from gptq_cli.planning.plan import plan_run
from gptq_cli.planning.seconds import (
    beside_seconds,
    estimate_time,
    fixed_seconds,
    gradient_seconds,
    saving_seconds,
)


def whole_run(
    shape: Shape, config: QuantizeConfig, rates: DeviceRates, block_seconds: float
) -> dict[str, Any]:
    """Return the seconds of the parts of a run of all blocks, each of which takes as long.

    `cached_seconds` are those of a run that finds its kernels compiled, `plan_seconds` the estimate
    of the cost model that `gptq plan --time` uses, at these rates.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_sparse_model(model, shape, shape.blocks)
        plan = plan_run(model, config)
        known = cost_model(rates, config.base)
        blocks = shape.blocks * block_seconds
        beside = max(0.0, beside_seconds(plan, known) - blocks)
        parts = {"blocks": blocks, "beside": beside, **fixed_seconds(plan, known)}
        parts["saving"] = saving_seconds(plan, config, known, blocks)
        if plan.loss_aware:
            passing = gradient_seconds(plan, config, known)
            parts["gradients"] = max(passing.working, passing.reading) + passing.saving
        cached = fixed_seconds(plan, replace(known, kernels=rates.cached_kernel_seconds))
        planned = estimate_time(plan, config, replace(known, network=float("inf")))
    seconds = sum(parts.values())
    return {
        "run_seconds": seconds,
        "cached_seconds": seconds - parts["source"] + cached["source"],
        "plan_seconds": planned.total,
        "parts": parts,
    }


def lines(found: dict[str, Any], blocks: int) -> Iterator[str]:
    """Yield the lines that show the parts of a run, longest first."""
    for name, seconds in sorted(found["parts"].items(), key=lambda item: -item[1]):
        yield f"{name:10} {seconds:8.1f} s"
    planned = f"{found['plan_seconds']:.0f} s by the cost model of `gptq plan --time`"
    yield f"a run of {blocks} blocks takes {found['run_seconds']:.0f} s (estimated); {planned}"
    yield f"with kernels that an earlier run compiled: {found['cached_seconds']:.0f} s (estimated)"
