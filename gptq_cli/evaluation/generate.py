"""`gptq generate`: the text that a checkpoint writes, by transformers' own `generate`.

The weights are decoded as they are for an evaluation. As many blocks as fit stay in memory; each of
the others is read again for each token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gptq_cli.calibration.chats import ChatTemplate, check_whole
from gptq_cli.calibration.windows import Encoder, check_token_ids, load_encoder
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.model_files import read_json
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.errors import ConfigError, InputError, ResourceError, size, to_json
from gptq_cli.evaluation.request import GenerateRequest
from gptq_cli.events import PhaseStarted, Report, Warned, ignore
from gptq_cli.files import is_file
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.run_plan import about_unused, positions
from gptq_cli.runtime.device import report_device, resolve_device
from gptq_cli.runtime.memory import Memory, device_errors
from gptq_cli.runtime.open_model import decoding_backend, open_stream, warn_of

DEFAULT_NEW_TOKENS = 128
# Of the free memory, for weights; the rest is for the keys and values of tokens and for forwards.
WEIGHTS_SHARE = 0.8
UNFINISHED = "\ufffd"  # a letter of which the last tokens hold only some bytes
LARGEST_ID = 2**63 - 1  # of a token in a tensor
SETTINGS_FILE = "generation_config.json"

Write = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The `text` that a model wrote after the `prompt`.

    `chat` tells whether a chat template made a chat of the prompt. `stopped` is "end" if the model
    ended the text, "length" if max_new_tokens or the positions of the model ended it. `seconds` is
    the time of the new tokens alone. `blocks_in_memory` of `blocks` stayed in memory.
    """

    model: str
    prompt: str
    text: str
    chat: bool
    prompt_tokens: int
    tokens: int
    stopped: str
    dtype: str
    device: str
    blocks: int
    blocks_in_memory: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        values: dict[str, Any] = to_json(self)
        return values


def generate_text(
    model: str, request: GenerateRequest, write: Write, report: Report = ignore
) -> GenerateResult:
    """Return the text that MODEL (a directory or a Hub id) writes; `write` gets it in pieces.

    Raises InputError for models and prompts that are refused, ConfigError E_CFG_SEQLEN for a prompt
    that leaves no room for the answer, ResourceError E_OOM if not even one block fits into memory.
    """
    device = resolve_device(request.device)
    checkpoint = open_decodable(locate_model(model, request.revision).directory)
    report_device(device, request.device, report)
    warn_of(checkpoint, report)
    encoder = load_encoder(checkpoint.directory, trust_remote_code=request.trust_remote_code)
    ids, is_chat = _prompt_ids(request, encoder, checkpoint)
    most = _room(request, len(ids), checkpoint)
    ends = _end_tokens(checkpoint.directory, encoder)
    host = Memory(torch.device("cpu"))
    with torch.inference_mode(), device_errors():
        stream = open_stream(
            checkpoint,
            device=device,
            dtype=request.dtype,
            trust_remote_code=request.trust_remote_code,
            backend=decoding_backend(checkpoint, None, device, report),
            host=host,
        )
        for code, text in about_unused(stream.unused):
            report(Warned(code, text))
        prompt = torch.tensor([ids])
        check_token_ids(prompt, stream.vocabulary_rows)
        n_kept = _blocks_in_memory(stream, Memory(device), report)
        writer = _Writer(encoder.tokenizer, write)
        with stream.whole(n_kept) as whole:
            started = time.perf_counter()
            _generate(whole, prompt.to(device), request, most, ends, writer)
            seconds = time.perf_counter() - started
        dtype = str(stream.dtype).removeprefix("torch.")
    stopped = "length"
    if writer.ids[-1] in ends:
        stopped = "end"
    return GenerateResult(
        model=model,
        prompt=request.prompt,
        text=writer.text,
        chat=is_chat,
        prompt_tokens=len(ids),
        tokens=len(writer.ids),
        stopped=stopped,
        dtype=dtype,
        device=str(device),
        blocks=stream.n_blocks,
        blocks_in_memory=n_kept,
        seconds=seconds,
    )


def _prompt_ids(
    request: GenerateRequest, encoder: Encoder, checkpoint: Checkpoint
) -> tuple[list[int], bool]:
    """Return the tokens of the prompt, and whether a chat template made a chat of it."""
    file = None
    if request.chat_template is not None:
        file = Path(request.chat_template)
    template = ChatTemplate(encoder.tokenizer, checkpoint.directory, file)
    is_chat = not request.raw and template.exists
    if is_chat:
        messages = [{"role": "user", "content": request.prompt}]
        text = template.render(messages, None, "the prompt", answer=True)
        check_whole(text, "the prompt, as the chat template renders it,")
        ids = encoder(text, False)
    else:
        check_whole(request.prompt, "the prompt")
        ids = encoder(request.prompt, True)
    if not ids:
        hint = "give a prompt that holds text"
        raise InputError("E_DATA_EMPTY", "the prompt holds no token", hint=hint)
    return ids, is_chat


