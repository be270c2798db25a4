"""The column of texts among the columns of rows, and how rows without one are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from gptq_cli.errors import InputError

Row = Mapping[str, Any]
LISTED = 8  # columns named in a message
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
RENDER = (
    "chat messages have to become text first: render each chat with the apply_chat_template of the model's "
    "tokenizer, and write the results into a .jsonl file, as column `text`"
)
NAME_IT = "name the column that holds the text with --text-column"
KINDS = {
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "a text",
    dict: "an object",
}


def texts_of(rows: Iterable[Row], column: str, label: str) -> Iterator[str]:
    """The strings of `column`, row by row; `label` is what the user called the dataset.

    InputError E_DATA_COLUMN at a row without a string, E_DATA_FORMAT at half a letter, E_DATA_EMPTY without a row.
    """
    number = 0
    for number, row in enumerate(rows, start=1):
        if column not in row:
            raise no_column(column, row, label, "" if number == 1 else f"row {number} of ")
        text = row[column]
        if not isinstance(text, str):
            chat = isinstance(text, list) and bool(text) and is_message(text[0])
            found = f"{kind_of(text)}{' of chat messages' if chat else ''}"
            raise no_string(
                f"of row {number} holds {found}, not a string", column, row, label, chat=chat
            )
        if not _is_whole(text):
            message = f"dataset `{label}`: column `{column}` of row {number} holds half of a surrogate pair"
            raise InputError(
                "E_DATA_FORMAT", message, hint="fix that text: half a pair is no letter"
            )
        yield text
    if number == 0:
        raise InputError(
            "E_DATA_EMPTY",
            f"dataset `{label}` has no rows",
            hint="choose a dataset that holds text",
        )


def check_schema(schema: Any, column: str, label: str) -> None:
    """Refuse by a schema of Arrow, before a row is read: InputError E_DATA_COLUMN without `column` as text."""
    from pyarrow import types

    if column not in schema.names:
        raise no_column(column, schema.names, label)
    kind = schema.field(column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if (
        types.is_string(value)
        or types.is_large_string(value)
        or types.is_string_view(value)
        or types.is_null(value)
    ):
        return  # a null is told with its row
    is_list = types.is_list(kind) or types.is_large_list(kind)
    fields = (
        {field.name for field in kind.value_type}
        if is_list and types.is_struct(kind.value_type)
        else set()
    )
    chat = is_message(fields)
    found = f"a list{' of chat messages' if chat else ''} in each row" if is_list else str(kind)
    raise no_string(f"holds {found}, not strings", column, schema.names, label, chat=chat)


def no_column(column: str, columns: Iterable[str], label: str, place: str = "") -> InputError:
    """E_DATA_COLUMN for a column that is not among `columns`, of the dataset or of a `place` in it."""
    columns = list(columns)
    message = f"{place}dataset `{label}` has no column `{column}`; it has {_listed(columns)}"
    chat = next((name for name in columns if name in CHAT_COLUMNS), None)
    return InputError(
        "E_DATA_COLUMN",
        message,
        hint=f"{NAME_IT}; if `{chat}` holds chats: {RENDER}" if chat else NAME_IT,
    )


def no_string(
    what: str, column: str, columns: Iterable[str], label: str, *, chat: bool
) -> InputError:
    """E_DATA_COLUMN for a column that holds something else than strings; `chat` if those are messages."""
    message = f"dataset `{label}`: column `{column}` {what}"
    others = [name for name in columns if name != column]
    hint = f"fix it, or name another with --text-column: {_listed(others)}" if others else "fix it"
    return InputError("E_DATA_COLUMN", message, hint=RENDER if chat else hint)


def kind_of(value: object) -> str:
    """The kind of `value` in the words of JSON."""
    return (
        "a list" if isinstance(value, list) else KINDS.get(type(value), f"a {type(value).__name__}")
    )


def is_message(fields: object) -> bool:
    """Whether the fields of an item are those of a chat message."""
    return isinstance(fields, Collection) and any(keys.issubset(fields) for keys in MESSAGE_KEYS)


def _is_whole(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _listed(columns: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in columns[:LISTED]) + (
        ", ..." if len(columns) > LISTED else ""
    )
