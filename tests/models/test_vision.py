"""Models that read images, block by block, against plain forwards of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from gptq_cli.calibration.images import ImageBatch
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.events import ignore
from gptq_cli.models.stream import ModelStream, token_ids
from gptq_cli.quantization.run import calibrate
from gptq_cli.runtime.open_model import open_stream
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from tests.runs import config
from tests.vision import FAMILIES, save_chats, save_vision_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model of each family."""
    return save_vision_model(tmp_path_factory.mktemp(request.param), request.param)


def batches_of(model: Path, folder: Path, **changes: Any) -> list[Any]:
    """Return the calibration batches of the chats of `save_chats`, one with text alone."""
    settings = config(
        dataset=str(save_chats(folder)),
        nsamples=4,
        seqlen=100,
        batch_size=2,
        trust_remote_code=True,
        **changes,
    )
    calibration = calibrate(open_checkpoint(model), settings, ignore, SINGLE_PROCESS)
    return list(calibration.batches(settings, model))


def opened(model: Path, dtype: str = "float32") -> ModelStream:
    return open_stream(
        open_checkpoint(model), device=CPU, dtype=dtype, trust_remote_code=True, images=True
    )


def plain(model: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).eval()


def through_blocks(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return what enters each block of the language model, and the logits."""
    seen: list[Tensor] = []
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None) or decoder.model.layers
    hooks = [layer.register_forward_pre_hook(noting(seen), with_kwargs=True) for layer in layers]
    logits = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def plain_inputs(batch: Any, processor: Any) -> dict[str, Tensor]:
    """Return the inputs of a batch, made by hand from text and images."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    from io import BytesIO

    from PIL import Image

    images = [Image.open(BytesIO(content)).convert("RGB") for content in batch.window.images]
    made = processor(
        text=[batch.window.text], images=[images], return_tensors="pt", add_special_tokens=False
    )
    return dict(made)


def through_stream(
    stream: ModelStream, batches: list[Any]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return what enters each block, by block and batch, and the states after the last block."""
    states = stream.embed(batches)
    entered = []
    for index in range(stream.n_blocks):
        seen: list[Tensor] = []
        with stream.block(index) as block:
            hook = block.module.register_forward_pre_hook(noting(seen), with_kwargs=True)
            states = [block.run(batch, state) for batch, state in enumerate(states)]
            hook.remove()
        entered.append(seen)
    return entered, states


def noting(seen: list[Tensor]) -> Callable[..., None]:
    """Return a hook that appends the hidden states which enter a block to `seen`."""

    def note(_block: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    return note


@torch.inference_mode()
def test_states_equal_those_of_a_plain_forward(model: Path, tmp_path: Path) -> None:
    batches = batches_of(model, tmp_path)
    assert sum(isinstance(batch, ImageBatch) for batch in batches) == 3
    stream = opened(model)
    entered, last = through_stream(stream, batches)
    truth, processor = plain(model), AutoProcessor.from_pretrained(model, trust_remote_code=True)
    for number, batch in enumerate(batches):
        expected, logits = through_blocks(truth, plain_inputs(batch, processor))
        for index, hidden in enumerate(expected):
            torch.testing.assert_close(entered[index][number], hidden, rtol=0, atol=0)
        with stream.head() as head:
            found = head(token_ids(batch), last[number])
        torch.testing.assert_close(found, logits)
