"""Chats in rows: their forms, their messages, and the text that a chat template makes of them.

The forms are those of OpenAI (`role`, `content`), ShareGPT (`from`, `value`), TRL (`prompt`,
`completion`) and Alpaca (`instruction`, `input`, `output`). docs/decisions/0026 has the order in
which they are recognised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal

from gptq_cli.calibration.columns import Content, Row, is_whole, kind_of, no_column, row_name
from gptq_cli.errors import InputError
from gptq_cli.files import file_errors, is_file

Message = dict[str, Any]
Kind = Literal["text", "messages", "prompt", "instruction"]
DEFAULT_COLUMN = "text"
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
IMAGE_COLUMNS = ("images", "image")
# Columns that a chat may have besides its own:
BESIDE_CHATS = ("input", "tools", "system", *IMAGE_COLUMNS)
IMAGE_PARTS = ("image", "image_url")
IMAGE_MARK = "<image>"  # the place of an image of IMAGE_COLUMNS in a text
ROLES = {  # of ShareGPT
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# Templates may write the date of today with `strftime_now`. With a fixed date in its place, a run
# that resumes tomorrow has the text of today. transformers passes no functions to a template, so a
# macro replaces the function; it is on the first line and moves no other.
TODAY = datetime(2025, 7, 1)
NOW = "strftime_now"
_PARTS = [f" | replace('%{part}', '{TODAY.strftime('%' + part)}')" for part in "aAbBdHIjmMpSyY"]
FIXED_DATE = f"{{% macro {NOW}(format) %}}{{{{ format{''.join(_PARTS)} }}}}{{% endmacro +%}}"
IN_TEMPLATE = ("<template>", "<unknown>")  # jinja2's names for a template without a file
FIX_TEMPLATE = "fix the template, or give another one with --chat-template FILE"
TEXT_ONLY = "give chats or text without images"
FIX_CHAT = (
    'write each chat as {"messages": [{"role": "user", "content": "..."}, ...]}, or name a column '
    "of text with --text-column"
)


class ImagesFoundError(InputError):
    """A chat has images, but the template makes text only."""


@dataclass(frozen=True, slots=True)
class Form:
    """The columns in which each row must hold its text or its chat.

    `beside` are columns of chats that are not read because there is a column `text`.
    """

    kind: Kind
    columns: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Return whether a chat template has to make text of the rows."""
        return self.kind != "text"


def form_of(columns: Mapping[str, Content], named: Sequence[str]) -> Form:
    """Return the form of rows with the content of these `columns`.

    `named` are the columns that the user named; without one, the columns decide: a column `text`,
    else chats, else the only column of text. If nothing is recognised, the form is that of a column
    `text`.
    """
    if len(named) == 1 and columns.get(named[0]) == "chat":
        return Form("messages", (named[0],))
    if named:
        return Form("text", tuple(named))
    chat = _form_of_chat(columns)
    if DEFAULT_COLUMN not in columns:
        return chat or _form_of_text(columns)
    if columns[DEFAULT_COLUMN] == "chat":
        return Form("messages", (DEFAULT_COLUMN,))
    if chat is not None:
        return Form("text", (DEFAULT_COLUMN,), chat.columns)
    return Form("text", (DEFAULT_COLUMN,))


def _form_of_text(columns: Mapping[str, Content]) -> Form:
    """Return the form of the only column of text, or that of a column `text`."""
    texts = [name for name, content in columns.items() if content == "text"]
    if len(texts) == 1:
        return Form("text", (texts[0],))
    return Form("text", (DEFAULT_COLUMN,))


def _form_of_chat(columns: Mapping[str, Content]) -> Form | None:
    """Return the form of the chats that the columns show, None if they show none."""
    for name in CHAT_COLUMNS:
        if columns.get(name) == "chat":
            return Form("messages", (name,))
    if "prompt" in columns and "completion" in columns:
        return Form("prompt", ("prompt", "completion"))
    if "instruction" in columns and "output" in columns:
        return Form("instruction", ("instruction", "output"))
    return None


