"""Copies from a simulated device: they wait for what makes a tensor, and arrive with its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from gptq_cli.checkpoint.device_copies import DeviceCopies
from tests.simulated_gpu import CUDA, SimulatedGpu, simulated_gpu

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as device:
        yield device


def made(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=CUDA).reshape(shape).half() * 3


def copied(copies: DeviceCopies, tensor: Tensor, finished: torch.cuda.Event) -> Tensor:
    """The tensor on the host, copied by another thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copies.to_host, tensor, finished).result().view(tensor.dtype).clone()


def test_tensors_of_any_size_arrive_in_pinned_memory(gpu: SimulatedGpu) -> None:
    copies = DeviceCopies(CUDA)
    for shape in ((3, 4), (2, 2), (5, 6)):
        tensor = made(*shape)
        found = copied(copies, tensor, copies.finished(tensor))
        assert found.tolist() == tensor.flatten().tolist()
        assert copies.to_host(tensor, copies.finished(tensor)).untyped_storage() in gpu.pinned


def test_a_copy_is_made_while_the_device_does_other_work(gpu: SimulatedGpu) -> None:
    copies, tensor = DeviceCopies(CUDA), made(3, 4)
    finished = copies.finished(tensor)
    later = made(8, 8)
    assert copied(copies, tensor, finished).tolist() == tensor.flatten().tolist()
    assert gpu.written(later.host) > finished.done


@pytest.mark.usefixtures("gpu")
def test_the_simulation_sees_a_copy_that_comes_too_early() -> None:
    copies, tensor = DeviceCopies(CUDA), made(3, 4)
    finished = copies.finished(tensor)
    tensor.add_(1)
    with pytest.raises(AssertionError, match="not yet complete"):
        copied(copies, tensor, finished)


def test_memory_that_cannot_be_pinned_is_used_unpinned(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    copies, tensor = DeviceCopies(CUDA), made(3, 4)
    found = copied(copies, tensor, copies.finished(tensor))
    assert found.tolist() == tensor.flatten().tolist()
    assert not gpu.pinned
