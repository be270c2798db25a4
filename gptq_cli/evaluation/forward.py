"""A model after its last block, and the distance between two models' predictions."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.calibration.windows import check_token_ids
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.events import BlockStarted, PhaseStarted, Report, Warned
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.run_plan import about_unused
from gptq_cli.runtime.memory import Memory, block_finished
from gptq_cli.runtime.open_model import HiddenStates, decoding_backend, open_stream

POSITIONS = 256  # converted to float32 at a time: a vocabulary of 256k makes that 256 MB


@dataclass(frozen=True, slots=True)
class Forward:
    """A model after its last block: `stream.head()` makes logits of the hidden states."""

    stream: ModelStream
    hidden: HiddenStates


def run_blocks(
    checkpoint: Checkpoint,
    batches: list[Tensor],
    report: Report,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    backend: str | None = None,
) -> Forward:
    """Run the blocks of a model, quantized or not, on token ids [batch, seqlen] each.

    `backend` is that of `decoding_backend`.
    Raises InputError E_TOKENIZER for an id that is not in the vocabulary.
    """
    report(PhaseStarted("evaluation", str(checkpoint.directory)))
    stream = open_stream(
        checkpoint,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        backend=decoding_backend(checkpoint, backend, device, report),
        host=Memory(torch.device("cpu")),
    )
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
    return Forward(stream, hidden)


def distance(wanted: Tensor, got: Tensor) -> tuple[float, int]:
    """Return the distance of the predictions `got` from the `wanted` ones, both [positions, V].

    Rows are logits or log-probabilities. The distance is the sum of KL(wanted || got) in nats, and
    the number of positions where both rank the same token first.
    """
    total, same = 0.0, 0
    for rows, others in zip(wanted.split(POSITIONS), got.split(POSITIONS), strict=True):
        log_p, log_q = rows.float().log_softmax(-1), others.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((rows.argmax(-1) == others.argmax(-1)).sum())
    return total, same
