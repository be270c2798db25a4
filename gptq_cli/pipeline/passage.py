"""One way of the calibration batches through a block: how its stages come to see every batch, and what comes out.

As many batches as may wait inside the block; for the others the block is run again for each stage. Both see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from gptq_cli.models.lockstep import WaitingBatches, waiting_batches
from gptq_cli.models.recording import State
from gptq_cli.models.stages import Stage, watch_inputs
from gptq_cli.models.stream import LoadedBlock
from gptq_cli.pipeline.activations import HiddenStates

Seen = list[tuple[Stage, Any]]


class Passage:
    """A forward of a block, or of what follows the blocks, for each batch of `hidden`; planned `linears` by name.

    `called` is what the forward calls by itself: these linears, but experts as a whole.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        called: Mapping[str, nn.Module],
        runs: Sequence[Callable[[], State]],
        hidden: HiddenStates,
    ) -> None:
        self.linears, self.called, self.runs, self._hidden = linears, called, runs, hidden
        self._waiting: WaitingBatches | None = None
        self._n_waiting = 0

    @classmethod
    def through(cls, block: LoadedBlock, hidden: HiddenStates, names: Container[str]) -> Passage:
        """The way of `hidden` through `block`, with those of its linears that `names` holds."""
        linears = {name: linear for name, linear in block.linears.items() if name in names}
        planned = set(linears.values())
        called = {name: module for name, module in block.called.items() if planned & set(module.modules())}
        return cls(linears, called, [partial(_run, block, hidden, batch) for batch in range(len(hidden))], hidden)

    @contextmanager
    def waiting(self, stages: Sequence[Stage], n_batches: int) -> Iterator[None]:
        """The first `n_batches` wait at each of `stages` until they are told to go on."""
        with waiting_batches(stages, self.called, self.runs[:n_batches]) as self._waiting:
            self._n_waiting = n_batches
            yield

    def inputs(self, together: Sequence[Stage]) -> Iterator[Seen]:
        """For each batch, every input of the stages `together`, which are one stage if batches wait."""
        if self._waiting is not None and self._n_waiting:
            (stage,) = together
            for seen in self._waiting.reach(stage):
                yield [(stage, seen)]
        for run in self.runs[self._n_waiting :]:
            yield _watched(together, self.called, run)

    def finish(self) -> None:
        """Let every batch run to its end; `hidden` becomes what comes out."""
        if self._waiting is not None:
            for batch, output in enumerate(self._waiting.finish()):
                self._hidden[batch] = output
        for batch in range(self._n_waiting, len(self.runs)):
            self._hidden[batch] = self.runs[batch]()


def _run(block: LoadedBlock, hidden: HiddenStates, batch: int) -> State:
    return block.run(batch, hidden[batch])


def _watched(together: Sequence[Stage], called: Mapping[str, nn.Module], run: Callable[[], object]) -> Seen:
    seen: Seen = []
    # A copy: what comes later in the forward may write into an input.
    watch_inputs(together, called, lambda stage, inputs: seen.append((stage, inputs.clone())), run)
    return seen
