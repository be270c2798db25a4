"""Datasets: registered names, ids of the Hub, files, folders, and refusals."""

from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from gptq_cli.calibration.corpus import CORPORA, DatasetSource, Documents, load_documents
from gptq_cli.errors import ConfigError, GptqError, InputError
from tests.calibration.rows import json_lines, parquet_bytes

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def as_parquet(**columns: list[Any]) -> bytes:
    return parquet_bytes(pyarrow.table(columns))


def load(path: Path, **options: Any) -> Documents:
    return load_documents(DatasetSource(str(path), **options))


def refused(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        list(load(path, **options).texts)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


class FakeBuilder:
    """A stand-in for the builder of a Hub dataset; it notes its arguments and how it is read."""

    hash = COMMIT

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments = (arguments, options)
        self.split: str | None = None
        self.prepared = False
        self.streamed = False

    def download_and_prepare(self) -> None:
        self.prepared = True

    def as_dataset(self, split: str) -> list[dict[str, str]]:
        assert self.prepared
        self.split = split
        return [{"text": f"row {index}"} for index in range(2000)]

    def as_streaming_dataset(self, split: str) -> list[dict[str, str]]:
        self.streamed = True
        self.split = split
        return [{"text": f"row {index}"} for index in range(2000)]


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> list[FakeBuilder]:
    made: list[FakeBuilder] = []

    def fake(*arguments: Any, **options: Any) -> FakeBuilder:
        made.append(FakeBuilder(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(datasets, "load_dataset_builder", fake)
    return made


C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
# The protocols of papers, written down a second time:
# repository, config, data files, split, streamed or not, separator of documents, most windows.
PUBLISHED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("wikitext2", "calibration"): (*WIKITEXT, None, "train", False, "\n\n", None),
    ("wikitext2", "evaluation"): (*WIKITEXT, None, "test", False, "\n\n", None),
    ("c4", "calibration"): ("allenai/c4", None, C4_TRAIN, "train", True, "\n\n", None),
    ("c4", "evaluation"): ("allenai/c4", None, C4_VALIDATION, "validation", True, " ", 256),
    ("c4-new", "calibration"): ("allenai/c4", None, C4_TRAIN, "train", True, "\n\n", None),
    ("c4-new", "evaluation"): ("allenai/c4", None, C4_VALIDATION, "validation", True, " ", 256),
}


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", CORPORA)
def test_each_registered_corpus_is_read_as_in_its_entry(
    name: str, purpose: Any, builders: list[FakeBuilder]
) -> None:
    documents = load_documents(DatasetSource(name, purpose=purpose))
    [builder] = builders
    corpus, part = CORPORA[name], CORPORA[name].parts[purpose]
    assert builder.arguments[0] == (corpus.repo, corpus.config)
    assert (builder.split, builder.streamed) == (part.split, corpus.stream)
    assert (documents.join, documents.max_windows) == (part.join, part.max_windows)
    assert len(list(documents.texts)) == (part.limit or 2000)


@pytest.mark.parametrize(("name", "purpose"), PUBLISHED)
def test_a_published_corpus_is_read_as_published(
    name: str, purpose: Any, builders: list[FakeBuilder]
) -> None:
    repo, config, data_files, split, stream, join, max_windows = PUBLISHED[name, purpose]
    documents = load_documents(DatasetSource(name, purpose=purpose))
    [builder] = builders
    assert builder.arguments == ((repo, config), {"data_files": data_files})
    assert (builder.split, builder.streamed) == (split, stream)
    assert (documents.name, documents.config, documents.split) == (name, config, split)
    assert (documents.join, documents.max_windows) == (join, max_windows)
    assert documents.revision == COMMIT
    n_texts = 2000
    if name != "wikitext2" and purpose == "evaluation":
        n_texts = 1100
    assert list(documents.texts) == [f"row {index}" for index in range(n_texts)]


def test_the_default_dataset_is_wikitext2(builders: list[FakeBuilder]) -> None:
    assert load_documents(DatasetSource()).name == "wikitext2"
    assert builders[0].arguments[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1")


def test_the_own_text_is_whole_and_needs_no_hub(builders: list[FakeBuilder]) -> None:
    texts = {}
    for purpose in ("calibration", "evaluation"):
        documents = load_documents(DatasetSource("english", purpose=purpose))  # type: ignore[arg-type]
        assert (documents.name, documents.revision) == ("english", None)
        [texts[purpose]] = documents.texts
    first, second = texts["calibration"], texts["evaluation"]
    assert first.startswith("To Sherlock Holmes she is always THE woman.")
    assert first.endswith("The sun is but a morning star.\n")
    assert (len(first.encode()), len(second.encode())) == (1_265_072, 138_922)
    own = {paragraph for paragraph in first.split("\n\n") if len(paragraph) > 100}
    assert len(own) > 1000
    assert own.isdisjoint(second.split("\n\n"))
    assert builders == []


def test_a_registered_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builders: list[FakeBuilder]
) -> None:
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert load_documents(DatasetSource("c4")).revision == COMMIT
    assert len(builders) == 1
    assert list(load_documents(DatasetSource("./c4")).texts) == ["mine"]


@pytest.mark.parametrize(("purpose", "split"), [("calibration", "train"), ("evaluation", "test")])
def test_a_hub_dataset_streams_the_split_for_its_purpose(
    purpose: Any, split: str, builders: list[FakeBuilder]
) -> None:
    documents = load_documents(DatasetSource("someone/texts", purpose=purpose))
    assert builders[0].arguments == (("someone/texts", None), {"data_files": None})
    assert (builders[0].split, builders[0].streamed, documents.revision) == (split, True, COMMIT)


def test_a_hub_dataset_has_the_given_config_and_split(builders: list[FakeBuilder]) -> None:
    load_documents(DatasetSource("someone/texts", config="english", split="extra"))
    assert builders[0].arguments[0] == ("someone/texts", "english")
    assert builders[0].split == "extra"


@pytest.mark.parametrize("dataset", ["wikitext2", "english", "./notes.txt"])
@pytest.mark.parametrize("options", [{"config": "x"}, {"split": "x"}])
def test_only_hub_datasets_accept_a_config_and_a_split(
    dataset: Any, options: dict[str, str], builders: list[FakeBuilder]
) -> None:
    (option,) = options
    with pytest.raises(ConfigError, match=f"dataset_{option} `x` has no meaning for") as caught:
        load_documents(DatasetSource(dataset, **options))
    assert caught.value.code == "E_CFG_CONFLICT"
    assert builders == []


@pytest.mark.parametrize("dataset", ["wikitext2", "english", "./notes.txt"])
def test_datasets_without_columns_refuse_text_column(
    dataset: Any, builders: list[FakeBuilder]
) -> None:
    with pytest.raises(ConfigError, match="text_column `body` has no meaning for") as caught:
        load_documents(DatasetSource(dataset, text_column="body"))
    assert (caught.value.code, caught.value.hint) == ("E_CFG_CONFLICT", "remove text_column")
    assert builders == []


def test_a_folder_accepts_text_column_if_a_file_has_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ConfigError, match="text_column `body` has no meaning"):
        load(tmp_path, text_column="body")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n')
    assert list(load(tmp_path, text_column="body").texts) == ["one", "two"]


@pytest.mark.parametrize("text", ["a word " * 1000, "The basic principles of it.", "another\0"])
def test_a_text_itself_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(
        InputError, match="is not a registered name, a file, a folder or the id"
    ) as (caught):
        load_documents(DatasetSource(text))
    assert caught.value.code == "E_DATA_NOT_FOUND"
    assert (caught.value.hint or "").endswith("write it into a .txt file and give its path")


@pytest.mark.parametrize(
    "name", [".hidden", "./gone", "../gone", "/gone", "~/gone", "gone.txt", "data/gone.jsonl"]
)
def test_a_name_that_looks_like_a_path_is_not_sent_to_the_hub(
    name: str, builders: list[FakeBuilder]
) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        load_documents(DatasetSource(name))
    assert caught.value.code == "E_DATA_NOT_FOUND"
    assert builders == []


def test_an_existing_folder_is_not_sent_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builders: list[FakeBuilder]
) -> None:
    (tmp_path / "someone" / "texts").mkdir(parents=True)
    (tmp_path / "someone" / "texts" / "a.txt").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert list(load_documents(DatasetSource("someone/texts")).texts) == ["local"]
    assert builders == []


