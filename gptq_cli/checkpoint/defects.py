"""Defects of a checkpoint, and the command that corrects those of its form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.errors import shell_word

# numbers = the decoded weights may not be those that were meant
# readers = they are, but some readers fail or take something else; only the owner can decide
# form = some readers fail, but the meaning is plain, and `gptq convert` writes it for all readers
Effect = Literal["numbers", "readers", "form"]


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong with a checkpoint.

    `tensor` may be a module; it is None if the defect is about a file or the whole checkpoint.
    """

    code: str
    message: str
    file: str | None = None
    tensor: str | None = None
    hint: str | None = None
    effect: Effect = "numbers"

    @property
    def place(self) -> str:
        """File and tensor, as far as they are known."""
        if self.file and self.tensor:
            return f"{self.file}: {self.tensor}"
        return self.file or self.tensor or ""

    def __str__(self) -> str:
        if self.place:
            return f"{self.code} {self.place}: {self.message}"
        return f"{self.code} {self.message}"


def tensor_defect(code: str, tensor: TensorInfo, message: str, hint: str | None = None) -> Defect:
    """Return a defect of the numbers or the shape of one tensor."""
    return Defect(code, message, tensor.file.name, tensor.name, hint)


def convert_command(directory: Path, format: str) -> str:
    """Return the command that rewrites the checkpoint in `directory` in a form for all readers."""
    return f"gptq convert {shell_word(str(directory))} --to {format} -o OUT"
