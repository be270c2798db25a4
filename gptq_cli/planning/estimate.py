"""Estimates from a plan alone: the memory and disk space that a run will take, and its work.

Every figure is a sum of named terms, so that a reader can see where it comes from;
`scripts/bench_memory.py plan` compares the sum for the CPU with measured peaks. Work is counted in
multiplications with an addition. The processes of a run balance their shares by these counts, and
`seconds.py` makes seconds of them. Needs no torch.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.checkpoint.headers import DTYPES, DTYPES_OF_CONFIG, TensorInfo
from gptq_cli.config.layer import HEAD, LayerConfig, expert_part
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import size
from gptq_cli.files import is_directory
from gptq_cli.planning.run_plan import LayerPlan, RunPlan, bounded

# A proposed limit leaves at least this much, or a quarter of the estimate, for what libraries
# take later.
SLACK_BYTES = 128 * 10**6
STEP_BYTES = 10**7

# The pass for gradients takes the first windows of the text, up to so many tokens, in pieces that
# pass a block together; and so many logits at a time at the end.
GRADIENT_TOKENS, TOKENS_OF_A_PIECE, LOGITS_AT_ONCE = 16384, 1024, 2**24
COPIES_OF_LOGITS = 5  # float32 numbers for each logit while its gradient is taken

# Names of terms that others look for
STATES, LIBRARIES, WAITING = "hidden states", "libraries", "waiting batches"
OUTSIDE = "embeddings and vision part"
DEVICE_SHARE = 4  # hidden states may fill a quarter of the free memory of an accelerator
# Private memory of Python with torch and transformers at work, as measured on Linux.
LIBRARIES_BYTES = 320_000_000
TOKENS_PER_CHUNK = 1024  # of the inputs that the Hessian takes in float32 at a time
# The shift takes more tokens at a time on an accelerator: inputs and differences, whole and split
TOKENS_OF_A_SHIFT, BYTES_OF_A_SHIFT = 4096, 14
FLOAT, HALF, CODE = 4, 2, 1  # bytes
ROWS_WITH_GRADIENTS = 32  # that loss-aware rounding takes at a time, as `ROW_BLOCK` of the solver

HESSIAN_SHARE = 9 / 16  # of a full product, as the Hessian is symmetric
# Number of rows that one process solves at a time: the least and the most. All processes cut layers
# alike: products then have the same shape, and the same bits, in every process. So the number must
# not depend on memory that is free at the moment. Smaller parts balance better among processes;
# larger ones fill an accelerator, as long as they take less memory than a wide layer's Hessian.
ROWS_OF_A_PART = {"cpu": (1024, 1024), "cuda": (4096, 16384)}
WEIGHTS_OF_A_PART = 2**27  # in parts of more than the least number of rows
# Number of experts of equal shapes that are solved together, if the bytes below hold them: on an
# accelerator they share launches, and a processor gains nothing. Both numbers are the same in every
# process and at every moment of a run, for the same reason. To be measured on a GPU.
EXPERTS_AT_ONCE = {"cpu": 1, "cuda": 32}
EXPERTS_BYTES = 3 * 2**30
EXPERTS_SHARE = 4  # they may take a quarter of max_vram
ROUTED_SHARE = 4  # of these bytes are those of the inputs from which Hessians are summed


# ---------------------------------------------------------------- memory and disk


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of the user that allows less than is free, in bytes.

    The run holds `held` bytes of it already. `sharers` processes share the limit; `held` and `free`
    are those of each process.
    """

    option: str
    allowed: int
    held: int
    free: int
    sharers: int = 1

    def __str__(self) -> str:
        of_all = ""
        if self.sharers > 1:
            of_all = f" for {self.sharers} processes"
        allows = f"{self.option} allows {size(self.allowed)}{of_all}"
        return f"{allows}, the run holds {size(self.held)} already"

    def way_out(self, needed: int) -> str | None:
        """Return the option with a value that allows `needed` bytes more in each process.

        None if fewer bytes are free.
        """
        if needed > self.free:
            return None
        more = min(needed + max(needed // 4, SLACK_BYTES), self.free)
        steps = math.ceil(self.sharers * (self.held + more) / STEP_BYTES)
        return f"{self.option} {steps * STEP_BYTES // 10**6}MB"


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a peak: its name, and its bytes."""

    what: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Terms of the peak memory of a run on the CPU, or on an accelerator and its host."""

    cpu: tuple[Term, ...]
    accelerator: tuple[Term, ...]
    accelerator_host: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes of the output, the saved hidden states and gradients, and bytes that are free.

    `free` is None if no part of the path exists. `measuring` are those of the measurement before an
    allocation of bits, which are gone before the output is written.
    """

    output: int
    states: int
    free: int | None
    gradients: int = 0
    measuring: int = 0

    @property
    def needed(self) -> int:
        """The most bytes that the run holds at once, without a download."""
        return max(self.output + self.states + self.gradients, self.measuring)

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """Bytes of the weights of a Hub model, and the most bytes on the disk with those of the run.

    The peaks are those of a model that is downloaded first, and while it is read.
    """

    bytes: int
    peak_disk_bytes: int
    streamed_peak_disk_bytes: int


def total(terms: Iterable[Term]) -> int:
    """Return the bytes of all terms."""
    return sum(term.nbytes for term in terms)


def terms_named(what: str, terms: Iterable[Term]) -> list[Term]:
    """Return the terms with this name."""
    return [term for term in terms if term.what == what]


def without(what: str, terms: Iterable[Term]) -> list[Term]:
    """Return the terms except the one with this name."""
    return [term for term in terms if term.what != what]


def estimate_memory(
    plan: RunPlan, config: QuantizeConfig, devices: int = 1, *, images: bool = False
) -> Estimate:
    """Estimate the peak memory of a run on each of `devices`, calibrated on `images` or on text.

    The peak is the sum of all that lives at once while the costliest layer of the largest block
    is calibrated or solved:

    * hidden states: tokens x hidden, of the calibration windows of one device; twice with
      asymmetric calibration, as are waiting batches
    * waiting batches: tokens x (2 hidden + the widest input), held by forwards that stop inside a
      block; without true_sequential those of one batch
    * block: the weights of the largest block, in the dtype of the forwards
    * experts' inputs: tokens x hidden of all calibration windows, if there are several devices; on
      accelerators once more, since the batches are joined
    * solver: see `_solver_bytes`; or, if that is more, as many panels of [I, I] as sums of batches
      wait for each other. One chunk of inputs in float32 comes on top, and if massive tokens are
      limited, a copy of the inputs of a batch

    While images are embedded, the hidden states are in memory beside everything outside of the
    blocks, in the dtype of the forwards. If that is more, it is the peak; so is the pass for
    gradients of a loss-aware run (see `gradient_terms`).
    """
    bits = forward_bits(plan, config)
    seqlen, hidden = bounded(config, plan.source).seqlen, hidden_size(plan)
    streams, batches = n_streams(plan), batches_each(config, devices)
    all_tokens, batch_tokens = config.nsamples * seqlen, config.batch_size * seqlen
    tokens = min(all_tokens, batches * batch_tokens)
    waiting = tokens
    if not config.true_sequential:
        waiting = min(tokens, batch_tokens)
    widest = _most_inputs(plan.layers)

    states = Term(STATES, streams * tokens * hidden * bits // 8)
    block = Term("block", largest_block(plan) * bits // 8)
    libraries = Term(LIBRARIES, LIBRARIES_BYTES)
    work = [
        states,
        Term(WAITING, streams * waiting * (2 * hidden + widest) * bits // 8),
        block,
    ]
    if devices > 1 and _has_experts(plan):
        work.append(Term("experts' inputs", streams * all_tokens * hidden * bits // 8))

    solver = {}
    for device in ROWS_OF_A_PART:
        solver[device] = Term("solver", solving_bytes(plan, config, device, devices))
    on_cpu: tuple[Term, ...] = (libraries, *work, solver["cpu"])
    on_device: tuple[Term, ...] = (*work, solver["cuda"])
    if _has_experts(plan):
        joined = Term("joined inputs", streams * all_tokens * hidden * bits // 8)
        on_device = (*work, joined, solver["cuda"])
    if plan.loss_aware:
        for passing in gradient_terms(plan, config):
            on_cpu = max(on_cpu, (libraries, *passing), key=total)
            on_device = max(on_device, passing, key=total)
    if images:
        embedding = (states, Term(OUTSIDE, _outside_weights(plan) * bits // 8))
        on_cpu = max(on_cpu, (libraries, *embedding), key=total)
        on_device = max(on_device, embedding, key=total)
    return Estimate(cpu=on_cpu, accelerator=on_device, accelerator_host=(libraries, states, block))


def gradient_terms(plan: RunPlan, config: QuantizeConfig) -> list[tuple[Term, ...]]:
    """Return what is in memory in the pass for gradients: inside a block, and at the end.

    Beside what each pass in reverse holds (see `pass_terms`), these are sums [O, O] of the pieces
    inside a block, of which as many panels wait as for Hessians.
    """
    tokens = gradient_tokens(plan, config)
    inside, at_the_end = pass_terms(plan, config, tokens)
    pieces = math.ceil(tokens / _piece_tokens(plan, config, tokens))
    panels = pieces.bit_length() * HESSIAN_SHARE + 1
    numbers = _most_in_a_block(_gradient_numbers(plan))
    sums = Term("sums of gradients", int(panels * numbers) * FLOAT)
    return [(*inside, sums), at_the_end]


def pass_terms(
    plan: RunPlan, config: QuantizeConfig, tokens: int
) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Return what a pass in reverse holds of this many tokens: inside a block, and at the end.

    Inside a block these are states and gradients of all tokens, the weights of the block, and
    inputs, outputs and gradients of all its linears for one piece. At the end it is everything
    outside of the blocks, with the logits of a few tokens.
    """
    nbytes = forward_bits(plan, config) // 8
    widths: Counter[int] = Counter()
    for layer in plan.layers:
        if not expert_part(layer.name) and layer.block < plan.n_blocks:
            widths[layer.block] += 2 * (layer.in_features + layer.out_features)
    piece = _piece_tokens(plan, config, tokens) * max(widths.values())
    states = Term("gradients", 2 * tokens * hidden_size(plan) * nbytes)
    inside = (
        states,
        Term("block", largest_block(plan) * nbytes),
        Term("one piece of text", piece * nbytes),
    )
    outside = sum(math.prod(tensor.shape) for tensor in tensors_outside(plan))
    logits = COPIES_OF_LOGITS * _logits_at_once(plan, config) * FLOAT
    head = Term("embeddings and head", outside * nbytes)
    return inside, (states, head, Term("logits", logits))


def _piece_tokens(plan: RunPlan, config: QuantizeConfig, tokens: int) -> int:
    """Return the tokens of a piece of a pass in reverse: one window, or several short ones."""
    return max(bounded(config, plan.source).seqlen, min(TOKENS_OF_A_PIECE, tokens))


def _logits_at_once(plan: RunPlan, config: QuantizeConfig) -> int:
    """Return how many logits a pass in reverse takes at a time, of one window at most."""
    rows = head_shape(plan)[0]
    tokens = min(bounded(config, plan.source).seqlen, LOGITS_AT_ONCE // rows)
    return max(1, tokens) * rows


def gradient_tokens(plan: RunPlan, config: QuantizeConfig) -> int:
    """Return the number of tokens of the pass for gradients."""
    seqlen = bounded(config, plan.source).seqlen
    return min(config.nsamples, max(1, GRADIENT_TOKENS // seqlen)) * seqlen


def gradient_disk(plan: RunPlan, config: QuantizeConfig) -> int:
    """Return the most bytes that the pass for gradients keeps.

    On the way back states are removed, and sums are added: after the second of the blocks there are
    sums of two, and after the last one the states before it, with gradients on both sides. What a
    step needed is removed after the next step.
    """
    if not plan.loss_aware:
        return 0
    tokens, sums = gradient_tokens(plan, config), gradient_sums(plan, config)
    after_second = pass_disk(plan, config, tokens) + min(2, plan.n_blocks) * sums // plan.n_blocks
    after_last = 5 * state_bytes(plan, config, tokens) + sums
    return max(after_second, after_last)


def gradient_sums(plan: RunPlan, config: QuantizeConfig) -> int:
    """Return the bytes of the sums of gradients, and of an energy for each token and layer."""
    energies = gradient_tokens(plan, config) * len(plan.loss_aware)
    return FLOAT * (_gradient_numbers(plan).total() + energies)


def pass_disk(plan: RunPlan, config: QuantizeConfig, tokens: int) -> int:
    """Return the most bytes that a pass in reverse over this many tokens keeps of them.

    These are the hidden states before all blocks and after the last one, with the gradients there
    and before the last block.
    """
    return (plan.n_blocks + 3) * state_bytes(plan, config, tokens)


def pass_writes(plan: RunPlan, config: QuantizeConfig, tokens: int) -> int:
    """Return the bytes that such a pass writes: states and gradients around all blocks."""
    return 2 * (plan.n_blocks + 1) * state_bytes(plan, config, tokens)


def state_bytes(plan: RunPlan, config: QuantizeConfig, tokens: int) -> int:
    """Return the bytes of the hidden states of this many tokens before one block."""
    return tokens * hidden_size(plan) * forward_bits(plan, config) // 8


def _gradient_numbers(plan: RunPlan) -> Counter[int]:
    """Return how many numbers the sums of gradients in each block have."""
    numbers: Counter[int] = Counter()
    for layer in plan.loss_aware:
        if layer.sums_gradients:
            numbers[layer.block] += layer.out_features**2
    return numbers


def _most_in_a_block(numbers: Counter[int]) -> int:
    return max(numbers.values(), default=0)


def estimate_within_limits(
    plan: RunPlan, config: QuantizeConfig, devices: int = 1, *, images: bool = False
) -> Estimate:
    """Estimate the memory of a run that keeps to --max-ram and --max-vram: fewer batches wait.

    One batch waits at least, even if the limit does not allow it.
    """
    estimate = estimate_memory(plan, config, devices, images=images)
    least = estimate_least_memory(plan, config, devices)
    max_ram, max_vram = config.max_ram_bytes, config.max_vram_bytes
    if max_ram is not None:
        max_ram //= devices
    return replace(
        estimate,
        cpu=_fewer_waiting(estimate.cpu, least.cpu, max_ram),
        accelerator=_fewer_waiting(estimate.accelerator, least.accelerator, max_vram),
    )


def _fewer_waiting(
    terms: Sequence[Term], least: Sequence[Term], allowed: int | None
) -> tuple[Term, ...]:
    """Return `terms` with as few bytes of waiting batches as are allowed, or as `least` has."""
    if allowed is None or total(terms) <= allowed:
        return tuple(terms)
    one_batch = total(terms_named(WAITING, least))
    others = without(WAITING, terms)
    waiting = max(one_batch, allowed - total(others))
    fewer = []
    for term in terms:
        if term.what == WAITING:
            term = Term(WAITING, min(term.nbytes, waiting))
        fewer.append(term)
    return tuple(fewer)


def solving_bytes(plan: RunPlan, config: QuantizeConfig, device: str, devices: int = 1) -> int:
    """Return the bytes of the solver on a type of device, or of sums of batches if they are more.

    Batches that wait inside a block are in memory beside them. The parts are those that
    `estimate_memory` tells of.
    """
    bits, streams = forward_bits(plan, config), n_streams(plan)
    n_sums = batches_each(config, devices).bit_length()
    sums = int(n_sums * _most_summed(plan, config, device) * FLOAT)
    solver = _solver_bytes(plan, bits, device)
    tokens, bytes_each = TOKENS_PER_CHUNK, FLOAT
    if device == "cuda":
        solver = max(solver, _experts_bytes(plan, config.max_vram_bytes))
        if plan.asymmetric:
            tokens, bytes_each = TOKENS_OF_A_SHIFT, BYTES_OF_A_SHIFT
    batch_tokens = config.batch_size * bounded(config, plan.source).seqlen
    chunk = min(tokens, batch_tokens) * bytes_each
    copies = int(config.limit_massive_tokens) * streams * batch_tokens * bits // 8
    copied = _most_inputs(plan.layers)
    if plan.asymmetric:
        copied += hidden_size(plan)
    return max(solver, sums) + chunk * _most_inputs(plan.layers) + copies * copied


def n_streams(plan: RunPlan) -> int:
    """Return how many models the calibration text passes through."""
    if plan.asymmetric:
        return 2
    return 1


def batches_each(config: QuantizeConfig, devices: int) -> int:
    """Return the number of calibration batches of one of `devices`."""
    return math.ceil(math.ceil(config.nsamples / config.batch_size) / devices)


def _most_summed(plan: RunPlan, config: QuantizeConfig, device: str) -> float:
    """Return the most numbers that a batch adds to the sums of one stage.

    The shifts of a layer with inputs of its own may have a row for each of its rows alone.
    """
    stages: Counter[tuple[str, int]] = Counter()
    for layer in plan.layers:
        stages[layer.name.rpartition(".")[0], layer.in_features] += 1
    of_rows = device == "cuda" and forward_dtype(plan.source, config.dtype) == "bfloat16"
    most = 0.0
    for layer in plan.quantized:
        n = layer.in_features
        shifts = 2 * (n_streams(plan) - 1) * n**2 + _drift_numbers(plan, layer)
        is_alone = stages[layer.name.rpartition(".")[0], n] == 1
        if of_rows and is_alone and has_shorter_shifts(layer):  # which include a drift
            shifts = 2 * (n_streams(plan) - 1) * layer.out_features * n
        most = max(most, HESSIAN_SHARE * n**2 + shifts)
    return most


def _drift_numbers(plan: RunPlan, layer: LayerPlan) -> int:
    """Return the numbers of the drifts of a layer: [O, I] for each half of the text.

    Only running the model shows whether outputs are added to the hidden states. Here they are, if
    there are as many as features.
    """
    if not plan.asymmetric:
        return 0
    return 2 * layer.in_features * written_outputs(layer, hidden_size(plan))


def written_outputs(layer: LayerPlan, features: int) -> int:
    """Return how many outputs a layer may add to hidden states; experts add none by themselves."""
    if layer.out_features != features or expert_part(layer.name):
        return 0
    return features


def _outside_weights(plan: RunPlan) -> int:
    """Return the number of weights outside of the blocks, except those of the head."""
    count = 0
    for tensor in tensors_outside(plan):
        if f"{HEAD}." not in tensor.name:
            count += math.prod(tensor.shape)
    return count


def tensors_outside(plan: RunPlan) -> list[TensorInfo]:
    """Return the tensors outside of the blocks."""
    tensors = plan.plain.tensors.values()
    return [tensor for tensor in tensors if not tensor.name.startswith(f"{plan.blocks}.")]


def head_shape(plan: RunPlan) -> tuple[int, ...]:
    """Return the shape of the output head, which is the largest tensor outside of the blocks."""
    shapes = [tensor.shape for tensor in tensors_outside(plan)]
    return max(shapes, key=math.prod, default=(1, 0))


def estimate_least_memory(plan: RunPlan, config: QuantizeConfig, devices: int = 1) -> Estimate:
    """Estimate the memory that the run cannot do without: one batch waits inside a block."""
    one_waits = config.model_copy(update={"true_sequential": False})
    return estimate_memory(plan, one_waits, devices)


def estimate_disk(plan: RunPlan, config: QuantizeConfig, output: Path) -> Disk:
    """Estimate the disk space of a run: its output, and the hidden states that let it resume.

    The output is written once, under another name beside its own. An older output stays until then.
    A loss-aware run holds gradients too.
    """
    seqlen = bounded(config, plan.source).seqlen
    bits = config.nsamples * seqlen * hidden_size(plan) * forward_bits(plan, config)
    states = saved_states(plan, bits // 8)
    for folder in (output, *output.absolute().parents):
        if is_directory(folder, writing=True):
            free = shutil.disk_usage(folder).free
            return Disk(plan.layout.nbytes, states, free, gradient_disk(plan, config))
    return Disk(plan.layout.nbytes, states, None, gradient_disk(plan, config))


def saved_states(plan: RunPlan, hidden_bytes: int) -> int:
    """Return the bytes of saved hidden states, if those of all windows take `hidden_bytes` once.

    While new ones are written, the last ones are kept; with asymmetric calibration both are double.
    """
    if plan.asymmetric:
        hidden_bytes *= 2
    return 2 * hidden_bytes


def estimate_download(plan: RunPlan, disk: Disk) -> DownloadPlan:
    """Return what the download of the model takes in both ways, beside what the run needs."""
    weights = plan.source.nbytes
    return DownloadPlan(weights, disk.needed + weights, disk.needed + streamed_bytes(plan))


def streamed_bytes(plan: RunPlan) -> int:
    """Return the most bytes of a model on the disk at once, if it is downloaded while it is read.

    These are two blocks, and everything that is in no block.
    """
    from gptq_cli.checkpoint.download import most_bytes_at_once

    return most_bytes_at_once(plan.source.tensors.values(), plan.blocks)


def forward_bits(plan: RunPlan, config: QuantizeConfig) -> int:
    """Return the bits of a number in the forwards."""
    return DTYPES[DTYPES_OF_CONFIG[forward_dtype(plan.source, config.dtype)]].bits


def hidden_size(plan: RunPlan) -> int:
    """Return the number of inputs that most linear layers of the blocks have."""
    sizes: Counter[int] = Counter()
    for layer in plan.layers:
        if layer.block < plan.n_blocks:
            sizes[layer.in_features] += 1
    return sizes.most_common(1)[0][0]


def _most_inputs(layers: Iterable[LayerPlan]) -> int:
    return max((layer.in_features for layer in layers), default=0)


def _has_experts(plan: RunPlan) -> bool:
    return any(expert_part(layer.name) for layer in plan.layers)


def largest_block(plan: RunPlan) -> int:
    """Return the number of weights in the linear layers of the largest block."""
    sizes: Counter[int] = Counter()
    for layer in plan.layers:
        sizes[layer.block] += layer.n_weights
    return max(sizes.values())


def has_shorter_shifts(layer: LayerPlan) -> bool:
    """Return whether W C [O, I] takes fewer products than C [I, I] for a layer without company.

    W (x₀ - x) is a product as large as the layer's own, and its product with x is another one. The
    inputs of experts are not summed in this way.
    """
    if layer.transposed or expert_part(layer.name):
        return False
    return 2 * layer.out_features < layer.in_features


def rows_of_a_part(device: str, in_features: int) -> int:
    """Return how many rows of layers with this many inputs one process solves at a time."""
    least, most = ROWS_OF_A_PART[device]
    return max(least, min(most, WEIGHTS_OF_A_PART // in_features))


def _solver_bytes(plan: RunPlan, bits: int, device: str) -> int:
    """Return the bytes of solving the layer that takes most.

    These are 2 float32 matrices [I, I], a Hessian and its factor, and 2 more with asymmetric
    calibration, the shifts of two halves of the text, with their drifts [O, I]; 3 float32 matrices
    and 2 of codes [rows of a part, I] while columns are rounded; the layer's weights and codes. A
    loss-aware layer is one part, with its gradients, damped and in order, and their factor, and 4
    float32 matrices [O, I] of weights, errors and products.
    """
    most = 0
    for layer in plan.quantized:
        rows = min(layer.out_features, rows_of_a_part(device, layer.in_features))
        of_gradients = 0
        if layer.sums_gradients:
            rows = layer.out_features
            of_gradients = (4 * rows**2 + 4 * layer.n_weights) * FLOAT
        matrices = _solving_bytes(layer.in_features, rows, follows=plan.asymmetric)
        matrices += _drift_numbers(plan, layer) * FLOAT
        most = max(most, matrices + of_gradients + layer.n_weights * (bits // 8 + CODE))
    return most


def experts_at_once(layers: Sequence[LayerPlan], device: str, max_vram: int | None) -> int:
    """Return how many experts with these `layers` are solved together on a type of device."""
    allowed = _experts_allowance(max_vram)
    if not layers or any(_has_scattered_groups(layer.config) for layer in layers):
        return 1
    return max(1, min(EXPERTS_AT_ONCE[device], allowed // _expert_bytes(layers, device)))


def routed_bytes(max_vram: int | None) -> int:
    """Return the bytes of inputs that are taken for several experts at a time.

    While their Hessians are summed, factors and codes are not in memory yet. Their bytes hold the
    inputs, and what the inputs of down_proj are made of.
    """
    return _experts_allowance(max_vram) // ROUTED_SHARE


def _experts_allowance(max_vram: int | None) -> int:
    if max_vram is None:
        return EXPERTS_BYTES
    return min(EXPERTS_BYTES, max_vram // EXPERTS_SHARE)


def _has_scattered_groups(config: LayerConfig | None) -> bool:
    """Return whether the groups of columns are those of the Hessian, so that experts differ."""
    return config is not None and config.desc_act and not config.static_groups


def _experts_bytes(plan: RunPlan, max_vram: int | None) -> int:
    """Return the bytes of solving the experts that an accelerator solves together."""
    experts: dict[str, list[LayerPlan]] = defaultdict(list)
    for layer in plan.quantized:
        if expert_part(layer.name):
            experts[layer.name.rpartition(".")[0]].append(layer)
    most = 0
    for layers in experts.values():
        needed = experts_at_once(layers, "cuda", max_vram) * _expert_bytes(layers, "cuda")
        most = max(most, needed)
    return most


def _expert_bytes(layers: Sequence[LayerPlan], device: str) -> int:
    """Return the bytes of solving the `layers` of one expert that see the same inputs."""
    rows: Counter[int] = Counter()
    for layer in layers:
        rows[layer.in_features] += layer.out_features
    follows = any(layer.config.follows_original for layer in layers if layer.config)
    most = 0
    for n, out_features in rows.items():
        part = min(out_features, rows_of_a_part(device, n))
        most = max(most, _solving_bytes(n, part, follows=follows))
    return most


def _solving_bytes(in_features: int, rows: int, *, follows: bool) -> int:
    """Return the bytes of solving some rows, with their Hessian, and their shifts if there are."""
    n_matrices = 2  # the Hessian and its factor
    if follows:
        n_matrices += 2
    return n_matrices * in_features**2 * FLOAT + rows * in_features * (3 * FLOAT + 2 * CODE)


# ---------------------------------------------------------------- work, in multiplications


def hessian_cost(in_features: int, tokens: float) -> float:
    """Return the cost of Σ x xᵀ over this many tokens."""
    return HESSIAN_SHARE * tokens * in_features**2


def shift_cost(in_features: int, tokens: float, written: int = 0) -> float:
    """Return the cost of Σ (x₀ - x) xᵀ over this many tokens; it is not symmetric.

    If the outputs are added to `written` numbers of hidden states, the drift is summed as well.
    """
    return tokens * in_features * (in_features + written)


def rows_shift_cost(layer: LayerPlan, tokens: float) -> float:
    """Return the cost of Σ W (x₀ - x) xᵀ over this many tokens; a drift in it costs no more."""
    return 2 * tokens * layer.n_weights


# From so many columns on, a GPU factorises by panels (`BLOCKED_FROM` of the solver)
WIDE_FACTOR = 8192


def factor_cost(in_features: int) -> float:
    """Return the cost of one Cholesky factorization."""
    return in_features**3 / 6


PRODUCTS_WITH_SHIFTS = 2  # W C, one for each half of the text


def solve_cost(layer: LayerPlan, *, of_rows: bool = False) -> float:
    """Return the cost of compensating and refining all columns, and of reporting the error.

    If shifts are those `of_rows`, they are W C already.
    """
    assert layer.config is not None
    rows, columns = layer.out_features, layer.in_features
    products = solve_products(layer.config)
    if of_rows:
        products -= PRODUCTS_WITH_SHIFTS
    cost = products * rows * columns**2
    if layer.sums_gradients:
        # Rounding once more with feedback along rows, and two losses
        cost += 2.5 * rows * columns**2 + 2.5 * rows**2 * columns + factor_cost(rows)
        if layer.config.refine_sweeps:  # twice, with scales first, and the slopes along rows
            cost += 4 * rows * columns**2 + 3 * rows**2 * columns
    return cost


def refining_products(config: LayerConfig) -> int:
    """Return how many products of the weight [O, I] with a matrix [I, I] refinement takes."""
    if config.refine_sweeps:
        return 1 + config.refine_sweeps
    return 0


def solve_products(config: LayerConfig) -> float:
    """Return how many products of the weight [O, I] with a matrix [I, I] a layer takes."""
    compensation = 0.5
    reporting = 1.5  # three energies of half a product each, as the Hessian is symmetric
    refining, following = refining_products(config), 0.0
    if config.follows_original:
        following = PRODUCTS_WITH_SHIFTS + 1  # with two solutions with a triangular matrix
    if config.asymmetric_calibration == "auto":
        following += 0.5  # one more solution
    return compensation + refining + reporting + following


def expert_cost(layers: Iterable[LayerPlan], tokens: float) -> float:
    """Return the cost of quantizing one expert that was sent this many tokens."""
    n_weights, solving = 0, 0.0
    inputs = set()
    for layer in layers:
        n_weights += layer.n_weights
        solving += solve_cost(layer)
        inputs.add(layer.in_features)
    sharing = 0.0  # linears with as many inputs share a Hessian and its factor
    for in_features in inputs:
        sharing += hessian_cost(in_features, tokens) + factor_cost(in_features)
    return n_weights * tokens + sharing + solving
