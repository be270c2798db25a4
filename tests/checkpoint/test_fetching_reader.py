"""When a reader of a download fetches blocks ahead, and when it drops them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gptq_cli.checkpoint.download import FetchingReader, is_block
from gptq_cli.models.stream import ReadAhead
from tests.simulated_gpu import simulated_gpu

BLOCKS = [f"layers.{number}" for number in range(4)]


class Pieces:
    """Stands for a download and its files: notes what is fetched, and refuses what is not there."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.there: set[str] = set()
        self.most = 0

    def start(self, piece: str) -> None:
        if piece not in self.there:
            self.fetched.append(piece)
            self.there.add(piece)
            self.most = max(self.most, len([*filter(is_block, self.there)]))

    def wait(self, name: str) -> None:
        self.start(name.rpartition(".")[0])

    def drop_blocks(self, keep: Collection[str]) -> None:
        self.there = {piece for piece in self.there if piece in keep or not is_block(piece)}

    def names(self) -> list[str]:
        return [f"{piece}.weight" for piece in ("embed", *BLOCKS, "head")]

    def read(self, name: str) -> Tensor:
        assert name.rpartition(".")[0] in self.there
        return torch.ones(3)

    def prefetch(self, names: Iterable[str]) -> None:
        raise AssertionError(f"{list(names)} need not be there yet")

    def check_unchanged(self) -> None:
        """Find no change."""

    def release(self) -> None:
        """Close nothing."""


def reader_of(pieces: Pieces) -> FetchingReader:
    return FetchingReader(cast("Any", pieces), cast("Any", pieces))


def run_blocks(source: Any, first: int = 0) -> None:
    """Read what a run reads that resumes at block `first`: embeddings, block 0, and the rest."""
    source.read("embed.weight")
    source.read("layers.0.weight")
    source.release()
    source.release()
    for number in range(first, len(BLOCKS)):
        source.read(f"{BLOCKS[number]}.weight")
        source.prefetch([f"{piece}.weight" for piece in BLOCKS[number + 1 : number + 2]])
        source.read(f"{BLOCKS[number]}.weight")
        source.release()
    source.read("head.weight")
    source.release()


@pytest.mark.parametrize("first", [0, 2])
def test_two_blocks_are_there_and_each_is_fetched_once(first: int) -> None:
    pieces = Pieces()
    run_blocks(reader_of(pieces), first)
    needed = dict.fromkeys(["embed", "layers.0", *BLOCKS[first:], "head"])
    assert pieces.fetched == list(needed)
    assert pieces.most == 2
    assert {"embed", "head"} <= pieces.there


def test_an_expected_block_stays_until_it_was_in_use() -> None:
    pieces = Pieces()
    reader = reader_of(pieces)
    reader.prefetch(["layers.1.weight"])
    reader.release()
    reader.prefetch(["layers.2.weight"])
    assert pieces.there == {"layers.1", "layers.2"}
    reader.prefetch(["layers.3.weight"])
    assert pieces.there == {"layers.2", "layers.3"}


def test_a_block_that_fails_drops_nothing() -> None:
    pieces = Pieces()
    reader = reader_of(pieces)
    reader.read("layers.1.weight")
    reader.prefetch(["layers.2.weight"])
    reader.release()
    reader.prefetch(())
    assert pieces.there == {"layers.1", "layers.2"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch pins memory of its own")
@pytest.mark.parametrize("most_bytes", [0, 10**6])
def test_blocks_that_are_read_ahead_are_fetched_once(most_bytes: int) -> None:
    pieces = Pieces()
    with simulated_gpu():
        run_blocks(ReadAhead(reader_of(pieces), most_bytes))
    assert pieces.fetched == ["embed", *BLOCKS, "head"]
