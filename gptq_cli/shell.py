"""Quoting of words for a shell, for commands in hints and reports."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable


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
