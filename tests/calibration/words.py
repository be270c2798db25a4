"""A tokenizer a child can check: one id for each word and blank, `<bos>` is 0."""

from __future__ import annotations

import re

from gptq_cli.calibration.corpus import Documents

BOS = 0


class WordEncoder:
    """Numbers words and runs of blanks in the order in which it first meets them; keeps what it was asked."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        self.calls.append((len(text), add_special_tokens))
        ids = [
            self.words.setdefault(word, len(self.words) + 1) for word in re.findall(r"\s|\S+", text)
        ]
        return [BOS, *ids] if add_special_tokens else ids


def numbered(count: int, name: str = "numbers") -> Documents:
    """One document of `count` different words, each with the blank after it: 2 x count tokens."""
    return Documents(name, ["".join(f"w{index} " for index in range(count))])
