"""A model of a disk after a power cut: names and bytes that were not yet synced may be lost.

The model is harsher than most file systems. Each name that was made, renamed or removed since the
last sync of its directory may be lost or kept, in any combination; each file with unsynced bytes
may have all of them, none, or half. A rename is one change even between two directories.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tests.disks import CountingDisk

Forgets = Callable[[Path], bool]
State = dict[str, bytes | None]  # what is at each path; None for a directory
ALL = 200  # combinations up to which every one is taken
SAMPLED = 40


@dataclass(eq=False)
class Node:
    """A file with its bytes or a directory with its names, for processes and on the disk."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    names: dict[str, Node] | None = None

    @classmethod
    def directory(cls) -> Node:
        return cls(names={})


Change = tuple[Node, str, Node | None]  # directory, name, what it names from now on (None: nothing)


class PowerLossDisk(CountingDisk):
    """A disk that works below `root` and calls `watch` after each operation.

    `watch` looks at the states after a power cut. An fsync does nothing for paths for which
    `forgets` returns True: this checks the check.
    """

    def __init__(
        self, root: Path, watch: Callable[[PowerLossDisk], None], forgets: Forgets
    ) -> None:
        super().__init__()
        self._path, self._watch, self._forgets = root, watch, forgets
        self._root = Node.directory()
        self._pending: list[list[Change]] = []
        self._files: dict[int, tuple[Path, Node]] = {}
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                node = Node.directory()
            else:
                node = Node(bytearray(path.read_bytes()), path.read_bytes())
            parent, name = self._parent(path)
            parent.names[name] = node  # type: ignore[index]
        self._durable: dict[Node, dict[str, Node]] = {}
        self._remember(self._root)

    def states(self) -> Iterator[State]:
        """Yield all states of the disk, or the extremes and a sample if there are too many."""
        dirty = [
            file
            for file in self._reachable()
            if file.names is None and bytes(file.content) != file.durable
        ]
        choices = [(False, True)] * len(self._pending) + [("none", "all", "half")] * len(dirty)
        n_changes = len(self._pending)
        for chosen in _combinations(choices):
            bytes_of = {id(file): how for file, how in zip(dirty, chosen[n_changes:], strict=True)}
            names = {node: dict(found) for node, found in self._durable.items()}
            for kept, changes in zip(chosen[:n_changes], self._pending, strict=True):
                for directory, name, node in changes if kept else ():
                    _apply(names.setdefault(directory, {}), name, node)
            yield dict(_walk(self._root, "", names, bytes_of))

    def after(self, number: int, name: str) -> None:
        del number, name
        self._watch(self)

    def _remember(self, directory: Node) -> None:
        assert directory.names is not None
        self._durable[directory] = dict(directory.names)
        for node in directory.names.values():
            if node.names is not None:
                self._remember(node)

    def _reachable(self) -> set[Node]:
        found = {self._root}
        waiting = [self._root]
        while waiting:
            directory = waiting.pop()
            there = list((directory.names or {}).values()) + list(
                self._durable.get(directory, {}).values()
            )
            fresh = set(there) - found
            found |= fresh
            waiting += [node for node in fresh if node.names is not None]
        return found

    def _parent(self, path: Path) -> tuple[Node, str]:
        node = self._root
        *folders, name = path.relative_to(self._path).parts
        for folder in folders:
            assert node.names is not None
            node = node.names[folder]
        return node, name

    def _at(self, path: Path) -> Node:
        if path == self._path:
            return self._root
        parent, name = self._parent(path)
        assert parent.names is not None
        return parent.names[name]

    def _change(self, *changes: Change) -> None:
        for directory, name, node in changes:
            assert directory.names is not None
            _apply(directory.names, name, node)
        self._pending.append(list(changes))

    def note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Do to the model what was just done to the disk."""
        getattr(self, f"_{name}")(*arguments, result)

    def _open(self, path: Path, _flags: int, result: Any) -> None:
        if path.is_relative_to(self._path):
            self._lock(path, None)
            self._files[result] = path, self._at(path)
        else:
            self._files.pop(result, None)

    def _lock(self, path: Path, _result: Any) -> None:
        parent, name = (self._root, None) if path == self._path else self._parent(path)
        if name is not None and name not in (parent.names or {}):
            self._change((parent, name, Node()))

    def _write(self, descriptor: int, data: memoryview, offset: int, result: int) -> None:
        self._files[descriptor][1].content[offset : offset + result] = data[:result]

    def _truncate(self, descriptor: int, size: int, _result: Any) -> None:
        content = self._files[descriptor][1].content
        content[:] = content[:size].ljust(size, b"\0")

    def _fsync(self, descriptor: int, _result: Any) -> None:
        path, node = self._files.get(descriptor, (None, None))
        if path is None or node is None or self._forgets(path):
            return
        if node.names is None:
            node.durable = bytes(node.content)
            return
        synced, pending = [], []
        for changes in self._pending:
            touched = [directory for directory, _, _ in changes]
            (synced if node in touched else pending).append(changes)
        self._pending = pending
        for changes in synced:
            for directory, name, target in changes:
                _apply(self._durable.setdefault(directory, {}), name, target)

    def _mkdir(self, path: Path, _mode: int, _result: Any) -> None:
        self._change((*self._parent(path), Node.directory()))

    def _unlink(self, path: Path, _result: Any) -> None:
        self._change((*self._parent(path), None))

    _rmdir = _unlink

    def _rename(self, source: Path, target: Path, _result: Any) -> None:
        self._change((*self._parent(target), self._at(source)), (*self._parent(source), None))

    def _exchange(self, one: Path, other: Path, _result: Any) -> None:
        self._change((*self._parent(one), self._at(other)), (*self._parent(other), self._at(one)))


def materialise(state: State, root: Path) -> None:
    """Put `state` below `root`."""
    for name, content in sorted(state.items()):
        path = root / name
        if content is None:
            path.mkdir(mode=0o700)
        else:
            path.write_bytes(content)


def _apply(names: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _walk(
    directory: Node, prefix: str, names: dict[Node, dict[str, Node]], bytes_of: dict[int, str]
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names.get(directory, {}).items():
        if node.names is not None:
            yield f"{prefix}{name}", None
            yield from _walk(node, f"{prefix}{name}/", names, bytes_of)
        else:
            yield f"{prefix}{name}", _found(node, bytes_of.get(id(node), "none"))


def _found(file: Node, how: str) -> bytes:
    if how == "none":
        return file.durable
    content, half = bytes(file.content), len(file.content) // 2
    if how == "all":
        return content
    return content[:half] + file.durable[half : len(content)].ljust(len(content) - half, b"\0")


def _combinations(choices: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    count = 1
    for choice in choices:
        count *= len(choice)
    if count <= ALL:
        yield from product(*choices)
        return
    picker = random.Random(len(choices))
    yield tuple(choice[0] for choice in choices)
    yield tuple(choice[1] for choice in choices)
    for _ in range(SAMPLED):
        yield tuple(picker.choice(choice) for choice in choices)
