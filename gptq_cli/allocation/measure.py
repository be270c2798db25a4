"""Measure the harm of each unit: what it does to the predictions if it alone is rounded.

The unquantized model runs block by block. In its block, a unit is rounded at each width with the
Hessian of the unquantized inputs, and a few windows of text, the probe, run through the block with
the rounded unit. The copy of the probe at one width, the reference, is then carried through all
later blocks together with the clean probe; at the end the harm is the KL of its predictions to the
clean ones. No gradient is needed. The outputs of the block at the other widths scale this harm: it
grows with the square of the relative change of the hidden states.

One more copy for each width is rounded in all units. It shows how harms add up.

A copy holds `tokens` tokens of hidden states. `probe_shape` keeps the sum over all copies below the
calibration tokens, so that the forwards of all copies cost as much as those of calibration: linear
in the depth of the model, and with memory that does not grow with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_cli.allocation.harms import Measurement, carried_width
from gptq_cli.allocation.saved import MeasuredBlocks
from gptq_cli.allocation.units import Unit
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.evaluation.perplexity import Divergence
from gptq_cli.events import BlockStarted, Report, ignore
from gptq_cli.models.block_calls import Container, State
from gptq_cli.models.paused_forwards import Stage
from gptq_cli.models.skeleton import place
from gptq_cli.models.stream import LoadedBlock, ModelStream
from gptq_cli.planning.run_plan import HEAD, RunPlan
from gptq_cli.quantization.block_loop import (
    Forwards,
    block_forwards,
    gather_inputs,
    head_forwards,
)
from gptq_cli.quantization.layers import LayerSolver
from gptq_cli.quantization.routed_experts import RoutedInputs, quantize_experts
from gptq_cli.quantization.run_state import Limits, Record, Run
from gptq_cli.runtime.memory import block_finished
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.hessian import HessianAccumulator

Weights = dict[str, Tensor]
Gathered = Mapping[Stage, HessianAccumulator | RoutedInputs]

LEAST_TOKENS, MOST_TOKENS = 128, 4096  # of the probe
LONGEST_WINDOW = 256


def probe_shape(n_tokens: int, n_units: int, seqlen: int) -> tuple[int, int]:
    """Return the number of windows of the probe and their length.

    `n_tokens` are those of calibration. A copy lives in half of the blocks on average, so the
    copies of all units may have twice as many together.
    """
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, 2 * n_tokens // n_units))
    length = min(LONGEST_WINDOW, seqlen, tokens)
    return tokens // length, length


@dataclass(frozen=True, slots=True)
class Copy:
    """The probe in one model, between two blocks: its state, and what blocks pass on beside it."""

    state: State
    passed_on: Sequence[Any] = ()

    @property
    def data(self) -> tuple[State, Sequence[Any]]:
        """The two as plain values."""
        return self.state, self.passed_on


class Measuring:
    """A measurement from the first block to the last.

    `limits` end it early, between two blocks.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        plans: Mapping[int, RunPlan],
        units: Sequence[Unit],
        stream: ModelStream,
        ranks: Ranks,
        batches: Sequence[Tensor],
        probe: Tensor,
        report: Report = ignore,
        limits: Limits | None = None,
        carried: Sequence[int] = (),
    ) -> None:
        """Set up the measurement of `units` at the widths of `plans`.

        `batches` are the calibration batches, `probe` [windows, length] is text beside them.
        """
        self.report, self.stream = report, stream
        self.units, self.probe, self.ranks = units, probe, ranks
        self.widths = sorted(plans)
        self.limits = limits or Limits(config)
        self.carried = carried or [carried_width(self.widths)]
        plain = config.model_copy(update={"true_sequential": False})
        self.runs = {}
        for width, plan in plans.items():
            unlimited = Limits(config)
            record = Record(ignore)
            self.runs[width] = Run(plain, plan, stream, ranks, batches, record, unlimited)
        self.run = self.runs[self.widths[0]]
        self.found = Measurement()
        self.copies: dict[tuple[int, int], Copy] = {}  # by the number of the unit, and width
        self.uniform: dict[int, Copy] = {}

    def carry_out(self, saved: MeasuredBlocks | None = None) -> Measurement:
        """Return what was measured over all blocks and the head.

        Only the leader of several processes has a place where finished blocks are `saved`.
        """
        stream, run = self.stream, self.run
        share = self.ranks.share(len(run.batches))
        mine = run.batches[share.start : share.stop]
        *states, state = stream.embed([*mine, self.probe])
        hidden = HiddenStates(states, run.budget.memory, share.start, len(run.batches))
        self._batch = len(mine)  # the number of the probe in the stream
        self.clean = Copy(_on_host(state))
        self.uniform = dict.fromkeys(self.widths, self.clean)
        for index in range(self._restore(hidden, saved), stream.n_blocks):
            started = time.perf_counter()
            self.report(BlockStarted(index, stream.n_blocks, stream.block_name(index)))
            self.limits.check_time_for_block()
            with stream.block(index) as block, block_forwards(block, [hidden], run) as forwards:
                self._measure_block(block, forwards)
                forwards.finish()
            self._save(index, hidden, saved)
            done = block_finished(index, stream, started)
            self.report(done)
            self.limits.add_block(done.seconds)
        self._compare(self.clean, hidden)
        self._merge()
        return self.found

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
        probe, self.found = self.ranks.broadcast(probe)
        hidden.restore([of_batch for of_batch, _ in batches])
        for containers, (_, passed_on) in zip(self.stream.carried, batches, strict=False):
            _refill(containers, _moved(passed_on, self.stream.device))
        self.clean = Copy(*probe["clean"])
        self.uniform = {width: Copy(*copy) for width, copy in probe["uniform"]}
        for number, width, copy in probe["copies"]:
            if self._is_mine(number):
                self.copies[number, width] = Copy(*copy)
        return int(n_finished)

    def _save(self, block: int, hidden: HiddenStates, saved: MeasuredBlocks | None) -> None:
        """Save the blocks up to `block`, if it is time to; the end is saved as a result."""
        due = False
        if saved is not None and block + 1 < self.stream.n_blocks:
            due = saved.times.is_due(self.ranks.size * self._nbytes(hidden))
        (due,) = self.ranks.broadcast([due])
        if not due:
            return
        self._merge()
        passed_on = map(_contents_of, self.stream.carried)
        batches = self.ranks.gather(list(zip(hidden.stored, passed_on, strict=False)))
        mine = [(*key, copy.data) for key, copy in self.copies.items()]
        copies = self.ranks.gather(mine)
        if saved is not None:
            uniform = [(width, copy.data) for width, copy in self.uniform.items()]
            probe = {"clean": self.clean.data, "uniform": uniform, "copies": copies}
            saved.save(block, {"batches": batches, "probe": probe}, self.found)

    def _nbytes(self, hidden: HiddenStates) -> int:
        """Return the bytes of the hidden states of this process."""
        copies = [copy.state for copy in self.copies.values()]
        copies += [copy.state for copy in self.uniform.values()]
        return hidden.nbytes + sum(int(tensor.nbytes) for tensor in tree_leaves(copies))

    def _is_mine(self, number: int) -> bool:
        """Return whether this process carries the copies of unit `number`."""
        return number % self.ranks.size == self.ranks.rank

    def _measure_block(self, block: LoadedBlock, forwards: Forwards) -> None:
        """Carry all copies through `block`, and add those of its units."""
        clean = self.clean
        gathered = self._gather(forwards)
        for key, copy in self.copies.items():
            self.copies[key] = self._pass(block, copy)
        after = self._pass(block, clean)
        own = {}
        for number, unit in enumerate(self.units):
            if set(unit.layers) <= forwards.linears.keys():
                own[number] = unit
        for width in self.widths:
            with self._rounded(forwards, gathered, width) as swap:
                self.uniform[width] = self._pass(block, self.uniform[width])
                for number, unit in own.items():
                    if not self._is_mine(number):
                        continue
                    with swap(unit.layers):
                        copy = self._pass(block, clean)
                    change = _change(copy.state, after.state)
                    self.found.change.setdefault(unit.name, {})[width] = change
                    if width in self.carried:
                        self.copies[number, width] = copy
        self.clean = after

    def _gather(self, forwards: Forwards) -> Gathered:
        """Return what each stage sees over all calibration batches."""
        gathered: dict[Stage, HessianAccumulator | RoutedInputs] = {}
        for together in forwards.stages:
            for stage, inputs in gather_inputs(together, forwards, self.run).items():
                if isinstance(inputs, RoutedInputs):
                    gathered[stage] = inputs
                else:
                    gathered[stage] = self.ranks.sum_hessians(inputs, len(self.run.batches))
        return gathered

    @contextmanager
    def _rounded(
        self, forwards: Forwards, gathered: Gathered, width: int
    ) -> Iterator[Callable[[Sequence[str]], AbstractContextManager[None]]]:
        """Round all layers of `forwards` to `width` in the body; put the weights back at the end.

        The body gets a function whose context rounds only some layers.
        """
        run = self.runs[width]
        solver, linears = LayerSolver(run), forwards.linears
        before = _weights(linears)
        for stage, inputs in gathered.items():
            if isinstance(inputs, RoutedInputs):
                quantize_experts(inputs, linears, solver)
                continue
            layers = [run.layers[name] for name in stage.names]
            for solved in solver.solve(layers, inputs, self.ranks):
                solver.put_back(solved, linears)
        rounded = _weights(linears)

        @contextmanager
        def only(names: Sequence[str]) -> Iterator[None]:
            _place(linears, before | {name: rounded[name] for name in names})
            try:
                yield
            finally:
                _place(linears, rounded)

        try:
            yield only
        finally:
            _place(linears, before)

    def _pass(self, block: LoadedBlock, copy: Copy) -> Copy:
        """Return `copy` after `block`."""
        containers = self.stream.carried[self._batch]
        _refill(containers, _moved(copy.passed_on, self.stream.device))
        state = block.run(self._batch, _moved(copy.state, self.stream.device))
        return Copy(_on_host(state), _on_host(_contents_of(containers)))

    def _compare(self, clean: Copy, hidden: HiddenStates) -> None:
        """Note the KL of every copy, and of the head if it is a unit."""
        heads = self._round_head(hidden)
        with self.stream.head() as logits:
            for window in range(len(self.probe)):
                predict = partial(self._predict, logits, window)
                wanted = predict(clean)
                for (number, width), copy in self.copies.items():
                    alone = self.found.kl.setdefault(self.units[number].name, {})
                    self._add_kl(alone, width, wanted, predict(copy))
                for width, copy in self.uniform.items():
                    with _replaced(self.stream.output_linear, heads.get(width)):
                        self._add_kl(self.found.uniform, width, wanted, predict(copy))
                        if heads:
                            alone = self.found.change.setdefault(HEAD, {})
                            self._add_kl(alone, width, wanted, predict(clean))
        if heads:
            # Nothing follows the head: what it changes is its harm.
            change = self.found.change[HEAD]
            self.found.kl[HEAD] = {width: change[width] for width in self.carried}

    def _round_head(self, hidden: HiddenStates) -> dict[int, Tensor]:
        """Return the weight of the head at each width; nothing if the head is not a unit."""
        if HEAD not in self.run.layers:
            return {}
        with head_forwards([hidden], self.run) as forwards:
            (inputs,) = self._gather(forwards).values()
        assert isinstance(inputs, HessianAccumulator)
        found = {}
        for width, run in self.runs.items():
            (solved,) = LayerSolver(run).solve([run.layers[HEAD]], inputs, self.ranks)
            found[width] = solved.quantized.dequantize(self.stream.dtype)
        return found

    def _predict(
        self, logits: Callable[[Tensor, State], Tensor], window: int, copy: Copy
    ) -> Tensor:
        """Return the logits [length, V] of one window of a copy."""
        rows = slice(window, window + 1)
        state = tree_map_only(Tensor, lambda tensor: tensor[rows], copy.state)
        return logits(self.probe[rows], _moved(state, self.stream.device))[0]

    def _add_kl(self, sums: dict[int, float], width: int, wanted: Tensor, got: Tensor) -> None:
        """Add the share of one window to a mean KL."""
        divergence = Divergence()
        divergence.add(wanted, got)
        sums[width] = sums.get(width, 0.0) + divergence.kl / len(self.probe)

    def _merge(self) -> None:
        """Take over what the other processes have measured."""
        for found in self.ranks.all_gather([(self.found.kl, self.found.change)]):
            kl, change = found
            self.found.kl |= kl
            self.found.change |= change


@contextmanager
def _replaced(linear: nn.Module, weight: Tensor | None) -> Iterator[None]:
    """Give `linear` another weight in the body; None leaves it as it is."""
    before = linear.get_parameter("weight")
    if weight is not None:
        place(linear, "weight", weight)
    try:
        yield
    finally:
        place(linear, "weight", before)


def _weights(linears: Mapping[str, nn.Module]) -> Weights:
    return {name: linear.get_parameter("weight") for name, linear in linears.items()}


def _place(linears: Mapping[str, nn.Module], weights: Weights) -> None:
    for name, weight in weights.items():
        place(linears[name], "weight", weight)


def _change(state: State, clean: State) -> float:
    """Return the mean over tokens of the squared relative change of the hidden states."""
    changed, unchanged = _hidden(state).float(), _hidden(clean).float()
    squares = (changed - unchanged).square().sum(-1) / unchanged.square().sum(-1)
    return float(squares.mean())


def _hidden(state: State) -> Tensor:
    if isinstance(state, tuple):
        hidden: Tensor = state[0]
        return hidden
    return state


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
