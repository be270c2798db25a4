"""Bytes that should be text in UTF-8: what they are instead, and the command that converts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gptq_cli.errors import InputError
from gptq_cli.shell import shell_word

HEAD_BYTES = 65536
UTF8_MARK = b"\xef\xbb\xbf"
MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
UNMARKED = {"utf-32le": 4, "utf-32be": 4, "utf-16le": 2, "utf-16be": 2}  # and the bytes of a letter
READABLE_SHARE = 0.7  # of the letters are ASCII, where NULs come from an encoding
WESTERN_SHARE = 0.3  # of the bytes are beyond ASCII at most, in Latin-1 text of any language


def decoded(file: Path) -> str:
    """The text of a file; InputError as `decoded_lines` says."""
    data = file.read_bytes()
    label = str(file)
    check_start(data[:HEAD_BYTES], label)
    start = len(UTF8_MARK) if data.startswith(UTF8_MARK) else 0
    return _decode(data[start:], label, start)


def decoded_lines(stream: BinaryIO, label: str) -> Iterator[str]:
    """The lines of a file, each with its end; `label` is what the user called it.

    InputError E_DATA_ENCODING for another encoding than UTF-8, E_DATA_FORMAT for what is no text.
    """
    check_start(stream.read(HEAD_BYTES), label)
    stream.seek(0)
    offset = 0
    for line in stream:
        start = len(UTF8_MARK) if offset == 0 and line.startswith(UTF8_MARK) else 0
        yield _decode(line[start:], label, offset + start)
        offset += len(line)


def check_start(data: bytes, label: str) -> None:
    """Refuse a file whose first bytes are UTF-16 or UTF-32, with a byte order mark or without."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise _other_encoding(encoding, label)
    for encoding in UNMARKED if b"\0" in data else ():
        if _is_readable(data, encoding):
            raise _other_encoding(encoding, label)


def encoding_refusal(label: str, data: bytes, start: int, offset: int | None) -> InputError:
    """E_DATA_ENCODING with the first byte of `data` that is not UTF-8, and its `offset` in the file if it is known."""
    place = "" if offset is None else f" at offset {offset}"
    message = f"dataset `{label}` is not UTF-8: byte 0x{data[start]:02x}{place}"
    sample = data[:HEAD_BYTES]
    if sum(byte >= 0x80 for byte in sample) < WESTERN_SHARE * len(sample):
        hint = f"if it is Latin-1, convert it: {_command('latin1', label)}"
    else:
        hint = f"find out its encoding and convert it, from GBK for example: {_command('gb18030', label)}"
    return InputError("E_DATA_ENCODING", message, hint=hint)


def _is_readable(data: bytes, encoding: str) -> bool:
    text = data.decode(encoding, "ignore")
    readable = sum(
        letter.isascii() and (letter.isprintable() or letter.isspace()) for letter in text
    )
    return readable > READABLE_SHARE * len(data) / UNMARKED[encoding]


def _decode(data: bytes, label: str, offset: int) -> str:
    if b"\0" in data:
        message = (
            f"dataset `{label}` is no text: it holds a NUL byte at offset {offset + data.index(0)}"
        )
        raise InputError("E_DATA_FORMAT", message, hint="choose a file that holds text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise encoding_refusal(label, data, error.start, offset + error.start) from error


def _other_encoding(encoding: str, label: str) -> InputError:
    message = f"dataset `{label}` is {encoding[:6].upper()}, not UTF-8"
    return InputError("E_DATA_ENCODING", message, hint=f"convert it: {_command(encoding, label)}")


def _command(encoding: str, label: str) -> str:
    path = Path(label)
    target = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t utf-8 {shell_word(label)} > {shell_word(str(target))}"
