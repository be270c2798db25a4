"""A text that is not UTF-8 is refused with its encoding and a command that converts it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gptq_cli.calibration.corpus import DatasetSource, load_documents
from gptq_cli.errors import InputError

TEXT = "It costs 5 \u20ac, said Zo\u00eb.\r\nNobody answered.\n" * 30
CHINESE = "\u91cf\u5316\u6a21\u578b\u7684\u6821\u51c6\u6587\u672c\u3002\n" * 30
# encoding of the file, words of the message, option of iconv
OTHERS = [
    ("utf-16", "is UTF-16, not UTF-8", "-f utf-16 "),
    ("utf-32", "is UTF-32, not UTF-8", "-f utf-32 "),
    ("utf-16-le", "is UTF-16, not UTF-8", "-f utf-16le "),
    ("utf-16-be", "is UTF-16, not UTF-8", "-f utf-16be "),
    ("utf-32-le", "is UTF-32, not UTF-8", "-f utf-32le "),
    ("utf-32-be", "is UTF-32, not UTF-8", "-f utf-32be "),
]
WRITTEN: dict[str, Callable[[str], str]] = {
    ".txt": lambda text: text,
    ".TXT": lambda text: text,
    ".jsonl": lambda text: json.dumps({"text": text}, ensure_ascii=False) + "\n",
    ".json": lambda text: json.dumps([{"text": text}], ensure_ascii=False, indent=1),
    ".csv": lambda text: f'text\n"{text}"\n',
}


def refused(file: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        list(load_documents(DatasetSource(str(file))).texts)
    assert caught.value.code == "E_DATA_ENCODING"
    return caught.value


def converted(file: Path) -> list[str]:
    """Run the command of the hint for `file`; return the texts of the file that it writes."""
    command = (refused(file).hint or "").partition(": ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    result = file.with_name(f"{file.stem}-utf8{file.suffix}")
    return list(load_documents(DatasetSource(str(result))).texts)


@pytest.mark.parametrize("suffix", WRITTEN)
@pytest.mark.parametrize(("encoding", "message", "command"), OTHERS)
def test_hint_converts_utf_16_and_utf_32(
    encoding: str, message: str, command: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"it's \u00a0 my notes{suffix}"
    file.write_bytes(WRITTEN[suffix](TEXT).encode(encoding))
    error = refused(file)
    assert message in str(error)
    assert command in (error.hint or "")
    assert converted(file) == [TEXT]


def test_hint_converts_big_endian_utf_16_with_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"\xfe\xff" + CHINESE.encode("utf-16-be"))
    assert "iconv -f utf-16 " in (refused(file).hint or "")
    assert converted(file) == [CHINESE]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_hint_for_text_mostly_beyond_ascii_is_gbk_not_latin_1(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(WRITTEN[suffix](CHINESE).encode("gbk"))
    error = refused(file)
    assert "latin1" not in (error.hint or "")
    assert "GBK" in (error.hint or "")
    assert converted(file) == [CHINESE]


def test_hint_for_few_letters_beyond_ascii_is_latin_1(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(WRITTEN[".jsonl"]("na\u00efve caf\u00e9").encode("latin1"))
    assert (refused(file).hint or "").startswith("if it is Latin-1, convert it: iconv -f latin1 ")
    assert "byte 0xef at offset 12" in str(refused(file))
    assert converted(file) == ["na\u00efve caf\u00e9"]


@pytest.mark.parametrize("text", ["\u91cf\u5316 caf\u00e9", "a", "\ufeffmark inside \ufeff"])
def test_utf_8_is_read_without_change(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text, encoding="utf-8-sig")
    assert list(load_documents(DatasetSource(str(tmp_path / "x.txt"))).texts) == [text]
