"""Windows of token ids from text: full windows, without padding, that do not overlap.

Calibration reads documents until the first POOL x nsamples windows are full or the text ends, and
draws nsamples of them without replacement. Evaluation takes every window of the text in order, as
the GPTQ paper does. Ids come from the model's own tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gptq_cli.calibration.corpus import Documents
from gptq_cli.errors import GptqError, InputError
from gptq_cli.files import file_cause, file_errors
from gptq_cli.models.remote_code import remote_code_refusal

Encode = Callable[[str, bool], list[int]]  # text, add_special_tokens -> ids
POOL = 8
PIECE = 1_000_000  # characters tokenized at a time for calibration


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Token ids [windows, seqlen], int64, and their hash as little-endian int64."""

    ids: Tensor
    sha256: str

    @classmethod
    def of(cls, rows: list[list[int]]) -> Windows:
        """Return windows of equal length, and their hash."""
        ids = torch.tensor(rows, dtype=torch.long)
        return cls(ids, sha256(ids.numpy().astype("<i8").tobytes()).hexdigest())

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def calibration_windows(
    documents: Documents,
    encode: Encode,
    *,
    seqlen: int,
    nsamples: int,
    seed: int,
    bos_token_id: int | None = None,
) -> Windows:
    """Return windows [nsamples, seqlen], drawn from the text without replacement.

    With `bos_token_id` each window is that token and seqlen - 1 tokens of text. The text is
    tokenized in pieces of about PIECE characters, cut between words. The draw is among the first
    POOL x nsamples windows, so that the result depends neither on how far a stream was read nor on
    the size of the rest. `seed` decides the draw and its order.

    Raises InputError: E_DATA_SHORT with the counts, E_DATA_EMPTY if there is not a single token.
    """
    prefix = [] if bos_token_id is None else [bos_token_id]
    length = seqlen - len(prefix)
    ids: list[int] = []
    for piece in _pieces(documents):
        ids += encode(piece, False)
        if len(ids) >= POOL * nsamples * length:
            break
    available = min(len(ids) // length, POOL * nsamples)
    if available < nsamples:
        raise _too_short(documents, available, nsamples, seqlen, len(ids))
    chosen = random.Random(seed).sample(range(available), nsamples)
    return Windows.of([prefix + ids[index * length : (index + 1) * length] for index in chosen])


def evaluation_windows(
    documents: Documents, encode: Encode, *, seqlen: int, max_windows: int | None = None
) -> Windows:
    """Return every full window [windows, seqlen] of the joined text in order.

    The rest of the text is dropped. All text is tokenized at once with the tokenizer's defaults,
    special tokens included: the protocol of GPTQ, Frantar et al. 2022, section 4. `max_windows` and
    the corpus's own limit cap the count.

    Raises InputError: E_DATA_SHORT if there is no full window, E_DATA_EMPTY if there is no token.
    """
    text = documents.join.join(documents.texts)
    ids: list[int] = []
    if text.strip():
        ids = encode(text, True)
    count = len(ids) // seqlen
    for limit in (max_windows, documents.max_windows):
        if limit is not None:
            count = min(count, limit)
    if count < 1:
        raise _too_short(documents, 0, 1, seqlen, len(ids))
    return Windows.of([ids[index * seqlen : (index + 1) * seqlen] for index in range(count)])


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise InputError E_TOKENIZER if an id is beyond the `vocab_size` rows of the embedding."""
    largest = int(ids.max())
    if largest >= vocab_size:
        raise InputError(
            "E_TOKENIZER",
            f"token id {largest} is beyond the embedding, which has {vocab_size} rows",
            hint="the tokenizer belongs to another model: copy the model's own tokenizer files "
            "beside it",
        )


def _pieces(documents: Documents) -> Iterator[str]:
    """Yield the joined text in order, in pieces of about PIECE characters."""
    waiting = ""
    for text in documents.pieces():
        waiting += text
        while len(waiting) >= PIECE:
            cut = _last_blank(waiting, PIECE)
            yield waiting[:cut]
            waiting = waiting[cut:]
    yield waiting


def _last_blank(text: str, end: int) -> int:
    """Return the cut before `end`: at a blank, where most tokenizers begin the next word."""
    cut = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
    return cut if cut > 0 else end


def _too_short(
    documents: Documents, windows: int, asked: int, seqlen: int, tokens: int
) -> InputError:
    name = documents.name
    if tokens == 0:
        message = f"dataset `{name}` holds no text"
        return InputError("E_DATA_EMPTY", message, hint="choose a dataset that holds text")
    held = f"{windows} windows of {seqlen} tokens ({tokens} tokens)"
    message = f"dataset `{name}` gives {held}, but {asked} are needed"
    options = "--nsamples or --seqlen" if asked > 1 else "--seqlen"
    return InputError("E_DATA_SHORT", message, hint=f"lower {options}, or give more text")


@dataclass(frozen=True, slots=True)
class Encoder:
    """A callable tokenizer; `bos_token_id` is None if it puts no token before a text."""

    tokenizer: Any
    bos_token_id: int | None

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        # verbose=False: a text longer than the model's positions is cut into windows afterwards
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids


def load_encoder(directory: Path, *, trust_remote_code: bool) -> Encoder:
    """Return the tokenizer in `directory`.

    Raises InputError: E_TOKENIZER if there is none that works, E_REMOTE_CODE if it is code.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True, use_fast=True
        )
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        bos = tokenizer.bos_token_id
    except Exception as error:
        raise _no_tokenizer(error, directory) from error
    if first != [bos]:
        bos = None
    return Encoder(tokenizer, bos)


def _no_tokenizer(error: Exception, directory: Path) -> GptqError:
    own_code = remote_code_refusal(error, directory, "the tokenizer of ")
    refused = own_code or file_cause(error) or _unreadable(directory)
    if refused is not None:
        return refused
    if not any(directory.glob("*token*")) and not any(directory.glob("*vocab*")):
        message = f"`{directory}` has no tokenizer"
        hint = (
            "copy the tokenizer's files into it, such as tokenizer.json and tokenizer_config.json"
        )
    else:
        text = " ".join(str(error).split())[:200]
        message = f"`{directory}` has no usable tokenizer: {text}"
        hint = "copy the tokenizer files into it"
    return InputError("E_TOKENIZER", message, hint=hint)


def _unreadable(directory: Path) -> GptqError | None:
    """Return the error for the first file that may not be read, which libraries may not name."""
    try:
        for file in sorted(directory.iterdir()):
            if file.is_file():
                with file_errors(file, writing=False), file.open("rb"):
                    pass
    except GptqError as error:
        return error
    return None
