"""A tokenizer that is easy to check: one id for each word and each blank; `<bos>` is 0."""

from __future__ import annotations

import re

from gptq_cli.calibration.corpus import Documents

BOS = 0


class WordEncoder:
    """An encoder that numbers words and blanks in order of appearance; it lists its calls."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        self.calls.append((len(text), add_special_tokens))
        ids = [BOS] if add_special_tokens else []
        for word in re.findall(r"\s|\S+", text):
            ids.append(self.words.setdefault(word, len(self.words) + 1))
        return ids


def numbered(count: int, name: str = "numbers") -> Documents:
    """Return one document of `count` different words, each before a blank: 2 x count tokens."""
    return Documents(name, ["".join(f"w{index} " for index in range(count))])
