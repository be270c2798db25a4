"""Windows of token ids from text: full windows, without padding, that do not overlap.

Calibration reads documents until the first POOL x nsamples windows are full or the text ends, and
draws nsamples of them without replacement. Evaluation takes every window of the text in order, as
the GPTQ paper does. Ids come from the model's own tokenizer. Chats follow one another, and are cut
where a window ends. The next window of a calibration begins with a later turn of the cut chat, or
with the next chat: always as the chat template begins a chat (docs/decisions/0026).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gptq_cli.calibration.chats import ChatTemplate, ChatText, ImagesFoundError
from gptq_cli.calibration.corpus import (
    DatasetSource,
    Documents,
    is_path,
    load_documents,
    windows_need,
)
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, GptqError, InputError, counted
from gptq_cli.files import file_cause, file_errors
from gptq_cli.models.remote_code import remote_code_refusal

if TYPE_CHECKING:
    from gptq_cli.calibration.images import ImageTemplate, ImageWindow, VisionModel

Encode = Callable[[str, bool], list[int]]  # text, add_special_tokens -> ids
POOL = 8
LEAST_ADVISED = 32  # tokens of a window; shorter ones show little of what a model sees
PIECE = 1_000_000  # characters tokenized at a time for calibration
TRIED = 30_000_000  # letters x turns of chats that are packed again to find a length that fits
COMPARED = 1024  # ids compared at a time


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Token ids [windows, seqlen], int64, and their hash as little-endian int64.

    Windows that are not packed have `lengths` of their own; zeros behind them are no tokens.
    `images` are the windows with images, by their numbers.
    """

    ids: Tensor
    sha256: str
    lengths: tuple[int, ...] | None = None
    images: dict[int, ImageWindow] = field(default_factory=dict)

    @classmethod
    def of_documents(cls, rows: Sequence[list[int] | ImageWindow]) -> Windows:
        """Return windows of any lengths, and the hash of ids, lengths and images."""
        ids: list[list[int]] = []
        images: dict[int, ImageWindow] = {}
        for number, row in enumerate(rows):
            if isinstance(row, list):
                ids.append(row)
            else:
                ids.append(row.ids[0].tolist())
                images[number] = row
        lengths = tuple(map(len, ids))
        longest = max(lengths)
        filled = [row + [0] * (longest - len(row)) for row in ids]
        digest = sha256(repr([_known(row) for row in rows]).encode()).hexdigest()
        return cls(torch.tensor(filled, dtype=torch.long), digest, lengths, images)

    def batches(self, batch_size: int) -> tuple[Tensor | ImageWindow, ...]:
        """Return the token ids [batch, length] of each batch: windows of one length, no padding.

        Each window with images is a batch of its own.
        """
        if self.lengths is None:
            return torch.split(self.ids, batch_size)
        batches: list[Tensor] = []
        lengths = torch.tensor(self.lengths)
        lengths[list(self.images)] = 0
        for length in sorted(set(lengths.tolist()), reverse=True):
            if length:
                batches += torch.split(self.ids[lengths == length, :length], batch_size)
        return (*[batch.contiguous() for batch in batches], *self.images.values())

    @classmethod
    def of(cls, rows: list[list[int]]) -> Windows:
        """Return windows of equal length, and their hash."""
        ids = torch.tensor(rows, dtype=torch.long)
        return cls(ids, sha256(ids.numpy().astype("<i8").tobytes()).hexdigest())

    @property
    def tokens(self) -> int:
        if self.lengths is not None:
            return sum(self.lengths)
        return self.ids.numel()


