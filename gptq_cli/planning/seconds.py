"""Estimates from a plan alone: the time that a run will take.

The work of `estimate.py` becomes seconds by rates, which `gptq plan --time` measures on this
machine. Needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptq_cli.checkpoint.layout import Layout
from gptq_cli.config.layer import expert_part
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.planning.estimate import (
    FLOAT,
    HALF,
    HESSIAN_SHARE,
    ROWS_WITH_GRADIENTS,
    WIDE_FACTOR,
    experts_at_once,
    factor_cost,
    forward_bits,
    gradient_sums,
    gradient_tokens,
    has_shorter_shifts,
    head_shape,
    hessian_cost,
    hidden_size,
    n_streams,
    pass_writes,
    rows_of_a_part,
    rows_shift_cost,
    shift_cost,
    solve_cost,
    written_outputs,
)
from gptq_cli.planning.run_plan import LayerPlan, RunPlan, bounded

SAVING_SHARE = 1 / 20  # of the time, for saving hidden states


@dataclass(frozen=True, slots=True)
class Rates:
    """The work that one device does in a second.

    `forward`, `hessian`, `shift`, `factor` and `solve` count multiplications with an addition, and
    `wide_factor` those of a factor from WIDE_FACTOR columns on, None if it is as `factor`. A
    Hessian is computed by panels of `panel` columns, or in HESSIAN_SHARE of a product if it is
    None. `states` and `expert_states` count numbers that enter or leave linears, and those of
    experts, in passes over memory beside the products; `columns` weights that are rounded once,
    and `followed` weights that are corrected, beside their products. `turn` are seconds of a
    column in kernels that take columns in turn, and `row_turn` those of a column of each block of
    rows that is rounded and refined with gradients.

    `disk` counts bytes read, `writes` bytes written and made durable, `copies` bytes between host
    and device, and `network` bytes sent to other devices. `hashes` are bytes that `hash_threads`
    threads hash together, one file each. `start` are seconds to import torch and transformers, and
    `kernels` those to compile kernels, whatever the sizes, which begins `before_kernels` seconds
    after the start. If `shifts_of_rows` is true, W C is summed in place of C for layers with few
    outputs.
    """

    forward: float
    hessian: float
    factor: float
    solve: float
    columns: float
    disk: float
    network: float = math.inf
    shift: float = math.inf
    wide_factor: float | None = None
    panel: int | None = None
    shifts_of_rows: bool = False
    states: float = math.inf
    expert_states: float = math.inf
    followed: float = math.inf
    turn: float = 0.0
    row_turn: float = 0.0
    copies: float = math.inf
    writes: float = math.inf
    hashes: float = math.inf
    hash_threads: int = 1
    start: float = 0.0
    before_kernels: float = 0.0
    kernels: float = 0.0

    @property
    def ready(self) -> float:
        """Seconds until transformers is imported and kernels are compiled."""
        return max(self.start, self.before_kernels + self.kernels)


@dataclass(frozen=True, slots=True)
class Seconds:
    """The time of a run on equal devices: computing, sending, and reading the model meanwhile.

    `beside` is the time of the thread that copies tensors meanwhile, `saving` that of saving hidden
    states between blocks, and `fixed` the time before and after the blocks: starting, hashing the
    model and the output.
    """

    forward: float = 0.0
    hessian: float = 0.0
    factor: float = 0.0
    solve: float = 0.0
    network: float = 0.0
    reading: float = 0.0
    beside: float = 0.0
    saving: float = 0.0
    fixed: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole run; threads read and copy while other parts work."""
        return max(self.working, self.reading, self.beside) + self.saving + self.fixed

    @property
    def working(self) -> float:
        """Seconds in which blocks are quantized."""
        return self.forward + self.hessian + self.factor + self.solve + self.network

    def plus(self, other: Seconds) -> Seconds:
        return Seconds(
            self.forward + other.forward,
            self.hessian + other.hessian,
            self.factor + other.factor,
            self.solve + other.solve,
            self.network + other.network,
            self.reading + other.reading,
            self.beside + other.beside,
            self.saving + other.saving,
            self.fixed + other.fixed,
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration text: its tokens, the number of experts that each token is sent to, and more.

    `state_bytes` are the bytes of the hidden states of one token, and `features` their numbers.
    """

    tokens: int
    experts_per_token: int
    batches: int
    state_bytes: int
    features: int


def estimate_time(plan: RunPlan, config: QuantizeConfig, rates: Rates) -> Seconds:
    """Estimate how long the run takes on one device with these rates."""
    text = calibration_of(plan, config)
    seconds = estimate_seconds(plan.layers, text, 1, plan.source.nbytes, rates)
    if plan.loss_aware:
        seconds = seconds.plus(gradient_seconds(plan, config, rates))
    saving = saving_seconds(plan, config, rates, seconds.working)
    fixed = sum(fixed_seconds(plan, rates).values())
    return seconds.plus(Seconds(beside=beside_seconds(plan, rates), saving=saving, fixed=fixed))


def calibration_of(plan: RunPlan, config: QuantizeConfig) -> Calibration:
    """Return the calibration text of a run."""
    seqlen, hidden = bounded(config, plan.source).seqlen, hidden_size(plan)
    declared = plan.source.text_config
    experts_per_token = declared.get("num_experts_per_tok") or declared.get("top_k")
    if not isinstance(experts_per_token, int):
        experts_per_token = 1
    return Calibration(
        tokens=config.nsamples * seqlen,
        experts_per_token=experts_per_token,
        batches=math.ceil(config.nsamples / config.batch_size),
        state_bytes=hidden * forward_bits(plan, config) // 8,
        features=hidden,
    )


def saving_seconds(plan: RunPlan, config: QuantizeConfig, rates: Rates, working: float) -> float:
    """Return the seconds in which hidden states are saved for a run that resumes.

    They are saved after each block, but take at most a twentieth of the `working` seconds.
    """
    tokens = config.nsamples * bounded(config, plan.source).seqlen
    numbers = n_streams(plan) * tokens * hidden_size(plan)
    nbytes = numbers * forward_bits(plan, config) // 8
    return min(plan.n_blocks * nbytes / rates.writes, SAVING_SHARE * working)


def fixed_seconds(plan: RunPlan, rates: Rates) -> dict[str, float]:
    """Return the seconds before the first block and after the last one, by what takes them.

    The model is read and hashed from the start on, and kernels are compiled once torch is there,
    while transformers is imported.
    After the blocks the tensors of the last one are read back, and the files of the output are
    hashed from the first of these on.
    """
    files = Counter[Path]()
    for tensor in plan.source.tensors.values():
        files[tensor.file] += tensor.nbytes
    last = _last_tensors(plan)
    late = sum(plan.layout.specs[name].nbytes for name in last)
    reading = max(plan.source.nbytes / rates.disk, _hashing_seconds(files.values(), rates))
    return {
        "start": rates.start,
        "source": max(rates.ready, reading) - rates.start,
        "verify": late / rates.writes + late / rates.hashes,
        "manifest": _hashing_seconds(_rests(plan.layout, last), rates),
    }


def beside_seconds(plan: RunPlan, rates: Rates) -> float:
    """Return the seconds of the thread that works during the blocks.

    It copies and hashes the other tensors, makes the output durable, reads it back and hashes it
    twice: each tensor, and each file.
    """
    copied, written = sum(tensor.nbytes for tensor in plan.copied), plan.layout.nbytes
    return (copied + 2 * written) * rates.hash_threads / rates.hashes + written / rates.writes


def _last_tensors(plan: RunPlan) -> set[str]:
    """Return the names of the tensors of the last block, or of the head if it is quantized."""
    last = max(layer.block for layer in plan.quantized)
    names = set[str]()
    for layer in plan.quantized:
        if layer.block == last:
            names.update(spec.name for spec in layer.packed(plan.packing))
    return names


def _rests(layout: Layout, names: Container[str]) -> Iterator[int]:
    """Yield the bytes of each shard from the first of the tensors `names` on."""
    for shard in layout.shards:
        starts = [offset for name, offset in shard.offsets.items() if name in names]
        yield shard.size - min(starts, default=shard.size)


def _hashing_seconds(files: Iterable[int], rates: Rates) -> float:
    """Return the seconds to hash files of these sizes, each of them in one thread."""
    sizes = list(files)
    in_one_thread = max(sizes, default=0) * rates.hash_threads
    return max(sum(sizes), in_one_thread) / rates.hashes


def gradient_seconds(plan: RunPlan, config: QuantizeConfig, rates: Rates) -> Seconds:
    """Estimate the time of the pass for gradients, which sums most of them."""
    tokens = gradient_tokens(plan, config)
    sums = 0.0
    for layer in plan.loss_aware:
        if layer.sums_gradients:
            sums += hessian_cost(layer.out_features, tokens)
    passing = pass_seconds(plan, config, tokens, gradient_sums(plan, config), rates)
    return passing.plus(Seconds(hessian=sums / rates.hessian))


def pass_seconds(
    plan: RunPlan,
    config: QuantizeConfig,
    tokens: int,
    kept: int,
    rates: Rates,
    extra_products: int = 0,
) -> Seconds:
    """Estimate the time of a pass in reverse over this many tokens.

    It reads the blocks twice and runs them forward twice. A pass back through a linear takes as
    much as one forward, because weights get no gradients, and there may be `extra_products` as
    large. The output head runs forward and back once. Between blocks the states are written and
    hashed, with what else is `kept`, in bytes.
    """
    linears = []
    for layer in plan.layers:
        if layer.block < plan.n_blocks:
            linears.append(replace(layer, config=None))
    text = replace(calibration_of(plan, config), tokens=tokens)
    once = estimate_seconds(linears, text, 1, 2 * plan.source.nbytes, rates)
    head = 2 * math.prod(head_shape(plan)) * tokens
    forward = (3 + extra_products) * once.forward + head / rates.forward
    written = pass_writes(plan, config, tokens) + kept
    saving = written / rates.writes + written * rates.hash_threads / rates.hashes
    return Seconds(forward=forward, reading=once.reading, saving=saving)


def estimate_seconds(
    layers: Iterable[LayerPlan], text: Calibration, devices: int, nbytes: int, rates: Rates
) -> Seconds:
    """Estimate how long quantizing `layers` takes on `devices`, each of which reads `nbytes`.

    Assume that the linears of one module with as many inputs share them, and that every expert is
    sent as many tokens.
    """
    stages: dict[tuple[str, int], list[LayerPlan]] = defaultdict(list)
    experts: dict[str, set[str]] = defaultdict(set)  # by the module that holds them
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        stages[parent, layer.in_features].append(layer)
        part = expert_part(layer.name)
        if part:
            experts[part[0]].add(parent)
    seconds = Seconds(reading=nbytes / rates.disk)
    for stage in stages.values():
        tokens = float(text.tokens)
        part = expert_part(stage[0].name)
        if part:
            tokens *= min(1.0, text.experts_per_token / len(experts[part[0]]))
        seconds = seconds.plus(_stage_seconds(stage, tokens, text, devices, rates))
    gathered = text.tokens * text.state_bytes * len(experts) * (devices - 1) / devices
    return seconds.plus(Seconds(network=gathered / rates.network))


def _stage_seconds(
    stage: Sequence[LayerPlan], tokens: float, text: Calibration, devices: int, rates: Rates
) -> Seconds:
    """Estimate the time of linears with one input; the busiest device counts."""
    n = stage[0].in_features
    is_of_expert = expert_part(stage[0].name) is not None
    passing = rates.states
    if is_of_expert:
        passing = rates.expert_states
    busiest = math.ceil(text.batches / devices) / text.batches
    products = _rows(stage) * n * tokens
    forward = products / rates.forward + (n + _rows(stage)) * tokens / passing
    quantized = [layer for layer in stage if layer.config is not None]
    if not quantized:
        return Seconds(forward=forward * busiest)
    config = quantized[0].config
    assert config is not None
    streams, rows = 1 + config.follows_original, _rows(quantized)
    of_rows = _are_shifts_of_rows(stage, rates)
    shift_numbers, shifting = _shifts(quantized, tokens, text, of_rows=of_rows)
    sent = float(rows * n)
    parts = math.ceil(rows / rows_of_a_part("cuda", n))
    if is_of_expert:  # one device does all of an expert
        hessian_share = factor_share = solve_share = 1 / devices
    else:  # Hessians are summed, each device factors for itself, and rows are shared
        hessian_share, factor_share = busiest, 1.0
        solve_share = math.ceil(parts / devices) / parts
        sent += 2 * FLOAT * (HESSIAN_SHARE * n**2 + shift_numbers)
    hessian = _hessian_products(n, tokens, rates) / rates.hessian + shifting / rates.shift
    hessian += streams * n * tokens / passing
    solving = 0.0
    for layer in quantized:
        solving += solve_cost(layer, of_rows=of_rows) / rates.solve
    return Seconds(
        forward=streams * forward * busiest,
        hessian=hessian * hessian_share,
        factor=factor_cost(n) * factor_share / _factor_rate(n, rates),
        solve=(solving + _seconds_of_weights(quantized, parts, rates)) * solve_share,
        network=sent * (devices - 1) / devices / rates.network,
    )


def _are_shifts_of_rows(stage: Sequence[LayerPlan], rates: Rates) -> bool:
    """Return whether a layer that follows the original model sums W C, as it is alone."""
    config = stage[0].config
    if not rates.shifts_of_rows or len(stage) > 1 or config is None:
        return False
    return config.follows_original and has_shorter_shifts(stage[0])


def _shifts(
    layers: Sequence[LayerPlan], tokens: float, text: Calibration, *, of_rows: bool
) -> tuple[int, float]:
    """Return how many numbers the shifts of `layers` with one input have, and their cost."""
    n, config = layers[0].in_features, layers[0].config
    if config is None or not config.follows_original:
        return 0, 0.0
    if of_rows:  # which include a drift
        return 2 * _rows(layers) * n, rows_shift_cost(layers[0], tokens)
    written = max(written_outputs(layer, text.features) for layer in layers)
    return 2 * n * (n + written), shift_cost(n, tokens, written)


def _hessian_products(in_features: int, tokens: float, rates: Rates) -> float:
    """Return the products of a Hessian, by the panels of columns that the device takes."""
    if rates.panel is None:
        return hessian_cost(in_features, tokens)
    panels = math.ceil(in_features / rates.panel)
    return tokens * in_features**2 * (panels + 1) / (2 * panels)


def _seconds_of_weights(layers: Sequence[LayerPlan], parts: int, rates: Rates) -> float:
    """Return the seconds that the weights of `layers` with one input take beside products.

    Their rows are solved in `parts`. Weights of 16 bits are copied to the device, codes from it.
    """
    config = layers[0].config
    assert config is not None
    sweeps, n = 1 + config.refine_sweeps, layers[0].in_features
    weights = _rows(layers) * n
    together = 1
    if expert_part(layers[0].name):
        together = experts_at_once(layers, "cuda", None)
    turns = sweeps * parts * n / together
    nbytes = weights * (HALF + config.bits / 8)
    seconds = sweeps * weights / rates.columns + turns * rates.turn + nbytes / rates.copies
    if config.follows_original:
        seconds += weights / rates.followed
    for layer in layers:
        if layer.sums_gradients:
            seconds += math.ceil(layer.out_features / ROWS_WITH_GRADIENTS) * n * rates.row_turn
    return seconds


def _factor_rate(in_features: int, rates: Rates) -> float:
    if rates.wide_factor is None or in_features < WIDE_FACTOR:
        return rates.factor
    return rates.wide_factor


def _rows(layers: Iterable[LayerPlan]) -> int:
    return sum(layer.out_features for layer in layers)