@dataclass(slots=True)
class ChatTemplate:
    """The template that makes text of chats; it counts the chats that it has `rendered`.

    `file` is that of --chat-template, None if the template is that of the `tokenizer`, whose files
    lie in `directory`.
    """

    tokenizer: Any = None
    directory: Path = Path()
    file: Path | None = None
    rendered: int = 0
    _text: str | None = None

    @property
    def text(self) -> str | None:
        """The text of `file`, read once; None without one. Raises the errors of `read_template`."""
        if self._text is None and self.file is not None:
            self._text = read_template(self.file)
        return self._text

    @property
    def exists(self) -> bool:
        """Whether the user gave a template or the tokenizer has one."""
        return self.text is not None or getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def sha256(self) -> str | None:
        """The hash of a template that the user gave, None for the tokenizer's own."""
        if self.text is None:
            return None
        return sha256(self.text.encode()).hexdigest()

    @property
    def summary(self) -> str:
        """A few words for the user about the chats that were rendered."""
        noun = "chat"
        if self.rendered != 1:
            noun = "chats"
        origin = "the model's chat template"
        if self.file is not None:
            origin = f"the chat template {self.file}"
        return f"{self.rendered} {noun}, rendered with {origin}"

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        place: str,
        *,
        answer: bool = False,
    ) -> str:
        """Return the text of a chat with the special tokens of the template, and count the chat.

        With `answer` it ends where the model begins to answer. Raises InputError E_DATA_TEMPLATE if
        there is no template or if it fails; `place` names the row of the chat.
        """
        text = self.text_of(messages, tools, place, answer=answer)
        self.rendered += 1
        return text

    def text_of(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        place: str,
        *,
        answer: bool = False,
    ) -> str:
        """Return the text as `render` does, but count no chat."""
        if not self.exists:
            raise InputError(
                "E_DATA_TEMPLATE",
                f"{place} holds a chat, but the model has no chat template",
                hint="give one with --chat-template FILE, such as the chat_template.jinja of the "
                "model's instruct version, or name a column of text with --text-column",
            )
        try:
            template = self.text or self._own_template(tools)
            if NOW in template:
                template = FIXED_DATE + template
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                add_generation_prompt=answer,
                tokenize=False,
            )
        except Exception as error:
            raise self._failure(error, place) from error
        return text

    def render_with_images(self, chat: ChatRow) -> str:
        """Return the text of a chat with images.

        Raises ImagesFoundError, because this template makes text only.
        """
        only = "only the calibration of `gptq quantize` reads images"
        raise ImagesFoundError(
            "E_DATA_IMAGE", f"{chat.place} holds an image, but {only}", hint=TEXT_ONLY
        )

    def _own_template(self, tools: list[Any] | None) -> str:
        template: str = self.tokenizer.get_chat_template(tools=tools)
        return template

    def _failure(self, error: Exception, place: str) -> InputError:
        where = self._name()
        line = _line_of(error)
        if line is not None:
            where += f", line {line}"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"chat template {where}, fails at {place}: {reason}"
        return InputError("E_DATA_TEMPLATE", message, hint=FIX_TEMPLATE)

    def _name(self) -> str:
        """Return the file of the template in the words of a message."""
        if self.file is not None:
            return f"`{self.file}`"
        own = self.directory / "chat_template.jinja"
        if own.is_file():
            return f"`{own}`"
        return f"in `{self.directory / 'tokenizer_config.json'}`"


def read_template(file: Path) -> str:
    """Return the template in `file`; InputError E_DATA_TEMPLATE if there is none."""
    if not is_file(file):
        hint = "give the path of a Jinja file, such as chat_template.jinja"
        raise InputError("E_DATA_TEMPLATE", f"chat template `{file}` is not a file", hint=hint)
    with file_errors(file, writing=False):
        content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"chat template `{file}` is not UTF-8: {error.reason} at offset {error.start}"
        raise InputError("E_DATA_TEMPLATE", message, hint="save it as UTF-8") from error
    if not text.strip():
        hint = "give a file that holds a Jinja template"
        raise InputError("E_DATA_TEMPLATE", f"chat template `{file}` is empty", hint=hint)
    return text


