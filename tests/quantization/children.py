"""What tests let processes of their own do; forked from a server that has all of this imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptq_cli.__main__ import main
from gptq_cli.errors import GptqError
from gptq_cli.models import paused_forwards
from gptq_cli.quantization import run_state
from gptq_cli.storage import durable
from tests.disks import CountingDisk
from tests.tiny import Case

torch.set_num_threads(1)


class DeadlyDisk(CountingDisk):
    """Kills the process for real after operation `last`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last

    def after(self, number: int, _name: str) -> None:
        if number == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def die(model: Path, output: Path, text: str, last: int) -> None:
    durable.disk = DeadlyDisk(last)
    Case(model, {}, []).run(output, dataset=text)


def race(model: Path, output: Path, text: str, barrier: Any, answers: Any) -> None:
    barrier.wait()
    try:
        result = Case(model, {}, []).run(output, dataset=text)
        answers.put("already done" if result.already_done else "worked")
    except GptqError as error:
        answers.put(f"{error.code}: {error}")


def be_gptq(when: str, signals: list[int], words: list[str], stdout: Path, stderr: Path) -> None:
    """Be the command line that prints into two files and sends `signals` to itself."""
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["gptq", *words]

    def send() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    if when == "block":
        after_the_first_block(send)
    elif when == "forward":
        before_a_layer(send)
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def after_the_first_block(send: Callable[[], None]) -> None:
    usual = run_state.FinishedBlocks.finished

    def finished(*arguments: Any) -> None:
        usual(*arguments)
        send()

    run_state.FinishedBlocks.finished = finished  # type: ignore[method-assign]


def before_a_layer(send: Callable[[], None]) -> None:
    usual = paused_forwards._Batch.before_linear

    def before_linear(batch: Any, stage: Any, name: str, inputs: Any) -> Any:
        if "layers.1.mlp.down" in name:
            send()
        return usual(batch, stage, name, inputs)

    paused_forwards._Batch.before_linear = before_linear  # type: ignore[method-assign]
