"""Every expected failure as an exception, and how values are written in messages and in JSON.

Each class of exceptions has one exit code; each raise has a code, a message and usually a hint. A
`Finding` is a flaw in a set of values, whatever source gave them. The version is here too, because
this module imports no other one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from typing_extensions import Self


_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    # A lookbehind, because a search for the whole scheme takes quadratic time in a long word.
    (re.compile(r"(?<=\w://)[^/\s@]+@"), "***@"),
)

__version__ = "0.2.0"


def without_secrets(text: str) -> str:
    """Return `text` without tokens of the Hub, authorization headers, credentials in addresses."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a file that the user wrote; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


def causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """Yield the error and its causes, outermost first, as a traceback would show them.

    With `hidden` the errors that a library hides with `from None` are among them.
    """
    link: BaseException | None = error
    while link is not None:
        yield link
        context = link.__context__
        if link.__suppress_context__ and not hidden:
            context = None
        link = link.__cause__ or context


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: a stable code, a message with the value, a hint at the next step, the place."""

    code: str
    message: str
    hint: str | None = None
    location: Location | None = None


class GptqError(Exception):
    """An expected failure with one or more problems; the process ends with `exit_code`."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self, code: str, message: str, *, hint: str | None = None, location: Location | None = None
    ) -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(code, message, hint, location),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """Return one error for all `problems`, at least one, so that a user sees all at once."""
        message = "; ".join(problem.message for problem in problems)
        error = cls(problems[0].code, message)
        error.problems = tuple(problems)
        return error

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[object, ...]]:
        """Let another process load the error: the arguments of Exception are not enough."""
        return type(self).of, (self.problems,)

    @property
    def code(self) -> str:
        return self.problems[0].code

    @property
    def hint(self) -> str | None:
        return self.problems[0].hint


class ConfigError(GptqError):
    """The flags or the configuration file are wrong, or do not fit the model."""

    exit_code = 2


class InputError(GptqError):
    """The model, the tokenizer, the dataset or the device was refused."""

    exit_code = 3


class GateError(GptqError):
    """A quality gate failed: perplexity threshold, verification, or numbers that are not finite."""

    exit_code = 4


class ResourceError(GptqError):
    """Memory, disk or another process is missing: provide it and run the command again."""

    exit_code = 5


class ExistsError(GptqError):
    """The output exists already, or another process is writing it."""

    exit_code = 6


class PausedError(GptqError):
    """The time limit is over; finished blocks are kept, and the same command resumes the run."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class Stopped(BaseException):
    """A signal asked the process to end; it is no `Exception`, just as KeyboardInterrupt."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.exit_code = 128 + signal


UNITS = ("B", "KB", "MB", "GB", "TB")
UNFINITE = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}  # in YAML

KeyPath = tuple[str | int, ...]

# Names that other tools and papers use for a field, where the spelling alone does not lead to it.
SYNONYMS = {
    "percdamp": "damp_percent",
    "dampening_frac": "damp_percent",
    "act_order": "desc_act",
    "actorder": "desc_act",
    "wbits": "bits",
    "w_bit": "bits",
    "num_calibration_samples": "nsamples",
    "max_seq_length": "seqlen",
    "ignore": "dynamic",
    "gpu": "cuda",
}


def name_of(path: KeyPath) -> str:
    """Return a path as people write it: `bits`, `dynamic['+:lm_head'].bits`, `dataset[1]`."""
    head, *rest = path
    words = [str(head)]
    for part in rest:
        if isinstance(part, str) and part.isidentifier():
            words.append(f".{part}")
        else:
            words.append(f"[{part!r}]")
    return "".join(words)


@dataclass(frozen=True, slots=True)
class Finding:
    """One flaw: its place (the first of `paths`), code, predicate for the fields, and hint."""

    paths: tuple[KeyPath, ...]
    code: str
    predicate: str
    hint: str | None = None

    def message(self, name: Callable[[KeyPath], str] = name_of) -> str:
        """Return the sentence about the fields, each called by its `name`."""
        return f"{' and '.join(map(name, self.paths))} {self.predicate}"


def size(n_bytes: float) -> str:
    """Return bytes in powers of 1000: 5.4 MB."""
    unit = 0
    while n_bytes >= 999.5 and unit < len(UNITS) - 1:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.3g} {UNITS[unit]}"


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, which gets an s unless it is one: 1 file, 2 files."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def one_of(values: Sequence[object]) -> str:
    """Return the values as a choice: `2, 3, 4 or 8`."""
    *most, last = map(str, values)
    if not most:
        return last
    return f"{', '.join(most)} or {last}"


def shown(value: object, limit: int = 60) -> str:
    """Return `value` as a file would hold it, on one line of at most `limit` characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return UNFINITE[str(float(value))]
    text = json.dumps(value, ensure_ascii=False, default=str)
    return cut("".join(map(_visible, text)), limit)


def cut(text: str, limit: int = 60) -> str:
    """Return at most `limit` letters of `text`, the last three as dots if there are more."""
    if len(text) <= limit:
        return text
    return text[: limit - 3] + "..."


def _visible(letter: str) -> str:
    if letter.isprintable():
        return letter
    return f"\\u{ord(letter):04x}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that `word` was most likely meant to be, None if no word is close."""
    known = list(known)
    key = word.strip().lower().replace("-", "_").replace(" ", "_")
    if SYNONYMS.get(key) in known:
        return SYNONYMS[key]
    matches = get_close_matches(key, known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggestion(word: str, known: Iterable[str]) -> str | None:
    """Return the hint that names the nearest known word, None if no word is close."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near else None


def shell_word(word: str) -> str:
    """Return `word` quoted for bash or zsh, unprintable letters as the escapes of their bytes."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def shell_words(words: Iterable[str]) -> str:
    """Return a command line of `words`, each quoted by `shell_word`."""
    return " ".join(map(shell_word, words))


def _escaped(letter: str) -> str:
    """Return `letter` as it stands inside $'...'."""
    if letter in "\\'":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))


@overload
def to_json(value: DataclassInstance) -> dict[str, Any]: ...
@overload
def to_json(value: object) -> Any: ...
def to_json(value: Any) -> Any:
    """Return `value` as JSON knows it: dataclasses become dicts, tuples lists, paths text.

    A configuration becomes the dict that a configuration file would hold.
    """
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(to_json, value))
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):  # asked this way, since pydantic is slow to import
        return value.model_dump(mode="json")
    return value
