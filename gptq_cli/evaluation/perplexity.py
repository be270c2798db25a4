"""`gptq eval-ppl`: perplexity of a checkpoint, quantized or not, with one block in memory.

Logits are judged in float32 whatever the model's dtype. Perplexity is the one of the GPTQ paper's
evaluation (Frantar et al. 2022, section 4): exp of the mean over windows of the mean cross-entropy
of a window's tokens 1 .. seqlen - 1, each given all tokens before it in the window.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gptq_cli.calibration.corpus import DatasetSource, Documents, load_documents
from gptq_cli.calibration.windows import Windows, check_token_ids, evaluation_windows, load_encoder
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.quantization_config import recorded_settings
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.errors import InputError
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import BlockStarted, PhaseStarted, Report, Warned, ignore
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.run_plan import about_unused, bounded_seqlen
from gptq_cli.quantization.run_record import Record
from gptq_cli.runtime.hidden_states import HiddenStates
from gptq_cli.runtime.memory import Memory, block_finished, device_errors
from gptq_cli.runtime.open_model import open_stream, resolve_backend, resolve_device, warn_of

DEFAULT_SEQLEN = 2048

POSITIONS = 256  # converted to float32 at a time: a vocabulary of 256k makes that 256 MB


@dataclass(frozen=True, slots=True)
class WindowResult:
    """One window of the evaluation text: it begins at token `first_token`; KL in nats a token."""

    first_token: int
    perplexity: float
    baseline_perplexity: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class EvalResult:
    """A perplexity with the protocol that gave it; the last five fields are empty without a baseline.

    `join` stands between the dataset's documents, `dataset_sha256` is the hash of the joined text in UTF-8.
    """

    model: str
    perplexity: float
    dataset: str
    dataset_config: str | None
    dataset_split: str | None
    dataset_revision: str | None
    dataset_sha256: str
    join: str
    seqlen: int
    windows: int
    tokens: int
    dtype: str
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int
    baseline: str | None = None
    baseline_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    per_window: tuple[WindowResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values, without those of single windows."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "per_window"}


def evaluate_perplexity(model: str, request: EvalRequest, report: Report = ignore) -> EvalResult:
    """Perplexity of MODEL (a directory or a Hub id) and, with a baseline, its divergence from that model.

    Raises InputError for models and datasets that are refused, ConfigError for a seqlen beyond the model's positions.
    """
    started = time.perf_counter()
    device = resolve_device(request.device)
    checkpoints = [open_decodable(locate_model(model, request.revision).directory)]
    if request.baseline is not None:
        checkpoints.append(open_decodable(locate_model(request.baseline).directory))
    backend = resolve_backend(request.backend or _recorded_backend(checkpoints[0]), device)
    record = Record(report)
    for checkpoint in checkpoints:
        warn_of(checkpoint, record)
    with torch.inference_mode(), device_errors():
        windows, documents = _windows(checkpoints[0], request, record)
        ids = windows.ids
        batches = list(ids.split(request.batch_size))
        runs = [
            _run(checkpoint, batches, request, device, backend, record)
            for checkpoint in checkpoints
        ]
        perplexities, divergence = _compare(runs, batches)
    return EvalResult(
        model=model,
        perplexity=perplexities[0].value,
        dataset=documents.name,
        dataset_config=documents.config,
        dataset_split=documents.split,
        dataset_revision=documents.revision,
        dataset_sha256=documents.sha256,
        join=documents.join,
        seqlen=ids.shape[1],
        windows=ids.shape[0],
        tokens=ids.numel(),
        dtype=str(runs[0].stream.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - started,
        peak_host_bytes=record.host_bytes,
        peak_device_bytes=record.device_bytes,
        baseline=request.baseline,
        baseline_perplexity=perplexities[1].value if divergence else None,
        kl=divergence.kl if divergence else None,
        top1_agreement=divergence.top1_agreement if divergence else None,
        per_window=_per_window(perplexities, divergence, ids.shape[1]) if divergence else (),
    )


def _per_window(
    perplexities: list[Perplexity], found: Divergence, seqlen: int
) -> tuple[WindowResult, ...]:
    model, baseline = (perplexity.of_windows for perplexity in perplexities)
    counts = zip(found.sums, found.agreements, found.positions, strict=True)
    return tuple(
        WindowResult(
            index * seqlen, model[index], baseline[index], total / positions, same / positions
        )
        for index, (total, same, positions) in enumerate(counts)
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A model after its last block."""

    stream: ModelStream
    hidden: HiddenStates


def _recorded_backend(checkpoint: Checkpoint) -> str | None:
    """The `backend` of the configuration that a checkpoint of ours was made with."""
    backend = recorded_settings(checkpoint.directory).get("backend")
    return backend if isinstance(backend, str) else None


