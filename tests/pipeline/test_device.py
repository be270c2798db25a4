"""Runs on a device that is simulated: the same bytes as on the CPU, and what the host waits for.

Kernels are left out: what is compiled for a GPU cannot be simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.engine import triton_solver
from gptq_cli.models.stream import ModelStream
from gptq_cli.pipeline.activations import HiddenStates
from gptq_cli.pipeline.memory import Memory
from gptq_cli.pipeline.setup import open_stream, resolve_device
from tests.families import save_model
from tests.simulated_gpu import SimulatedGpu, simulated_gpu

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a device of its own")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    monkeypatch.setattr(triton_solver, "KERNEL_DEVICES", set())
    with simulated_gpu() as device:
        yield device


@pytest.mark.usefixtures("gpu")
def test_the_device_that_is_there_is_named_as_its_tensors_name_it() -> None:
    device = resolve_device("auto")
    assert device == resolve_device("cuda") == resolve_device("cuda:0") == torch.zeros(1, device=device).device
    states = HiddenStates([torch.zeros(2, 3, device=device)], Memory(device)).copy()
    assert states.stored[0].device == device


def test_a_model_is_opened_on_the_device_that_kernels_will_be_launched_on(gpu: SimulatedGpu, tmp_path: Path) -> None:
    model = open_checkpoint(save_model(tmp_path / "model"))
    stream = open_stream(model, device=resolve_device("auto"), dtype="float32", trust_remote_code=False)
    assert isinstance(stream, ModelStream)
    assert gpu.current == stream.device
