"""Words as a shell takes them, for commands in hints and reports."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable


def shell_word(word: str) -> str:
    """`word` as one would paste it into bash or zsh; letters that do not print are written as the bytes they are."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (_LITERAL.get(letter) or _letter(letter) for letter in word)
    return f"$'{''.join(letters)}'"


def shell_words(words: Iterable[str]) -> str:
    """A command line of `words`, see `shell_word`."""
    return " ".join(map(shell_word, words))


_LITERAL = {"\\": "\\\\", "'": "\\'"}


def _letter(letter: str) -> str:
    if letter.isprintable():
        return letter
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))
