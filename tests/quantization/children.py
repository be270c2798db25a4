"""What tests let processes of their own do; forked from a server that has all of this imported."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from gptq_cli.errors import GptqError
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
