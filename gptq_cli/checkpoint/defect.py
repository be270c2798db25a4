"""One thing that is wrong with a checkpoint: where it is, what it does to readers, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

# "numbers": the weights that are decoded may not be those that were meant.
# "readers": they are, but some readers fail or take something else; only the owner of the checkpoint can decide.
# "form": likewise, but the meaning is plain, and `gptq convert` writes it as all readers take it.
Effect = Literal["numbers", "readers", "form"]


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong with a checkpoint; `tensor` may be a module, None where a file or all is meant."""

    code: str
    message: str
    file: str | None = None
    tensor: str | None = None
    hint: str | None = None
    effect: Effect = "numbers"

    @property
    def place(self) -> str:
        return ": ".join(part for part in (self.file, self.tensor) if part)

    def __str__(self) -> str:
        return (
            f"{self.code} {self.place}: {self.message}"
            if self.place
            else f"{self.code} {self.message}"
        )


def convert_command(directory: Path, format: str) -> str:
    """The command that writes the checkpoint in `directory` anew, in the form that all readers take."""
    return f"gptq convert {quote(str(directory))} --to {format} -o OUT"
