"""Held-out text on which outputs are compared with their original, whose blocks run only once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.calibration.chats import ChatTemplate
from gptq_cli.calibration.corpus import DatasetSource, load_documents
from gptq_cli.calibration.windows import evaluation_windows, load_encoder
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.evaluation.forward import Forward, run_blocks
from gptq_cli.evaluation.perplexity import Divergence, Perplexity
from gptq_cli.events import ignore

WINDOWS_AT_ONCE = 4  # logits of a large vocabulary are 100 MB for 1000 tokens in bfloat16


@dataclass(frozen=True)
class Quality:
    """How an output predicts a text; KL(original || output) is in nats a token."""

    kl: float
    top1: float
    perplexity: float
    original_perplexity: float


def forward(model: Path, batches: list[Tensor], dtype: str = "auto") -> Forward:
    """Return a model, quantized or not, after its last block on token ids [windows, seqlen] each.

    `dtype` "auto" is that of the checkpoint, as for the commands.
    """
    with torch.inference_mode():
        return run_blocks(
            open_decodable(model),
            batches,
            ignore,
            device=torch.device("cpu"),
            dtype=dtype,
            trust_remote_code=False,
        )


def windows_of(model: Path, text: Path, seqlen: int, most: int | None) -> list[Tensor]:
    """Return the first windows of a text, or all if `most` is None, in batches [n, seqlen]."""
    encoder = load_encoder(model, trust_remote_code=False)
    source = DatasetSource(dataset=str(text), purpose="evaluation")
    documents = load_documents(source, ChatTemplate(encoder.tokenizer, model, None))
    windows = evaluation_windows(documents, encoder, seqlen=seqlen, max_windows=most)
    return list(windows.ids.split(WINDOWS_AT_ONCE))


@torch.inference_mode()
def compare(original: Forward, output: Forward, batches: list[Tensor]) -> Quality:
    """Return how an output predicts the tokens of `batches`, which both models have run on."""
    of_original, of_output, divergence = Perplexity(), Perplexity(), Divergence()
    with original.stream.head() as original_head, output.stream.head() as output_head:
        for index, batch in enumerate(batches):
            wanted = original_head(batch, original.hidden[index])
            found = output_head(batch, output.hidden[index])
            for window, ids in enumerate(batch):
                of_original.add(wanted[window], ids)
                of_output.add(found[window], ids)
                divergence.add(wanted[window], found[window])
    return Quality(divergence.kl, divergence.top1_agreement, of_output.value, of_original.value)
