"""The columns of rows: their text, and the refusal of rows without it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from gptq_cli.config.corpora import PARAGRAPH
from gptq_cli.errors import InputError

Row = Mapping[str, Any]
Content = Literal["text", "chat", "other"]  # of a column
LISTED = 8  # columns named in a message
MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
NAME_IT = (
    "name the column that holds the text or the chats with --text-column; a chat is a list of "
    '{"role": ..., "content": ...}'
)
KINDS = {  # in the words of JSON
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "a text",
    dict: "an object",
    list: "a list",
}


class LineRow(dict[str, Any]):
    """A row of a file, with the line of the file on which it begins."""

    line: int = 0

    @classmethod
    def of(cls, row: Mapping[str, Any], line: int) -> LineRow:
        """Return `row` with its line."""
        placed = cls(row)
        placed.line = line
        return placed


def row_name(number: int, row: Row) -> str:
    """Return the name of a row for a message: that of its line if the row knows it."""
    if isinstance(row, LineRow):
        return f"line {row.line}"
    return f"row {number}"


def texts_of(rows: Iterable[Row], columns: Sequence[str], label: str) -> Iterator[str]:
    """Yield the strings of `columns`, joined, row by row; `label` is the user's name for the rows.

    Raises InputError: E_DATA_COLUMN at a row without a string, E_DATA_FORMAT at half a letter,
    E_DATA_EMPTY if there is no row.
    """
    number = 0
    for number, row in enumerate(rows, start=1):
        yield PARAGRAPH.join([_text_of(row, number, column, label) for column in columns])
    if number == 0:
        message = f"dataset `{label}` has no rows"
        raise InputError("E_DATA_EMPTY", message, hint="choose a dataset that holds text")


def _text_of(row: Row, number: int, column: str, label: str) -> str:
    name = row_name(number, row)
    if column not in row:
        place = "" if number == 1 else f"{name} of "
        raise no_column(column, row, label, place)
    text = row[column]
    if not isinstance(text, str):
        what = f"of {name} holds {kind_of(text)}, not a string"
        raise no_string(what, column, row, label)
    if not is_whole(text):
        message = f"dataset `{label}`: column `{column}` of {name} holds half of a surrogate pair"
        raise InputError(
            "E_DATA_FORMAT", message, hint="fix that text: half of a pair is not a letter"
        )
    return text


def check_schema(schema: Any, columns: Sequence[str], label: str) -> None:
    """Raise InputError E_DATA_COLUMN if an Arrow schema does not have `columns` as text.

    It is for datasets that have a schema, before a row is read.
    """
    for column in columns:
        if column not in schema.names:
            raise no_column(column, schema.names, label)
        kind = schema.field(column).type
        if _is_text(kind):
            continue
        found = str(kind)
        if _items_of(kind) is not None:
            found = "a list in each row"
        raise no_string(f"holds {found}, not strings", column, schema.names, label)


def columns_of_schema(schema: Any) -> dict[str, Content]:
    """Return the content of each column of an Arrow schema."""
    from pyarrow import types

    columns: dict[str, Content] = {}
    for field in schema:
        columns[field.name] = "other"
        if is_message(_items_of(field.type)):
            columns[field.name] = "chat"
        elif _is_text(field.type) and not types.is_null(field.type):
            columns[field.name] = "text"
    return columns


def columns_of_row(row: Row | None) -> dict[str, Content]:
    """Return the content of each column of a row; none without a row."""
    columns: dict[str, Content] = {}
    for name, value in (row or {}).items():
        columns[name] = "other"
        if isinstance(value, list) and len(value) > 0 and is_message(value[0]):
            columns[name] = "chat"
        elif isinstance(value, str):
            columns[name] = "text"
    return columns


def _is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of text, or null, which is refused at its row."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(test(kind) for test in tests)


def _items_of(kind: Any) -> set[str] | None:
    """Return the names of the fields of a list's items; None for an Arrow type that is no list."""
    from pyarrow import types

    if not types.is_list(kind) and not types.is_large_list(kind):
        return None
    if not types.is_struct(kind.value_type):
        return set()
    return {field.name for field in kind.value_type}


def no_column(column: str, columns: Iterable[str], label: str, place: str = "") -> InputError:
    """Return E_DATA_COLUMN for a column that the dataset, or a `place` in it, does not have."""
    columns = list(columns)
    message = f"{place}dataset `{label}` has no column `{column}`; it has {_listed(columns)}"
    return InputError("E_DATA_COLUMN", message, hint=NAME_IT)


def no_string(what: str, column: str, columns: Iterable[str], label: str) -> InputError:
    """Return E_DATA_COLUMN for a column that holds no strings."""
    others = [name for name in columns if name != column]
    hint = "fix it"
    if others:
        hint = f"fix it, or name another with --text-column: {_listed(others)}"
    return InputError("E_DATA_COLUMN", f"dataset `{label}`: column `{column}` {what}", hint=hint)


def kind_of(value: object) -> str:
    """Return the kind of `value` in the words of JSON."""
    kind = type(value)
    return KINDS.get(kind, f"a {kind.__name__}")


def is_message(fields: object) -> bool:
    """Return whether the fields of an item are those of a chat message."""
    if not isinstance(fields, Collection):
        return False
    return any(keys.issubset(fields) for keys in MESSAGE_KEYS)


def is_whole(text: str) -> bool:
    """Return whether a text has no halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def quoted(columns: Iterable[str]) -> str:
    """Return the names of columns for a message."""
    return ", ".join(f"`{name}`" for name in columns)


def _listed(columns: Sequence[str]) -> str:
    words = [f"`{name}`" for name in columns[:LISTED]]
    if len(columns) > LISTED:
        words.append("...")
    return ", ".join(words)
