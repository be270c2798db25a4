"""`gptq eval-ppl`: perplexity of a checkpoint, quantized or not, with one block in memory.

Logits are converted to float32 whatever the model's dtype. Perplexity is that of the GPTQ paper's
evaluation (Frantar et al. 2022, section 4): exp of the mean over windows of the mean cross-entropy
of a window's tokens 1 .. seqlen - 1, each given all tokens before it in the window.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gptq_cli.calibration.chats import ChatTemplate
from gptq_cli.calibration.corpus import DatasetSource, Documents, load_documents
from gptq_cli.calibration.windows import Windows, evaluation_windows, load_encoder
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.quantization_config import recorded_settings
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.errors import InputError, to_json
from gptq_cli.evaluation.forward import POSITIONS, Forward, distance, run_blocks
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import PhaseStarted, Report, ignore
from gptq_cli.planning.run_plan import bounded_seqlen
from gptq_cli.quantization.run_state import Record
from gptq_cli.runtime.device import report_device, report_slow_dtype, resolve_device
from gptq_cli.runtime.memory import device_errors
from gptq_cli.runtime.open_model import resolve_backend, warn_of

DEFAULT_SEQLEN = 2048


@dataclass(frozen=True, slots=True)
class WindowResult:
    """One window of the evaluation text, from token `first_token` on; KL in nats a token."""

    first_token: int
    perplexity: float
    baseline_perplexity: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class EvalResult:
    """A perplexity with its protocol; the last five fields are empty without a baseline.

    `join` stands between the dataset's documents, `dataset_sha256` is the hash of the joined text
    in UTF-8.
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
        """Return the result as plain JSON values, without those of single windows."""
        values = to_json(replace(self, per_window=()))
        del values["per_window"]
        return values

    def windows_to_json(self) -> list[dict[str, Any]]:
        """Return the results of single windows as plain JSON values."""
        return list(map(to_json, self.per_window))


