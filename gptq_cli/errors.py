"""Every expected failure as an exception: each class has one exit code, each raise has a code, a
message and usually a hint. The version is here too, because this module imports no other one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),
)

__version__ = "0.1.0"


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

    @property
    def code(self) -> str:
        return self.problems[0].code

    @property
    def hint(self) -> str | None:
        return self.problems[0].hint


class ConfigError(GptqError):
    """The flags or the configuration file are wrong; nothing was read or written."""

    exit_code = 2


class InputError(GptqError):
    """The model, tokenizer or dataset was refused."""

    exit_code = 3


class GateError(GptqError):
    """A quality gate failed: perplexity threshold, verification, or numbers that are not finite."""

    exit_code = 4


class ResourceError(GptqError):
    """Memory, disk or a device is missing: provide it and run the command again."""

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
