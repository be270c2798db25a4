"""`gptq explain`: the meaning of the code of an error or a warning, its remedy and an example."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Annotated

import typer

from gptq_cli.cli.codes import examples, explanations
from gptq_cli.cli.console import Console, fitted
from gptq_cli.cli.options import AsJson
from gptq_cli.errors import ConfigError

LEAST_LIKENESS = 0.7


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE",
            help="code in brackets, as in error[CODE]; default all codes",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain the code of an error or a warning.

    Example: gptq explain E_SHAPE
    """
    console, texts = Console(as_json), explanations()
    if code is None:
        lines = [fitted(f"{name:<22}{text.splitlines()[0]}", 22) for name, text in texts.items()]
        console.result({"codes": texts}, "\n".join(lines), "\n".join(texts))
        return
    known = code.strip().upper().replace("-", "_")
    if known not in texts:
        near = _nearest(known, texts)
        hint = "gptq explain lists all codes"
        if near:
            hint = f"did you mean {near}?"
        raise ConfigError("E_CODE", f"there is no code `{code}`", hint=hint)
    text, example = texts[known], examples()[known]
    lines = [known, "", *(fitted(line, 0) for line in text.splitlines()), "", "Example:"]
    lines += [fitted(f"  {line}", 4) for line in example.splitlines()]
    data = {"code": known, "text": text, "example": example}
    console.result(data, "\n".join(lines), text)


def _nearest(word: str, codes: Iterable[str]) -> str | None:
    """Return the code that `word` was most likely meant to be, None if none is close.

    The letter before _ says little, and a word may be the beginning of a code. A slip seldom alters
    the first letter.
    """
    name = word.partition("_")[2] or word
    best, closest = LEAST_LIKENESS, None
    for code in codes:
        whole = code.partition("_")[2]
        for part in (whole, whole[: len(name)], whole[: len(name) + 1]):
            likeness = SequenceMatcher(None, name, part).ratio()
            if part.startswith(name[:1]) and likeness > best:
                best, closest = likeness, code
    return closest
