"""The weights of a Hub model, which are downloaded piece by piece and dropped behind the reader.

A piece is what a block holds, or a module outside numbered lists of modules. Byte ranges of the
shards on the Hub become small safetensors files of one piece each, so that all readers work as on
any checkpoint. `FetchingReader` fetches the pieces that are expected, and drops the blocks that are
done.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from gptq_cli.checkpoint.headers import PlainReader, TensorInfo, read_headers, scan_weights
from gptq_cli.checkpoint.layout import TensorSpec, plan_layout
from gptq_cli.checkpoint.ranges import HubFiles, RemoteHeader
from gptq_cli.errors import GptqError, InputError
from gptq_cli.hub_errors import NETWORK_MIDWAY, hub_refusal
from gptq_cli.storage.durable import OpenFile, make_directory, remove

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 64 * 2**20  # of one request
CONNECTIONS = 8
PIECES_AT_ONCE = 2
_NUMBERED = re.compile(r"(?:.*?\.)??\d+(?=\.)")


def piece_of(name: str) -> str:
    """Return the piece that tensor `name` belongs to: `model.layers.3`, or its module."""
    numbered = _NUMBERED.match(name)
    if numbered:
        return numbered[0]
    return name.rpartition(".")[0] or name


def is_block(piece: str) -> bool:
    """Return whether a piece is an item of a numbered list, which is dropped when it is done."""
    return piece.rpartition(".")[2].isdecimal()


def most_bytes_at_once(tensors: Iterable[TensorInfo], blocks: str) -> int:
    """Return the most bytes that a download keeps of a model with the list `blocks`.

    These are two blocks, and everything that is in no block.
    """
    outside = 0
    of_blocks: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        piece = piece_of(tensor.name)
        if is_block(piece) and piece.rpartition(".")[0] == blocks:
            of_blocks[piece] += tensor.nbytes
        else:
            outside += tensor.nbytes
    return outside + sum(sorted(of_blocks.values())[-2:])


class RemoteWeights:
    """The files of a Hub model that may hold weights; `identities` has those that were looked at.

    The files of tensors are named by the id of the model, and positions count from their start.
    """

    def __init__(self, hub: HubFiles, files: Collection[str]) -> None:
        self.hub, self.identities = hub, dict[str, str]()
        self._names = sorted(name for name in files if PurePosixPath(name).name == name)

    def names(self) -> Sequence[str]:
        """Return the names of the files in the top folder."""
        return self._names

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return name in self._names

    def headers(self, names: Sequence[str]) -> dict[str, dict[str, TensorInfo]]:
        """Return the tensors of these files; one InputError for all that are torn."""
        with ThreadPoolExecutor(CONNECTIONS, "headers") as threads:
            found = {name: threads.submit(self.hub.header, name) for name in names}

            def tensors(name: str) -> dict[str, TensorInfo]:
                header: RemoteHeader = found[name].result()
                self.identities[name] = header.identity
                return header.tensors

            return read_headers(names, tensors)


# ---------------------------------------------------------------- pieces


class Part(NamedTuple):
    """Bytes `start` to `end` of a shard, which go to another place, `moved` bytes farther."""

    start: int
    end: int
    moved: int


@dataclass(frozen=True, slots=True)
class PieceFile:
    """The tensors of a piece that one shard holds, as a safetensors file of their own."""

    shard: str
    path: Path
    header: bytes
    size: int
    parts: Sequence[Part]
    tensors: Sequence[TensorInfo]  # in this file


@dataclass(frozen=True, slots=True)
class Piece:
    """The files of a piece, one for each shard that it lies in, in a folder of its own."""

    folder: Path
    files: Sequence[PieceFile]

    @property
    def tensors(self) -> Iterator[TensorInfo]:
        """Yield the tensors of all files."""
        for file in self.files:
            yield from file.tensors


def _pieces(folder: Path, tensors: Iterable[TensorInfo]) -> dict[str, Piece]:
    """Return all pieces of a model with these tensors, in folders of `folder`, by name."""
    sorted_out: dict[str, dict[str, list[TensorInfo]]] = defaultdict(lambda: defaultdict(list))
    for tensor in tensors:
        sorted_out[piece_of(tensor.name)][tensor.file.name].append(tensor)
    pieces = {}
    for number, (name, shards) in enumerate(sorted_out.items()):
        # A number, because a name of the model may be no safe name of a file.
        own = folder / str(number)
        files = [_piece_file(own / shard, shard, held) for shard, held in shards.items()]
        pieces[name] = Piece(own, files)
    return pieces


def _piece_file(path: Path, shard: str, tensors: Sequence[TensorInfo]) -> PieceFile:
    units: list[tuple[TensorSpec, ...]] = []
    for tensor in tensors:
        units.append((TensorSpec(tensor.name, tensor.dtype, tensor.shape),))
    (laid_out,) = plan_layout(units, sys.maxsize).shards
    held, parts = [], []
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        start = laid_out.offsets[tensor.name]
        held.append(replace(tensor, file=path, start=start, end=start + tensor.nbytes))
        if tensor.nbytes:
            parts.append(Part(tensor.start, tensor.end, start - tensor.start))
    return PieceFile(shard, path, laid_out.header, laid_out.size, _requests(parts), held)


def _requests(parts: Sequence[Part]) -> list[Part]:
    """Join parts that follow each other in both files, and cut long ones."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and (last.end, last.moved) == (part.start, part.moved):
            joined[-1] = last._replace(end=part.end)
        else:
            joined.append(part)
    requests = []
    for part in joined:
        for start in range(part.start, part.end, PART_BYTES):
            requests.append(Part(start, min(start + PART_BYTES, part.end), part.moved))
    return requests


