"""The smallest run, a fifth of a second: a model, its settings, its output, a kill at any step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from gptq_cli.events import BlockFinished, Event, Report
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from tests.disks import DyingDisk, Killed, using
from tests.families import written
from tests.runs import config

WORK = ".out.gptq-work"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SETTINGS = {"nsamples": 2, "batch_size": 1, "seqlen": 16, "lm_head": True, "max_shard_size": "60KB"}
SETTINGS |= {"dynamic": {"-:.*(q|k|v|gate|up)_proj": {}}}
SETTINGS |= {"preset": "gptq"}  # the other presets only solve longer
SETTINGS |= {
    "dataset": written("a quick brown fox jumps over the lazy dog and then some more " * 20)
}


@dataclass(frozen=True)
class Case:
    """A small model, the hashes of its quantized files, and the disk operations of such a run."""

    model: Path
    tree: dict[str, str]
    operations: list[str]

    def run(self, output: Path, **changes: object) -> QuantizeResult:
        """Quantize the model into `output` with SETTINGS; `changes` are settings or run options."""
        named = ("resume", "overwrite", "max_seconds", "report", "worker")
        options = {key: changes.pop(key) for key in named if key in changes}
        return quantize_checkpoint(
            str(self.model), output, config(**(SETTINGS | changes)), **options
        )

    def moments(self, every: bool) -> list[int]:
        """Return the numbers of the operations at which a test ends the run, from 1 on.

        If not `every` operation counts, take one of those that are alike: the same operation
        was before them and the same is after them, as for each tensor of each block.
        """
        if every:
            return list(range(1, len(self.operations) + 1))
        first_of_kind: dict[tuple[str, ...], int] = {}
        for index in range(len(self.operations)):
            around = tuple(self.operations[max(0, index - 1) : index + 2])
            first_of_kind.setdefault(around, index + 1)
        return list(first_of_kind.values())

    def interrupted(self, output: Path, last: int) -> bool:
        """Run and kill after disk operation `last`; return False if the run ended before."""
        try:
            with using(DyingDisk(last)):
                self.run(output)
        except Killed:
            return True
        return False


def killer(block: int) -> Report:
    """Return a report that kills the run when `block` is finished and durable."""

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.index == block:
            raise Killed

    return stop


def kill_after_block(case: Case, output: Path, block: int) -> None:
    """Run and kill when `block` is finished and durable."""
    with pytest.raises(Killed):
        case.run(output, report=killer(block))
