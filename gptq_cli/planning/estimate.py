"""Estimates from a plan alone: memory and disk that a run will take, and how much there is to
compute. Needs no torch.

Every figure is a sum of named terms, so that a reader can see where it comes from;
`scripts/bench_plan.py` compares the sum for the CPU with measured peaks. Work is counted in
multiplications with an addition. Shares of it are balanced by these counts; times come from them by
rates, which are assumptions until somebody has measured them: see docs/scale-out.md.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.config.finding import size
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import expert_part
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.files import is_directory
from gptq_cli.planning.run_plan import LayerPlan, RunPlan, bounded

SLACK_BYTES = (
    128 * 10**6
)  # that a proposed limit leaves for what libraries take later, or a quarter of the estimate
STEP_BYTES = 10**7


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that leaves less than is free, in bytes; `held` is what the run has taken of it already.

    `sharers` processes share the limit; held and free are of each.
    """

    option: str
    allowed: int
    held: int
    free: int
    sharers: int = 1

    def __str__(self) -> str:
        of_all = f" for {self.sharers} processes" if self.sharers > 1 else ""
        return f"{self.option} allows {size(self.allowed)}{of_all}, the run holds {size(self.held)} already"

    def way_out(self, needed: int) -> str | None:
        """The option that would let a process take `needed` bytes; None if so much is not free."""
        if needed > self.free:
            return None
        wanted = self.sharers * (self.held + min(needed + max(needed // 4, SLACK_BYTES), self.free))
        return f"{self.option} {-(-wanted // STEP_BYTES) * STEP_BYTES // 10**6}MB"


STATES, LIBRARIES = "hidden states", "libraries"  # names of terms that others look for
DEVICE_SHARE = 4  # hidden states may fill a quarter of the free memory of an accelerator
LIBRARIES_BYTES = 320_000_000  # private memory of Python with torch and transformers at work, as measured on Linux
TOKENS_PER_CHUNK = 1024  # of the inputs that the Hessian takes in float32 at a time
FLOAT, CODE = 4, 1
WORD_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
STORED_NAMES = {"BF16": "bfloat16", "F16": "float16"}

HESSIAN_SHARE = 9 / 16  # of a full product, as the Hessian is symmetric
# Rows that one process solves at a time. Everybody cuts alike, so that products have the same shape, and the same bits,
# whoever multiplies them. Smaller parts balance better among processes; larger ones fill an accelerator.
ROWS_OF_A_PART = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a peak: what for, and bytes."""

    what: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Terms of the peak memory of a run on the CPU, and of a run on an accelerator: its own and the host's."""

    cpu: tuple[Term, ...]
    accelerator: tuple[Term, ...]
    accelerator_host: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that the run writes beside its output, and what is free there; None when nothing of the path exists."""

    needed: int
    free: int | None

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free


def total(terms: Iterable[Term]) -> int:
    """Bytes of all terms."""
    return sum(term.nbytes for term in terms)


def estimate_memory(plan: RunPlan, config: QuantizeConfig, devices: int = 1) -> Estimate:
    """The peak of the block loop on each of `devices`: what lives at once while the costliest layer of the largest
    block is calibrated or solved.

    hidden states    tokens x hidden, of its calibration windows; twice with asymmetric calibration, as waiting batches
    waiting batches  tokens x (2 hidden + the widest input): what forwards hold that stop inside a block; without
                     true_sequential only one batch's
    block            the weights of the largest block, in the forward's dtype
    solver           2 float32 matrices [I, I], a Hessian and its factor, and 3 of [rows of a part, I] while columns are
                     rounded, beside the layer's weights and codes; or as many panels of [I, I] as sums of batches wait
                     for each other
    experts' inputs  tokens x hidden of all calibration windows, if there are several devices
    """
    bits = WORD_BITS[forward_dtype(plan, config)]
    seqlen, hidden = bounded(config, plan.source).seqlen, _hidden_size(plan)
    widest = max(layer.in_features for layer in plan.layers)
    batches = -(-config.nsamples // config.batch_size)
    mine = -(-batches // devices)
    tokens = min(config.nsamples, mine * config.batch_size) * seqlen
    waiting = tokens if config.true_sequential else min(tokens, config.batch_size * seqlen)
    chunk = min(TOKENS_PER_CHUNK, config.batch_size * seqlen)
    block = _largest_block(plan) * bits // 8
    streams = 2 if plan.asymmetric else 1
    waiting_sums = mine.bit_length() * (HESSIAN_SHARE + streams - 1)
    most = max(layer.in_features for layer in plan.quantized)
    states = Term(STATES, streams * tokens * hidden * bits // 8)
    work = [
        Term("waiting batches", streams * waiting * (2 * hidden + widest) * bits // 8),
        Term("block", block),
    ]
    if devices > 1 and any(expert_part(layer.name) for layer in plan.layers):
        everything = config.nsamples * seqlen * hidden * bits // 8
        work.append(Term("experts' inputs", streams * everything))

    def solver(device: str) -> Term:
        solving = max(
            _solver_bytes(layer, bits, ROWS_OF_A_PART[device]) for layer in plan.quantized
        )
        return Term(
            "solver", max(solving, int(waiting_sums * most**2 * FLOAT)) + chunk * widest * FLOAT
        )

    libraries = Term(LIBRARIES, LIBRARIES_BYTES)
    on_cpu, on_accelerator = (states, *work, solver("cpu")), (states, *work, solver("cuda"))
    return Estimate((libraries, *on_cpu), on_accelerator, (libraries, states, Term("block", block)))


def estimate_time(plan: RunPlan, config: QuantizeConfig, rates: Rates) -> Seconds:
    """Estimate how long the run takes on one device with these rates."""
    seqlen, hidden = bounded(config, plan.source).seqlen, _hidden_size(plan)
    declared = plan.source.text_config
    chosen = declared.get("num_experts_per_tok") or declared.get("top_k")
    text = Calibration(
        tokens=config.nsamples * seqlen,
        experts_per_token=chosen if isinstance(chosen, int) else 1,
        batches=-(-config.nsamples // config.batch_size),
        state_bytes=hidden * WORD_BITS[forward_dtype(plan, config)] // 8,
    )
    return estimate_seconds(plan.layers, text, 1, plan.source.nbytes, rates)


def estimate_disk(plan: RunPlan, output: Path) -> Disk:
    """The output is written once, under another name beside its own, while whatever stands there stays."""
    folders = (output, *output.absolute().parents)
    place = next((folder for folder in folders if is_directory(folder, writing=True)), None)
    return Disk(plan.layout.nbytes, shutil.disk_usage(place).free if place else None)


def _hidden_size(plan: RunPlan) -> int:
    return Counter(
        layer.in_features for layer in plan.layers if layer.block < plan.n_blocks
    ).most_common(1)[0][0]


def forward_dtype(plan: RunPlan, config: QuantizeConfig) -> str:
    """Name the dtype that the model runs in, as far as headers and config.json tell."""
    declared = plan.source.text_config
    name: str = config.dtype
    if name == "auto":
        name = str(declared.get("dtype") or declared.get("torch_dtype")).removeprefix("torch.")
    if name in WORD_BITS:
        return name
    return STORED_NAMES.get(plan.layers[0].weight.dtype, "float32")


def _largest_block(plan: RunPlan) -> int:
    """Weights in the linears of the largest block."""
    sizes: Counter[int] = Counter()
    for layer in plan.layers:
        sizes[layer.block] += layer.out_features * layer.in_features
    return max(sizes.values())


def _solver_bytes(layer: LayerPlan, bits: int, rows_of_part: int) -> int:
    n, rows = layer.in_features, min(layer.out_features, rows_of_part)
    layer_bytes = n * layer.out_features * (bits // 8 + CODE)
    return 2 * n**2 * FLOAT + rows * n * (3 * FLOAT + 2 * CODE) + layer_bytes


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
    return (
        forward
        + sum(hessian_cost(n, tokens) + factor_cost(n) for n in inputs)
        + sum(map(solve_cost, layers))
    )


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
        return max(
            self.forward + self.hessian + self.factor + self.solve + self.network, self.reading
        )


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
        for number, seconds in enumerate(
            _stage(together, tokens, bool(part), text, devices, rates)
        ):
            done[number] += seconds
    gathered = text.tokens * text.state_bytes * len(n_experts) * (devices - 1) / devices
    done[4] += gathered / rates.network
    forward, hessian, factor, solve, network = done
    return Seconds(forward, hessian, factor, solve, network, nbytes / rates.disk)


def _stage(
    together: Sequence[LayerPlan],
    tokens: float,
    expert: bool,
    text: Calibration,
    devices: int,
    rates: Rates,
) -> tuple[float, ...]:
    """Seconds for linears with one input: forward, Hessian, factor, solve, network."""
    n, all_rows = together[0].in_features, sum(layer.out_features for layer in together)
    quantized = [layer for layer in together if layer.config is not None]
    config = quantized[0].config if quantized else None
    streams = 1 + bool(config and config.asymmetric_calibration)
    busiest = -(-text.batches // devices) / text.batches  # the share of whoever has the most
    forward = streams * all_rows * n * tokens * busiest / rates.forward
    if config is None:
        return forward, 0.0, 0.0, 0.0, 0.0
    rows = sum(layer.out_features for layer in quantized)
    parts = -(-rows // ROWS_OF_A_PART["cuda"])
    alone, share = (1 / devices, 1 / devices) if expert else (1.0, -(-parts // devices) / parts)
    hessian = (
        hessian_cost(n, tokens) * streams * (1 / devices if expert else busiest) / rates.hessian
    )
    columns = rows * n * (1 + config.refine_sweeps) / rates.columns
    solve = (sum(map(solve_cost, quantized)) / rates.solve + columns) * share
    sent = rows * n + (0 if expert else 2 * HESSIAN_SHARE * 4 * n**2 + (streams - 1) * 2 * 4 * n**2)
    network = sent * (devices - 1) / devices / rates.network
    return forward, hessian, factor_cost(n) * alone / rates.factor, solve, network
