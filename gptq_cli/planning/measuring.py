"""The measurement before an allocation of bits: its text, time, and bytes on the disk. No torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.planning.estimate import (
    GRADIENT_TOKENS,
    forward_bits,
    hidden_size,
    tensors_outside,
)
from gptq_cli.planning.run_plan import RunPlan, bounded
from gptq_cli.planning.seconds import Rates, Seconds, calibration_of, estimate_seconds

SHARE = 4  # the measurement takes a quarter of the windows, but not fewer tokens than these:
LEAST_TOKENS, LEAST_PROBE = 8192, 2048  # of calibration, and of the probe for gradients
# Rounding for the measurement: quick, but with the order and the signs of the run itself
QUICK: dict[str, Any] = {
    "scale_search": "none",
    "refine_sweeps": 0,
    "asymmetric_calibration": 0.0,
    "loss_aware": False,
}


def calibration_windows(config: QuantizeConfig) -> int:
    """Return the number of windows with which layers are rounded.

    A part of the windows of the run is enough. They make as many batches, so that as many processes
    can share them.
    """
    n_batches = math.ceil(config.nsamples / config.batch_size)
    return min(config.nsamples, max(_a_part(config, LEAST_TOKENS), n_batches))


def probe_windows(config: QuantizeConfig) -> int:
    """Return the number of windows on which harms are measured by gradients."""
    most = max(1, GRADIENT_TOKENS // config.seqlen)
    return min(config.nsamples, _a_part(config, LEAST_PROBE), most)


def _a_part(config: QuantizeConfig, least_tokens: int) -> int:
    return max(math.ceil(least_tokens / config.seqlen), math.ceil(config.nsamples / SHARE))


def measuring_disk(plan: RunPlan, config: QuantizeConfig) -> int:
    """Return the most bytes that a measurement by gradients keeps: states, and codes of layers.

    If no dtype was asked for, some CPUs compute it in float32.
    """
    config = bounded(config, plan.source)
    blocks = (plan.n_blocks + 1) * probe_windows(config)
    windows = blocks + 2 * calibration_windows(config)
    bits = 32
    if config.dtype != "auto":
        bits = forward_bits(plan, config)
    states = windows * config.seqlen * hidden_size(plan) * bits // 8
    return states + sum(layer.n_weights for layer in plan.quantized)


def measuring_seconds(plan: RunPlan, config: QuantizeConfig, rates: Rates) -> Seconds:
    """Estimate the time of a measurement by gradients.

    Calibration passes once, and all layers are rounded quickly. The probe passes the blocks forward
    twice and back once, and once more through the errors of all weights.
    """
    config = bounded(config, plan.source)
    layers = []
    for layer in plan.layers:
        if layer.config is not None:
            layer = replace(layer, config=replace(layer.config, **QUICK))
        layers.append(layer)
    text = calibration_of(plan, config.model_copy(update=QUICK))
    tokens = calibration_windows(config) * config.seqlen
    rounding = estimate_seconds(
        layers, replace(text, tokens=tokens), 1, 2 * plan.source.nbytes, rates
    )
    tokens = probe_windows(config) * config.seqlen
    kept = [replace(layer, config=None) for layer in plan.layers]
    once = estimate_seconds(kept, replace(text, tokens=tokens), 1, 0, rates)
    head = max((math.prod(tensor.shape) for tensor in tensors_outside(plan)), default=0)
    nbytes = measuring_disk(plan, config)
    saving = nbytes / rates.writes + nbytes * rates.hash_threads / rates.hashes
    forward = 4 * once.forward + 2 * head * tokens / rates.forward
    return rounding.plus(Seconds(forward=forward, saving=saving))
