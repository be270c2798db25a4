"""The measurement before an allocation of bits: its text, time, and bytes on the disk. No torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from gptq_cli.config.layer import expert_part
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.planning.estimate import (
    CODE,
    FLOAT,
    GRADIENT_TOKENS,
    HESSIAN_SHARE,
    LIBRARIES,
    LIBRARIES_BYTES,
    STATES,
    Estimate,
    Term,
    batches_each,
    forward_bits,
    largest_block,
    pass_disk,
    pass_terms,
    solving_bytes,
    state_bytes,
    total,
)
from gptq_cli.planning.run_plan import RunPlan, bounded
from gptq_cli.planning.seconds import (
    Rates,
    Seconds,
    calibration_of,
    estimate_seconds,
    pass_seconds,
)

SHARE = 4  # the measurement takes a quarter of the windows, but not fewer tokens than these:
LEAST_TOKENS, LEAST_PROBE = 8192, 2048  # of calibration, and of the probe for gradients
# Rounding for the measurement: quick, but with the order and the signs of the run itself
QUICK: dict[str, Any] = {
    "scale_search": "none",
    "refine_sweeps": 0,
    "asymmetric_calibration": 0.0,
    "loss_aware": False,
}


def quick_plan(plan: RunPlan) -> RunPlan:
    """Return `plan` with the settings of quick rounding for every layer."""
    layers = []
    for layer in plan.layers:
        if layer.config is not None:
            layer = replace(layer, config=replace(layer.config, **QUICK))
        layers.append(layer)
    return replace(plan, layers=tuple(layers))


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


def _as_measured(plan: RunPlan, config: QuantizeConfig) -> QuantizeConfig:
    """Return `config` with windows that fit the model, and with the dtype of the measurement.

    If no dtype was asked for, some CPUs measure in float32, and no other dtype takes more.
    """
    config = bounded(config, plan.source)
    if config.dtype == "auto":
        return config.model_copy(update={"dtype": "float32"})
    return config


def measuring_disk(plan: RunPlan, config: QuantizeConfig) -> int:
    """Return the most bytes that a measurement by gradients keeps.

    These are the states of the probe, those of the calibration around two blocks, and codes with a
    scale and a zero point of 4 bytes for each group.
    """
    config = _as_measured(plan, config)
    tokens = probe_windows(config) * config.seqlen
    calibration = state_bytes(plan, config, calibration_windows(config) * config.seqlen)
    codes = 0
    for layer in plan.quantized:
        assert layer.config is not None
        columns = layer.config.columns_per_group(layer.in_features)
        codes += layer.n_weights + 8 * layer.n_weights // columns
    # Three states of the calibration are there before the last two states of the probe.
    more = max(0, calibration - state_bytes(plan, config, tokens))
    return pass_disk(plan, config, tokens) + calibration + 2 * more + codes


def measuring_seconds(plan: RunPlan, config: QuantizeConfig, rates: Rates) -> Seconds:
    """Estimate the time of a measurement by gradients.

    Calibration passes once, and all layers are rounded quickly. The probe passes in reverse, and
    once more through the errors of all weights. States of the calibration and codes are written.
    """
    config = _as_measured(plan, config)
    text = calibration_of(plan, config.model_copy(update=QUICK))
    tokens = calibration_windows(config) * config.seqlen
    layers = quick_plan(plan).layers
    rounding = estimate_seconds(layers, replace(text, tokens=tokens), 1, 0, rates)
    kept = plan.n_blocks * state_bytes(plan, config, tokens)
    kept += sum(layer.n_weights for layer in plan.quantized)
    probe = probe_windows(config) * config.seqlen
    return rounding.plus(pass_seconds(plan, config, probe, kept, rates, extra_products=1))


def with_measuring(
    estimate: Estimate, plan: RunPlan, config: QuantizeConfig, devices: int = 1
) -> Estimate:
    """Return the memory of a run, or of the measurement before it where that takes more."""
    on_cpu, on_device = estimate.cpu, estimate.accelerator
    libraries = Term(LIBRARIES, LIBRARIES_BYTES)
    for terms in measuring_terms(plan, config, "cpu", devices):
        on_cpu = max(on_cpu, (libraries, *terms), key=total)
    for terms in measuring_terms(plan, config, "cuda", devices):
        on_device = max(on_device, terms, key=total)
    return replace(estimate, cpu=on_cpu, accelerator=on_device)


def measuring_terms(
    plan: RunPlan, config: QuantizeConfig, device: str, devices: int
) -> list[tuple[Term, ...]]:
    """Return what a measurement holds on a type of device, in each of `devices` processes.

    It is what a pass in reverse over the probe holds, inside a block and at the end, and the states
    of the calibration. In reverse there are errors of all weights of the block, too. While the
    block is rounded, there are its rounded weights and their codes, and Hessians of all its linears
    at once.
    """
    config = bounded(config, plan.source)
    if device == "cpu":
        config = _as_measured(plan, config)
    nbytes, block = forward_bits(plan, config) // 8, largest_block(plan)
    tokens = math.ceil(calibration_windows(config) / devices) * config.seqlen
    states = Term(STATES, state_bytes(plan, config, tokens))
    inside, at_the_end = pass_terms(plan, config, probe_windows(config) * config.seqlen)
    most = max(layer.n_weights for layer in plan.layers)
    rounded = Term("rounded weights", block * (nbytes + CODE))
    errors = Term("errors of weights", block * nbytes + 2 * most * FLOAT)
    solver = Term("solver", _rounding_bytes(plan, config, device, devices))
    return [
        (states, *inside, rounded, solver),
        (states, *inside, errors),
        (states, *at_the_end),
    ]


def _rounding_bytes(plan: RunPlan, config: QuantizeConfig, device: str, devices: int) -> int:
    """Return the bytes of Hessians of all linears of a block, and of the solver beside them.

    Before a block is solved, as many sums of batches wait as in a run, but for all of its linears.
    """
    quick = quick_plan(plan)
    stages = set()
    for layer in quick.quantized:
        if not expert_part(layer.name):
            stages.add((layer.block, layer.name.rpartition(".")[0], layer.in_features))
    numbers: Counter[int] = Counter()
    for block, _, in_features in stages:
        numbers[block] += in_features**2
    hessians = int(HESSIAN_SHARE * max(numbers.values(), default=0)) * FLOAT
    waiting = hessians * batches_each(config, devices).bit_length()
    solver = solving_bytes(quick, config.model_copy(update=QUICK), device, devices)
    return max(waiting, hessians + solver)
