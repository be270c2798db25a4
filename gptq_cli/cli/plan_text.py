"""The calibration text in the output of `gptq plan`: what it holds, and what the run needs.

Text on this machine is read and counted if the model's tokenizer is here, too. Text of the Hub is
not fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_cli.calibration.corpus import DatasetSource, calibration_sources, check_source, is_path
from gptq_cli.cli.console import Console, fitted
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import InputError

if TYPE_CHECKING:
    from gptq_cli.calibration.windows import Part

NO_TOKENIZER = ("E_TOKENIZER", "E_REMOTE_CODE")

Text = dict[str, Any]  # as it is printed with --json


def plan_text(
    console: Console, config: QuantizeConfig, directory: Path, *, has_tokenizer: bool
) -> list[Text]:
    """Return the text of each dataset; notes about it are printed.

    Raises the errors of `check_source` and `read_parts`, but a text that is too short is a note.
    """
    sources = calibration_sources(config)
    for source, _ in sources:
        check_source(source)
    if has_tokenizer and all(is_path(source.name) for source, _ in sources):
        from gptq_cli.calibration.windows import read_parts

        try:
            return [_counted(console, part) for part in read_parts(directory, config)]
        except InputError as error:
            if error.code not in NO_TOKENIZER:
                raise
            console.say(f"note: the text is not counted: {error}")
    return [_uncounted(source, n_windows, config) for source, n_windows in sources]


def _counted(console: Console, part: Part) -> Text:
    documents = part.documents
    if documents.beside:
        console.warn("W_DATA_CHATS", documents.about_chats)
    refused = part.shortage
    if refused is not None:
        console.say(f"note: quantize will refuse the text: {refused}; {refused.hint}")
    return {
        "dataset": documents.name,
        "chats": part.n_chats,
        "tokens": part.pool.tokens,
        "whole": part.pool.whole,
        "windows": part.nsamples,
        "needed_tokens": part.needed_tokens,
        "summary": part.summary,
    }


def _uncounted(source: DatasetSource, n_windows: int, config: QuantizeConfig) -> Text:
    needed = None
    windows = f"{n_windows} documents of up to {config.seqlen} tokens are needed"
    if config.pack:
        needed = n_windows * config.seqlen
        windows = f"{n_windows} windows of {config.seqlen} need {needed:,} tokens"
    return {
        "dataset": source.name,
        "chats": None,
        "tokens": None,
        "whole": None,
        "windows": n_windows,
        "needed_tokens": needed,
        "summary": f"{source.name}, not read yet; {windows}",
    }


def text_lines(texts: list[Text]) -> list[str]:
    """Return a line for each dataset."""
    return [fitted(f"text    {text['summary']}") for text in texts]