@dataclass(frozen=True, slots=True)
class Pool:
    """The windows of a text from which some are drawn.

    `tokens` were read, up to the end of the text if it is `whole`; None if they are not counted. A
    window has `length` tokens of text, None if each is a document of any length. Of chats, `tokens`
    are those that can stand in windows; `cut` are left out, from a window's end to the next turn.
    `chats` are the texts of the chats that were read.
    """

    windows: list[Any]
    tokens: int | None
    whole: bool
    length: int | None
    cut: int = 0
    chats: Sequence[ChatText] = ()


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

    The draw is among the first POOL x nsamples windows, so that the result depends neither on how
    far a stream was read nor on the size of the rest. `seed` decides the draw and its order.

    Raises InputError: E_DATA_SHORT with the counts, E_DATA_EMPTY if there is not a single token;
    ConfigError E_CFG_RANGE if a window has no room for text.
    """
    pool = read_pool(documents, encode, seqlen=seqlen, nsamples=nsamples, bos_token_id=bos_token_id)
    return Windows.of(Part(documents, pool, nsamples, seqlen, encode).draw(seed))


def read_pool(
    documents: Documents,
    encode: Encode,
    *,
    seqlen: int,
    nsamples: int,
    bos_token_id: int | None = None,
) -> Pool:
    """Return the first POOL x nsamples windows [seqlen] of the text, or all if there are fewer.

    With `bos_token_id` each window of text is that token and seqlen - 1 tokens of text; a window of
    chats begins as their template begins a chat. Text is tokenized in pieces of about PIECE
    characters, cut between words; a chat is tokenized whole. Raises ConfigError E_CFG_RANGE if a
    window has no room for text.
    """
    if documents.chats is not None:
        return _pool_of_chats(documents.texts, encode, seqlen, POOL * nsamples)
    prefix = [] if bos_token_id is None else [bos_token_id]
    if seqlen <= len(prefix):
        message = f"seqlen must be 2 or more for this model, got {seqlen}"
        hint = "each window begins with the model's BOS token: choose a larger --seqlen"
        raise ConfigError("E_CFG_RANGE", message, hint=hint)
    length = seqlen - len(prefix)
    ids: list[int] = []
    whole = True
    for piece in _pieces(documents):
        ids += encode(piece, False)
        if len(ids) >= POOL * nsamples * length:
            whole = False
            break
    most = min(len(ids) // length, POOL * nsamples)
    windows = [prefix + ids[at * length : (at + 1) * length] for at in range(most)]
    return Pool(windows, len(ids), whole, length)


def _pool_of_chats(chats: Iterable[str], encode: Encode, seqlen: int, most: int) -> Pool:
    """Return the first `most` windows [seqlen] of chats, or all if there are fewer.

    After a window that cuts a chat, the chat continues with its next turn, rendered as a chat of
    its own; if there is none, the next chat follows.
    """
    windows: list[list[int]] = []
    window: list[int] = []
    cut = 0
    read: list[ChatText] = []
    for chat in chats:
        assert isinstance(chat, ChatText)
        read.append(chat)
        whole = encode(chat, False)
        later = _later_ids(chat, encode, whole)
        ids = whole
        while len(window) + len(ids) >= seqlen:
            room = seqlen - len(window)
            windows.append(window + ids[:room])
            window = []
            if len(windows) == most:
                return Pool(windows, most * seqlen, False, seqlen, cut, read)
            unseen = len(ids) - room
            ids, held = _next_turn(later, whole, unseen, seqlen)
            cut += unseen - held
        window += ids
    tokens = len(windows) * seqlen + len(window)
    return Pool(windows, tokens, True, seqlen, cut, read)


def _next_turn(
    later: Iterator[list[int]], whole: list[int], unseen: int, seqlen: int
) -> tuple[list[int], int]:
    """Return the ids of a chat from its next turn on, and how many `unseen` tokens they hold.

    The next turn is the first in `later` that repeats no more than the last `unseen` tokens of the
    `whole` chat, apart from the mark with which turns begin. Without one, both are empty. A
    beginning that fills a window of `seqlen` with what each window of this chat begins with shows
    nothing new.
    """
    for ids in later:
        ahead = _n_equal(ids, whole)
        behind = _n_equal(ids[::-1], whole[::-1])
        if min(len(ids) - ahead, behind) <= unseen and ahead < seqlen:
            return ids, min(behind, unseen)
    return [], 0


def _n_equal(first: list[int], second: list[int]) -> int:
    """Return how many ids from the first on are the same in both."""
    equal = 0
    while first[equal : equal + COMPARED] == second[equal : equal + COMPARED]:
        equal += COMPARED
        if equal >= max(len(first), len(second)):
            return len(first)
    for one, other in zip(first[equal:], second[equal:], strict=False):
        if one != other:
            break
        equal += 1
    return equal


def _later_ids(chat: ChatText, encode: Encode, whole: list[int]) -> Iterator[list[int]]:
    """Yield the ids of a chat from each later turn on; `whole` are the ids of all of it.

    The template renders all the rest each time, because it may look at the last turn. The texts
    share almost all of their pieces, so each piece is tokenized once, if the pieces of the whole
    chat give the ids of the whole.
    """
    if isinstance(encode, Encoder):
        pieces = _Pieces(encode, chat)
        if pieces(chat, False) == whole:
            encode = pieces
    for text in chat.later():
        yield encode(text, False)


class _Pieces:
    """An encoder of texts that have pieces in common with a chat, which are tokenized once.

    A piece begins with a special token, where a tokenizer splits a text before all else.
    """

    def __init__(self, encoder: Encoder, chat: str) -> None:
        self.encoder = encoder
        self.known = {piece: encoder(piece, False) for piece in self._split(chat)}

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for piece in self._split(text):
            if piece in self.known:
                ids += self.known[piece]
            else:
                ids += self.encoder(piece, add_special_tokens)
        return ids

    def _split(self, text: str) -> list[str]:
        begins = [match.start() for match in self.encoder.marks.finditer(text)]
        return [text[begin:end] for begin, end in pairwise([0, *begins, len(text)])]


def read_documents(
    documents: Documents,
    encode: Encode,
    *,
    seqlen: int,
    nsamples: int,
    bos_token_id: int | None = None,
) -> Pool:
    """Return the first POOL x nsamples documents, each as a window of up to `seqlen` tokens.

    A document that is not a chat begins with `bos_token_id`. Documents without a token are left
    out.
    """
    prefix = []
    if bos_token_id is not None and documents.chats is None:
        prefix = [bos_token_id]
    windows: list[list[int]] = []
    tokens = 0
    for text in documents.texts:
        ids = encode(text, False)
        tokens += len(ids)
        if ids:
            windows.append((prefix + ids)[:seqlen])
        if len(windows) == POOL * nsamples:
            return Pool(windows, tokens, False, None)
    return Pool(windows, tokens, True, None)


@dataclass(frozen=True, slots=True)
class Part:
    """The text of one dataset of a calibration, which has to give `nsamples` windows [seqlen]."""

    documents: Documents
    pool: Pool
    nsamples: int
    seqlen: int
    encode: Encode

    @property
    def n_chats(self) -> int | None:
        """The number of chats that were read, None for plain text."""
        if self.documents.chats is None:
            return None
        return self.documents.chats.rendered

    @property
    def shortage(self) -> InputError | None:
        """The error of `draw`, None if the text gives enough windows."""
        held = len(self.pool.windows)
        if held >= self.nsamples:
            return None
        if not self.pool.tokens:
            return _empty(self.documents)
        if self.pool.length is None:
            gives = f"has {held} documents with tokens"
            hint = "give more documents, fewer --nsamples, or leave out --no-pack"
        else:
            gives = f"gives {counted(held, 'window')} of {self.seqlen} tokens ({self._n_tokens})"
            hint = _more_text(held, self.fitting_seqlen, cut=self.pool.cut > 0)
        return _too_short(self.documents, gives, self.nsamples, hint)

    @property
    def _n_tokens(self) -> str:
        """The tokens that were read, and those of chats that are cut off."""
        if self.pool.cut:
            return f"{self.pool.tokens:,} tokens, {self.pool.cut:,} more are cut off"
        return f"{self.pool.tokens:,} tokens"

    @property
    def fitting_seqlen(self) -> int:
        """The length of windows of which the text gives enough, up to `seqlen`.

        It is less than LEAST_ADVISED if no length that is worth advice fits, or if the chats
        have so many turns that it takes long to find one.
        """
        if len(self.pool.windows) >= self.nsamples:
            return self.seqlen
        if self.documents.chats is None:
            return (self.pool.tokens or 0) // self.nsamples
        return self._fitting_chats()

    def _fitting_chats(self) -> int:
        """Return `fitting_seqlen` of chats by trial: a shorter window cuts at other turns."""
        fits, too_long = LEAST_ADVISED - 1, self.seqlen
        if sum(len(chat) * len(chat.chat.messages) for chat in self.pool.chats) > TRIED:
            return fits
        while too_long - fits > 1:
            tried = (fits + too_long) // 2
            pool = _pool_of_chats(self.pool.chats, self.encode, tried, self.nsamples)
            if len(pool.windows) == self.nsamples:
                fits = tried
            else:
                too_long = tried
        return fits

    @property
    def needed_tokens(self) -> int | None:
        """The tokens that the windows need, None if each is a document of any length."""
        if self.pool.length is None:
            return None
        return self.nsamples * self.pool.length

    @property
    def summary(self) -> str:
        """One line for the user: the dataset, what was read of it, and what is needed."""
        held = f"{self.pool.tokens:,} tokens"
        if self.documents.chats is not None:
            held = f"{self.documents.chats.summary}, {held}"
        if self.pool.cut:
            held = f"{held} ({self.pool.cut:,} more are cut off)"
        if not self.pool.whole:
            held = f"{held} read"
        needed = f"{self.nsamples} documents of up to {self.seqlen} tokens are needed"
        if self.needed_tokens is not None:
            needed = windows_need(self.nsamples, self.seqlen, self.needed_tokens)
            if self.pool.length != self.seqlen:
                needed += ", because each begins with the BOS token"
        return f"{self.documents.name}, {held}; {needed}"

    @property
    def n_with_images(self) -> int | None:
        """The number of chats with images, None for text."""
        return None

    def draw(self, seed: int) -> list[Any]:
        """Return the windows; raises InputError E_DATA_SHORT or E_DATA_EMPTY."""
        refused = self.shortage
        if refused is not None:
            raise refused
        return random.Random(seed).sample(self.pool.windows, self.nsamples)

    def identity(self, windows: list[Any]) -> str:
        """Return what the dataset is known by: its id on the Hub, else the hash of its windows."""
        if not is_path(self.documents.name):
            return self.documents.name
        known = repr([_known(window) for window in windows])
        return f"sha256 {sha256(known.encode()).hexdigest()}"


def _known(window: list[int] | ImageWindow) -> list[int] | str:
    """Return what a window is known by: its token ids, or the hash of ids and pixels."""
    if isinstance(window, list):
        return window
    return window.sha256


@dataclass(frozen=True, slots=True)
class ImagePart(Part):
    """The chats of a dataset with images: those that are drawn become windows up to `seqlen`.

    Chats without images become windows of token ids. The tokens of the others are not counted.
    """

    template: ImageTemplate
    model: VisionModel

    @property
    def shortage(self) -> InputError | None:
        """The error of `draw`, None if there are enough chats."""
        held = len(self.pool.windows)
        if held >= self.nsamples:
            return None
        message = (
            f"dataset `{self.documents.name}` has {held} chats, but {self.nsamples} are needed"
        )
        hint = "give more chats, or fewer --nsamples"
        return InputError("E_DATA_SHORT", message, hint=hint)

    @property
    def n_with_images(self) -> int | None:
        """The number of chats with images among those that were read."""
        return self.template.with_images

    @property
    def summary(self) -> str:
        """One line for the user: the dataset, what was read of it, and what is needed."""
        held = f"{self.template.summary}, {self.n_with_images} with images"
        needed = f"{self.nsamples} chats of up to {self.seqlen} tokens are needed"
        return f"{self.documents.name}, {held}; {needed}"

    def draw(self, seed: int) -> list[Any]:
        """Return token ids or an `ImageWindow` for each chat.

        Raises InputError E_DATA_SHORT, and the errors of `image_window`.
        """
        if self.shortage is not None:
            raise self.shortage
        from gptq_cli.calibration.images import check_lengths, image_window

        drawn: list[Any] = []
        for chat in random.Random(seed).sample(self.pool.windows, self.nsamples):
            if chat.images:
                drawn.append(image_window(chat, self.model, self.seqlen))
            else:
                drawn.append(self.encode(chat.text, False)[: self.seqlen])
        check_lengths(drawn, self.seqlen)
        return drawn


def read_image_part(
    source: DatasetSource, nsamples: int, config: QuantizeConfig, directory: Path, encode: Encode
) -> ImagePart:
    """Return the chats of a dataset with images, for the model in `directory`.

    Raises the errors of `load_documents`, and InputError: E_DATA_IMAGE, E_PROCESSOR.
    """
    from gptq_cli.calibration.images import ImageTemplate, VisionModel

    model = VisionModel(directory, config.trust_remote_code)
    model.check_reads_images()
    template = ImageTemplate(model.processor, directory, source.template_file)
    documents = load_documents(source, template)
    chats: list[Any] = []
    whole = True
    for text in documents.texts:
        if encode(text, False):
            chats.append(template.chat)
        if len(chats) == POOL * nsamples:
            whole = False
            break
    pool = Pool(chats, None, whole, None)
    return ImagePart(documents, pool, nsamples, config.seqlen, encode, template, model)


def read_parts(
    directory: Path, config: QuantizeConfig, sources: Sequence[tuple[DatasetSource, int]]
) -> list[Part]:
    """Return the text of each dataset of a run, tokenized by the tokenizer in `directory`.

    `sources` are those datasets, each with the number of windows that it has to give.
    Raises the errors of `load_encoder`, `load_documents`, `read_pool` and `read_image_part`.
    """
    encoder = load_encoder(directory, trust_remote_code=config.trust_remote_code)
    read = read_pool
    if not config.pack:
        read = read_documents
    parts: list[Part] = []
    for source, nsamples in sources:
        template = ChatTemplate(encoder.tokenizer, directory, _template_file(config))
        documents = load_documents(source, template)
        try:
            pool = read(
                documents,
                encoder,
                seqlen=config.seqlen,
                nsamples=nsamples,
                bos_token_id=encoder.bos_token_id,
            )
        except ImagesFoundError:
            parts.append(read_image_part(source, nsamples, config, directory, encoder))
            continue
        parts.append(Part(documents, pool, nsamples, config.seqlen, encoder))
    if config.chat_template is not None and not any(part.documents.chats for part in parts):
        message = "chat_template has no meaning: none of the datasets holds chats"
        hint = "remove chat_template, or name the column of chats with --text-column"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)
    return parts


def shortages(parts: Sequence[Part], config: QuantizeConfig) -> list[InputError]:
    """Return the error of each text that is too short; the hints name what fits all of them.

    `parts` are those of `read_parts`.
    """
    errors = []
    for part in parts:
        shortage = part.shortage
        if shortage is not None:
            errors.append(shortage)
    if not errors or len(parts) == 1 or not config.pack:
        return errors
    hint = _more_of_all(parts, config)
    for number, error in enumerate(errors):
        if error.code == "E_DATA_SHORT":
            errors[number] = InputError(error.code, str(error), hint=hint)
    return errors


def _more_of_all(parts: Sequence[Part], config: QuantizeConfig) -> str:
    """Return the hint for too little text in some of several datasets."""
    from gptq_cli.calibration.mixture import fitting_nsamples

    nsamples = fitting_nsamples(config, [len(part.pool.windows) for part in parts])
    fitting = min(part.fitting_seqlen for part in parts)
    is_cut = any(part.pool.cut for part in parts)
    return _more_text(nsamples, fitting, " in all", cut=is_cut)


def _template_file(config: QuantizeConfig) -> Path | None:
    return DatasetSource(chat_template=config.chat_template).template_file


def in_order(windows: list[list[Any]], seed: int) -> list[Any]:
    """Return the windows of all datasets; `seed` mixes those of several."""
    rows = [row for of_dataset in windows for row in of_dataset]
    if len(windows) > 1:
        random.Random(seed).shuffle(rows)
    return rows


def windows_of(rows: list[Any], *, packed: bool) -> Windows:
    """Return the windows of all datasets: of one length if they are packed and have no images."""
    if packed and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        return Windows.of(rows)
    return Windows.of_documents(rows)


def evaluation_windows(
    documents: Documents, encode: Encode, *, seqlen: int, max_windows: int | None = None
) -> Windows:
    """Return every full window [windows, seqlen] of the joined text in order.

    The rest of the text is dropped. All text is tokenized at once with the tokenizer's defaults,
    special tokens included: the protocol of GPTQ, Frantar et al. 2022, section 4. Chats are
    tokenized one by one, with the special tokens of their template. `max_windows` and the corpus's
    own limit cap the count.

    Raises InputError: E_DATA_SHORT if there is no full window, E_DATA_EMPTY if there is no token.
    """
    ids = _joined_ids(documents, encode)
    count = len(ids) // seqlen
    for limit in (max_windows, documents.max_windows):
        if limit is not None:
            count = min(count, limit)
    if not ids:
        raise _empty(documents)
    if count < 1:
        gives = f"gives 0 windows of {seqlen} tokens ({len(ids):,} tokens)"
        raise _too_short(documents, gives, 1, _more_text(0, len(ids)))
    return Windows.of([ids[index * seqlen : (index + 1) * seqlen] for index in range(count)])


def _joined_ids(documents: Documents, encode: Encode) -> list[int]:
    """Return the tokens of the joined text, or those of all chats."""
    ids: list[int] = []
    if documents.chats is not None:
        for chat in documents.texts:
            ids += encode(chat, False)
        return ids
    text = documents.join.join(documents.texts)
    if text.strip():
        ids = encode(text, True)
    return ids


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
    """Yield the joined text in order, in pieces of about PIECE characters; chats one by one."""
    if documents.chats is not None:
        yield from documents.texts
        return
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


def _empty(documents: Documents) -> InputError:
    message = f"dataset `{documents.name}` holds no text"
    return InputError("E_DATA_EMPTY", message, hint="choose a dataset that holds text")


def _too_short(documents: Documents, gives: str, asked: int, hint: str) -> InputError:
    verb = "are"
    if asked == 1:
        verb = "is"
    message = f"dataset `{documents.name}` {gives}, but {asked} {verb} needed"
    return InputError("E_DATA_SHORT", message, hint=hint)


def _more_text(nsamples: int, seqlen: int, scope: str = "", *, cut: bool = False) -> str:
    """Return the hint for too little text, with what would fit: one of the two, if it is enough.

    With `cut` it says why much of the chats is cut off.
    """
    more = "give more text"
    if cut:
        more += " (a long answer gives only its beginning)"
    fits = []
    if nsamples:
        fits.append(f"{counted(nsamples, 'window')}{scope} (--nsamples)")
    if seqlen >= LEAST_ADVISED:
        fits.append(f"windows of {seqlen} tokens (--seqlen)")
    if not fits:
        return more
    return f"{more}, or what fits: {' or '.join(fits)}"


@dataclass(frozen=True)
class Encoder:
    """A callable tokenizer; `bos_token_id` is None if it puts no token before a text."""

    tokenizer: Any
    bos_token_id: int | None

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        # verbose=False: a text longer than the model's positions is cut into windows afterwards
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """The special tokens in a text; without any, nothing matches."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = [token.content for token in added if token.special and token.content]
        if not special:
            return re.compile("(?!)")
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))


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
