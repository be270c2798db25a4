"""Chats with images: the model's own processor makes token ids and pixels of them.

A chat is one window. The windows of a run keep the text and the bytes of their images; pixels are
made when the window is embedded, and again if it is needed again.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from gptq_cli.calibration.chats import (
    IMAGE_MARK,
    TEXT_ONLY,
    ChatRow,
    ChatTemplate,
    Message,
)
from gptq_cli.calibration.columns import kind_of
from gptq_cli.errors import InputError
from gptq_cli.files import file_errors, is_file
from gptq_cli.models.remote_code import remote_code_refusal

FIX_IMAGE = "fix the row, or remove it"
INSTALL = "install it: pip install 'gptq_cli[vision]'"
WIDE = 2  # dimensions of a tensor with one value for each token: [1, tokens]


@dataclass(frozen=True, slots=True)
class ImageChat:
    """A chat as text, with its images in order: paths, or bytes of files. It may have none."""

    text: str
    images: tuple[Path | bytes, ...]
    place: str


@dataclass(frozen=True, slots=True, eq=False)
class ImageWindow:
    """A chat with images as a window of its own: token ids [1, tokens], its text, and image files.

    `sha256` is the hash of everything that the model gets, pixels included.
    """

    ids: Tensor
    sha256: str
    text: str
    images: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class VisionModel:
    """The directory of a model that reads images, and whether code in it may run."""

    directory: Path
    trust_remote_code: bool

    @property
    def processor(self) -> Any:
        """The processor, loaded once in each process; errors as `load_processor`."""
        return load_processor(self.directory, trust_remote_code=self.trust_remote_code)

    def check_reads_images(self) -> None:
        """Raise InputError E_DATA_IMAGE if the model reads text only."""
        _image_token(self.directory, trust_remote_code=self.trust_remote_code)

    @property
    def image_token(self) -> int:
        """The token id that stands for each piece of an image."""
        return _image_token(self.directory, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """A window with images as a batch of its own, and the model that reads it."""

    window: ImageWindow
    model: VisionModel

    def __len__(self) -> int:
        """Return the number of windows."""
        return 1

    @property
    def ids(self) -> Tensor:
        """The token ids [1, tokens]."""
        return self.window.ids

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs of the model, made anew: token ids, pixels, and what goes with them."""
        made = _processed(self.model, self.window.text, self.window.images)
        return _cut(made, self.ids.shape[1])


def with_model(
    batches: Iterable[Tensor | ImageWindow], model: VisionModel
) -> tuple[Tensor | ImageBatch, ...]:
    """Return batches that make the inputs of their images by the processor of `model`."""
    found: list[Tensor | ImageBatch] = []
    for batch in batches:
        if isinstance(batch, Tensor):
            found.append(batch)
        else:
            found.append(ImageBatch(batch, model))
    return tuple(found)


class ImageTemplate(ChatTemplate):
    """The template that makes text of chats with images: the processor's, or that of a file.

    `chat` is the chat that was rendered last.
    """

    def __init__(self, processor: Any, directory: Path, file: Path | None) -> None:
        super().__init__(processor.tokenizer, directory, file)
        self.processor = processor
        self.chat = ImageChat("", (), "")
        self.with_images = 0

    @property
    def exists(self) -> bool:
        """Whether the user gave a template, or the processor or the tokenizer has one."""
        return self.processor.chat_template is not None or super().exists

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        place: str,
        *,
        answer: bool = False,
    ) -> str:
        """Return the text of a chat without images; errors as those of `ChatTemplate`."""
        text = super().render(messages, tools, place, answer=answer)
        self.chat = ImageChat(text, (), place)
        return text

    def render_with_images(self, chat: ChatRow) -> str:
        """Return the text of a chat with images, in which a token marks the place of each image.

        Raises InputError E_DATA_IMAGE if an image cannot be found, or if an image has no place.
        """
        messages = with_marks_replaced(chat.messages, chat.images)
        found = tuple([located(source, chat) for source in _sources_of(chat, messages)])
        parts = [_as_parts(message) for message in messages]
        text = super().render(parts, chat.tools, chat.place)
        self.chat = ImageChat(text, found, chat.place)
        self.with_images += 1
        return text

    def _own_template(self, tools: list[Any] | None) -> str:
        own = self.processor.chat_template
        if isinstance(own, str):
            return own
        return super()._own_template(tools)


