"""Strict YAML: every value means the same to every reader and comes with its place in the file.

PyYAML reads YAML 1.1, where `no` is false, `010` is 8, `1e-3` is a text and the last of two equal
keys wins. Here the scalars follow the core schema of YAML 1.2.2 (section 10.3.2), and duplicate
keys, anchors, tags and tabs are refused. JSON is YAML in flow style and takes the same path.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gptq_cli.errors import ConfigError, KeyPath, Location, Problem
from gptq_cli.files import advice, hint_at_near

MAX_BYTES = 10**6
MAX_DEPTH = 64
MAX_DIGITS = 1000

CORE_SCHEMA: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), "~nN"),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
    ),
)

# PyYAML's words for the usual mistakes -> a message and a hint.
SYNTAX: dict[str, tuple[str, str]] = {
    r"'\t'": ("a tab cannot indent or separate in YAML", "use spaces"),
    "single document": (
        "a second document begins here",
        "one configuration is one document: remove the `---`",
    ),
    "mapping values are not allowed": (
        "a key cannot stand here",
        "check the indentation; put text with `: ` in quotes",
    ),
    "unknown escape character": (
        "this is not an escape inside double quotes",
        "put the text in single quotes",
    ),
    "cannot start any token": (
        "this character cannot begin a value",
        "put the text in single quotes",
    ),
}


@dataclass(frozen=True, slots=True)
class Place:
    """The locations of a key and its value; an item of a list is its own key."""

    key: Location
    value: Location


@dataclass(frozen=True, slots=True)
class Document:
    """The mapping in a file, the place of every value, and the problems of its YAML."""

    values: dict[str, Any]
    places: dict[KeyPath, Place]
    problems: tuple[Problem, ...]


def load(path: Path) -> Document:
    """Return the mapping in the YAML or JSON file `path`.

    Problems that do not stop the reading (duplicate keys, anchors, tags) come with the document. A
    file that cannot be read or parsed raises ConfigError with E_CFG_FILE or E_CFG_YAML.
    """
    return parse(_read(path), str(path))


def parse(data: bytes, name: str) -> Document:
    """Return the mapping in the bytes of a file called `name` in messages; errors as `load`."""
    text = _decode(data, name)
    if "\t" in text and _is_json(text):
        text = text.replace("\t", " ")  # JSON may indent with tabs and has none inside its texts
    root, problems = _compose(text, name)
    if not isinstance(root, MappingNode):
        raise ConfigError(
            "E_CFG_YAML",
            "a configuration is a mapping of settings",
            hint="write one setting a line, like `bits: 4`",
            location=Location(name, 1, 1),
        )
    reader = _Reader(name, problems)
    values = reader.value(root, ())
    return Document(values, reader.places, tuple(reader.problems))


def parse_scalar(text: str) -> Any:
    """Return the value that a file would hold in `text`: `4`, `true`, `{bits: 8}`.

    Plain text stays unchanged, with `#`.
    """
    try:
        document = parse(b"value: " + text.encode(), "")
    except (ConfigError, UnicodeEncodeError):
        return text
    if document.problems or set(document.values) != {"value"}:
        return text
    value = document.values["value"]
    is_quoted = text.startswith(("'", '"'))
    if isinstance(value, str) and not is_quoted:
        return text
    return value


def _compose(text: str, name: str) -> tuple[Node | None, list[Problem]]:
    """Return the root of the nodes in `text`, and the problems that do not stop the reading."""
    try:
        composer = _Composer(text, name)
        return composer.get_single_node(), composer.problems
    except yaml.MarkedYAMLError as error:
        raise ConfigError.of([_syntax(error, name)]) from None
    except yaml.reader.ReaderError as error:
        letter = f"U+{ord(text[error.position]):04X}"
        raise ConfigError(
            "E_CFG_YAML",
            f"the character {letter} is not allowed in YAML",
            location=_end_of(text[: error.position], name),
        ) from None


def _end_of(text: str, name: str) -> Location:
    """Return the location of the character that follows `text`."""
    return Location(name, text.count("\n") + 1, len(text) - text.rfind("\n"))


def _read(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError(
                "E_CFG_FILE",
                f"{path} is {kind}, but a configuration is a YAML or JSON file",
                hint="name a file in it, or a recipe: `gptq recipes` lists them",
            )
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot read the configuration {path}: {reason}"
        hint = advice(error, path)
        if isinstance(error, FileNotFoundError):
            hint = hint_at_near(path) or hint
        raise ConfigError("E_CFG_FILE", message, hint=hint) from None
    except ValueError as error:  # a NUL in its name
        raise ConfigError("E_CFG_FILE", f"cannot read the configuration {path}: {error}") from None
    if len(data) > MAX_BYTES:
        hint = "put calibration text into a file of its own and name it in dataset"
        raise ConfigError("E_CFG_YAML", f"{path} is larger than {MAX_BYTES // 10**6} MB", hint=hint)
    return data


def _decode(data: bytes, name: str) -> str:
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        hint = "save the file as UTF-8 without BOM"
        raise ConfigError(
            "E_CFG_YAML",
            "the file begins with a byte order mark",
            hint=hint,
            location=Location(name, 1, 1),
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "E_CFG_YAML",
            f"the byte 0x{data[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
            location=_end_of(data[: error.start].decode("utf-8"), name),
        ) from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _at(name: str, mark: yaml.Mark) -> Location:
    return Location(name, mark.line + 1, mark.column + 1)


def _syntax(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    raw = f"{error.context or ''} {error.problem or 'cannot be parsed'}".strip()
    location = _at(name, mark) if mark else None
    for part, (message, hint) in SYNTAX.items():
        if part in raw:
            return Problem("E_CFG_YAML", message, hint, location)
    return Problem("E_CFG_YAML", raw, None, location)


class _Resolver(yaml.resolver.BaseResolver):
    """Tags by the YAML 1.2 core schema."""


for _tag, _pattern, _first in CORE_SCHEMA:
    # An empty value has no first letter; it is a null.
    _letters = [*_first, ""] if _tag == "null" else [*_first]
    _Resolver.add_implicit_resolver(_tag, _pattern, _letters)


class _Composer(
    yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer, _Resolver
):
    """PyYAML's node graph, limited to a tree of plain values."""

    def __init__(self, text: str, name: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        _Resolver.__init__(self)
        self.problems: list[Problem] = []
        self._file = name
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        start, end = event.start_mark, event.end_mark
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self._refuse(event, f"the alias *{event.anchor} is not allowed", "write the value out")
            return ScalarNode("null", "", start, end)
        if event.anchor is not None:
            self._refuse(
                event,
                f"the anchor &{event.anchor} is not allowed",
                "write the value out where it is used",
            )
            event.anchor = None
        if event.tag is not None:
            self._refuse(event, f"the tag {event.tag} is not allowed", "write a plain value")
            event.tag = None
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_DEPTH} levels deep", problem_mark=start
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, event: Any, message: str, hint: str) -> None:
        self.problems.append(
            Problem("E_CFG_YAML", message, hint, _at(self._file, event.start_mark))
        )