def take_nothing(_prefix: str) -> None:
    """Do nothing with a block that is there."""


class Download:
    """The weights of a Hub model, which are fetched piece by piece into files below `folder`.

    `tensors` tells where each tensor lies once its piece is there, `identities` what each shard is
    known by. `take` is called with `model.layers.3.` while this block is there, at the latest
    before it is dropped.
    """

    def __init__(
        self, remote: RemoteWeights, folder: Path, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.identities = dict[str, str]()
        for tensor in tensors.values():
            self.identities[tensor.file.name] = remote.identities[tensor.file.name]
        self.take: Callable[[str], None] = take_nothing
        self._hub, self._pieces = remote.hub, _pieces(folder, tensors.values())
        moved = {}
        for piece in self._pieces.values():
            for tensor in piece.tensors:
                moved[tensor.name] = tensor
        self.tensors = {name: moved[name] for name in tensors}
        self._fetched: dict[str, Future[None]] = {}
        self._lock = Lock()
        self._requests = ThreadPoolExecutor(CONNECTIONS, "requests")
        self._fetching = ThreadPoolExecutor(PIECES_AT_ONCE, "download")

    def start(self, piece: str) -> Future[None]:
        """Begin to fetch a piece, if nobody has."""
        with self._lock:
            if piece not in self._fetched:
                self._fetched[piece] = self._fetching.submit(self._fetch, self._pieces[piece])
            return self._fetched[piece]

    def wait(self, name: str) -> None:
        """Return when the file of tensor `name` is complete.

        InputError E_HUB_* if the Hub refuses it or gives no answer, E_STREAM and E_SOURCE_CHANGED
        as `HubFiles.receive` raises them, E_CKPT_NONFINITE if a tensor of the piece is not finite;
        ResourceError E_DISK.
        """
        piece = piece_of(name)
        fetched = self.start(piece)
        try:
            fetched.result()
        except GptqError:
            self._forget(piece)
            raise
        except Exception as error:
            self._forget(piece)
            what, commit = f"model `{self._hub.identifier}`", self._hub.commit
            refused = hub_refusal(error, what, commit)
            if refused is None:
                raise
            hint = refused.hint
            if refused.code == "E_HUB_NETWORK":
                hint = NETWORK_MIDWAY
            raise InputError(refused.code, str(refused), hint=hint) from error

    def drop_blocks(self, keep: Collection[str]) -> None:
        """Remove the files of all blocks that are there, except those that `keep` names."""
        for piece, fetched in list(self._fetched.items()):
            if not is_block(piece) or not fetched.done():
                continue
            if fetched.exception() is None:
                self.take(f"{piece}.")
            if piece not in keep:
                self._forget(piece)
                remove(self._pieces[piece].folder)

    def close(self) -> None:
        """Stop fetching."""
        self._hub.stop()
        self._fetching.shutdown(cancel_futures=True)
        self._requests.shutdown(cancel_futures=True)

    def _forget(self, piece: str) -> None:
        with self._lock:
            self._fetched.pop(piece, None)

    def _fetch(self, piece: Piece) -> None:
        make_directory(piece.folder)
        for file in piece.files:
            with OpenFile(file.path, file.size) as opened:
                opened.write_at(0, file.header)
                self._fetch_parts(file, opened)
        scan_weights(piece.tensors, hashed=False)

    def _fetch_parts(self, file: PieceFile, opened: OpenFile) -> None:
        requested = []
        for part in file.parts:
            put = partial(_put, opened, part.moved)
            receive = partial(self._hub.receive, file.shard, part.start, part.end, put)
            requested.append(self._requests.submit(receive))
        try:
            for request in requested:
                request.result()
        finally:
            for request in requested:
                request.cancel()
            # The file is open until no thread writes into it any more.
            for request in requested:
                if not request.cancelled():
                    request.exception()


def _put(opened: OpenFile, moved: int, position: int, data: bytes) -> None:
    opened.write_at(position + moved, data)


class FetchingReader:
    """Reads a model that is downloaded meanwhile.

    Expected blocks are fetched ahead. Blocks are dropped if they have not been read since the last
    `release` and were neither expected before nor are now.
    """

    def __init__(self, reader: PlainReader, download: Download) -> None:
        self._reader, self._download = reader, download
        self._used: set[str] = set()
        self._expected: set[str] = set()

    def names(self) -> list[str]:
        return self._reader.names()

    def read(self, name: str) -> Tensor:
        """Return the tensor, once its piece is there; raise what `Download.wait` raises."""
        self._used.add(piece_of(name))
        self._download.wait(name)
        return self._reader.read(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Drop the blocks that are done, and begin to fetch the pieces of `names`."""
        coming = set(map(piece_of, names))
        if coming:
            self._download.drop_blocks(self._used | self._expected | coming)
        for piece in sorted(coming):
            self._download.start(piece)
        self._expected = coming

    def check_unchanged(self) -> None:
        """Do the same as TensorReader."""
        self._reader.check_unchanged()

    def release(self) -> None:
        """Do the same as TensorReader; what was read is no longer in use."""
        self._used = set()
        self._reader.release()
