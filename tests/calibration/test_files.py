"""Files of text in each form: packed, Arrow, folders of `save_to_disk`; columns and lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import ipc

from gptq_cli.calibration.corpus import DatasetSource, Documents, check_source, load_documents
from gptq_cli.calibration.windows import Windows, read_parts
from gptq_cli.errors import GptqError, InputError
from gptq_cli.planning.checks import _check_text, calibration_sources
from tests.calibration.rows import json_lines, parquet_bytes
from tests.families import save_model
from tests.runs import config, quantize_with_events
from tests.tiny import SMALL

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
CONTENT = {
    "x.txt": b"one two",
    "x.JSONL": b'{"text": "one"}\n{"text": "two"}\n',
    "x.json": b'[{"text": "one"},\n {"text": "two"}]',
    "x.csv": b"text\none\ntwo\n",
}


def load(path: Path, **options: object) -> Documents:
    return load_documents(DatasetSource(str(path), **options))


def refused(path: Path, **options: object) -> GptqError:
    with pytest.raises(GptqError) as caught:
        list(load(path, **options).texts)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", CONTENT)
def test_a_packed_file_holds_the_text_of_the_plain_one(
    name: str, packing: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(CONTENT[name])
    packed = tmp_path / f"{name}{packing}"
    packed.write_bytes(PACK[packing](CONTENT[name]))
    assert list(load(packed).texts) == list(load(tmp_path / name).texts) != []


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "not packed"])
def test_damaged_packed_bytes_are_refused(damage: str, packing: str, tmp_path: Path) -> None:
    whole = PACK[packing](b'{"text": "one"}\n' * 1000)
    content = whole[:-9]
    if damage == "not packed":
        content = b'{"text": "one"}\n'
    file = tmp_path / f"x.jsonl{packing}"
    file.write_bytes(content)
    error = refused(file)
    assert (error.code, error.exit_code) == ("E_DATA_FORMAT", 3)
    assert f"dataset `{file}` cannot be read: it is not a whole" in str(error)
    assert error.hint == "make the file again, or fetch it again"


def test_a_packed_table_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    error = refused(tmp_path / "x.parquet.gz")
    assert error.code == "E_DATA_NOT_FOUND"
    assert error.hint.endswith("with .gz or .zst after it: .txt, .json, .jsonl, .csv")


@pytest.mark.parametrize("opened", [ipc.new_stream, ipc.new_file])
def test_arrow_streams_and_files_are_read(opened: Callable[..., object], tmp_path: Path) -> None:
    table = pyarrow.table({"n": [1, 2, 3], "body": ["one", "two", "three"]})
    with (
        pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as sink,
        opened(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    assert list(load(tmp_path / "x.arrow").texts) == ["one", "two", "three"]
    (tmp_path / "x.arrow").write_bytes((tmp_path / "x.arrow").read_bytes()[:-200])
    error = refused(tmp_path / "x.arrow")
    assert (error.code, error.hint) == ("E_DATA_FORMAT", "check that it is a whole Arrow file")


@pytest.fixture
def saved() -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(5)]})
    return rows.select([4, 1, 0])


def test_a_folder_of_save_to_disk_is_read_in_its_order(
    saved: datasets.Dataset, tmp_path: Path
) -> None:
    saved.save_to_disk(tmp_path / "one")
    saved.save_to_disk(tmp_path / "shards", num_shards=3)
    for name in ("one", "shards"):
        assert list(load(tmp_path / name).texts) == ["text 4", "text 1", "text 0"]


def test_a_split_of_save_to_disk_is_chosen(saved: datasets.Dataset, tmp_path: Path) -> None:
    both = {"test": saved.select([0]), "train": saved.select([1, 2])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"only": saved}).save_to_disk(tmp_path / "only")
    assert list(load(tmp_path / "both").texts) == ["text 1", "text 0"]
    assert list(load(tmp_path / "both", purpose="evaluation").texts) == ["text 4"]
    assert list(load(tmp_path / "both", split="test").texts) == ["text 4"]
    assert len(list(load(tmp_path / "only").texts)) == 3
    error = refused(tmp_path / "both", split="gone")
    assert str(error).endswith("has no split `gone`; it has test, train")
    assert (error.code, error.hint) == ("E_DATA_SPLIT", "name a split with --dataset-split")


@pytest.mark.parametrize("split", ["..", "../elsewhere", "/etc", ".", "a/b", ""])
def test_a_split_never_leaves_its_saved_folder(
    split: str, saved: datasets.Dataset, tmp_path: Path
) -> None:
    saved.save_to_disk(tmp_path / "elsewhere")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "both")
    names = json.dumps({"splits": ["train", split]})
    (tmp_path / "both" / "dataset_dict.json").write_text(names)
    error = refused(tmp_path / "both", split=split or None)
    assert str(error).endswith(f'its split "{split}" is outside the folder')
    assert (error.code, error.exit_code) == ("E_DATA_FORMAT", 3)
    assert error.hint == "write the folder again with save_to_disk"


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"_data_files": []}', '{"_data_files": [{}]}', "[" * 100_000], ids=len
)
def test_a_damaged_folder_of_save_to_disk_is_refused(
    damage: str, saved: datasets.Dataset, tmp_path: Path
) -> None:
    saved.save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text(damage)
    error = refused(tmp_path)
    assert (error.code, error.hint) == ("E_DATA_FORMAT", "write the folder again with save_to_disk")
    assert f"`{tmp_path / 'state.json'}` cannot be read: it " in str(error)


ONLY_TEXT = {
    "x.jsonl": json_lines([{"n": 1, "body": "one", "tags": ["a"]}]).encode(),
    "x.json": b'[{"body": "one", "n": null}]',
    "x.csv": b"body\none\n",
    "x.parquet": parquet_bytes(pyarrow.table({"n": [1], "body": ["one"], "tags": [["a"]]})),
}


@pytest.mark.parametrize("name", ONLY_TEXT)
def test_the_only_column_of_text_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ONLY_TEXT[name])
    assert list(load(tmp_path / name).texts) == ["one"]


def test_several_columns_of_text_are_joined(tmp_path: Path) -> None:
    rows = [{"title": "t", "body": "b", "n": 1}, {"title": "u", "body": "c", "n": 2}]
    (tmp_path / "x.jsonl").write_text(json_lines(rows))
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(pyarrow.Table.from_pylist(rows)))
    for suffix in (".jsonl", ".parquet"):
        file = tmp_path / f"x{suffix}"
        assert list(load(file, text_column=["title", "body"]).texts) == ["t\n\nb", "u\n\nc"]
        assert next(iter(load(file, text_column=["body", "title"]).texts)) == "b\n\nt"
        assert "column `n` " in str(refused(file, text_column=["title", "n"]))
        assert "has no column `gone`" in str(refused(file, text_column=["title", "gone"]))


def test_a_broken_row_is_named_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('\n{"text": "a"}\n\n\n{"text": 5}\n')
    (tmp_path / "x.csv").write_text('n,text\n1,"two\nlines"\n\n2\n')
    for name, line in (("x.jsonl", 5), ("x.csv", 5)):
        error = refused(tmp_path / name)
        assert error.code == "E_DATA_COLUMN"
        assert str(error).startswith(f"dataset `{tmp_path / name}`: column `text` of line {line} ")


def test_a_damaged_source_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(GptqError, match="it names no files"):
        check_source(DatasetSource(str(tmp_path)))
    with pytest.raises(GptqError, match="does not exist"):
        _check_text(config(dataset=str(tmp_path / "gone.arrow")))


CHAT = [{"role": "user", "content": "a question"}]
BESIDE = {
    "messages": ({"messages": CHAT}, "`messages` are not read: --text-column messages takes them"),
    "prompts": ({"prompt": "p", "completion": "c"}, "remove `text` to take them"),
}


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_beside_chats_is_told(case: str, suffix: str, tmp_path: Path) -> None:
    columns, told = BESIDE[case]
    rows = [{"text": "a text", **columns}]
    file = tmp_path / f"x{suffix}"
    if suffix == ".jsonl":
        file.write_text(json_lines(rows))
    else:
        file.write_bytes(parquet_bytes(pyarrow.Table.from_pylist(rows)))
    found = load(file)
    assert list(found.texts) == ["a text"]
    assert found.about_chats.endswith(told)
    assert load(file, text_column="text").beside == ()


def test_without_packing_each_document_is_a_window_of_its_own(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **SMALL)
    rows = ["abc", "", "defgh", "ij", "klmnopqrst"]
    (tmp_path / "x.jsonl").write_text(json_lines([{"text": text} for text in rows]))
    settings = {"dataset": str(tmp_path / "x.jsonl"), "seqlen": 6, "nsamples": 4, "pack": False}
    of_run = config(**settings)
    [part] = read_parts(model, of_run, calibration_sources(of_run))
    assert [len(ids) for ids in part.pool.windows] == [3, 5, 2, 6], "the last one is cut"
    assert len({ids[0] for ids in part.pool.windows}) == 4, "a document begins each window"
    assert part.summary.endswith("20 tokens; 4 documents of up to 6 tokens are needed")
    result, _ = quantize_with_events(model, tmp_path / "out", **settings)
    assert result.tokens == 3 + 5 + 2 + 6, "no padding counts"


def test_batches_of_documents_hold_one_length_and_no_padding() -> None:
    rows = [[1, 2, 3], [4], [5, 6, 7], [8, 9], [10], [11, 12, 13]]
    windows = Windows.of_documents(rows)
    batches = [batch.tolist() for batch in windows.batches(2)]
    assert batches == [[[1, 2, 3], [5, 6, 7]], [[11, 12, 13]], [[8, 9]], [[4], [10]]]
    assert windows.tokens == 13
    assert windows.sha256 != Windows.of_documents([[1, 2], [3], *rows[1:]]).sha256


def test_too_few_documents_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **SMALL)
    (tmp_path / "x.txt").write_text("one document " * 100)
    of_run = config(dataset=str(tmp_path / "x.txt"), pack=False)
    [part] = read_parts(model, of_run, calibration_sources(of_run))
    with pytest.raises(
        InputError, match=r"has 1 documents with tokens, but 6 are needed"
    ) as caught:
        part.draw(0)
    assert (caught.value.code, caught.value.exit_code) == ("E_DATA_SHORT", 3)
    assert (caught.value.hint or "").endswith("or leave out --no-pack")
