"""Measure the harm of each unit with copies: what it does to predictions if it alone is rounded.

This is for models whose gradient cannot be computed block by block (see `first_order.py`).

The unquantized model runs block by block. In its block, a unit is rounded at one width, the
reference, with the Hessian of the unquantized inputs, and a few windows of text, the probe, run
through the block with the rounded unit. This copy of the probe is then carried through all later
blocks together with the clean probe. At the end, the harm of the unit is the KL of the copy's
predictions to the clean ones. No gradient is needed. One more copy is rounded in all units; it
shows how harms add up.

`probe_shape` keeps the tokens of all copies together at the number of calibration tokens at most.
Thus the forwards of copies cost half of those of calibration, linear in the depth of the model, and
the memory does not grow with the depth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_cli.allocation.harms import Measurement
from gptq_cli.allocation.rounding import (
    Gathered,
    put_weights,
    replaced,
    round_layers,
    rounded_head,
    run_batches,
    weights_of,
)
from gptq_cli.allocation.saved import MeasuredBlocks
from gptq_cli.allocation.units import Unit
from gptq_cli.calibration.windows import Windows
from gptq_cli.config.layer import HEAD
from gptq_cli.events import BlockStarted, Report, ignore
from gptq_cli.models.block_calls import Container, State
from gptq_cli.models.stream import LoadedBlock
from gptq_cli.quantization.block_loop import Forwards, block_forwards
from gptq_cli.quantization.layers import LayerSolver
from gptq_cli.quantization.run_state import Limits, Run
from gptq_cli.runtime.memory import block_finished
from gptq_cli.runtime.open_model import HiddenStates

LEAST_TOKENS, MOST_TOKENS = 96, 4096  # of the probe
LEAST_WINDOWS, LONGEST_WINDOW = 2, 256


def probe_shape(n_tokens: int, n_units: int, seqlen: int) -> tuple[int, int]:
    """Return the number of windows of the probe and their length; `n_tokens` are of calibration."""
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, n_tokens // n_units))
    n_windows = max(LEAST_WINDOWS, -(-tokens // min(LONGEST_WINDOW, seqlen)))
    return n_windows, tokens // n_windows


@dataclass(frozen=True, slots=True)
class Copy:
    """The probe in one model, between two blocks: its state, and what blocks pass on beside it."""

    state: State
    passed_on: Sequence[Any] = ()

    @property
    def data(self) -> tuple[State, Sequence[Any]]:
        """The two as plain values."""
        return self.state, self.passed_on


@dataclass(frozen=True, slots=True)
class Wanted:
    """The predictions of the clean model, which serve all copies; `predicted` [w, length] count."""

    log_p: Tensor  # [w, length, V]
    p: Tensor
    predicted: Tensor

    @classmethod
    def of(cls, log_p: Tensor, predicted: Tensor) -> Wanted:
        """Return the predictions with these logarithms of probabilities."""
        return cls(log_p, log_p.exp(), predicted.to(log_p.device))

    def kl(self, log_q: Tensor) -> float:
        """Return the sum of the KL of `log_q` [w, length, V], which this overwrites."""
        difference = torch.sub(self.log_p, log_q, out=log_q)
        of_tokens = difference.mul_(self.p).sum(-1)
        return float(of_tokens[self.predicted].sum())


class Copying:
    """A measurement with copies, from the first block to the last.

    `run` has the plan in which every layer is rounded as for the measurement, and the calibration
    batches, for which linears compute in `dtype`. `probe` is text beside them, of which zeros
    behind its windows do not count. `limits` end the measurement early, between two blocks.
    """

    def __init__(
        self,
        run: Run,
        units: Sequence[Unit],
        probe: Windows,
        dtype: torch.dtype,
        report: Report = ignore,
        limits: Limits | None = None,
    ) -> None:
        self.run, self.units, self.probe, self.report = run, units, probe.ids, report
        self._dtype = dtype
        self._predicted = _predicted(probe)
        self.stream, self.ranks = run.stream, run.ranks
        self.limits = limits or Limits(run.config)
        self.solver = LayerSolver(run)
        self.found = Measurement(tokens=probe.tokens)
        self.copies: dict[int, Copy] = {}  # by the number of the unit
        self._batch = 0  # the number of the probe in the stream

    def carry_out(self, saved: MeasuredBlocks | None = None) -> Measurement:
        """Return what was measured over all blocks and the head.

        Only the leader of several processes has a place where finished blocks are `saved`.
        """
        stream, run = self.stream, self.run
        share = self.ranks.share(len(run.batches))
        mine = run.batches[share.start : share.stop]
        *states, state = stream.embed([*mine, self.probe])
        hidden = HiddenStates(states, run.budget.memory, share.start, len(run.batches))
        self._batch = len(mine)
        self.clean = self.uniform = Copy(_on_host(state))
        for index in range(self._restore(hidden, saved), stream.n_blocks):
            started = time.perf_counter()
            self.report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
            self.limits.check_time_together(self.ranks)
            with stream.block(index) as block, block_forwards(block, [hidden], run) as forwards:
                self._measure_block(block, forwards, hidden)
            self._save(index, hidden, saved)
            done = block_finished(index, stream, started)
            self.report(done)
            self.limits.add_block(done.seconds)
        self._compare(hidden)
        self._merge()
        return self.found

    # ------------------------------------------------------------ one block

    def _measure_block(self, block: LoadedBlock, forwards: Forwards, hidden: HiddenStates) -> None:
        """Carry everything through `block`, and add the copies of its units."""
        with self._in_dtype(forwards.linears.values()):
            gathered = run_batches(forwards, hidden, self.run)
        for number, copy in self.copies.items():
            self.copies[number] = self._pass(block, copy)
        before, self.clean = self.clean, self._pass(block, self.clean)
        with self._rounded(forwards, gathered) as only:
            self.uniform = self._pass(block, self.uniform)
            for number, unit in enumerate(self.units):
                if self._is_mine(number) and set(unit.layers) <= forwards.linears.keys():
                    with only(unit.layers):
                        self.copies[number] = self._pass(block, before)

    @contextmanager
    def _in_dtype(self, linears: Collection[nn.Module]) -> Iterator[None]:
        """Let linears compute in the dtype of the run; all that is between them stays as it is."""
        other = self._dtype != self.stream.dtype
        casting = torch.autocast(self.stream.device.type, self._dtype, enabled=other)
        for linear in linears:
            linear.forward = _with(casting, linear.forward)
        try:
            yield
        finally:
            for linear in linears:
                del linear.forward

    @contextmanager
    def _rounded(
        self, forwards: Forwards, gathered: Gathered
    ) -> Iterator[Callable[[Sequence[str]], AbstractContextManager[None]]]:
        """Round all layers of `forwards` in the body; put the weights back at the end.

        The body gets a function whose context rounds only some layers.
        """
        linears = forwards.linears
        before = weights_of(linears)
        round_layers(gathered, linears, self.solver)
        rounded = weights_of(linears)

        @contextmanager
        def only(names: Sequence[str]) -> Iterator[None]:
            put_weights(linears, before | {name: rounded[name] for name in names})
            try:
                yield
            finally:
                put_weights(linears, rounded)

        try:
            yield only
        finally:
            put_weights(linears, before)

    def _pass(self, block: LoadedBlock, copy: Copy) -> Copy:
        """Return `copy` after `block`."""
        containers = self.stream.carried[self._batch]
        _refill(containers, _moved(copy.passed_on, self.stream.device))
        state = block.run(self._batch, _moved(copy.state, self.stream.device))
        return Copy(_on_host(state), _on_host(_contents_of(containers)))

    def _is_mine(self, number: int) -> bool:
        """Return whether this process carries the copy of unit `number`."""
        return number % self.ranks.size == self.ranks.rank

    # ------------------------------------------------------------ after the last block

    def _compare(self, hidden: HiddenStates) -> None:
        """Note the KL of every copy, and of the head if it is a unit."""
        head = rounded_head(hidden, self.solver)
        with self.stream.head() as logits:
            for rows in self._windows_together():
                predict = partial(self._predict, logits, rows)
                wanted = Wanted.of(predict(self.clean), self._predicted[rows])
                for number, copy in self.copies.items():
                    self._add_kl(self.units[number].name, wanted, predict(copy))
                with replaced(self.stream.output_linear, head):
                    self.found.uniform += self._share(wanted, predict(self.uniform))
                    if head is not None:
                        self._add_kl(HEAD, wanted, predict(self.clean))

    def _windows_together(self) -> Iterator[slice]:
        """Yield the windows whose logits are in memory together: one, or a few short ones."""
        n_windows, length = self.probe.shape
        step = max(1, LONGEST_WINDOW // length)
        for first in range(0, n_windows, step):
            yield slice(first, first + step)

    def _predict(
        self, logits: Callable[[Tensor, State], Tensor], rows: slice, copy: Copy
    ) -> Tensor:
        """Return the logarithms of the probabilities [w, length, V] in some windows of a copy."""
        state = tree_map_only(Tensor, lambda tensor: tensor[rows], copy.state)
        found = logits(self.probe[rows], _moved(state, self.stream.device))
        return found.float().log_softmax(-1)

    def _add_kl(self, name: str, wanted: Wanted, got: Tensor) -> None:
        self.found.kl[name] = self.found.kl.get(name, 0.0) + self._share(wanted, got)

    def _share(self, wanted: Wanted, got: Tensor) -> float:
        """Return what some windows add to the mean KL of all predicted tokens."""
        return wanted.kl(got) / max(1, int(self._predicted.sum()))

    def _merge(self) -> None:
        """Take over what the other processes have measured."""
        found: dict[str, float] = {}
        for kl in self.ranks.all_gather([self.found.kl]):
            found |= kl
        self.found.kl = dict(sorted(found.items()))

    # ------------------------------------------------------------ resuming

    def _restore(self, hidden: HiddenStates, saved: MeasuredBlocks | None) -> int:
        """Load what is `saved`; return the number of finished blocks."""
        n_finished: int = 0
        batches: Any = None
        probe: Any = None
        if saved is not None:
            n_finished, batches, probe = saved.read()
        n_finished = self.ranks.broadcast([n_finished])[0]
        if not n_finished:
            return 0
        batches = self.ranks.scatter(batches, hidden.n_all)
        probe = self.ranks.broadcast(probe)
        hidden.restore([of_batch for of_batch, _ in batches])
        for containers, (_, passed_on) in zip(self.stream.carried, batches, strict=False):
            _refill(containers, _moved(passed_on, self.stream.device))
        self.clean, self.uniform = Copy(*probe["clean"]), Copy(*probe["uniform"])
        for number, copy in probe["copies"]:
            if self._is_mine(number):
                self.copies[number] = Copy(*copy)
        return n_finished

    def _save(self, block: int, hidden: HiddenStates, saved: MeasuredBlocks | None) -> None:
        """Save the blocks up to `block`, if it is time to; the end is saved as a result."""
        due = False
        if saved is not None and block + 1 < self.stream.n_blocks:
            due = saved.times.is_due(self.ranks.size * self._nbytes(hidden))
        (due,) = self.ranks.broadcast([due])
        if not due:
            return
        passed_on = map(_contents_of, self.stream.carried)
        batches = self.ranks.gather(list(zip(hidden.stored, passed_on, strict=False)))
        copies = self.ranks.gather([(number, copy.data) for number, copy in self.copies.items()])
        if saved is not None:
            probe = {"clean": self.clean.data, "uniform": self.uniform.data, "copies": copies}
            saved.save(block, {"batches": batches, "probe": probe})

    def _nbytes(self, hidden: HiddenStates) -> int:
        """Return the bytes of the hidden states of this process."""
        copies = [copy.state for copy in self.copies.values()]
        return hidden.nbytes + sum(int(tensor.nbytes) for tensor in tree_leaves(copies))


def _predicted(probe: Windows) -> Tensor:
    """Return which tokens [windows, length] predict a next one: neither the last nor padding."""
    n_windows, length = probe.ids.shape
    lengths = torch.tensor(probe.lengths or (length,) * n_windows)
    return torch.arange(length) < lengths[:, None] - 1


def _with(
    casting: AbstractContextManager[Any], forward: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return the forward of a linear in a context; its outputs have the dtype of its inputs."""

    def cast(inputs: Tensor) -> Tensor:
        with casting:
            return forward(inputs).to(inputs.dtype)

    return cast


def _moved(state: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), state)


def _on_host(state: Any) -> Any:
    return _moved(state, torch.device("cpu"))


def _contents_of(containers: Sequence[Container]) -> list[Any]:
    """Return the contents of containers, in new ones."""
    found: list[Any] = []
    for container in containers:
        if isinstance(container, MutableMapping):
            found.append(dict(container))
        else:
            found.append(list(container))
    return found


def _refill(containers: Sequence[Container], contents: Sequence[Any]) -> None:
    """Replace the contents of containers; before the first block there are none."""
    for container in containers:
        container.clear()
    for container, of_container in zip(containers, contents, strict=False):
        if isinstance(container, MutableMapping):
            container.update(of_container)
        else:
            container.extend(of_container)
