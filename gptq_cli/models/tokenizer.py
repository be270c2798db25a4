"""The model's own tokenizer, as a function from text to token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gptq_cli.errors import GptqError, InputError
from gptq_cli.files import file_cause, file_errors
from gptq_cli.models.remote_code import remote_code_refusal


@dataclass(frozen=True, slots=True)
class Encoder:
    """Calls the tokenizer; `bos_token_id` is None for a tokenizer that puts no token before a text."""

    tokenizer: Any
    bos_token_id: int | None

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        # verbose=False: a text longer than the model's positions is cut into windows afterwards
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids


def load_encoder(directory: Path, *, trust_remote_code: bool) -> Encoder:
    """The tokenizer in `directory`; InputError E_TOKENIZER if there is none that works, E_REMOTE_CODE if it is code."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True, use_fast=True
        )
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    except Exception as error:
        own_code = remote_code_refusal(error, directory, "the tokenizer of ")
        if refused := own_code or file_cause(error) or _unreadable(directory):
            raise refused from error
        if not any(directory.glob("*token*")) and not any(directory.glob("*vocab*")):
            hint = "copy the tokenizer's files into it, such as tokenizer.json and tokenizer_config.json"
            raise InputError("E_TOKENIZER", f"`{directory}` has no tokenizer", hint=hint) from error
        text = " ".join(str(error).split())[:200]
        raise InputError(
            "E_TOKENIZER", f"`{directory}` has no usable tokenizer: {text}", hint="copy the tokenizer files into it"
        ) from error
    bos = tokenizer.bos_token_id
    return Encoder(tokenizer, bos if bos is not None and first == [bos] else None)


def _unreadable(directory: Path) -> GptqError | None:
    """The error for the first file in `directory` that may not be read; some libraries say less."""
    try:
        for file in sorted(directory.iterdir()):
            if file.is_file():
                with file_errors(file, writing=False), file.open("rb"):
                    pass
    except GptqError as error:
        return error
    return None
