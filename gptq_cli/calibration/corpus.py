"""The text that a dataset names: registered datasets, local files and folders, Hub datasets.

A registered name is read by the protocol of papers. Any other string that looks like a path (it
begins with `.`, `/` or `~`, ends like a data file, or exists) is only looked for on this machine.
Every other string is the id of a Hub dataset. A .txt file is one document; each row of another file
is one document; the row of a chat is a document after the chat template has made text of it.
`mixture.py` makes one text of several datasets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from errno import ENAMETOOLONG
from hashlib import sha256
from itertools import islice
from pathlib import Path

from gptq_cli.calibration.chats import (
    DEFAULT_COLUMN,
    ChatTemplate,
    Form,
    form_of,
    read_template,
    rendered_chats,
)
from gptq_cli.calibration.columns import quoted, texts_of
from gptq_cli.calibration.encodings import TABLES, decoded, suffix_of
from gptq_cli.calibration.loading import LoadRequest, open_column
from gptq_cli.calibration.rows import READERS, columns_of_file
from gptq_cli.config.corpora import (
    BUILT_IN,
    CORPORA,
    DEFAULT_DATASET,
    PARAGRAPH,
    REGISTERED,
    Purpose,
)
from gptq_cli.errors import ConfigError, GptqError, InputError, counted
from gptq_cli.files import expanded, file_errors, hint_at_near, is_directory, status_of
from gptq_cli.hub_errors import id_flaw, pasted_id

TEXT = ".txt"
SUFFIXES = (TEXT, *READERS)
KINDS = ", ".join(SUFFIXES)
PACKABLE = ", ".join(suffix for suffix in SUFFIXES if suffix not in TABLES)
_SHARE = re.compile(r"(.+):([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FileTexts:
    """The texts of some files in order, read on demand; a file of text has no form."""

    files: tuple[Path, ...]
    forms: tuple[Form | None, ...]
    template: ChatTemplate

    def __iter__(self) -> Iterator[str]:
        for file, form in zip(self.files, self.forms, strict=True):
            with file_errors(file, writing=False):
                if file.stat().st_size == 0:
                    message = f"dataset `{file}` is an empty file"
                    raise InputError("E_DATA_EMPTY", message, hint="choose a file that holds text")
                yield from self._texts(file, form)

    def _texts(self, file: Path, form: Form | None) -> Iterable[str]:
        if form is None:
            return [decoded(file)]
        rows = READERS[suffix_of(file)](file, form)
        if form.is_chat:
            return rendered_chats(rows, form, str(file), self.template)
        return texts_of(rows, form.columns, str(file))

    @property
    def beside(self) -> tuple[str, ...]:
        """The columns of chats that are not read, in the first file that has some."""
        for form in self.forms:
            if form is not None and form.beside:
                return form.beside
        return ()

    def chats(self, name: str) -> ChatTemplate | None:
        """Return the template if the files hold chats, None if they hold text.

        Raises InputError E_DATA_FORMAT if some hold chats and others text; `name` is the dataset.
        """
        kinds = {}
        for file, form in zip(self.files, self.forms, strict=True):
            kinds[form is not None and form.is_chat] = file.name
        if len(kinds) == 2:
            message = f"dataset `{name}` mixes chats (`{kinds[True]}`) and text (`{kinds[False]}`)"
            hint = "put them into two folders, and give one of these"
            raise InputError("E_DATA_FORMAT", message, hint=hint)
        if True in kinds:
            return self.template
        return None


def read_files(files: Sequence[Path], columns: Sequence[str], template: ChatTemplate) -> FileTexts:
    """Return the texts of files in order.

    `columns` are those that the user named; without one, the columns of each file decide. Reading
    the texts raises InputError E_DATA_ENCODING, E_DATA_FORMAT, E_DATA_COLUMN, E_DATA_EMPTY and the
    errors of chats.
    """
    forms = tuple(_form_of_file(file, columns) for file in files)
    return FileTexts(tuple(files), forms, template)


def _form_of_file(file: Path, columns: Sequence[str]) -> Form | None:
    if suffix_of(file) == TEXT:
        return None
    with file_errors(file, writing=False):
        return form_of(columns_of_file(file), columns)


def _listed(folder: Path) -> list[Path]:
    with file_errors(folder, writing=False):
        return list(folder.iterdir())


def has_columns(path: Path) -> bool:
    """Return whether `path` leads to a file of rows, or to a folder that holds one."""
    if not is_directory(path):
        return suffix_of(path) in READERS
    return _is_saved(path) or any(suffix_of(file) in READERS for file in _listed(path))


def holds_chats(source: DatasetSource) -> bool:
    """Return whether a text of this machine is made of chats; raises the errors of `read_files`."""
    if not is_path(source.name):
        return False
    files = _files_at(expanded(source.name), source.split, source.purpose)
    return read_files(files, source.columns, ChatTemplate()).chats(source.name) is not None


def has_splits(path: Path) -> bool:
    """Return whether `path` leads to a folder of `save_to_disk` with several splits."""
    if not is_directory(path):
        return False
    from gptq_cli.calibration import tables

    return tables.has_splits(path)


def _is_saved(folder: Path) -> bool:
    from gptq_cli.calibration import tables

    return tables.is_saved(folder)


def _files_at(path: Path, split: str | None, purpose: Purpose) -> tuple[Path, ...]:
    """Return the files that a path leads to, those of a folder sorted by name.

    Raises InputError: E_DATA_NOT_FOUND, and E_DATA_SPLIT or E_DATA_FORMAT for a folder of
    `save_to_disk`.
    """
    if status_of(path) is None:
        hint = hint_at_near(path) or f"give a file ({KINDS}), a folder or a Hub id"
        raise InputError("E_DATA_NOT_FOUND", f"dataset `{path}` does not exist", hint=hint)
    if path.is_dir():
        if _is_saved(path):
            from gptq_cli.calibration import tables

            return tables.saved_files(path, split, DEFAULT_SPLITS[purpose])
        return _files_in(path)
    if not path.is_file() or suffix_of(path) not in SUFFIXES:
        message = f"dataset `{path}` is not a supported type of file"
        hint = f"give {KINDS}; with .gz or .zst after it: {PACKABLE}"
        raise InputError("E_DATA_NOT_FOUND", message, hint=hint)
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


DEFAULT_SPLITS: dict[Purpose, str] = {"calibration": "train", "evaluation": "test"}
SCRIPTED = ("ptb", "ptb-new")


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """The user's request for the text of one dataset.

    `config` and `split` are for Hub datasets; a folder of `save_to_disk` may have splits, too.
    `text_column` names the column of text or chats, or several columns of text, which are joined;
    if it is None, the columns of the rows decide. `chat_template` is the path of a file.
    """

    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    text_column: str | Sequence[str] | None = None
    purpose: Purpose = "calibration"
    chat_template: str | None = None

    @property
    def name(self) -> str:
        """The dataset, or the default one if none was asked for."""
        if self.dataset is None:
            return DEFAULT_DATASET
        return self.dataset

    @property
    def hub_id(self) -> str | None:
        """The id of the dataset on the Hub, None for text of this machine."""
        if self.name in CORPORA:
            return CORPORA[self.name].repo
        if self.name == BUILT_IN or is_path(self.name):
            return None
        return self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the user named."""
        if isinstance(self.text_column, str):
            return (self.text_column,)
        return tuple(self.text_column or ())

    @property
    def template_file(self) -> Path | None:
        """The path of the chat template, None if the user gave none."""
        if self.chat_template is None:
            return None
        return expanded(self.chat_template)


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts in order, and the string that joins them.

    `revision` is the commit of a Hub dataset, None for other text. Texts for calibration may be
    read on demand, so that a stream is read no further than needed. `max_windows` is part of the
    evaluation protocol of some corpora. `chats` is the template that renders the texts, None if
    they are plain text. `beside` are columns of chats that are not read because there is a column
    of text.
    """

    name: str
    texts: Iterable[str]
    join: str = PARAGRAPH
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    max_windows: int | None = None
    chats: ChatTemplate | None = None
    beside: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """The hash of the joined text in UTF-8; reads every text."""
        digest = sha256()
        for piece in self.pieces():
            digest.update(piece.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def about_chats(self) -> str:
        """The warning about chats `beside` the text."""
        way_out = f"remove `{DEFAULT_COLUMN}` to take them"
        if len(self.beside) == 1:
            way_out = f"--text-column {self.beside[0]} takes them"
        return (
            f"dataset `{self.name}` has a column `{DEFAULT_COLUMN}`, so the chats in "
            f"{quoted(self.beside)} are not read: {way_out}"
        )

    def pieces(self) -> Iterator[str]:
        """Yield the texts, each but the first with the string that joins it to the one before."""
        for position, text in enumerate(self.texts):
            yield text if position == 0 else self.join + text


def windows_need(nsamples: int, seqlen: int, tokens: int) -> str:
    """Return what windows need, in the words of the line about the text."""
    verb = "need"
    if nsamples == 1:
        verb = "needs"
    return f"{counted(nsamples, 'window')} of {seqlen} {verb} {tokens:,}"


def load_documents(source: DatasetSource, template: ChatTemplate | None = None) -> Documents:
    """Return the documents that `source` names, in the order of their files and rows.

    `template` renders chats; without one, chats are refused. Raises the errors of `check_source`,
    and InputError: E_DATA_NOT_FOUND, E_DATA_COLUMN, E_DATA_SCRIPT, E_DATA_EMPTY, E_DATA_ENCODING,
    E_DATA_FORMAT, E_DATA_CONFIG, E_DATA_SPLIT, E_DATA_CHAT, E_DATA_TEMPLATE, E_HUB_*. Texts read on
    demand raise the same errors when they are read.
    """
    check_source(source)
    documents = _documents_of(source, template or ChatTemplate())
    if source.chat_template is not None and documents.chats is None:
        message = f"chat_template has no meaning for dataset `{documents.name}`, which holds text"
        hint = "remove chat_template, or name the column of chats with --text-column"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)
    if source.purpose == "evaluation":
        # Evaluation tokenizes all of the text at once.
        documents = replace(documents, texts=list(documents.texts))
    return documents


def _documents_of(source: DatasetSource, template: ChatTemplate) -> Documents:
    name = source.name
    if name == BUILT_IN:
        return _built_in(source.purpose)
    if name in CORPORA:
        return _registered(name, source.purpose)
    if name in SCRIPTED:
        raise InputError(
            "E_DATA_SCRIPT",
            f"dataset `{name}` needs a loading script, which `datasets` 4 and later do not run",
            hint=f"use {REGISTERED} or a file of your own",
        )
    if is_path(name):
        files = _files_at(expanded(name), source.split, source.purpose)
        texts = read_files(files, source.columns, template)
        chats = texts.chats(name)
        return Documents(name, texts, join=_join(chats), chats=chats, beside=texts.beside)
    return _hub(name, source, template)


def _join(chats: ChatTemplate | None) -> str:
    """Return the string between two documents; a chat ends as its template has written."""
    if chats is None:
        return PARAGRAPH
    return ""


def check_source(source: DatasetSource) -> None:
    """Check `source` before a text is read or fetched.

    Raises ConfigError E_CFG_CONFLICT for a config, split or column of a dataset that has none;
    InputError E_DATA_NOT_FOUND for a path that leads to nothing, E_DATA_TEMPLATE for a chat
    template that is not there, and the errors of a folder of `save_to_disk`.
    """
    name = source.name
    if name in CORPORA or name == BUILT_IN:
        _refuse_options(f"the registered dataset `{name}`", source, columns=False, splits=False)
    elif is_path(name):
        path = expanded(name)
        _refuse_options(f"`{name}`", source, columns=has_columns(path), splits=has_splits(path))
        _files_at(path, source.split, source.purpose)
    else:
        _refuse_bad_id(name)
    if source.template_file is not None:
        read_template(source.template_file)


def is_path(name: str) -> bool:
    """Return whether a dataset name means a place on this machine and never goes to the Hub."""
    if name.startswith((".", "/", "~")):
        return True
    has_suffix = suffix_of(Path(name)) in SUFFIXES and "://" not in name
    return has_suffix or exists(name)


def exists(name: str) -> bool:
    """Return whether something is, or may be, at a path; a text too long for one is none."""
    try:
        return bool(name) and status_of(name) is not None
    except GptqError as error:
        return not isinstance(error.__cause__, OSError) or error.__cause__.errno != ENAMETOOLONG


def split_share(dataset: str) -> tuple[str, str | None]:
    """Return the name and the share of a dataset; a file of the whole name has no share."""
    match = _SHARE.fullmatch(dataset)
    if match is None or exists(dataset):
        return dataset, None
    return match[1], match[2]


def _built_in(purpose: Purpose) -> Documents:
    """Return the text that comes with the program; texts/README.md tells what it is."""
    from bz2 import decompress

    packed = Path(__file__).with_name("texts") / f"{purpose}.txt.bz2"
    return Documents(BUILT_IN, [decompress(packed.read_bytes()).decode()])


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
    texts, revision = open_column(request, (DEFAULT_COLUMN,), ChatTemplate())
    if part.limit is not None:
        texts = list(islice(texts, part.limit))
    return Documents(name, texts, part.join, corpus.config, part.split, revision, part.max_windows)


def _hub(name: str, source: DatasetSource, template: ChatTemplate) -> Documents:
    split = source.split or DEFAULT_SPLITS[source.purpose]
    request = LoadRequest(
        path=name, label=name, config=source.config, split=split, stream=True, hint=_nearest(name)
    )
    column, revision = open_column(request, source.columns, template)
    chats = None
    if column.form.is_chat:
        chats = template
    return Documents(
        name,
        column,
        _join(chats),
        source.config,
        split,
        revision=revision,
        chats=chats,
        beside=column.form.beside,
    )


def _refuse_bad_id(name: str) -> None:
    flaw = id_flaw(name)
    if flaw is None:
        return
    _refuse_lonely_share(name)
    message = (
        f"dataset `{name}` is not a registered name, a file, a folder or the id of a Hub dataset: "
        f"{flaw}"
    )
    pasted = pasted_id(name)
    hint = (
        f"registered names are {REGISTERED}; a text itself is not taken: write it into a .txt file "
        "and give its path"
    )
    if pasted is not None:
        hint = f"use --dataset {pasted.id}"
    raise InputError("E_DATA_NOT_FOUND", message, hint=hint)


def _refuse_lonely_share(name: str) -> None:
    """Raise E_CFG_CONFLICT for the only dataset if it has a share."""
    dataset, share = split_share(name)
    if share is not None:
        message = f"dataset `{dataset}` has a share of {share}, but it is the only one"
        hint = f"remove `:{share}`, or give a second --dataset"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)


def _nearest(name: str) -> str | None:
    near = get_close_matches(name, [*CORPORA, BUILT_IN], n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _refuse_options(what: str, source: DatasetSource, *, columns: bool, splits: bool) -> None:
    """Raise E_CFG_CONFLICT for options that mean nothing for `what`, which may have columns."""
    if source.columns not in ((), (DEFAULT_COLUMN,)) and not columns:
        message = f"text_column {quoted(source.columns)} has no meaning for {what}"
        raise ConfigError("E_CFG_CONFLICT", message, hint="remove text_column")
    if source.chat_template is not None and not columns:
        message = f"chat_template `{source.chat_template}` has no meaning for {what}"
        hint = "remove chat_template, or give a dataset of chats"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)
    for option, value in (("dataset_config", source.config), ("dataset_split", source.split)):
        if value is None or (option == "dataset_split" and splits):
            continue
        raise ConfigError(
            "E_CFG_CONFLICT",
            f"{option} `{value}` has no meaning for {what}",
            hint=f"remove {option}, or name a Hub dataset by its id",
        )
