"""The text that a dataset names: registered datasets, local files, Hub datasets, literal texts.

A registered name is read by the protocol of papers. Any other string that looks like a path (it
begins with `.`, `/` or `~`, ends like a data file, or exists) is only looked for on this machine.
Every other string is the id of a Hub dataset. A .txt file is one document; each row of another file
is one document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from errno import ENAMETOOLONG
from hashlib import sha256
from itertools import islice
from pathlib import Path

from gptq_cli.calibration.columns import texts_of
from gptq_cli.calibration.encodings import decoded
from gptq_cli.calibration.loading import LoadRequest, open_column
from gptq_cli.calibration.rows import READERS
from gptq_cli.config.corpora import CORPORA, DEFAULT_DATASET, PARAGRAPH, REGISTERED, Purpose
from gptq_cli.errors import ConfigError, GptqError, InputError
from gptq_cli.files import expanded, file_errors, is_directory, is_file, resolved, status_of
from gptq_cli.hub_errors import id_flaw, pasted_id
from gptq_cli.shell import shell_word

TEXT = ".txt"
SUFFIXES = (TEXT, *READERS)
KINDS = ", ".join(SUFFIXES)


@dataclass(frozen=True, slots=True)
class FileTexts:
    """The texts of some files in order, read on demand."""

    files: tuple[Path, ...]
    column: str

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with file_errors(file, writing=False):
                if file.stat().st_size == 0:
                    message = f"dataset `{file}` is an empty file"
                    raise InputError("E_DATA_EMPTY", message, hint="choose a file that holds text")
                yield from self._texts(file)

    def _texts(self, file: Path) -> Iterable[str]:
        if suffix_of(file) == TEXT:
            return [decoded(file)]
        rows = READERS[suffix_of(file)](file, self.column)
        return texts_of(rows, self.column, str(file))


def suffix_of(file: Path) -> str:
    """Return the suffix of a file's name in small letters: TRAIN.TXT is a text, too."""
    return file.suffix.lower()


def read_files(path: Path, column: str) -> Iterable[str]:
    """Return the texts of a file, or of the files of a folder sorted by name.

    Raises InputError: E_DATA_NOT_FOUND, and E_DATA_FORMAT for a folder of another kind. Reading the
    texts raises E_DATA_ENCODING, E_DATA_FORMAT, E_DATA_COLUMN and E_DATA_EMPTY.
    """
    return FileTexts(_files_at(path), column)


def _listed(folder: Path) -> list[Path]:
    with file_errors(folder, writing=False):
        return list(folder.iterdir())


def has_columns(path: Path) -> bool:
    """Return whether `path` leads to a file of rows, or to a folder that holds one."""
    files = _listed(path) if is_directory(path) else [path]
    return any(suffix_of(file) in READERS for file in files)


def _files_at(path: Path) -> tuple[Path, ...]:
    if status_of(path) is None:
        hint = f"give a {KINDS} file, a folder or a Hub id"
        raise InputError("E_DATA_NOT_FOUND", f"dataset `{path}` does not exist", hint=hint)
    if path.is_dir():
        _refuse_saved(path)
        return _files_in(path)
    if not path.is_file() or suffix_of(path) not in SUFFIXES:
        message = f"dataset `{path}` is not a supported type of file"
        raise InputError("E_DATA_NOT_FOUND", message, hint=f"give {KINDS}")
    return (path,)


def _files_in(folder: Path) -> tuple[Path, ...]:
    files = []
    for file in sorted(_listed(folder)):
        if suffix_of(file) in SUFFIXES and not file.name.startswith("."):
            files.append(file)
    if not files:
        message = f"folder `{folder}` holds no file that is read"
        raise InputError("E_DATA_NOT_FOUND", message, hint=f"put {KINDS} files there")
    return tuple(files)


def _refuse_saved(folder: Path) -> None:
    """Raise E_DATA_FORMAT for a folder of `save_to_disk`, whose JSON files hold no texts."""
    place = resolved(folder)
    splits = sorted(file.parent.name for file in folder.glob("*/state.json"))
    if is_file(folder / "dataset_dict.json") and splits:
        split = "train" if "train" in splits else splits[0]
        loaded = f"load_from_disk({str(place)!r})[{split!r}]"
    elif is_file(folder / "dataset_info.json") and is_file(folder / "state.json"):
        loaded = f"load_from_disk({str(place)!r})"
    else:
        return
    target = str(place.with_name(f"{place.name}.jsonl"))
    code = f"from datasets import load_from_disk; {loaded}.to_json({target!r})"
    message = f"folder `{folder}` was written by save_to_disk of datasets: Arrow files are not read"
    hint = f"write it as JSON: python -c {shell_word(code)}"
    raise InputError("E_DATA_FORMAT", message, hint=hint)


