"""Runs on images, of models whose class for text alone has other names or is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.families import text_file
from tests.runs import messages, quantize, quantize_with_events
from tests.vision import save_chats, save_vision_model


@pytest.mark.parametrize("family", ["llama4", "qwen3_vl"])
def test_images_and_text_give_the_same_names(family: str, tmp_path: Path) -> None:
    model = save_vision_model(tmp_path / "model", family)
    given = {"nsamples": 4, "batch_size": 2, "seqlen": 100, "trust_remote_code": True}
    given |= {"moe_uncovered": "rtn", "preset": "fast"}
    on_images = tmp_path / "on images"
    images = str(save_chats(tmp_path))
    result, events = quantize_with_events(model, on_images, dataset=images, **given)
    assert messages(events, "W_CKPT_UNUSED") == []
    on_text, of_text = quantize(tmp_path, model, dataset=text_file(), **given)
    assert (result.image_windows, of_text.image_windows) == (3, 0)
    with_images, with_text = tensors(on_images), tensors(on_text)
    assert with_images.keys() == with_text.keys()
    differing = [name for name in with_text if not with_text[name].equal(with_images[name])]
    assert len(differing) > 10
    assert not [name for name in differing if "visi" in name or "visual" in name]
    source = tensors(model)
    vision = [name for name in source if "visi" in name or "visual" in name]
    assert len(vision) > 10
    assert all(with_images[name].equal(source[name]) for name in vision)


def tensors(directory: Path) -> dict[str, object]:
    return load_file(directory / "model.safetensors")
