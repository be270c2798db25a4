"""Bytes that should be text in UTF-8: their real encoding, and the command that converts them."""

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
UNMARKED = {"utf-32le": 4, "utf-32be": 4, "utf-16le": 2, "utf-16be": 2}  # bytes of a letter
READABLE_SHARE = 0.7  # the least share of ASCII letters if NULs come from an encoding
WESTERN_SHARE = 0.3  # the largest share of bytes beyond ASCII in Latin-1 text of any language


def decoded(file: Path) -> str:
    """Return the text of a file; errors as `decoded_lines`."""
    data = file.read_bytes()
    label = str(file)
    check_start(data[:HEAD_BYTES], label)
    start = len(UTF8_MARK) if data.startswith(UTF8_MARK) else 0
    return _decode(data[start:], label, start)


def decoded_lines(stream: BinaryIO, label: str) -> Iterator[str]:
    """Yield the lines of a file, each with its end; `label` is the user's name for it.

    Raises InputError: E_DATA_ENCODING for another encoding than UTF-8, E_DATA_FORMAT if it holds no
    text.
    """
    check_start(stream.read(HEAD_BYTES), label)
    stream.seek(0)
    offset = 0
    for line in stream:
        start = len(UTF8_MARK) if offset == 0 and line.startswith(UTF8_MARK) else 0
        yield _decode(line[start:], label, offset + start)
        offset += len(line)


def check_start(data: bytes, label: str) -> None:
    """Raise E_DATA_ENCODING if the first bytes are UTF-16 or UTF-32, with a mark or without."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise _other_encoding(encoding, label)
    if b"\0" not in data:
        return
    for encoding in UNMARKED:
        if _is_readable(data, encoding):
            raise _other_encoding(encoding, label)


def _encoding_refusal(label: str, data: bytes, start: int, offset: int) -> InputError:
    """Return E_DATA_ENCODING for the byte data[start], which stands at `offset` in the file."""
    message = f"dataset `{label}` is not UTF-8: byte 0x{data[start]:02x} at offset {offset}"
    sample = data[:HEAD_BYTES]
    if sum(byte >= 0x80 for byte in sample) < WESTERN_SHARE * len(sample):
        hint = f"if it is Latin-1, convert it: {_command('latin1', label)}"
    else:
        command = _command("gb18030", label)
        hint = f"find out its encoding and convert it, from GBK for example: {command}"
    return InputError("E_DATA_ENCODING", message, hint=hint)


def _is_readable(data: bytes, encoding: str) -> bool:
    """Return whether most letters of the bytes are ASCII in an encoding."""
    readable = 0
    for letter in data.decode(encoding, "ignore"):
        if letter.isascii() and (letter.isprintable() or letter.isspace()):
            readable += 1
    return readable > READABLE_SHARE * len(data) / UNMARKED[encoding]


def _decode(data: bytes, label: str, offset: int) -> str:
    if b"\0" in data:
        message = (
            f"dataset `{label}` is not text: it holds a NUL byte at offset {offset + data.index(0)}"
        )
        raise InputError("E_DATA_FORMAT", message, hint="choose a file that holds text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _encoding_refusal(label, data, error.start, offset + error.start) from error


def _other_encoding(encoding: str, label: str) -> InputError:
    message = f"dataset `{label}` is {encoding[:6].upper()}, not UTF-8"
    return InputError("E_DATA_ENCODING", message, hint=f"convert it: {_command(encoding, label)}")


def _command(encoding: str, label: str) -> str:
    path = Path(label)
    target = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t utf-8 {shell_word(label)} > {shell_word(str(target))}"
