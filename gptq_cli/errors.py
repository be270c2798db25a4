"""Every expected failure: one small tree, each class one exit code, each raise a code, a message
and usually a hint. Here is also the version of the program, which needs nothing else to be known.
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
    """`text` without access tokens of the Hub, authorization headers and credentials in addresses."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a file the user wrote; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a stable code, what and which value, what to do next, where."""

    code: str
    message: str
    hint: str | None = None
    location: Location | None = None


class GptqError(Exception):
    """An expected failure with one or more problems; `exit_code` is what the process returns."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self, code: str, message: str, *, hint: str | None = None, location: Location | None = None
    ) -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(code, message, hint, location),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """One error for all `problems` (at least one), so that a user can fix all of it in one go."""
        error = cls(problems[0].code, "; ".join(problem.message for problem in problems))
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
    """Memory, disk or device: give resources and run again."""

    exit_code = 5


class ExistsError(GptqError):
    """The output exists already, or somebody else is writing it."""

    exit_code = 6


class PausedError(GptqError):
    """The time that the user gave is over; what is finished is kept, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class Stopped(BaseException):
    """A signal asked the process to end. No `Exception`, as KeyboardInterrupt is none: it is no failure."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.exit_code = 128 + signal