def with_marks_replaced(messages: list[Message], images: Sequence[Any]) -> list[Message]:
    """Return messages in which each IMAGE_MARK is a part, if the images are those of a column.

    Messages that have parts for their images are returned as they are.
    """
    if not images or any(_image_parts(message) for message in messages):
        return messages
    replaced = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and IMAGE_MARK in content:
            message = {**message, "content": _split_at_marks(content)}
        replaced.append(message)
    return replaced


def _split_at_marks(text: str) -> list[Message]:
    parts: list[Message] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image", "image": None})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _sources_of(chat: ChatRow, messages: Sequence[Message]) -> list[Any]:
    """Return what a chat says about each image, in the order of their places in `messages`."""
    parts: list[Message] = []
    for message in messages:
        parts += _image_parts(message)
    sources = [part["image"] for part in parts if part["image"] is not None]
    if chat.images and sources:
        text = f"{chat.place} has images both in its messages and in a column"
        raise InputError("E_DATA_IMAGE", text, hint="keep one of them")
    sources = sources or chat.images
    if len(sources) != len(parts):
        held = f"{len(sources)} images for {len(parts)} places in its messages"
        hint = f'write {{"type": "image"}} or {IMAGE_MARK} where each image stands'
        raise InputError("E_DATA_IMAGE", f"{chat.place} has {held}", hint=hint)
    return sources


def _image_parts(message: Message) -> list[Message]:
    content = message.get("content")
    if not isinstance(content, list):
        return []
    return [part for part in content if part["type"] == "image"]


def _as_parts(message: Message) -> Message:
    """Return a message with a list of parts, which all templates for images take.

    The content of a tool stays a text.
    """
    content = message.get("content")
    if not isinstance(content, str) or message["role"] == "tool":
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


# ------------------------------------------------------------ images


def located(source: Any, chat: ChatRow) -> Path | bytes:
    """Return the path of an image or the bytes of its file.

    A relative path begins at the folder of the dataset. Raises InputError E_DATA_IMAGE if there is
    no such file, and for an address on the web.
    """
    if isinstance(source, Mapping):  # as `datasets` stores images
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return source
    if hasattr(source, "save"):  # as `datasets` hands on images
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        return buffer.getvalue()
    if not isinstance(source, str):
        message = f"{chat.place}: an image is {kind_of(source)}, not a path"
        raise InputError("E_DATA_IMAGE", message, hint=FIX_IMAGE)
    if source.startswith("data:"):
        return _from_data_url(source, chat.place)
    return _path_of(source, chat)


def _path_of(source: str, chat: ChatRow) -> Path:
    if source.startswith(("http://", "https://")):
        message = f"{chat.place}: the image `{source}` is on the web, which is not read"
        hint = "download it, and write its path"
        raise InputError("E_DATA_IMAGE", message, hint=hint)
    path = chat.folder / Path(source.removeprefix("file://")).expanduser()
    if not is_file(path):
        message = f"{chat.place}: there is no image `{path}`"
        hint = "fix the path: it is relative to the folder of the dataset"
        raise InputError("E_DATA_IMAGE", message, hint=hint)
    return path


def _from_data_url(source: str, place: str) -> bytes:
    head, _, body = source.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        message = f"{place}: a data URL holds no image: {error}"
        raise InputError("E_DATA_IMAGE", message, hint=FIX_IMAGE) from error


def _read(image: Path | bytes, place: str) -> bytes:
    """Return the bytes of an image; InputError E_DATA_IMAGE if no image can be made of them."""
    name = "an image"
    content = image
    if isinstance(image, Path):
        name = f"`{image}`"
        with file_errors(image, writing=False):
            content = image.read_bytes()
    assert isinstance(content, bytes)
    try:
        _decoded(content)
    except Exception as error:
        reason = str(error).partition("<")[0].strip() or type(error).__name__
        message = f"{place}: {name} is not an image that Pillow reads: {reason}"
        raise InputError("E_DATA_IMAGE", message, hint=FIX_IMAGE) from error
    return content


def _decoded(content: bytes) -> Any:
    """Return the image in RGB, turned as its camera says.

    ValueError for an image of more pixels than Pillow takes for safe.
    """
    from PIL import Image
    from transformers.image_utils import load_image

    with catch_warnings():
        simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused below
        image = Image.open(io.BytesIO(content))
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        text = f"it has {image.width} x {image.height} pixels, more than the {most:,} it allows"
        raise ValueError(text)
    return load_image(image)


# ------------------------------------------------------------ the processor