@pytest.mark.parametrize("name", ["two words", "a/b/c", "https://example.com/x", ""])
def test_a_name_that_is_no_hub_id_is_not_sent_to_the_hub(
    name: str, builders: list[FakeBuilder]
) -> None:
    with pytest.raises(InputError) as caught:
        load_documents(DatasetSource(name))
    assert caught.value.code == "E_DATA_NOT_FOUND"
    assert "wikitext2, c4, c4-new" in (caught.value.hint or "")
    assert builders == []


@pytest.mark.parametrize("name", ["ptb", "ptb-new"])
def test_corpora_that_need_a_script_are_refused(name: str, builders: list[FakeBuilder]) -> None:
    with pytest.raises(InputError) as caught:
        load_documents(DatasetSource(name))
    assert caught.value.code == "E_DATA_SCRIPT"
    assert builders == []


FILES: dict[str, bytes] = {
    "rows.jsonl": b'{"text": "one", "n": 1}\n{"text": "NA", "n": 2}\n',
    "rows.json": b'[{"text": "one"}, {"text": "NA"}]',
    "rows.csv": b"n,text\n1,one\n2,NA\n",
    "rows.parquet": as_parquet(n=[1, 2], text=["one", "NA"]),
}


@pytest.mark.parametrize("name", FILES)
def test_each_row_of_a_file_is_a_document(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    documents = load(tmp_path / name)
    assert list(documents.texts) == ["one", "NA"]
    assert list(documents.texts) == ["one", "NA"], "texts can be read again"
    assert documents.name == str(tmp_path / name)


def test_a_text_file_is_one_document_with_every_byte(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes("ä\r\n\n\nb ".encode())
    documents = load(tmp_path / "notes.txt", purpose="evaluation")
    assert documents.texts == ["ä\r\n\n\nb "]
    assert documents.sha256 == sha256("ä\r\n\n\nb ".encode()).hexdigest()


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(load(tmp_path / "notes.txt").texts) == ["hello"]


def test_files_of_a_folder_are_read_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n{"text": "fourth"}\n')
    (tmp_path / "a.parquet").write_bytes(as_parquet(text=["first"]))
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    assert list(load(tmp_path).texts) == ["first", "second", "third", "fourth"]


def test_text_column_selects_another_column(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    assert list(load(tmp_path / "rows.jsonl", text_column="body").texts) == ["yes"]


REFUSALS: dict[str, tuple[str, bytes, str, str]] = {
    "no such column": (
        "x.jsonl",
        b'{"body": "a", "n": "1"}\n',
        "E_DATA_COLUMN",
        "has no column `text`; it has `body`, `n`",
    ),
    "no such column of csv": (
        "x.csv",
        b"body,n\na,1\n",
        "E_DATA_COLUMN",
        "has no column `text`; it has `body`, `n`",
    ),
    "no such column of a list": (
        "x.json",
        b'[{"body": "a", "n": "b"}]',
        "E_DATA_COLUMN",
        "has no column `text`; it has `body`, `n`",
    ),
    "numbers": (
        "x.jsonl",
        b'{"text": 5}\n',
        "E_DATA_COLUMN",
        "of line 1 holds a number, not a string",
    ),
    "numbers of a list": (
        "x.json",
        b'[{"text": 5}]',
        "E_DATA_COLUMN",
        "column `text` of row 1 holds a number, not a string",
    ),
    "numbers of parquet": (
        "x.parquet",
        as_parquet(text=[1.5]),
        "E_DATA_COLUMN",
        "holds double, not strings",
    ),
    "null row": (
        "x.jsonl",
        b'{"text": "a"}\n{"text": null}\n',
        "E_DATA_COLUMN",
        "column `text` of line 2 holds null",
    ),
    "null row of parquet": (
        "x.parquet",
        as_parquet(text=["a", None]),
        "E_DATA_COLUMN",
        "of row 2 holds null",
    ),
    "latin1 text": (
        "x.txt",
        "na\xefve".encode("latin1"),
        "E_DATA_ENCODING",
        "is not UTF-8: byte 0xef at offset 2",
    ),
    "latin1 jsonl": (
        "x.jsonl",
        b'{"text": "na\xefve"}\n',
        "E_DATA_ENCODING",
        "is not UTF-8: byte 0xef",
    ),
    "latin1 csv": ("x.csv", b"text\nna\xefve\n", "E_DATA_ENCODING", "is not UTF-8: byte 0xef"),
    "empty text": ("x.txt", b"", "E_DATA_EMPTY", "is an empty file"),
    "empty jsonl": ("x.jsonl", b"", "E_DATA_EMPTY", "is an empty file"),
    "empty list": ("x.json", b"[]", "E_DATA_EMPTY", "has no rows"),
    "header only": ("x.csv", b"text\n", "E_DATA_EMPTY", "has no rows"),
    "no rows of parquet": (
        "x.parquet",
        as_parquet(text=pyarrow.array([], "string")),
        "E_DATA_EMPTY",
        "has no rows",
    ),
    "broken jsonl": ("x.jsonl", b'{"text": "a"\n{"te', "E_DATA_FORMAT", "cannot be read"),
    "deep json": ("x.json", b'{"text": ' + b"[" * 100_000, "E_DATA_FORMAT", "cannot be read"),
    "broken parquet": ("x.parquet", b"PAR1 no", "E_DATA_FORMAT", "cannot be read"),
    "later row": (
        "x.jsonl",
        b'{"text": "a"}\n{"body": "b"}\n',
        "E_DATA_COLUMN",
        "line 2 of dataset",
    ),
    "list": (
        "x.jsonl",
        b'{"text": ["a"]}\n',
        "E_DATA_COLUMN",
        "of line 1 holds a list, not a string",
    ),
    "list of parquet": (
        "x.parquet",
        as_parquet(text=[["a"]]),
        "E_DATA_COLUMN",
        "holds a list in each row, not",
    ),
    "no object": (
        "x.jsonl",
        b'{"text": "a"}\n5\n',
        "E_DATA_FORMAT",
        "line 2 holds a number, not an object",
    ),
    "no object of a list": (
        "x.json",
        b'[{"text": "a"}, null]',
        "E_DATA_FORMAT",
        "item 2 holds null, not an object",
    ),
    "half a pair": (
        "x.jsonl",
        b'{"text": "\\ud800"}\n',
        "E_DATA_FORMAT",
        "of line 1 holds half of a surrogate pair",
    ),
    "deep": (
        "x.jsonl",
        b'{"text": ' + b"[" * 10**5 + b"\n",
        "E_DATA_FORMAT",
        "line 1 cannot be read",
    ),
    "broken list": ("x.json", b'[{"text": "a"},\n {"te', "E_DATA_FORMAT", "line 2 is not JSON"),
    "two documents": (
        "x.json",
        b'{\n"text": "a"\n}\n{\n',
        "E_DATA_FORMAT",
        "line 4 is not JSON: Extra data",
    ),
    "long record": (
        "x.csv",
        b"text,n\na,1,2\n",
        "E_DATA_FORMAT",
        "line 2 has 3 fields, but the header has 2",
    ),
    "short record": (
        "x.csv",
        b"n,text\n1\n",
        "E_DATA_COLUMN",
        "column `text` of line 2 holds null",
    ),
    "open quote": (
        "x.csv",
        b'text\n"a\nb\n',
        "E_DATA_FORMAT",
        "is not CSV: unexpected end of data",
    ),
    "header twice": (
        "x.csv",
        b"text,text\na,b\n",
        "E_DATA_FORMAT",
        "its header has the column `text` twice",
    ),
    "nuls": (
        "x.txt",
        b"\0" * 5000,
        "E_DATA_FORMAT",
        "is not text: it holds a NUL byte at offset 0",
    ),
    "nul in a text": (
        "x.txt",
        b"some text" * 9 + b"\0",
        "E_DATA_FORMAT",
        "it holds a NUL byte at offset 81",
    ),
    "nul in rows": (
        "x.jsonl",
        b'{"text": "a"}\n{"text": "\0"}\n',
        "E_DATA_FORMAT",
        "a NUL byte at offset 24",
    ),
    "nul in csv": ("x.csv", b"text\na\0b\n", "E_DATA_FORMAT", "it holds a NUL byte at offset 6"),
    "binary": (
        "x.TXT",
        b"\x7fELF\2\1\1" + bytes(range(256)),
        "E_DATA_FORMAT",
        "is not text: it holds a NUL byte",
    ),
    "other kind": ("x.md", b"text", "E_DATA_NOT_FOUND", "is not a supported type of file"),
}


# `datasets` does not close a file that it cannot read: the garbage collector closes it
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
@pytest.mark.parametrize("case", REFUSALS)
def test_a_faulty_file_is_refused_with_the_reason(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, content, code, message = REFUSALS[case]
    (tmp_path / name).write_bytes(content)
    gc.freeze()  # so that it only searches objects of this test at the end
    error = refused(tmp_path / name)
    assert error.code == code
    assert message in str(error)
    assert f"`{tmp_path / name}`" in str(error)
    assert capfd.readouterr() == ("", "")
    del error
    gc.collect()
    gc.unfreeze()


def test_message_names_the_broken_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": \n{"text": "d"}\n')
    error = refused(tmp_path / "x.jsonl")
    assert (error.code, error.hint) == ("E_DATA_FORMAT", "fix that line")
    assert "cannot be read: line 4 is not JSON" in str(error)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path(os.devnull)):
        error = refused(path)  # it would wait for ever if it opened the pipe
        assert error.code == "E_DATA_NOT_FOUND"
        assert "is not a supported type of file" in str(error)


def test_command_of_the_hint_converts_a_latin_1_file(tmp_path: Path) -> None:
    file = tmp_path / "my notes.txt"
    file.write_bytes("naïve".encode("latin1"))
    command = (refused(file).hint or "").partition(": ")[2]
    assert subprocess.run(command, shell=True, capture_output=True, check=True).stdout == b""
    assert list(load(tmp_path / "my notes-utf8.txt").texts) == ["naïve"]


def test_hint_names_the_other_columns_that_hold_text(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": 5}\n')
    assert refused(tmp_path / "one.jsonl").hint == "fix it"
    (tmp_path / "two.jsonl").write_text('{"text": 5, "body": "a"}\n')
    hint = refused(tmp_path / "two.jsonl").hint
    assert hint == "fix it, or name another with --text-column: `body`"


def test_message_names_only_the_first_of_many_columns(tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text(json.dumps({f"c{number}": "a" for number in range(30)}))
    assert str(refused(tmp_path / "many.jsonl")).endswith("`c6`, `c7`, ...")


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("no")
    error = refused(tmp_path)
    assert error.code == "E_DATA_NOT_FOUND"
    assert ".jsonl" in (error.hint or "")


def test_a_faulty_later_file_is_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.jsonl").write_text(json.dumps({"other": 5}))
    texts: Iterator[str] = iter(load(tmp_path).texts)
    assert next(texts) == "good"
    with pytest.raises(GptqError, match="has no column `text`"):
        next(texts)


NAMES = [
    "data[1]",
    "a*",
    "b?",
    "{c,d}",
    "e::f",
    "~",
    "~nobody",
    "zip:",
    "hf:",
    "g%20h",
    "i#j?k=l",
    "[!m]",
    "**",
    " n ",
]


# the content of a file with one text, by the suffix of the file
ONE_TEXT: dict[str, Callable[[str], bytes]] = {
    ".txt": lambda text: text.encode(),
    ".csv": lambda text: f'text\n"{text}"\n'.encode(),
    ".json": lambda text: json.dumps({"text": text}).encode(),
    ".jsonl": lambda text: json.dumps({"text": text}).encode(),
    ".parquet": lambda text: as_parquet(text=[text]),
}


@pytest.mark.parametrize(
    "suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".TXT", ".Jsonl", ".CSV"]
)
def test_a_path_with_special_characters_is_not_a_pattern(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = ONE_TEXT[suffix.lower()]
    for decoy in ("data1", "axx", "bx", "c", "d", "e", "l", "m", "x"):
        Path(f"{decoy}{suffix}").write_bytes(content("decoy"))
    for name in NAMES:
        Path(f"{name}{suffix}").write_bytes(content(name))
        assert list(load_documents(DatasetSource(f"{name}{suffix}")).texts) == [name]
        folder = Path(f"folder {name}")
        folder.mkdir()
        (folder / f"{name}{suffix}").write_bytes(content(f"in {name}"))
        assert list(load(folder).texts) == [f"in {name}"]
        assert list(load(folder.absolute()).texts) == [f"in {name}"]


@pytest.mark.parametrize(
    "name",
    [
        "a[1].jsonl",
        "*.jsonl",
        "x::a.jsonl",
        "zip://a.jsonl::b.zip",
        "https://h/a.jsonl",
        "hf://datasets/a/b.jsonl",
        "file:///etc/a.txt",
        "memory://a.json",
    ],
)
def test_patterns_and_addresses_are_not_found_as_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("a1.jsonl", "a.jsonl", "x"):
        (tmp_path / other).write_text('{"text": "another"}')
    with pytest.raises(InputError) as caught:
        load_documents(DatasetSource(name))
    assert caught.value.code == "E_DATA_NOT_FOUND"
    assert f"`{name}`" in str(caught.value)


@pytest.mark.parametrize("kind", ["json", "csv", "text", "parquet", "imagefolder"])
def test_a_type_of_file_is_refused_as_a_dataset_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builders: list[FakeBuilder]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('{"text": "what lies around"}')
    with pytest.raises(InputError, match=f"`{kind}` is a type of file for `datasets`") as caught:
        load_documents(DatasetSource(kind))
    assert caught.value.code == "E_DATA_NOT_FOUND"
    assert caught.value.hint == "give the path of the file itself"
    assert builders == []


@pytest.mark.parametrize(
    ("name", "repo"), [("wikitext2", "Salesforce/wikitext"), ("c4", "allenai/c4")]
)
def test_a_folder_cannot_replace_a_registered_corpus(
    name: str,
    repo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    builders: list[FakeBuilder],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / repo).mkdir(parents=True)
    message = f"`{repo}` in the current directory has the name of the Hub"
    with pytest.raises(InputError, match=message) as caught:
        load_documents(DatasetSource(name))
    assert caught.value.code == "E_DATA_NOT_FOUND"
    assert "another directory" in (caught.value.hint or "")
    assert builders == []


SHAPES = {
    "lines.json": '{"text": "a"}\n\n{"text": "b"}',
    "list.jsonl": ' [{"text": "a"},\n {"text": "b"}]',
    "texts.json": '["a", "b"]',
    "marked.jsonl": '\ufeff{"text": "a"}\r\n{"text": "b"}\r\n',
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_read_from_json_of_every_shape(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SHAPES[name], encoding="utf-8")
    assert list(load(tmp_path / name).texts) == ["a", "b"]


def test_one_json_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{\n "text": "a\\u00e9",\n "n": 1\n}\n')
    assert list(load(tmp_path / "one.json").texts) == ["a\u00e9"]


def test_csv_fields_may_contain_newlines_commas_and_quotes(tmp_path: Path) -> None:
    first = b'1,"a, ""b""\r\nc"\r\n'
    last = b"3," + b"x" * 200_000 + b"\n"
    content = b"\xef\xbb\xbfn,text\r\n" + first + b"\r\n2,null\r\n" + last
    (tmp_path / "x.csv").write_bytes(content)
    assert list(load(tmp_path / "x.csv").texts) == ['a, "b"\r\nc', "null", "x" * 200_000]


def test_files_of_rows_are_read_lazily(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(3000)]
    lines = json_lines({"text": text} for text in texts)
    records = "text\n" + "\n".join(texts) + "\n"
    for name, content in (("x.jsonl", lines), ("x.csv", records)):
        (tmp_path / name).write_bytes(content.encode() + b"\xff")
        found = iter(load(tmp_path / name).texts)
        assert [next(found) for _ in range(3)] == ["row 0", "row 1", "row 2"]


def broken(*_: Any, **__: Any) -> None:
    raise AttributeError("a slip in the program")


def test_a_bug_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset_builder", broken)
    with pytest.raises(AttributeError, match="a slip"):
        list(load_documents(DatasetSource("someone/texts")).texts)


def test_a_bug_is_not_blamed_on_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", broken)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(AttributeError, match="a slip"):
        list(load(tmp_path / "rows.jsonl").texts)


def test_load_restores_progress_bars_and_log_level(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_info()
    try:
        list(load(tmp_path / "rows.jsonl").texts)
        assert datasets.logging.get_verbosity() == datasets.logging.INFO
        assert datasets.is_progress_bar_enabled()
    finally:
        datasets.logging.set_verbosity(verbosity)
