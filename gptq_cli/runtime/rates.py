"""The rates of this machine's device, measured in a few seconds for `gptq plan --time`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.planning.device_rates import CPU_START_SECONDS, H100, cost_model
from gptq_cli.planning.estimate import (
    factor_cost,
    hessian_cost,
    rows_of_a_part,
    shift_cost,
    solve_products,
)
from gptq_cli.planning.seconds import Rates
from gptq_cli.solver.factor import HessianFactor, prepare
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.numerics import feedback_precision
from gptq_cli.solver.solve import solve
from gptq_cli.storage.manifest import n_threads

SECONDS_EACH = 0.3  # for repeating one piece of work
MOST_COLUMNS = 4096  # of the layer that stands for the model's: a larger one only takes longer
TOKENS = 2048
READ_BYTES = 128 * 2**20
HASHED_BYTES = 32 * 2**20
# What is not measured on a GPU
TAKEN_FROM_AN_H100 = (
    "states",
    "expert_states",
    "followed",
    "copies",
    "kernels",
    "before_kernels",
    "row_turn",
)


def measure_rates(
    device: torch.device, dtype: torch.dtype, in_features: int, config: LayerConfig, file: Path
) -> Rates:
    """Measure the rates of `device` by doing a little of each kind of work.

    The work has the sizes of a layer with `in_features` inputs under `config`. The start of `file`
    is read to measure the disk, or the cache if the file lies there. Two rates are not measured and
    count as infinite: the one between devices, and that of the disk if `file` does not exist, as
    for a model that is not downloaded yet.
    """
    group_size = config.columns_per_group(in_features)
    columns = min(in_features, max(group_size, MOST_COLUMNS // group_size * group_size))
    rows = rows_of_a_part(device.type, in_features)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, columns, generator=generator).to(device, dtype)
    weight = torch.randn(rows, columns, generator=generator).to(device) / columns**0.5
    seen = HessianAccumulator(columns, device)
    seen.add(inputs)
    hessian = seen.hessian
    prepared = prepare(hessian, config, seen.tokens)
    same_dtype = weight.to(dtype)
    forward = _seconds(lambda: inputs @ same_dtype.T, device)
    with feedback_precision(weight):
        product = _seconds(lambda: weight @ hessian, device)
    adding = _seconds(lambda: HessianAccumulator(columns, device).add(inputs), device)
    shifting = math.inf
    if config.asymmetric_calibration:
        both = _seconds(lambda: HessianAccumulator(columns, device).add(inputs, inputs), device)
        shifting = shift_cost(columns, TOKENS) / max(both - adding, both / 100)
    factoring = _seconds(lambda: prepare(hessian, config, TOKENS), device)
    solving = _seconds(lambda: _solved(weight, hessian, prepared, config), device)
    products = solve_products(replace(config, asymmetric_calibration=0.0)) * product
    # Products inside the solver may be faster than alone, so the difference may be too small.
    rounding = max(solving - products, solving / 100)
    wide_factor, others = None, {}
    if device.type == "cuda":
        wide_factor = rows * columns**2 / product  # most of its work is products
        model = cost_model(H100, config)
        others = {name: getattr(model, name) for name in TAKEN_FROM_AN_H100}
    return Rates(
        forward=rows * columns * TOKENS / forward,
        hessian=hessian_cost(columns, TOKENS) / adding,
        factor=factor_cost(columns) / factoring,
        wide_factor=wide_factor,
        shifts_of_rows=device.type == "cuda" and dtype == torch.bfloat16,
        solve=rows * columns**2 / product,
        columns=rows * columns * (1 + config.refine_sweeps) / rounding,
        disk=_reading_rate(file),
        shift=shifting,
        hashes=_hashing_rate(),
        hash_threads=n_threads(),
        start=CPU_START_SECONDS,
        **others,
    )


def _solved(weight: Tensor, hessian: Tensor, prepared: HessianFactor, config: LayerConfig) -> None:
    solve(weight, hessian, prepared, config)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of `work`, repeated for SECONDS_EACH after one call to warm up."""
    work()
    _wait(device)
    started = time.perf_counter()
    calls = 0
    while calls == 0 or time.perf_counter() - started < SECONDS_EACH:
        work()
        _wait(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hashing_rate() -> float:
    """Return the bytes that all threads together hash in a second."""
    data = bytes(HASHED_BYTES)
    started = time.perf_counter()
    sha256(data)
    seconds = time.perf_counter() - started
    return n_threads() * HASHED_BYTES / seconds


def _reading_rate(file: Path) -> float:
    """Return the bytes of `file` that are read in a second."""
    if not file.is_file():
        return math.inf
    started = time.perf_counter()
    with file.open("rb") as stream:
        n_bytes = len(stream.read(READ_BYTES))
    return n_bytes / (time.perf_counter() - started)
