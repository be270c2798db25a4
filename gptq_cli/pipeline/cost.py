"""The amount of computation in a run, and how long it takes at given rates. Needs no torch.

Work is counted in multiplications with an addition. Processes share it by these counts; `gptq plan --time` measures the
rates that turn it into seconds, and docs/scale-out.md does the sum for several devices with rates of data sheets.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import expert_part
from gptq_cli.pipeline.run_plan import LayerPlan

HESSIAN_SHARE = 9 / 16  # of a full product, as the Hessian is symmetric
# Rows that one process solves at a time. Everybody cuts alike, so that products have the same shape, and the same bits,
# whoever multiplies them. Smaller parts balance better among processes; larger ones fill an accelerator.
ROWS_OF_A_PART = {"cpu": 1024, "cuda": 4096}


def hessian_cost(in_features: int, tokens: float) -> float:
    """Cost of Σ x xᵀ over so many tokens."""
    return HESSIAN_SHARE * tokens * in_features**2


def factor_cost(in_features: int) -> float:
    """Cost of one Cholesky factor."""
    return in_features**3 / 6


def solve_cost(layer: LayerPlan) -> float:
    """Cost of passing on the errors of all columns, of refining, and of the error that is reported."""
    assert layer.config is not None
    return solve_products(layer.config) * layer.out_features * layer.in_features**2


def solve_products(config: LayerConfig) -> float:
    """Number of products of the weight [O, I] with a matrix [I, I] in solving a layer."""
    passing_on, reporting = 0.5, 1.0
    refining = 0
    if config.refine_sweeps:
        refining = 1 + config.refine_sweeps
    following = int(config.asymmetric_calibration > 0)
    return passing_on + refining + reporting + following


def expert_cost(layers: Sequence[LayerPlan], tokens: float) -> float:
    """Cost of quantizing one expert that was sent so many tokens."""
    inputs = {layer.in_features for layer in layers}
    forward = sum(layer.out_features * layer.in_features for layer in layers) * tokens
    return forward + sum(hessian_cost(n, tokens) + factor_cost(n) for n in inputs) + sum(map(solve_cost, layers))


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device does in a second: multiplications with an addition, weights whose columns are rounded once, and
    bytes between devices and from a disk."""

    forward: float
    hessian: float
    factor: float
    solve: float
    columns: float
    disk: float
    network: float = math.inf


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of a run on equal devices: what is computed, what they send each other, what is read meanwhile."""

    forward: float
    hessian: float
    factor: float
    solve: float
    network: float
    reading: float

    @property
    def total(self) -> float:
        """Reading the model goes on beside the rest."""
        return max(self.forward + self.hessian + self.factor + self.solve + self.network, self.reading)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tokens, how many experts each is sent to, batches, bytes of the hidden states of one token."""

    tokens: int
    experts_per_token: int
    batches: int
    state_bytes: int


def estimate_seconds(
    layers: Iterable[LayerPlan], text: Calibration, devices: int, nbytes: int, rates: Rates
) -> Seconds:
    """About how long quantizing `layers` takes on `devices` devices, each of which reads `nbytes`.

    Linears of one module with as many inputs are taken to share them; every expert to be sent as many tokens.
    """
    shared: dict[tuple[str, int], list[LayerPlan]] = defaultdict(list)
    n_experts: dict[str, set[str]] = defaultdict(set)
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        shared[parent, layer.in_features].append(layer)
        if part := expert_part(layer.name):
            n_experts[part[0]].add(parent)
    done = [0.0] * 5
    for together in shared.values():
        part = expert_part(together[0].name)
        tokens = float(text.tokens)
        if part:
            tokens *= min(1.0, text.experts_per_token / len(n_experts[part[0]]))
        for number, seconds in enumerate(_stage(together, tokens, bool(part), text, devices, rates)):
            done[number] += seconds
    gathered = text.tokens * text.state_bytes * len(n_experts) * (devices - 1) / devices
    done[4] += gathered / rates.network
    forward, hessian, factor, solve, network = done
    return Seconds(forward, hessian, factor, solve, network, nbytes / rates.disk)


def _stage(
    together: Sequence[LayerPlan], tokens: float, expert: bool, text: Calibration, devices: int, rates: Rates
) -> tuple[float, ...]:
    """Seconds for linears with one input: forward, Hessian, factor, solve, network."""
    n, all_rows = together[0].in_features, sum(layer.out_features for layer in together)
    quantized = [layer for layer in together if layer.config is not None]
    config = quantized[0].config if quantized else None
    ways = 1 + bool(config and config.asymmetric_calibration)
    busiest = -(-text.batches // devices) / text.batches  # the share of whoever has the most
    forward = ways * all_rows * n * tokens * busiest / rates.forward
    if config is None:
        return forward, 0.0, 0.0, 0.0, 0.0
    rows = sum(layer.out_features for layer in quantized)
    parts = -(-rows // ROWS_OF_A_PART["cuda"])
    alone, share = (1 / devices, 1 / devices) if expert else (1.0, -(-parts // devices) / parts)
    hessian = hessian_cost(n, tokens) * ways * (1 / devices if expert else busiest) / rates.hessian
    columns = rows * n * (1 + config.refine_sweeps) / rates.columns
    solve = (sum(map(solve_cost, quantized)) / rates.solve + columns) * share
    sent = rows * n + (0 if expert else 2 * HESSIAN_SHARE * 4 * n**2 + (ways - 1) * 2 * 4 * n**2)
    network = sent * (devices - 1) / devices / rates.network
    return forward, hessian, factor_cost(n) * alone / rates.factor, solve, network
