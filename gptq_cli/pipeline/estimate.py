"""How much memory and disk a run will take, estimated from its plan alone. Needs no torch.

Every figure is a sum of named terms, so that a reader can see where it comes from; `scripts/bench_plan.py` compares the
sum for the CPU with measured peaks.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gptq_cli.config.rules import expert_part
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.files import is_directory
from gptq_cli.pipeline.cost import HESSIAN_SHARE, ROWS_OF_A_PART, Calibration, Rates, Seconds, estimate_seconds
from gptq_cli.pipeline.run_plan import LayerPlan, RunPlan
from gptq_cli.pipeline.windows import bounded

STATES, LIBRARIES = "hidden states", "libraries"  # names of terms that others look for
DEVICE_SHARE = 4  # hidden states may fill a quarter of the free memory of an accelerator
LIBRARIES_BYTES = 320_000_000  # private memory of Python with torch and transformers at work, as measured on Linux
TOKENS_PER_CHUNK = 1024  # of the inputs that the Hessian takes in float32 at a time
FLOAT, CODE = 4, 1
WORD_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
STORED_NAMES = {"BF16": "bfloat16", "F16": "float16"}


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
    work = [Term("waiting batches", streams * waiting * (2 * hidden + widest) * bits // 8), Term("block", block)]
    if devices > 1 and any(expert_part(layer.name) for layer in plan.layers):
        everything = config.nsamples * seqlen * hidden * bits // 8
        work.append(Term("experts' inputs", streams * everything))

    def solver(device: str) -> Term:
        solving = max(_solver_bytes(layer, bits, ROWS_OF_A_PART[device]) for layer in plan.quantized)
        return Term("solver", max(solving, int(waiting_sums * most**2 * FLOAT)) + chunk * widest * FLOAT)

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
    return Counter(layer.in_features for layer in plan.layers if layer.block < plan.n_blocks).most_common(1)[0][0]


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
