"""`gptq eval-ppl`: perplexity of a checkpoint, quantized or not, with one block in memory."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.calibration.corpus import DatasetSource, Documents, load_documents
from gptq_cli.calibration.sampling import Windows, check_token_ids, evaluation_windows
from gptq_cli.checkpoint.decodable import open_decodable
from gptq_cli.checkpoint.hub import locate_model
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import InputError
from gptq_cli.evaluation.perplexity import Divergence, Perplexity
from gptq_cli.models.stream import ModelStream
from gptq_cli.models.tokenizer import load_encoder
from gptq_cli.pipeline.activations import HiddenStates
from gptq_cli.pipeline.device_errors import device_errors
from gptq_cli.pipeline.eval_request import EvalRequest
from gptq_cli.pipeline.events import BlockStarted, PhaseStarted, Report, Warned, ignore
from gptq_cli.pipeline.memory import Memory, block_finished
from gptq_cli.pipeline.readers import about_unused
from gptq_cli.pipeline.record import Record
from gptq_cli.pipeline.recorded import recorded_settings
from gptq_cli.pipeline.setup import open_stream, resolve_backend, resolve_device, warn_of
from gptq_cli.pipeline.windows import bounded_seqlen

DEFAULT_SEQLEN = 2048


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
        runs = [_run(checkpoint, batches, request, device, backend, record) for checkpoint in checkpoints]
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


def _per_window(perplexities: list[Perplexity], found: Divergence, seqlen: int) -> tuple[WindowResult, ...]:
    model, baseline = (perplexity.of_windows for perplexity in perplexities)
    counts = zip(found.sums, found.agreements, found.positions, strict=True)
    return tuple(
        WindowResult(index * seqlen, model[index], baseline[index], total / positions, same / positions)
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


def _windows(checkpoint: Checkpoint, request: EvalRequest, report: Report) -> tuple[Windows, Documents]:
    said = request.seqlen is not None
    seqlen = bounded_seqlen(request.seqlen or DEFAULT_SEQLEN, said=said, checkpoint=checkpoint)
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
    return evaluation_windows(documents, encoder, seqlen=seqlen, max_windows=request.max_windows), documents


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
                raise InputError("E_TOKENIZER", f"model and baseline have different vocabularies: {sizes} tokens")
            for window, tokens in enumerate(ids.to(logits[0].device)):
                for perplexity, rows in zip(perplexities, logits, strict=True):
                    perplexity.add(rows[window], tokens)
                if divergence is not None:
                    divergence.add(logits[1][window], logits[0][window])
    return perplexities, divergence
