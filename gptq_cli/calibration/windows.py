"""Text to windows of token ids: full windows, without padding, that do not overlap.

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
    """Token ids [windows, seqlen], int64; `sha256` is the hash of the ids as little-endian int64."""

    ids: Tensor
    sha256: str

    @classmethod
    def of(cls, rows: list[list[int]]) -> Windows:
        """Windows of equal length, and their hash."""
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
    """`nsamples` windows [nsamples, seqlen] in a seeded order, drawn without replacement from the text's windows.

    With `bos_token_id` each window is that token and seqlen - 1 tokens of text. The text is tokenized in pieces of
    about PIECE characters, cut between words. The draw is among the first POOL x nsamples windows, so that the result
    depends neither on how far a stream was read nor on the size of the rest.

    Raises InputError E_DATA_SHORT with the counts, E_DATA_EMPTY without a single token.
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
        raise _too_short(
            documents, windows=available, asked=nsamples, seqlen=seqlen, tokens=len(ids)
        )
    chosen = random.Random(seed).sample(range(available), nsamples)
    return Windows.of([prefix + ids[index * length : (index + 1) * length] for index in chosen])


def evaluation_windows(
    documents: Documents, encode: Encode, *, seqlen: int, max_windows: int | None = None
) -> Windows:
    """Every full window [windows, seqlen] of the joined text in order; what remains at the end is dropped.

    All text is tokenized at once and as the tokenizer does by default, special tokens included: the protocol of GPTQ,
    Frantar et al. 2022, section 4. `max_windows` and the corpus's own limit cap the count.

    Raises InputError E_DATA_SHORT for less than one window, E_DATA_EMPTY without a single token.
    """
    text = documents.join.join(documents.texts)
    ids = encode(text, True) if text.strip() else []
    limits = [limit for limit in (max_windows, documents.max_windows) if limit is not None]
    count = min([len(ids) // seqlen, *limits])
    if count < 1:
        raise _too_short(documents, windows=0, asked=1, seqlen=seqlen, tokens=len(ids))
    return Windows.of([ids[index * seqlen : (index + 1) * seqlen] for index in range(count)])


def check_token_ids(ids: Tensor, vocab_size: int) -> None:
    """InputError E_TOKENIZER if an id has no row among the `vocab_size` rows of the embedding."""
    largest = int(ids.max())
    if largest >= vocab_size:
        raise InputError(
            "E_TOKENIZER",
            f"token id {largest} is beyond the embedding, which has {vocab_size} rows",
            hint="the tokenizer belongs to another model: copy the model's own tokenizer files beside it",
        )


def _pieces(documents: Documents) -> Iterator[str]:
    """The joined text in order, in pieces of about PIECE characters."""
    waiting = ""
    for position, text in enumerate(documents.texts):
        waiting += text if position == 0 else documents.join + text
        while len(waiting) >= PIECE:
            cut = _last_blank(waiting, PIECE)
            yield waiting[:cut]
            waiting = waiting[cut:]
    yield waiting


def _last_blank(text: str, end: int) -> int:
    """Where to cut before `end`: at a blank, which most tokenizers put at the start of the next word."""
    cut = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
    return cut if cut > 0 else end


def _too_short(
    documents: Documents, *, windows: int, asked: int, seqlen: int, tokens: int
) -> InputError:
    name = documents.name
    if tokens == 0:
        return InputError(
            "E_DATA_EMPTY",
            f"dataset `{name}` holds no text",
            hint="choose a dataset that holds text",
        )
    held = f"{windows} windows of {seqlen} tokens ({tokens} tokens)"
    return InputError(
        "E_DATA_SHORT",
        f"dataset `{name}` gives {held}, {asked} are needed",
        hint="lower --nsamples or --seqlen, or give more text"
        if asked > 1
        else "lower --seqlen, or give more text",
    )


@dataclass(frozen=True, slots=True)
class Encoder:
    """Calls the tokenizer; `bos_token_id` is None for a tokenizer that puts no token before a text."""

    tokenizer: Any
    bos_token_id: int | None

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        # verbose=False: a text longer than the model's positions is cut into windows afterwards
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]
        return ids


def load_encoder(directory: Path, *, trust_remote_code: bool) -> Encoder:
    """The tokenizer in `directory`; InputError E_TOKENIZER if there is none that works, E_REMOTE_CODE if it is code."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True, use_fast=True
        )
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        bos = tokenizer.bos_token_id
    except Exception as error:
        own_code = remote_code_refusal(error, directory, "the tokenizer of ")
        if refused := own_code or file_cause(error) or _unreadable(directory):
            raise refused from error
        if not any(directory.glob("*token*")) and not any(directory.glob("*vocab*")):
            hint = "copy the tokenizer's files into it, such as tokenizer.json and tokenizer_config.json"
            raise InputError("E_TOKENIZER", f"`{directory}` has no tokenizer", hint=hint) from error
        text = " ".join(str(error).split())[:200]
        raise InputError(
            "E_TOKENIZER",
            f"`{directory}` has no usable tokenizer: {text}",
            hint="copy the tokenizer files into it",
        ) from error
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
