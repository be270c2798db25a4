"""Tensors that are read ahead: equal to others, pinned, within the limit, and freed in time."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event
from weakref import ref

import pytest
import torch
from torch import Tensor

from gptq_cli.checkpoint.reader import TensorReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.models.stream import ReadAhead
from tests.families import save_model
from tests.simulated_gpu import SimulatedGpu, simulated_gpu

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch pins memory of its own"
)
NAMES = [f"t{number}" for number in range(6)]
BYTES = 400  # of each


class Numbers:
    """A source of six tensors that notes what is asked of it; some cannot be read."""

    def __init__(self, broken: Iterable[str] = ()) -> None:
        self.reads: list[str] = []
        self.told: list[list[str]] = []
        self.broken = set(broken)

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        if name in self.broken:
            raise InputError("E_CKPT_CORRUPT", f"{name} is torn")
        return torch.full((100,), float(name[1:]))

    def prefetch(self, names: Iterable[str]) -> None:
        self.told.append(list(names))

    def release(self) -> None:
        self.reads.append("release")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as device:
        yield device


def test_expected_tensors_are_read_once_and_pinned() -> None:
    source = Numbers()
    ahead = ReadAhead(source, 10_000)
    ahead.prefetch(["t1", "t2"])
    found = {name: ahead.read(name) for name in ("t2", "t1", "t1", "t3")}
    assert source.told == [["t1", "t2"]]
    assert source.reads == ["t1", "t2", "t3"]
    assert {name: tensor.is_pinned() for name, tensor in found.items()} == {
        "t2": True,
        "t1": True,
        "t3": False,
    }
    assert all(tensor.tolist() == [float(name[1:])] * 100 for name, tensor in found.items())
    ahead.release()
    assert source.reads[-1] == "release"


@pytest.mark.parametrize("fitting", [0, 1, 4])
def test_pinned_bytes_stay_within_the_limit(fitting: int) -> None:
    ahead = ReadAhead(Numbers(), fitting * BYTES + BYTES - 1)
    for _ in range(2):  # the room is there again for the next block
        ahead.prefetch(NAMES)
        tensors = [ahead.read(name) for name in NAMES]
        assert [tensor.is_pinned() for tensor in tensors] == [True] * fitting + [False] * (
            6 - fitting
        )
        assert [tensor[0].item() for tensor in tensors] == [0, 1, 2, 3, 4, 5]


def test_new_prefetch_frees_the_tensors_of_the_old_one() -> None:
    ahead = ReadAhead(Numbers(), 10_000)
    ahead.prefetch(["t1", "t2"])
    held = [ref(ahead.read(name)) for name in ("t1", "t2")]
    gc.collect()
    assert all(tensor() is not None for tensor in held)
    ahead.prefetch([])
    gc.collect()
    assert all(tensor() is None for tensor in held)
    assert not ahead.read("t1").is_pinned()


def test_tensors_of_an_old_prefetch_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source, began, goes_on = Numbers(), Event(), Event()
    read = source.read

    def slowly(name: str) -> Tensor:
        began.set()
        assert goes_on.wait(60)
        return read(name)

    monkeypatch.setattr(source, "read", slowly)
    ahead = ReadAhead(source, 10_000)
    ahead.prefetch(["t1", "t2", "t3"])
    assert began.wait(60)
    ahead.prefetch(["t4"])
    goes_on.set()
    assert ahead.read("t4").is_pinned()
    assert source.reads == ["t1", "t4"]


def test_unreadable_tensor_raises_error_only_at_its_own_read() -> None:
    ahead = ReadAhead(Numbers(broken=["t2"]), 10_000)
    ahead.prefetch(["t1", "t2", "t3"])
    assert ahead.read("t3").is_pinned()
    with pytest.raises(InputError, match="t2 is torn"):
        ahead.read("t2")
    ahead.prefetch(["t1"])
    assert ahead.read("t1").is_pinned()


def test_tensors_are_read_if_no_memory_can_be_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_tensor: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    ahead = ReadAhead(Numbers(), 10_000)
    ahead.prefetch(NAMES)
    assert [ahead.read(name)[0].item() for name in NAMES] == [0, 1, 2, 3, 4, 5]


def test_thread_may_release_a_file_just_opened_by_another(
    tmp_path: Path,
) -> None:
    class Forgetful(dict[str, object]):
        def __setitem__(self, _file: str, _opened: object) -> None:
            """Released before anybody could look."""

    checkpoint = open_checkpoint(save_model(tmp_path / "model"))
    reader, plain = TensorReader(checkpoint), TensorReader(checkpoint)
    reader._open = Forgetful()
    assert all(torch.equal(reader.read(name), plain.read(name)) for name in checkpoint.tensors)


def test_files_may_be_released_while_a_thread_reads_them(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path / "model", max_shard_size="50KB"))
    ahead, plain = ReadAhead(TensorReader(checkpoint), 10**9), TensorReader(checkpoint)
    for _ in range(20):
        ahead.prefetch(checkpoint.tensors)
        for name in checkpoint.tensors:
            ahead.release()
            assert torch.equal(ahead.read(name), plain.read(name))