DEFAULT_COLUMN = "text"
DEFAULT_SPLITS: dict[Purpose, str] = {"calibration": "train", "evaluation": "test"}
SCRIPTED = ("ptb", "ptb-new")


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """The user's request. `config` and `split` are for Hub datasets; a list holds literal texts."""

    dataset: str | Sequence[str] | None = None
    config: str | None = None
    split: str | None = None
    text_column: str = DEFAULT_COLUMN
    purpose: Purpose = "calibration"

    @property
    def name(self) -> str | Sequence[str]:
        """The dataset, or the default one if none was asked for."""
        if self.dataset is None:
            return DEFAULT_DATASET
        return self.dataset


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts in order, and the string that joins them.

    `revision` is the commit of a Hub dataset, None for other text. Texts for calibration may be
    read on demand, so that a stream is read no further than needed. `max_windows` is part of the
    evaluation protocol of some corpora.
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
        """The hash of the joined text in UTF-8; reads every text."""
        digest = sha256()
        for piece in self.pieces():
            digest.update(piece.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def pieces(self) -> Iterator[str]:
        """Yield the texts, each but the first with the string that joins it to the one before."""
        for position, text in enumerate(self.texts):
            yield text if position == 0 else self.join + text


def load_documents(source: DatasetSource) -> Documents:
    """Return the documents that `source` names, in the order of their files and rows.

    Raises the errors of `check_source`, and InputError: E_DATA_NOT_FOUND, E_DATA_COLUMN,
    E_DATA_SCRIPT, E_DATA_EMPTY, E_DATA_ENCODING, E_DATA_FORMAT, E_DATA_CONFIG, E_DATA_SPLIT,
    E_HUB_*. Texts read on demand raise the same errors when they are read.
    """
    check_source(source)
    documents = _documents_of(source)
    if source.purpose == "evaluation":
        # Evaluation tokenizes all of the text at once.
        documents = replace(documents, texts=list(documents.texts))
    return documents


def _documents_of(source: DatasetSource) -> Documents:
    name = source.name
    if not isinstance(name, str):
        return _literal(list(name))
    if name in CORPORA:
        return _registered(name, source.purpose)
    if name in SCRIPTED:
        raise InputError(
            "E_DATA_SCRIPT",
            f"dataset `{name}` needs a loading script, which `datasets` 4 and later do not run",
            hint=f"use {REGISTERED} or a file of your own",
        )
    if is_path(name):
        return Documents(name, read_files(expanded(name), source.text_column))
    return _hub(name, source)


def check_source(source: DatasetSource) -> None:
    """Check `source` before a text is read or fetched.

    Raises ConfigError E_CFG_CONFLICT for a config, split or column of a dataset that has none, and
    for files in place of texts; InputError E_DATA_NOT_FOUND for a path that leads to nothing.
    """
    name = source.name
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
    """Return whether a dataset name means a place on this machine and never goes to the Hub."""
    if name.startswith((".", "/", "~")):
        return True
    has_suffix = suffix_of(Path(name)) in SUFFIXES and "://" not in name
    return has_suffix or _exists(name)


def _exists(name: str) -> bool:
    """Return whether something is, or may be, at a path; a text too long for one is none."""
    try:
        return bool(name) and status_of(name) is not None
    except GptqError as error:
        return not isinstance(error.__cause__, OSError) or error.__cause__.errno != ENAMETOOLONG


def _refuse_files(texts: Sequence[str]) -> None:
    for text in texts:
        is_one_word = len(text.split()) == 1
        if _exists(text) or (is_one_word and text.lower().endswith(SUFFIXES)):
            message = (
                f"`{text}` is a file, but a dataset given twice or more holds the texts themselves"
            )
            hint = "put the files into a folder and give that"
            raise ConfigError("E_CFG_CONFLICT", message, hint=hint)


def _literal(texts: list[str]) -> Documents:
    if not any(text.strip() for text in texts):
        message = "the list of texts holds no text"
        raise InputError("E_DATA_EMPTY", message, hint="give at least one text, or a dataset")
    return Documents("texts", texts)


def _registered(name: str, purpose: Purpose) -> Documents:
    corpus = CORPORA[name]
    part = corpus.parts[purpose]
    request = LoadRequest(
        path=corpus.repo,
        label=name,
        config=corpus.config,
        split=part.split,
        data_files={part.split: part.file} if part.file else None,
        stream=corpus.stream,
    )
    texts: Iterable[str]
    texts, revision = open_column(request, DEFAULT_COLUMN)
    if part.limit is not None:
        texts = list(islice(texts, part.limit))
    return Documents(name, texts, part.join, corpus.config, part.split, revision, part.max_windows)


def _hub(name: str, source: DatasetSource) -> Documents:
    _refuse_bad_id(name)
    split = source.split or DEFAULT_SPLITS[source.purpose]
    request = LoadRequest(
        path=name, label=name, config=source.config, split=split, stream=True, hint=_nearest(name)
    )
    column, revision = open_column(request, source.text_column)
    return Documents(name, column, config=source.config, split=split, revision=revision)


def _refuse_bad_id(name: str) -> None:
    flaw = id_flaw(name)
    if flaw is None:
        return
    message = (
        f"dataset `{name}` is not a registered name, a file, a folder or the id of a Hub dataset: "
        f"{flaw}"
    )
    pasted = pasted_id(name)
    hint = f"registered names are {REGISTERED}; give literal texts as a list"
    if pasted is not None:
        hint = f"use --dataset {pasted.id}"
    raise InputError("E_DATA_NOT_FOUND", message, hint=hint)


def _nearest(name: str) -> str | None:
    near = get_close_matches(name, CORPORA, n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _refuse_options(what: str, source: DatasetSource, *, columns: bool = False) -> None:
    if source.text_column != DEFAULT_COLUMN and not columns:
        message = f"text_column `{source.text_column}` has no meaning for {what}"
        raise ConfigError("E_CFG_CONFLICT", message, hint="remove text_column")
    for option, value in (("dataset_config", source.config), ("dataset_split", source.split)):
        if value is not None:
            raise ConfigError(
                "E_CFG_CONFLICT",
                f"{option} `{value}` has no meaning for {what}",
                hint=f"remove {option}, or name a Hub dataset by its id",
            )
