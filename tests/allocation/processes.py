"""Several processes measure one model for a test and meet in a store that the test owns."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import torch
from torch.distributed import TCPStore

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.quantization.run_state import SavingTimes
from gptq_cli.runtime import torchrun
from tests.allocation.measuring import measure
from tests.runs import be_rank

torch.set_num_threads(1)
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.allocation.processes"])


def measure_together(size: int, model: Path, file: Path, wanted: QuantizeConfig) -> None:
    """Measure a model with `size` processes, which save every block."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(size):
        arguments = (rank, size, store.port, model, file, wanted)
        processes.append(CHILDREN.Process(target=_member, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size


def _member(
    rank: int, size: int, port: int, model: Path, file: Path, wanted: QuantizeConfig
) -> None:
    SavingTimes.is_due = lambda *_: True  # type: ignore[method-assign]
    be_rank(rank, size, port)
    with torchrun.joined("cpu", [], lambda _: os._exit(9)) as worker:
        measure(model, wanted, file, worker=worker)
