"""Which text: registered names, local files and folders, Hub datasets, literal texts.

A registered name is read as papers read it. Any other string that looks like a path (it begins with `.`, `/` or `~`,
ends like a data file, or exists) is only ever looked for on this machine; what remains is the id of a Hub dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from errno import ENAMETOOLONG
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Literal

from gptq_cli.calibration.files import SUFFIXES, has_columns, read_files, suffix_of
from gptq_cli.calibration.loading import LoadRequest, open_column
from gptq_cli.errors import ConfigError, GptqError, InputError
from gptq_cli.files import expanded, status_of
from gptq_cli.hub_errors import id_flaw, pasted_id

Purpose = Literal["calibration", "evaluation"]
PARAGRAPH = "\n\n"
DEFAULT_DATASET = "wikitext2"
DEFAULT_COLUMN = "text"


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """What the user asked for. `config` and `split` belong to Hub datasets; a list holds literal texts."""

    dataset: str | Sequence[str] | None = None
    config: str | None = None
    split: str | None = None
    text_column: str = DEFAULT_COLUMN
    purpose: Purpose = "calibration"


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts in order and the string that joins them. `revision` is the commit of a Hub dataset, None for other text.

    Texts for calibration may be read on demand, so that a stream is read no further than needed. `max_windows` is part
    of the evaluation protocol of some corpora.
    """

    name: str
    texts: Iterable[str]
    join: str = PARAGRAPH
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    max_windows: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the joined text in UTF-8; reads every text."""
        digest = sha256()
        for position, text in enumerate(self.texts):
            digest.update(
                (text if position == 0 else self.join + text).encode("utf-8", "surrogatepass")
            )
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a Hub dataset that serve one purpose; `limit` is the number of documents, None for all."""

    split: str
    file: str | None = None
    join: str = PARAGRAPH
    limit: int | None = None
    max_windows: int | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A Hub dataset known by a short name."""

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
# One shard each, as in the GPTQ paper's code; its evaluation reads 1100 documents, joined by blanks, and 256 windows.
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
SCRIPTED = ("ptb", "ptb-new")


def load_documents(source: DatasetSource) -> Documents:
    """The documents that `source` names, in the order of their files and rows.

    Raises what `check_source` does, and InputError: E_DATA_NOT_FOUND, E_DATA_COLUMN, E_DATA_SCRIPT, E_DATA_EMPTY,
    E_DATA_ENCODING, E_DATA_FORMAT, E_DATA_CONFIG, E_DATA_SPLIT, E_HUB_*. Texts read on demand raise the same errors
    when they are read.
    """
    check_source(source)
    name = DEFAULT_DATASET if source.dataset is None else source.dataset
    if not isinstance(name, str):
        documents = _literal(list(name))
    elif name in CORPORA:
        documents = _registered(name, source)
    elif name in SCRIPTED:
        raise _scripted(name)
    elif is_path(name):
        documents = _local(expanded(name), name, source)
    else:
        documents = _hub(name, source)
    if source.purpose == "evaluation":
        documents = replace(
            documents, texts=list(documents.texts)
        )  # evaluation tokenizes all of it at once
    return documents


def check_source(source: DatasetSource) -> None:
    """Raise what is wrong with `source` before a text is read or fetched.

    ConfigError E_CFG_CONFLICT for a config, split or column of what has none, and for files where texts belong;
    InputError E_DATA_NOT_FOUND for a path that leads to nothing.
    """
    name = DEFAULT_DATASET if source.dataset is None else source.dataset
    if not isinstance(name, str):
        _refuse_options("literal texts", source)
        _refuse_files(name)
    elif name in CORPORA:
        _refuse_options(f"the registered dataset `{name}`", source)
    elif is_path(name):
        path = expanded(name)
        _refuse_options(f"`{name}`", source, columns=has_columns(path))
        read_files(path, source.text_column)


def is_path(name: str) -> bool:
    """Whether a dataset name means something on this machine, and so is never sent to the Hub."""
    ends_like_one = suffix_of(Path(name)) in SUFFIXES and "://" not in name
    return name.startswith((".", "/", "~")) or ends_like_one or _exists(name)


def _exists(name: str) -> bool:
    """Whether something is there, or behind a folder that may not be entered; a long text is no path."""
    try:
        return bool(name) and status_of(name) is not None
    except GptqError as error:
        return not isinstance(error.__cause__, OSError) or error.__cause__.errno != ENAMETOOLONG


def _refuse_files(texts: Sequence[str]) -> None:
    files = [
        text
        for text in texts
        if _exists(text) or (text.lower().endswith(SUFFIXES) and len(text.split()) == 1)
    ]
    if files:
        message = (
            f"`{files[0]}` is a file, and a dataset given twice or more holds the texts themselves"
        )
        raise ConfigError(
            "E_CFG_CONFLICT", message, hint="put the files into a folder and give that"
        )


def _literal(texts: list[str]) -> Documents:
    if not any(text.strip() for text in texts):
        raise InputError(
            "E_DATA_EMPTY",
            "the list of texts holds no text",
            hint="give at least one text, or a dataset",
        )
    return Documents("texts", texts)


def _local(path: Path, name: str, source: DatasetSource) -> Documents:
    return Documents(name, read_files(path, source.text_column))


def _registered(name: str, source: DatasetSource) -> Documents:
    corpus = CORPORA[name]
    part = corpus.parts[source.purpose]
    request = LoadRequest(
        path=corpus.repo,
        label=name,
        config=corpus.config,
        split=part.split,
        data_files=None if part.file is None else {part.split: part.file},
        stream=corpus.stream,
    )
    column, revision = open_column(request, DEFAULT_COLUMN)
    texts: Iterable[str] = column if part.limit is None else list(islice(column, part.limit))
    return Documents(name, texts, part.join, corpus.config, part.split, revision, part.max_windows)


def _hub(name: str, source: DatasetSource) -> Documents:
    if flaw := id_flaw(name):
        pasted = pasted_id(name)
        listed = f"registered are {', '.join(CORPORA)}; literal texts are given as a list"
        raise InputError(
            "E_DATA_NOT_FOUND",
            f"dataset `{name}` is not a registered name, a file, a folder or the id of a Hub dataset: {flaw}",
            hint=f"use --dataset {pasted.id}" if pasted else listed,
        )
    split = source.split or ("train" if source.purpose == "calibration" else "test")
    request = LoadRequest(
        path=name, label=name, config=source.config, split=split, stream=True, hint=_nearest(name)
    )
    column, revision = open_column(request, source.text_column)
    return Documents(name, column, config=source.config, split=split, revision=revision)


def _nearest(name: str) -> str | None:
    near = get_close_matches(name, CORPORA, n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _refuse_options(what: str, source: DatasetSource, *, columns: bool = False) -> None:
    if source.text_column != DEFAULT_COLUMN and not columns:
        message = f"text_column `{source.text_column}` has no meaning for {what}"
        raise ConfigError("E_CFG_CONFLICT", message, hint="leave text_column out")
    for option, value in (("dataset_config", source.config), ("dataset_split", source.split)):
        if value is not None:
            raise ConfigError(
                "E_CFG_CONFLICT",
                f"{option} `{value}` has no meaning for {what}",
                hint=f"leave {option} out, or name a Hub dataset by its id",
            )


def _scripted(name: str) -> InputError:
    return InputError(
        "E_DATA_SCRIPT",
        f"dataset `{name}` needs a loading script, which `datasets` 4 and later do not run",
        hint="use wikitext2, c4 or a file of your own",
    )