def _room(request: GenerateRequest, n_prompt: int, checkpoint: Checkpoint) -> int:
    """Return the number of tokens to write; ConfigError E_CFG_SEQLEN if they do not fit."""
    limit = positions(checkpoint)
    wanted = request.max_new_tokens or DEFAULT_NEW_TOKENS
    if limit is None or n_prompt + wanted <= limit:
        return wanted
    left = limit - n_prompt
    needed = f"the prompt has {n_prompt} tokens, and the model has {limit} positions"
    if left < 1:
        raise ConfigError("E_CFG_SEQLEN", needed, hint="give a shorter prompt")
    if request.max_new_tokens is not None:
        message = f"{needed}: {wanted} new tokens do not fit"
        raise ConfigError("E_CFG_SEQLEN", message, hint=f"use --max-new-tokens {left}")
    return left


def _end_tokens(directory: Path, encoder: Encoder) -> list[int]:
    """Return the tokens that end a text: those of generation_config.json and the tokenizer's."""
    ends = {encoder.tokenizer.eos_token_id}
    file = directory / SETTINGS_FILE
    if is_file(file):
        found = read_json(file)
        named = found.get("eos_token_id") if isinstance(found, dict) else None
        if not isinstance(named, list):
            named = [named]
        # Ids that no tensor can hold are never written.
        ends.update(token for token in named if type(token) is int and 0 <= token <= LARGEST_ID)
    return sorted(ends - {None})


def _blocks_in_memory(stream: ModelStream, memory: Memory, report: Report) -> int:
    """Return how many blocks fit into memory, and report it.

    Raises ResourceError E_OOM if not even the weights outside the blocks and one block fit.
    """
    sizes = [stream.block_bytes(index) for index in range(stream.n_blocks)]
    outside = stream.outside_bytes()
    whole, free = outside + sum(sizes), memory.free()
    left = int(free * WEIGHTS_SHARE) - outside
    dtype = str(stream.dtype).removeprefix("torch.")
    needed = f"{size(whole)} of weights in {dtype} on {stream.device}"
    if whole <= free * WEIGHTS_SHARE:
        report(PhaseStarted("model", f"{needed}, {size(free)} free"))
        return stream.n_blocks
    if left < max(sizes):
        least = size(outside + max(sizes))
        message = f"the embeddings and one block take {least} in {dtype}, {size(free)} are free"
        hint = "use --dtype bfloat16, another --device, or a machine with more memory"
        raise ResourceError("E_OOM", message, hint=hint)
    n_kept = 0
    left -= max(sizes)  # for the block that is read
    while left >= sizes[n_kept]:
        left -= sizes[n_kept]
        n_kept += 1
    held = f"{n_kept} of {stream.n_blocks} blocks stay in memory"
    effect = "the others are read again for each token, which is slow"
    report(Warned("W_MEM_BLOCKS", f"{needed}, but {size(free)} are free: {held}, {effect}"))
    return n_kept


def _generate(
    model: Any,
    prompt: Tensor,
    request: GenerateRequest,
    most: int,
    ends: list[int],
    writer: _Writer,
) -> None:
    """Let transformers write up to `most` tokens after the `prompt` [1, tokens]."""
    settings: dict[str, Any] = {"do_sample": False}
    if request.temperature > 0:
        torch.manual_seed(request.seed or 0)
        settings = {"do_sample": True, "temperature": request.temperature, "top_k": 0}
        settings["top_p"] = request.top_p or 1.0
    model.generation_config = GenerationConfig(
        max_new_tokens=most, eos_token_id=ends or None, pad_token_id=0, **settings
    )
    model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=writer)


class _Writer(BaseStreamer):  # type: ignore[misc]
    """Receives tokens from transformers, and writes the text of each as soon as it is whole."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._is_prompt = True  # transformers gives the prompt first

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self._decoded()
        if not text.endswith(UNFINISHED):
            self._add(text)

    def end(self) -> None:
        self._add(self._decoded())

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _add(self, text: str) -> None:
        new = text[len(self.text) :]
        if new:
            self.text = text
            self._write(new)