@cache
def load_processor(directory: Path, *, trust_remote_code: bool) -> Any:
    """Return the processor in `directory`.

    Raises InputError: E_PROCESSOR if there is none that works or Pillow is missing, E_REMOTE_CODE
    if it is code.
    """
    if find_spec("PIL") is None:
        raise InputError("E_PROCESSOR", "images need Pillow", hint=INSTALL)
    from transformers import AutoProcessor

    try:
        with _quiet():
            processor = AutoProcessor.from_pretrained(
                directory, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:
        refused = remote_code_refusal(error, directory, "the processor of ")
        raise refused or _no_processor(str(error), directory) from error
    if getattr(processor, "image_processor", None) is None:
        raise _no_processor("it has no processor of images", directory)
    return processor


def _no_processor(reason: str, directory: Path) -> InputError:
    reason = " ".join(reason.split())[:200]
    message = f"`{directory}` has no usable processor of images: {reason}"
    hint = "copy preprocessor_config.json and processor_config.json of the original into it"
    if "orchvision" in reason:
        hint = "install the torchvision that belongs to your torch"
    return InputError("E_PROCESSOR", message, hint=hint)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from logging which of its image processors it takes."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@cache
def _image_token(directory: Path, *, trust_remote_code: bool) -> int:
    """Return the token id of images; InputError E_DATA_IMAGE if the model reads no images."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = AutoConfig.from_pretrained(
        directory, trust_remote_code=trust_remote_code, local_files_only=True
    )
    token = getattr(config, "image_token_id", None)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or token is None:
        message = (
            f"the dataset holds images, but `{directory}` ({config.model_type}) reads text only"
        )
        raise InputError("E_DATA_IMAGE", message, hint=TEXT_ONLY)
    return int(token)


def _processed(model: VisionModel, text: str, images: Sequence[bytes]) -> dict[str, Tensor]:
    """Return all that the processor makes of a chat; special tokens are those of the template."""
    pictures = [_decoded(image) for image in images]
    made = model.processor(
        text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False
    )
    inputs = {}
    for name, value in made.items():
        if isinstance(value, Tensor):
            inputs[name] = value
    return inputs


def _cut(inputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return the inputs of the first `length` tokens."""
    shape = inputs["input_ids"].shape
    cut = {}
    for name, value in inputs.items():
        if value.dim() == WIDE and value.shape == shape:
            value = value[:, :length]
        cut[name] = value
    return cut


@dataclass(frozen=True, slots=True)
class TooLong:
    """A chat of `tokens` whose last image ends at token `end`, behind the end of a window."""

    place: str
    tokens: int
    end: int


def image_window(chat: ImageChat, model: VisionModel, seqlen: int) -> ImageWindow | TooLong:
    """Return the window of a chat with images, cut after `seqlen` tokens.

    It is TooLong if the cut would hit an image. Raises InputError E_DATA_IMAGE if an image cannot
    be read, or if the processor refuses the chat (its template may leave an image out).
    """
    images = tuple([_read(image, chat.place) for image in chat.images])
    try:
        inputs = _processed(model, chat.text, images)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"the model's processor refuses {chat.place}: {reason}"
        raise InputError("E_DATA_IMAGE", message, hint=FIX_IMAGE) from error
    ids = inputs["input_ids"]
    places = (ids[0] == model.image_token).nonzero()
    if not len(places):
        message = f"the images of {chat.place} have no token {model.image_token}"
        hint = "compare image_token_id in config.json and the tokenizer with those of the original"
        raise InputError("E_DATA_IMAGE", message, hint=hint)
    end = int(places[-1]) + 1
    if end > seqlen:
        return TooLong(chat.place, ids.shape[1], end)
    kept = _cut(inputs, seqlen)
    return ImageWindow(kept["input_ids"], _hash_of(kept), chat.text, images)


def check_lengths(windows: Iterable[Any], seqlen: int) -> None:
    """Raise InputError E_DATA_IMAGE with the length that fits, if a window is TooLong."""
    too_long = [window for window in windows if isinstance(window, TooLong)]
    if not too_long:
        return
    longest = max(too_long, key=lambda chat: chat.end)
    raise InputError(
        "E_DATA_IMAGE",
        f"{longest.place} has {longest.tokens:,} tokens, and its last image ends at token "
        f"{longest.end:,}, but a window has {seqlen:,}",
        hint=f"use --seqlen {longest.end} or more, or smaller images",
    )


def _hash_of(inputs: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(inputs):
        value = inputs[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