def _line_of(error: Exception) -> int | None:
    """Return the line of a template at which it is wrong or has failed, if that is known."""
    line = getattr(error, "lineno", None)
    if isinstance(line, int):
        return line
    for frame in extract_tb(error.__traceback__):
        if frame.filename in IN_TEMPLATE:
            line = frame.lineno
    return line


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A chat and its `place` in the words of a message.

    The content of a message is a text, or a list of parts. `images` are those in columns of the
    row. Paths are relative to `folder`.
    """

    messages: list[Message]
    tools: list[Any] | None
    images: list[Any]
    place: str
    folder: Path

    @property
    def has_images(self) -> bool:
        """Whether there is an image, in a column or in a message."""
        if self.images:
            return True
        return any(isinstance(message.get("content"), list) for message in self.messages)


class ChatText(str):
    """The text that `template` made of `chat`."""

    chat: ChatRow
    template: ChatTemplate

    @classmethod
    def of(cls, text: str, chat: ChatRow, template: ChatTemplate) -> ChatText:
        """Return `text` with the chat and the template of which it is made."""
        made = cls(text)
        made.chat, made.template = chat, template
        return made

    def later(self) -> Iterator[str]:
        """Yield the text of the chat from each later turn on with which a chat can begin.

        The template makes each text, so it begins as every chat does. A turn is left out if the
        template fails for a chat that begins with it.
        """
        for messages in _later(self.chat.messages):
            try:
                yield self.template.text_of(messages, self.chat.tools, self.chat.place)
            except InputError:
                continue


def _later(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages from each later turn on with which a chat can begin.

    Such a turn is one of the user, or one of the assistant that follows the result of a tool; the
    turn of the user that it answers stays before it. Turns of the system stay at the beginning.
    """
    system = list(takewhile(_is_system, messages))
    turns = messages[len(system) :]
    asked = turns[:1]
    for index in range(1, len(turns)):
        roles = (turns[index - 1]["role"], turns[index]["role"])
        if roles[1] == "user":
            asked = [turns[index]]
            yield system + turns[index:]
        elif roles == ("tool", "assistant"):
            yield system + asked + turns[index:]


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def rendered_chats(
    rows: Iterable[Row], form: Form, label: str, template: ChatTemplate
) -> Iterator[str]:
    """Yield the text of the chat in each row: a `ChatText` if the chat has no images.

    `label` is the user's name for the dataset. Raises InputError: E_DATA_COLUMN at a row that lacks
    a column of the form, E_DATA_CHAT at one that holds no chat, E_DATA_TEMPLATE, E_DATA_IMAGE,
    E_DATA_FORMAT at half a letter.
    """
    for number, row in enumerate(rows, start=1):
        name = row_name(number, row)
        for column in form.columns:
            if column not in row:
                raise no_column(column, row, label, f"{name} of ")
        place = f"{name} of dataset `{label}`"
        try:
            messages, tools = _messages_of(row, form), _tools_of(row)
        except _NoChatError as flaw:
            message = f"{place} holds no chat: {flaw}"
            raise InputError("E_DATA_CHAT", message, hint=FIX_CHAT) from flaw
        chat = ChatRow(messages, tools, _images_of(row), place, Path(label).parent)
        if chat.has_images:
            text = template.render_with_images(chat)
        else:
            text = ChatText.of(template.render(messages, tools, place), chat, template)
        check_whole(text, place)
        yield text


def check_whole(text: str, place: str) -> None:
    """Raise InputError E_DATA_FORMAT for a text with half a letter; `place` names the text."""
    if not is_whole(text):
        message = f"{place} holds half of a surrogate pair"
        hint = "fix that text: half of a pair is not a letter"
        raise InputError("E_DATA_FORMAT", message, hint=hint)


class _NoChatError(Exception):
    """A row holds no chat; the text is the reason."""


