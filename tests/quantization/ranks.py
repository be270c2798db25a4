"""Several processes quantize one model for a test and meet in a store that the test owns."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import GptqError
from gptq_cli.events import BlockFinished, Event
from gptq_cli.models.stream import LoadedBlock
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.planning.estimate import ROWS_OF_A_PART
from gptq_cli.quantization import (
    block_loop,
    layers,
    reverse_pass,
    routed_experts,
    run,
    run_state,
)
from gptq_cli.runtime import torchrun
from gptq_cli.solver.factor import HessianFactor
from gptq_cli.solver.grid import ScaleRangeError
from tests.runs import be_rank

torch.set_num_threads(1)
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.quantization.ranks"])
RUNS, ROWS = "forwards", "weights times columns"


def team(
    size: int,
    model: Path,
    output: Path,
    settings: QuantizeConfig,
    *,
    dies: int | None = None,
    when: str = "",
) -> tuple[list[Counter[str]], list[str | None], list[int | None]]:
    """Return the work, the error message (or None) and the exit code of each of `size` processes.

    Process `dies` kills itself `when`: at the "start", in a "forward", before it can "solve" rows
    or an "expert", after the first block is "finished" or "told", or at the "head". If `when` is
    "unlike", the process differs from the others; if it is "refused", no scale fits its weights;
    with "few" tokens the pass for gradients has one piece of text for all processes.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = CHILDREN.SimpleQueue()
    arguments = (model, output, settings, dies, when, answers)
    processes = [
        CHILDREN.Process(target=member, args=(rank, size, store.port, *arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    work: list[Counter[str]] = [Counter() for _ in range(size)]
    said: list[str | None] = [None] * size
    while not answers.empty():
        rank, done, words = answers.get()
        work[rank], said[rank] = done, words
    return work, said, [process.exitcode for process in processes]


def member(
    rank: int,
    size: int,
    port: int,
    model: Path,
    output: Path,
    settings: QuantizeConfig,
    dies: int | None,
    when: str,
    answers: Any,
) -> None:
    be_rank(rank, size, port)
    done = _counted()
    if rank == dies or when == "few":
        _doom(when)
    try:
        with torchrun.joined("cpu", [], lambda _: os._exit(9)) as place:
            prepared = prepare_run(
                str(model), output, settings, RunOptions(), writes=place.team.is_leader
            )
            run.carry_out(prepared, _doomed_report, place)
        answers.put((rank, done, None))
    except GptqError as error:
        answers.put((rank, done, f"{error.code}: {error}"))
    except torchrun.ReportedByAnotherRank:
        answers.put((rank, done, None))


def _counted() -> Counter[str]:
    """Count the forwards of blocks and the multiplied weights of solved rows from now on."""
    done: Counter[str] = Counter()
    run, solve = LoadedBlock.run, layers.solve_together

    def counted_run(self: LoadedBlock, batch: int, hidden: Any) -> Any:
        done[RUNS] += 1
        return run(self, batch, hidden)

    def counted_solve(
        weights: Sequence[Any], hessian: Any, prepared: HessianFactor, config: Any
    ) -> Any:
        done[ROWS] += sum(weight.numel() * weight.shape[1] for weight in weights)
        return solve(weights, hessian, prepared, config)

    LoadedBlock.run = counted_run  # type: ignore[method-assign]
    layers.solve_together = counted_solve  # type: ignore[assignment]
    ROWS_OF_A_PART["cpu"] = (16, 16)
    return done


_dying = ""


def _die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(*_: object) -> Any:
    raise ScaleRangeError(0)


def _die_after_the_first_block(self: run_state.FinishedBlocks, block: int, *arguments: Any) -> None:
    _finished(self, block, *arguments)
    if block == 0:
        _die()


_finished = run_state.FinishedBlocks.finished
PLANTS: dict[str, tuple[Any, str, Any]] = {
    "start": (run, "check_agreement", _die),
    "forward": (LoadedBlock, "run", _die),
    "solve": (layers, "solve_together", _die),
    "expert": (routed_experts, "expert_cost", _die),
    "head": (block_loop, "head_forwards", _die),
    "finished": (run_state.FinishedBlocks, "finished", _die_after_the_first_block),
    "refused": (layers, "solve_together", _refuse),
}


def _doom(when: str) -> None:
    global _dying
    _dying = when
    if when == "unlike":
        torch.set_num_threads(2)
    elif when == "few":
        reverse_pass.GRADIENT_TOKENS = 1
    elif when in PLANTS:
        setattr(*PLANTS[when])


def _doomed_report(event: Event) -> None:
    if _dying == "told" and isinstance(event, BlockFinished):
        _die()
