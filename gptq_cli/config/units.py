"""Sizes and times as people say them, and words as a shell takes them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable

UNITS = ("B", "KB", "MB", "GB", "TB")


def size(n_bytes: float) -> str:
    """Bytes in powers of 1000: 5.4 MB."""
    unit = 0
    while n_bytes >= 999.5 and unit < len(UNITS) - 1:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.3g} {UNITS[unit]}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
