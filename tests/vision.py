"""Tiny random models that read images, with processors that need no torchvision, and their chats.

The image processors are those of transformers that work with Pillow and numpy. Where the processor
of a family asks for torchvision (videos of Qwen, tiles of Llama 4), a class beside the model takes
its place, as a model with code of its own has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Processor,
    PreTrainedModel,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.families import COMMON, add_noise, save_tokenizer

TEXT = COMMON | {"head_dim": 16, "max_position_embeddings": 256}
QWEN_TEXT = TEXT | {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
    },
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
    "gemma3": {
        "text_config": TEXT
        | {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "vision_config": CLIP | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
    "llama4": {
        "text_config": TEXT
        | {
            "num_hidden_layers": 2,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
        },
        "vision_config": CLIP
        | {
            "intermediate_size": 128,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "pixel_shuffle_ratio": 0.5,
        },
    },
}
QWEN = ("qwen2_5_vl", "qwen3_vl")
IMAGE_TOKENS = {  # the token of a piece of an image, and the tokens around
    "qwen2_5_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "qwen3_vl": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "llama4": ["<|patch|>", "<|image_start|>", "<|image_end|>", "<|image|>"],
}
PLACES = {  # what a template writes where an image stands
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "llama4": "<|image|>",
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}PLACE"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
)
OWN_CLASSES = {
    "qwen": '''
from transformers import Qwen2_5_VLProcessor


class TinyProcessor(Qwen2_5_VLProcessor):
    """The processor of Qwen without videos."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super(Qwen2_5_VLProcessor, self).__init__(
            image_processor, tokenizer, chat_template=chat_template
        )
''',
    "llama4": '''
from transformers import Llama4Processor


class TinyProcessor(Llama4Processor):
    """The processor of Llama 4 for images of one tile."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(
            image_processor, tokenizer, patch_size=4, chat_template=chat_template
        )

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self._prompt_split_image([1, 1], 4)
''',
}


def save_vision_model(
    directory: Path, family: str, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a random model of FAMILIES with tokenizer, processor and template.

    `changes` are settings of its language model. Return `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = IMAGE_TOKENS[family]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if family == "gemma3":
        for name, token in zip(("image_token", "boi_token", "eoi_token"), tokens, strict=True):
            tokenizer.init_kwargs.setdefault("extra_special_tokens", {})[name] = token
            tokenizer._set_model_specific_special_tokens({name: token})
    tokenizer.save_pretrained(directory)
    _save_processor(directory, family, tokenizer)
    template = TEMPLATE.replace("PLACE", PLACES[family])
    (directory / "chat_template.jinja").write_text(template)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    _random_vision_model(family, ids, changes, dtype).save_pretrained(directory)
    return directory


def _random_vision_model(
    family: str, ids: list[int], changes: dict[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    settings = dict(FAMILIES[family])
    settings["text_config"] = settings["text_config"] | changes
    names = {"gemma3": ("image_token_index",), "llama4": ("image_token_index",)}
    of_qwen = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id")
    for name, number in zip(names.get(family, of_qwen), ids, strict=False):
        settings[name] = number
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    add_noise(model)
    return model


def _save_processor(directory: Path, family: str, tokenizer: Any) -> None:
    if family == "gemma3":
        sizes = {"height": 16, "width": 16}
        images = Gemma3ImageProcessorPil(size=sizes, image_seq_length=4)
        Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(directory)
        return
    name = "qwen" if family in QWEN else family
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    if family in QWEN:
        images = Qwen2VLImageProcessorPil(
            patch_size=4,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 64, "longest_edge": 1024},
        )
    images.save_pretrained(directory)
    (directory / "tiny_processor.py").write_text(OWN_CLASSES[name])
    own = {"AutoProcessor": "tiny_processor.TinyProcessor"}
    content = {"processor_class": "TinyProcessor", "auto_map": own}
    (directory / "processor_config.json").write_text(json.dumps(content))


def save_image(file: Path, width: int, height: int, seed: int = 0) -> Path:
    """Save an image of random colours; return its path."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(colours.numpy()).save(file)
    return file


def save_chats(folder: Path) -> Path:
    """Save two images, and a file of chats with none, one and two of them; return its path."""
    save_image(folder / "low.png", 24, 16)
    save_image(folder / "high.jpg", 16, 32, seed=1)
    rows = [
        [_user(_image("low.png"), "what is this?"), _assistant("noise")],
        [_user("compare ", _image("low.png"), _image("high.jpg")), _assistant("two of noise")],
        [_user("good day"), _assistant("and to you")],
        [_user(_image("high.jpg")), _assistant("noise"), _user("sure?"), _assistant("quite")],
    ]
    file = folder / "chats.jsonl"
    file.write_text("".join([json.dumps({"messages": messages}) + "\n" for messages in rows]))
    return file


def _image(path: str) -> dict[str, str]:
    return {"type": "image", "image": path}


def _user(*parts: str | dict[str, str]) -> dict[str, Any]:
    content = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        content.append(part)
    return {"role": "user", "content": content}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
