"""The simulated device refuses what a real one refuses, and sees what a real one waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated_gpu import CUDA, SimulatedGpu, simulated_gpu

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as device:
        yield device


def on_device(*numbers: float) -> Tensor:
    return torch.tensor(numbers, device=CUDA, dtype=torch.float32)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "mix",
    [
        lambda: on_device(1, 2) + torch.ones(2),
        lambda: torch.ones(2).add_(on_device(1, 2)),
        lambda: torch.ones(()).add_(on_device(1)[0]),
        lambda: torch.stack([on_device(1)[0], torch.ones(())]),
        lambda: torch.ones(3)[on_device(0, 1).long()],
        lambda: on_device(1, 2).index_select(0, torch.tensor([0])),
    ],
)
def test_operations_that_mix_devices_are_refused(mix: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix()


@pytest.mark.usefixtures("gpu")
def test_host_cannot_access_memory_of_the_device() -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        on_device(1, 2).numpy()
    assert on_device(1, 2).cpu().numpy().tolist() == [1, 2]


@pytest.mark.parametrize("inference", [False, True])
def test_allowed_mixtures_of_devices_compute_on_the_device(
    gpu: SimulatedGpu, inference: bool
) -> None:
    with torch.inference_mode(inference):
        found = (on_device(1, 2) * torch.tensor(3.0))[torch.tensor([1, 0])]
        assert (found.device, found.is_cuda, found.tolist()) == (CUDA, True, [6, 3])
        assert {
            made.device
            for made in (found.new_zeros(2), torch.arange(2, device=CUDA), torch.eye(2).to(CUDA))
        } == {CUDA}
    assert gpu.allocated > 0


@pytest.mark.usefixtures("gpu")
def test_views_and_in_place_operations_change_the_same_tensor() -> None:
    whole = torch.zeros(2, 3, device=CUDA)
    whole[1].add_(1)
    whole.T[0] = 5
    assert whole.tolist() == [[5, 0, 0], [5, 1, 1]]
    assert whole.mul_(2) is whole
    assert whole[1].untyped_storage().data_ptr() == whole.data_ptr()


@pytest.mark.usefixtures("gpu")
def test_a_mode_of_torch_sees_that_views_share_their_memory() -> None:
    whole = torch.zeros(4, 3, device=CUDA)
    seen: list[bool] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            output = func(*args, **(kwargs or {}))
            for part in output:
                seen.append(part.untyped_storage() is whole.untyped_storage())
            return output

    with Mode():
        whole.split(2)
    assert seen == [True, True]


@pytest.mark.usefixtures("gpu")
def test_other_threads_get_16_bit_products_in_float32() -> None:
    found: list[Tensor] = []
    matrix = torch.full((2, 2), 1.0078125, device=CUDA, dtype=torch.bfloat16)
    thread = Thread(target=lambda: found.append(torch.mm(matrix, matrix, out_dtype=torch.float32)))
    thread.start()
    thread.join()
    assert (found[0].dtype, found[0].device) == (torch.float32, CUDA)
    assert found[0][0, 0].item() == 2 * 1.0078125**2


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 1).any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.copy_(torch.ones(3)), 1),
        (lambda x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True), 0),
        (lambda x: x[x > 1], 1),
        (lambda x: x[torch.tensor([0])], 1),
        (lambda x: x[x.long() % 3], 0),
        (lambda x: x.masked_fill(x > 1, 0), 0),
        (lambda x: torch.linalg.cholesky_ex(x.diag())[0], 0),
        (lambda x: x.nonzero(), 1),
    ],
)
def test_waits_of_the_host_are_counted(
    gpu: SimulatedGpu, work: Callable[[Tensor], object], waits: int
) -> None:
    numbers = on_device(1, 2, 3)
    gpu.waits.clear()
    work(numbers)
    assert gpu.waits.total() == waits


def test_allocation_beyond_the_limit_fails(gpu: SimulatedGpu) -> None:
    torch.cuda.set_per_process_memory_fraction(2048 / gpu.total_bytes)
    kept = torch.zeros(256, device=CUDA)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.zeros(512, device=CUDA)
    assert torch.cuda.memory_allocated() == kept.nbytes
