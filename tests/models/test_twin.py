"""Two ways through a model at once, the second with the weights as they were: neither sees what the other does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.models.stream import ModelStream
from gptq_cli.pipeline.setup import open_stream
from tests.architectures import build, save
from tests.families import VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says about its own models is not at stake


def opened(model: Path) -> tuple[ModelStream, list[Tensor]]:
    stream = open_stream(
        open_checkpoint(model), device=torch.device("cpu"), dtype="float32", trust_remote_code=False, backend="torch"
    )
    ids = torch.randint(0, min(VOCABULARY, stream.vocabulary_rows), (3, 16), generator=torch.Generator().manual_seed(0))
    return stream, list(ids.split(2))


def through(model: Path, *, changed: bool) -> list[Tensor]:
    """Hidden states after all blocks, whose weights are `changed` or not."""
    stream, batches = opened(model)
    hidden = stream.embed(batches)
    for index in range(stream.n_blocks):
        with stream.block(index) as block:
            if changed:
                halve(block.linears)
            hidden = [block.run(batch, state) for batch, state in enumerate(hidden)]
    return hidden


def halve(linears: dict[str, torch.nn.Module]) -> None:
    for linear in linears.values():
        linear.weight = torch.nn.Parameter(linear.weight / 2)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma3n_text", "llama"])
@torch.no_grad()
def test_each_way_has_keys_and_values_of_its_own(model_type: str, tmp_path: Path) -> None:
    model = save(build(model_type), tmp_path / "model")
    stream, batches = opened(model)
    hidden = stream.embed(batches)
    original = [state.clone() for state in hidden]
    for index in range(stream.n_blocks):
        with stream.block(index) as block:
            twin = block.twin()
            halve(block.linears)
            for batch in range(len(batches)):
                hidden[batch] = block.run(batch, hidden[batch])
            for batch in range(len(batches)):
                original[batch] = twin.run(batch, original[batch])
    whole = zip(through(model, changed=True), through(model, changed=False), strict=True)
    for batch, (changed, unchanged) in enumerate(whole):
        assert torch.equal(hidden[batch], changed)
        assert torch.equal(original[batch], unchanged)
        assert not torch.equal(changed, unchanged)