def evaluate_perplexity(model: str, request: EvalRequest, report: Report = ignore) -> EvalResult:
    """Return the perplexity of MODEL (a directory or a Hub id), and its divergence from a baseline.

    Raises InputError for models and datasets that are refused, ConfigError for a seqlen beyond the
    model's positions.
    """
    started = time.perf_counter()
    device = resolve_device(request.device)
    checkpoints = [open_decodable(locate_model(model, request.revision).directory)]
    if request.baseline is not None:
        checkpoints.append(open_decodable(locate_model(request.baseline).directory))
    backend = resolve_backend(request.backend or _recorded_backend(checkpoints[0]), device)
    record = Record(report)
    report_device(device, request.device, record)
    for checkpoint in checkpoints:
        warn_of(checkpoint, record)
    runs = []
    with torch.inference_mode(), device_errors():
        windows, documents = _windows(checkpoints[0], request, record)
        batches = list(windows.ids.split(request.batch_size))
        tokens = windows.ids.numel()
        report_slow_dtype(device, request.dtype, checkpoints[0], tokens, record)
        for checkpoint in checkpoints:
            runs.append(
                run_blocks(
                    checkpoint,
                    batches,
                    record,
                    device=device,
                    dtype=request.dtype,
                    trust_remote_code=request.trust_remote_code,
                    backend=backend,
                )
            )
        perplexities, divergence = _compare(runs, batches)
    result = EvalResult(
        model=model,
        perplexity=perplexities[0].value,
        dataset=documents.name,
        dataset_config=documents.config,
        dataset_split=documents.split,
        dataset_revision=documents.revision,
        dataset_sha256=documents.sha256,
        join=documents.join,
        seqlen=windows.ids.shape[1],
        windows=windows.ids.shape[0],
        tokens=windows.tokens,
        dtype=str(runs[0].stream.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - started,
        peak_host_bytes=record.host_bytes,
        peak_device_bytes=record.device_bytes,
    )
    if divergence is None:
        return result
    return replace(
        result,
        baseline=request.baseline,
        baseline_perplexity=perplexities[1].value,
        kl=divergence.kl,
        top1_agreement=divergence.top1_agreement,
        per_window=_per_window(perplexities, divergence, result.seqlen),
    )


def _per_window(
    perplexities: list[Perplexity], divergence: Divergence, seqlen: int
) -> tuple[WindowResult, ...]:
    model, baseline = (perplexity.of_windows for perplexity in perplexities)
    results = []
    for index, positions in enumerate(divergence.positions):
        results.append(
            WindowResult(
                first_token=index * seqlen,
                perplexity=model[index],
                baseline_perplexity=baseline[index],
                kl=divergence.sums[index] / positions,
                top1_agreement=divergence.agreements[index] / positions,
            )
        )
    return tuple(results)


def _recorded_backend(checkpoint: Checkpoint) -> str | None:
    """Return the `backend` in the configuration beside a checkpoint, None without one."""
    backend = recorded_settings(checkpoint.directory).get("backend")
    return backend if isinstance(backend, str) else None


def _windows(
    checkpoint: Checkpoint, request: EvalRequest, report: Report
) -> tuple[Windows, Documents]:
    explicit = request.seqlen is not None
    seqlen = bounded_seqlen(
        request.seqlen or DEFAULT_SEQLEN, explicit=explicit, checkpoint=checkpoint
    )
    report(PhaseStarted("dataset", f"windows of {seqlen} tokens"))
    encoder = load_encoder(checkpoint.directory, trust_remote_code=request.trust_remote_code)
    source = DatasetSource(
        dataset=request.dataset,
        config=request.dataset_config,
        split=request.dataset_split,
        text_column=request.text_column,
        purpose="evaluation",
        chat_template=request.chat_template,
    )
    template = ChatTemplate(encoder.tokenizer, checkpoint.directory, source.template_file)
    documents = load_documents(source, template)
    windows = evaluation_windows(documents, encoder, seqlen=seqlen, max_windows=request.max_windows)
    if documents.chats is not None:
        report(PhaseStarted("text", template.summary))
    return windows, documents


def _compare(
    runs: list[Forward], batches: list[Tensor]
) -> tuple[list[Perplexity], Divergence | None]:
    """Return the perplexity of each run, and the divergence of the first from a second one."""
    perplexities = [Perplexity() for _ in runs]
    divergence = Divergence() if len(runs) == 2 else None
    with ExitStack() as stack:
        heads = [stack.enter_context(run.stream.head()) for run in runs]
        for batch, ids in enumerate(batches):
            logits = []
            for head, run in zip(heads, runs, strict=True):
                logits.append(head(ids, run.hidden[batch]))
            _check_vocabularies(logits)
            for window, tokens in enumerate(ids.to(logits[0].device)):
                for perplexity, rows in zip(perplexities, logits, strict=True):
                    perplexity.add(rows[window], tokens)
                if divergence is not None:
                    divergence.add(logits[1][window], logits[0][window])
    return perplexities, divergence


def _check_vocabularies(logits: list[Tensor]) -> None:
    """Raise InputError E_TOKENIZER if model and baseline have logits of different sizes."""
    sizes = [str(rows.shape[-1]) for rows in logits]
    if len(set(sizes)) > 1:
        message = f"model and baseline have different vocabularies: {' and '.join(sizes)} tokens"
        raise InputError("E_TOKENIZER", message)


@dataclass(slots=True)
class Perplexity:
    """The perplexity of windows that are added one by one."""

    losses: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, ids: Tensor) -> None:
        """Add a window: logits [seqlen, V] and the token ids [seqlen] that they come from."""
        chunks = zip(logits[:-1].split(POSITIONS), ids[1:].split(POSITIONS), strict=True)
        total = 0.0
        for rows, targets in chunks:
            total += float(functional.cross_entropy(rows.float(), targets, reduction="sum"))
        self.losses.append(total / (len(ids) - 1))

    @property
    def value(self) -> float:
        """The perplexity of all windows: inf if the loss is too large, nan if a loss is nan."""
        return _exp(sum(self.losses) / len(self.losses))

    @property
    def of_windows(self) -> list[float]:
        """The perplexity of each window alone."""
        return [_exp(loss) for loss in self.losses]


def _exp(loss: float) -> float:
    if loss > 700:  # beyond the exponents of a float
        return math.inf
    return math.exp(loss)


@dataclass(slots=True)
class Divergence:
    """The distance of a model's predictions from a baseline's, at the same positions.

    Each window has a sum of KL(baseline || model) in nats, a number of positions where both rank
    the same token first, and a number of all positions.
    """

    sums: list[float] = field(default_factory=list)
    agreements: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, baseline: Tensor, logits: Tensor) -> None:
        """Add a window: the logits [seqlen, V] of both models."""
        total, same = distance(baseline[:-1], logits[:-1])
        self.sums.append(total)
        self.agreements.append(same)
        self.positions.append(len(logits) - 1)

    @property
    def kl(self) -> float:
        """The mean KL(baseline || model) per predicted token, in nats."""
        return sum(self.sums) / sum(self.positions)

    @property
    def top1_agreement(self) -> float:
        """The share of positions where both models rank the same token first."""
        return sum(self.agreements) / sum(self.positions)