def _windows(
    checkpoint: Checkpoint, request: EvalRequest, report: Report
) -> tuple[Windows, Documents]:
    said = request.seqlen is not None
    seqlen = bounded_seqlen(request.seqlen or DEFAULT_SEQLEN, explicit=said, checkpoint=checkpoint)
    report(PhaseStarted("dataset", f"windows of {seqlen} tokens"))
    encoder = load_encoder(checkpoint.directory, trust_remote_code=request.trust_remote_code)
    source = DatasetSource(
        dataset=request.dataset,
        config=request.dataset_config,
        split=request.dataset_split,
        text_column=request.text_column,
        purpose="evaluation",
    )
    documents = load_documents(source)
    return evaluation_windows(
        documents, encoder, seqlen=seqlen, max_windows=request.max_windows
    ), documents


def _run(
    checkpoint: Checkpoint,
    batches: list[Tensor],
    request: EvalRequest,
    device: torch.device,
    backend: str,
    report: Report,
) -> _Run:
    report(PhaseStarted("evaluation", str(checkpoint.directory)))
    stream = open_stream(
        checkpoint, device=device, dtype=request.dtype, trust_remote_code=request.trust_remote_code, backend=backend,
        host=Memory(torch.device("cpu")),
    )  # fmt: skip
    for code, text in about_unused(stream.unused):
        report(Warned(code, text))
    for ids in batches:
        check_token_ids(ids, stream.vocabulary_rows)
    hidden = HiddenStates(stream.embed(batches), Memory(device))
    for index in range(stream.n_blocks):
        started = time.perf_counter()
        report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
        with stream.block(index) as block:
            for batch in range(len(hidden)):
                hidden[batch] = block.run(batch, hidden[batch])
        report(block_finished(index, stream, started))
    return _Run(stream, hidden)


def _compare(runs: list[_Run], batches: list[Tensor]) -> tuple[list[Perplexity], Divergence | None]:
    """Perplexity of each run, and the divergence of the first from the second if there are two."""
    perplexities = [Perplexity() for _ in runs]
    divergence = Divergence() if len(runs) == 2 else None
    with ExitStack() as stack:
        heads = [stack.enter_context(run.stream.head()) for run in runs]
        for batch, ids in enumerate(batches):
            logits = [head(ids, run.hidden[batch]) for head, run in zip(heads, runs, strict=True)]
            if divergence is not None and logits[0].shape != logits[1].shape:
                sizes = f"{logits[0].shape[-1]} and {logits[1].shape[-1]}"
                raise InputError(
                    "E_TOKENIZER", f"model and baseline have different vocabularies: {sizes} tokens"
                )
            for window, tokens in enumerate(ids.to(logits[0].device)):
                for perplexity, rows in zip(perplexities, logits, strict=True):
                    perplexity.add(rows[window], tokens)
                if divergence is not None:
                    divergence.add(logits[1][window], logits[0][window])
    return perplexities, divergence


@dataclass(slots=True)
class Perplexity:
    """Collects windows; `value` is their perplexity."""

    losses: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, ids: Tensor) -> None:
        """One window: logits [seqlen, V] and the token ids [seqlen] they were computed from."""
        chunks = zip(logits[:-1].split(POSITIONS), ids[1:].split(POSITIONS), strict=True)
        total = sum(
            float(functional.cross_entropy(row.float(), target, reduction="sum"))
            for row, target in chunks
        )
        self.losses.append(total / (len(ids) - 1))

    @property
    def value(self) -> float:
        """Infinite when a loss is too large for a float, not a number when one is not."""
        return _exp(sum(self.losses) / len(self.losses))

    @property
    def of_windows(self) -> list[float]:
        """The perplexity of each window alone."""
        return [_exp(loss) for loss in self.losses]


def _exp(loss: float) -> float:
    return math.exp(loss) if not loss > 700 else math.inf


@dataclass(slots=True)
class Divergence:
    """How far a model's predictions are from a baseline's, over the same positions as the perplexity.

    Of each window: the sum of KL(baseline || model) in nats, positions where both rank the same token first, and all.
    """

    sums: list[float] = field(default_factory=list)
    agreements: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, baseline: Tensor, logits: Tensor) -> None:
        """One window: both models' logits [seqlen, V]."""
        total, same = 0.0, 0
        for wanted, got in zip(
            baseline[:-1].split(POSITIONS), logits[:-1].split(POSITIONS), strict=True
        ):
            log_p, log_q = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((wanted.argmax(-1) == got.argmax(-1)).sum())
        self.sums.append(total)
        self.agreements.append(same)
        self.positions.append(len(logits) - 1)

    @property
    def kl(self) -> float:
        """Mean KL(baseline || model) per predicted token, in nats."""
        return sum(self.sums) / sum(self.positions)

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both models rank the same token first."""
        return sum(self.agreements) / sum(self.positions)
