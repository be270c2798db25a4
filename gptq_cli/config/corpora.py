"""The registered datasets: short names, places on the Hub, and the protocols of papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Purpose = Literal["calibration", "evaluation"]
PARAGRAPH = "\n\n"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a Hub dataset for one purpose, as a paper reads them.

    `file` names one file of the dataset; None means all files of `split`. For evaluation the first
    `limit` documents are joined with `join`, and the first `max_windows` windows count; None means
    all.
    """

    split: str
    file: str | None = None
    join: str = PARAGRAPH
    limit: int | None = None
    max_windows: int | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A Hub dataset that has a short name.

    `config` is the configuration of the dataset on the Hub, None if there is one only. With
    `stream` rows are read on demand.
    """

    repo: str
    config: str | None
    stream: bool
    parts: dict[Purpose, Part]


WIKITEXT2 = Corpus(
    repo="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    stream=False,
    parts={"calibration": Part("train"), "evaluation": Part("test")},
)
# One shard for each purpose, as in the code of the GPTQ paper, whose evaluation reads 1100
# documents, joins them with blanks, and takes 256 windows.
C4 = Corpus(
    repo="allenai/c4",
    config=None,
    stream=True,
    parts={
        "calibration": Part("train", file="en/c4-train.00000-of-01024.json.gz"),
        "evaluation": Part(
            "validation",
            file="en/c4-validation.00000-of-00008.json.gz",
            join=" ",
            limit=1100,
            max_windows=256,
        ),
    },
)
CORPORA: dict[str, Corpus] = {"wikitext2": WIKITEXT2, "c4": C4, "c4-new": C4}
DEFAULT_DATASET = "wikitext2"
BUILT_IN = "english"  # comes with the program, so it needs no network

REGISTERED = ", ".join([*CORPORA, BUILT_IN])
ACCEPTED_TEXT = f"{REGISTERED}, a Hub id, a file or a folder"  # for help texts