def _messages_of(row: Row, form: Form) -> list[Message]:
    """Return the messages of a row, with the turn in its column `system` before them."""
    if form.kind == "messages":
        messages = _turns(row, form.columns[0])
    elif form.kind == "prompt":
        messages = _side(row, "prompt", "user") + _side(row, "completion", "assistant")
    else:
        messages = _side(row, "instruction", "user") + _side(row, "output", "assistant")
        if row.get("input"):
            messages[0]["content"] += "\n" + _string(row, "input")
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _string(row, "system")})
    return messages


def _string(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise _NoChatError(f"column `{column}` holds {kind_of(text)}, not a string")
    return text


def _side(row: Row, column: str, role: str) -> list[Message]:
    """Return the messages of one side of a chat: a string, or messages if it is a prompt."""
    if isinstance(row[column], list) and column in ("prompt", "completion"):
        return _turns(row, column)
    return [{"role": role, "content": _string(row, column)}]


def _turns(row: Row, column: str) -> list[Message]:
    items = row[column]
    if not isinstance(items, list):
        raise _NoChatError(f"column `{column}` holds {kind_of(items)}, not a list of messages")
    if not items:
        raise _NoChatError(f"column `{column}` is an empty list")
    return [_turn(item, f"message {number}") for number, item in enumerate(items, start=1)]


def _turn(item: object, name: str) -> Message:
    """Return a message with `role` and all other keys that hold something."""
    if not isinstance(item, dict):
        raise _NoChatError(f"{name} is {kind_of(item)}, not an object")
    # A schema gives each message the keys of all messages.
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if speaker not in ROLES:
            raise _NoChatError(f"{name} is from {speaker!r}; known are {', '.join(ROLES)}")
        message["role"] = ROLES[speaker]
        message["content"] = message.pop("value", None)
    if not isinstance(message.get("role"), str):
        raise _NoChatError(f"{name} has no `role` that is a string")
    if "tool_calls" in message:
        message["tool_calls"] = _with_parsed_arguments(message["tool_calls"], name)
        if message.get("content") is None:
            return message
    message["content"] = _content(message.get("content"), name)
    return message


def _content(content: object, name: str) -> str | list[Message]:
    """Return the content of a message: a text, or a list of parts if there is an image in it.

    A list of texts becomes one text, as in vLLM.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _NoChatError(f"{name} has {kind_of(content)} as its content, not a string")
    parts = [_part(part, name) for part in content]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join([part["text"] for part in parts])


def _part(part: object, name: str) -> Message:
    """Return a part of a message: a text, or an `image`, None if a column of the row holds it."""
    if not isinstance(part, dict):
        raise _NoChatError(f"{name} has {kind_of(part)} as a part of its content, not an object")
    if part.get("type") in IMAGE_PARTS:
        return {"type": "image", "image": _image_in(part)}
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _NoChatError(f"{name} has a part that is neither a text nor an image")
    return {"type": "text", "text": part["text"]}


def _image_in(part: Mapping[str, Any]) -> Any:
    """Return what a part says about its image: a path, a URL or bytes; None if it says nothing."""
    for key in ("image", "path", "url", "image_url"):
        value = part.get(key)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is not None:
            return value
    return None


def _images_of(row: Row) -> list[Any]:
    """Return the images in the columns of a row."""
    for column in IMAGE_COLUMNS:
        images = row.get(column)
        if isinstance(images, list):
            return images
        if images is not None:
            return [images]
    return []


def _with_parsed_arguments(calls: object, name: str) -> list[Any]:
    """Return tool calls with their arguments as an object, which templates expect.

    OpenAI's API writes the arguments as JSON in a string.
    """
    if not isinstance(calls, list):
        raise _NoChatError(f"{name} has {kind_of(calls)} as its `tool_calls`, not a list")
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = _json(function["arguments"], f"{name} has a string of arguments")
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return parsed


def _tools_of(row: Row) -> list[Any] | None:
    """Return the tools of a chat: a list, or JSON in a string, which keeps a schema simple."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "column `tools` holds a string")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise _NoChatError(f"column `tools` holds {kind_of(tools)}, not a list")
    return tools


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _NoChatError(f"{what} that is not JSON: {error}") from error
