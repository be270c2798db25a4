"""Several processes measure one model for a test and meet in a store that the test owns."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch
from torch.distributed import TCPStore

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import GptqError, PausedError
from gptq_cli.quantization.run_state import Limits, SavingTimes
from gptq_cli.runtime import torchrun
from tests.allocation.measuring import measure
from tests.runs import be_rank

torch.set_num_threads(1)
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.allocation.processes"])


def measure_together(
    size: int, model: Path, file: Path, wanted: QuantizeConfig, n_steps: int | None = None
) -> None:
    """Measure a model with `size` processes, which save every block.

    After `n_steps` steps the time of the first process is over, which ends all of them. The time of
    the others is over from the start, which does not matter.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(size):
        arguments = (rank, size, store.port, model, file, wanted, n_steps)
        processes.append(CHILDREN.Process(target=_member, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    code = 0
    if n_steps is not None:
        code = PausedError.exit_code
    assert [process.exitcode for process in processes] == [code] * size


def _member(
    rank: int,
    size: int,
    port: int,
    model: Path,
    file: Path,
    wanted: QuantizeConfig,
    n_steps: int | None,
) -> None:
    SavingTimes.is_due = lambda *_: True  # type: ignore[method-assign]
    if n_steps is not None:
        _let_time_end(n_steps * (rank == 0))
    be_rank(rank, size, port)
    code = 0
    try:
        with torchrun.joined("cpu", [], lambda _: os._exit(9)) as worker:
            try:
                measure(model, wanted, file, worker=worker)
            except GptqError as error:
                code = error.exit_code
                raise
    except (GptqError, torchrun.ReportedByAnotherRank):
        sys.exit(code)


def _let_time_end(n_steps: int) -> None:
    """Let the time of this process be over after this many steps."""
    begun = 0

    def check(*_: object) -> None:
        nonlocal begun
        begun += 1
        if begun > n_steps:
            raise PausedError("E_PAUSED", "the time is over")

    Limits.check_time_for_block = check  # type: ignore[method-assign]