class _Reader:
    """The reader that makes Python values from nodes and collects their places."""

    def __init__(self, name: str, problems: list[Problem]) -> None:
        self.places: dict[KeyPath, Place] = {}
        self.problems = problems
        self._name = name

    def value(self, node: Node, path: KeyPath) -> Any:
        if isinstance(node, MappingNode):
            return {key: self.value(child, (*path, key)) for key, child in self._items(node, path)}
        if isinstance(node, SequenceNode):
            items = []
            for index, child in enumerate(node.value):
                at = _at(self._name, child.start_mark)
                self.places[(*path, index)] = Place(at, at)
                items.append(self.value(child, (*path, index)))
            return items
        return self._scalar(node)

    def _items(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[str, Node]]:
        for key_node, child in node.value:
            place = Place(_at(self._name, key_node.start_mark), _at(self._name, child.start_mark))
            if not isinstance(key_node, ScalarNode):
                self._refuse("a key must be a word", None, place.key)
                continue
            key = self._scalar(key_node)
            if not isinstance(key, str):
                self._refuse(
                    f"the key {key_node.value} is not a text", "put it in quotes", place.key
                )
                continue
            first = self.places.setdefault((*path, key), place)
            if first is place:
                yield key, child
            else:
                self._refuse(
                    f"{key} is given twice, first in {first.key}", "keep one of them", place.key
                )

    def _scalar(self, node: Node) -> Any:
        try:
            return _CONSTRUCT.get(node.tag, _text)(node.value)
        except ValueError as error:
            self._refuse(str(error), None, _at(self._name, node.start_mark))
            return None

    def _refuse(self, message: str, hint: str | None, at: Location) -> None:
        self.problems.append(Problem("E_CFG_YAML", message, hint, at))


def _whole(word: str) -> int:
    if len(word) > MAX_DIGITS:
        raise ValueError(f"a number of {len(word)} digits is not allowed")
    base = {"0o": 8, "0x": 16}.get(word[:2], 10)
    return int(word, base)


def _real(word: str) -> float:
    return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _text(text: str) -> str:
    try:
        # JSON writes one emoji as two escapes.
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        if _names_a_file(text):
            return text
        raise ValueError("a text holds half of a surrogate pair") from None


def _names_a_file(text: str) -> bool:
    """Return whether the halves in `text` are bytes of a file's name that is not UTF-8.

    Python holds them as halves of surrogate pairs (`surrogateescape`).
    """
    try:
        return bool(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


_CONSTRUCT: dict[str, Any] = {
    "null": lambda _: None,
    "bool": lambda word: word.lower() == "true",
    "int": _whole,
    "float": _real,
}
