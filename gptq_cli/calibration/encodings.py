"""Bytes that should be text in UTF-8: their real encoding, and the command that converts them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gptq_cli.errors import InputError, shell_word

HEAD_BYTES = 65536
PACKED = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".parquet", ".arrow")  # which are not read if they are packed again
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


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Yield the bytes of a file, unpacked if its name ends with .gz or .zst.

    Raises InputError E_DATA_FORMAT if packed bytes are damaged.
    """
    with file.open("rb") as stream:
        if not is_packed(file):
            yield stream
            return
        try:
            with _unpacked(stream, file) as plain:
                yield plain
        except (OSError, EOFError, ValueError) as error:
            kind = PACKED[file.suffix.lower()]
            message = f"dataset `{file}` cannot be read: it is not a whole {kind} file: {error}"
            hint = "make the file again, or fetch it again"
            raise InputError("E_DATA_FORMAT", message, hint=hint) from error


def is_packed(file: Path) -> bool:
    """Return whether the name of a file says that its bytes are compressed."""
    return file.suffix.lower() in PACKED


def suffix_of(file: Path) -> str:
    """Return the suffix of a file's name in small letters: TRAIN.TXT is a text, too.

    A file of text that is packed has the suffix of its content: .jsonl for a.jsonl.gz. Other packed
    files are not read, so they have none.
    """
    suffix = file.suffix.lower()
    if not is_packed(file):
        return suffix
    inner = Path(file.stem).suffix.lower()
    if inner in TABLES:
        return ""
    return inner


def _unpacked(stream: BinaryIO, file: Path) -> BinaryIO:
    if file.suffix.lower() == ".gz":
        from gzip import GzipFile

        return io.BufferedReader(GzipFile(fileobj=stream))
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))


def decoded(file: Path) -> str:
    """Return the text of a file; errors as `decoded_lines`."""
    with opened(file) as stream:
        data = stream.read()
    label = str(file)
    check_start(data[:HEAD_BYTES], label)
    start = len(UTF8_MARK) if data.startswith(UTF8_MARK) else 0
    return _decode(data[start:], label, start)


def decoded_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a file, each with its end.

    Raises InputError: E_DATA_ENCODING for another encoding than UTF-8, E_DATA_FORMAT if it holds no
    text or its packed bytes are damaged.
    """
    label = str(file)
    with opened(file) as stream:
        check_start(stream.read(HEAD_BYTES), label)
    offset = 0
    with opened(file) as stream:
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
    """Return the shell command that writes a copy of the file in UTF-8, unpacked."""
    path = Path(label)
    source = f"iconv -f {encoding} -t utf-8 {shell_word(label)}"
    if is_packed(path):
        unpack = f"{PACKED[path.suffix.lower()]} -dc {shell_word(label)}"
        source = f"{unpack} | iconv -f {encoding} -t utf-8"
        path = path.with_suffix("")
    target = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"{source} > {shell_word(str(target))}"
