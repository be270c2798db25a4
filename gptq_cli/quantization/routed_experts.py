"""Quantize mixtures of experts: each expert is calibrated on the tokens that it is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from statistics import median

import torch
from torch import Tensor, nn

from gptq_cli.errors import GateError
from gptq_cli.events import ExpertsCovered
from gptq_cli.models.experts import Expert, Experts, Routed, on_device
from gptq_cli.planning.estimate import (
    EXPERTS_AT_ONCE,
    expert_cost,
    experts_at_once,
    routed_bytes,
)
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.layers import Inputs, LayerSolver, SolvedLayer
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from gptq_cli.solver.hessian import HessianAccumulator, limit_parts_

LISTED = 8  # experts that an error names


@dataclass(frozen=True, slots=True)
class RoutedInputs:
    """The inputs of the experts of a block, batch by batch, in the quantized model first.

    If there is a second model, it is the unquantized one; the router of the first model decides
    which tokens an expert gets. Inputs are kept, not Hessians, so that one Hessian lives at a time.
    """

    name: str  # the prefix of the names of the experts' linears
    experts: Sequence[Experts]  # of each model
    limited: bool = False  # as for HessianAccumulator
    batches: list[tuple[Routed, ...]] = field(default_factory=list)
    joined: Sequence[int] = ()  # the tokens of each batch, if they were joined into one

    def add(self, batch: int, *inputs: Routed) -> None:
        """Add the inputs of one batch in each model; batches come in order."""
        del batch  # the signature is that of HessianOfBatches.add
        self.batches.append(inputs)

    def join(self) -> RoutedInputs:
        """Return the same inputs as those of one batch, so that an expert needs one sum."""
        tokens = [self.experts[0].n_tokens(first) for first, *_ in self.batches]
        whole = []
        for experts, batches in zip(self.experts, zip(*self.batches, strict=True), strict=True):
            whole.append(experts.joined(batches))
        return replace(self, batches=[tuple(whole)], joined=tokens)

    def rows(self) -> list[tuple[Tensor, ...]]:
        """Return the rows that each expert is sent, one tensor for each batch."""
        return list(zip(*(self.experts[0].rows(first) for first, *_ in self.batches), strict=True))

    def hessian(
        self, number: int, rows: Sequence[Tensor], device: torch.device, *, down: bool
    ) -> HessianAccumulator:
        """Return the Hessian of `rows` of the batches in expert `number`.

        With `down` it is that of the inputs of down_proj, else that of the inputs of the expert.
        """
        expert = self.experts[0][number]
        in_features = expert.up_proj.in_features
        if down:
            in_features = expert.down_proj.in_features
        hessian = HessianAccumulator(in_features, device, limited=self.limited)
        for place, (batch, mine) in enumerate(zip(self.batches, rows, strict=True)):
            inputs = _taken(batch, mine)
            if down:
                for model, experts in enumerate(self.experts):
                    inputs[model] = experts.intermediate(number, inputs[model])
            first, *others = inputs
            hessian.add(first, next(iter(others), None), half=place % 2)
        return hessian

    def hessians(
        self,
        numbers: Sequence[int],
        rows: Sequence[Tensor],
        device: torch.device,
        *,
        down: bool,
        most_bytes: int,
    ) -> Iterator[HessianAccumulator]:
        """Yield the Hessians of the experts `numbers`, of inputs that were joined.

        `rows` are those of each expert. Inputs are taken for as many experts at a time as have
        `most_bytes` of them, and for one at least.
        """
        widths = [batch.hidden.shape[1] * batch.hidden.itemsize for batch in self.batches[0]]
        for places in _portions(list(map(len, rows)), most_bytes // sum(widths)):
            yield from self._hessians(numbers[places], rows[places], device, down=down)

    def _hessians(
        self, numbers: Sequence[int], rows: Sequence[Tensor], device: torch.device, *, down: bool
    ) -> Iterator[HessianAccumulator]:
        counts = list(map(len, rows))
        inputs = _taken(self.batches[0], torch.cat(list(rows)))
        if down:
            for model, experts in enumerate(self.experts):
                inputs[model] = experts.intermediates(numbers, inputs[model], counts)
        if self.limited:
            limit_parts_(inputs[0], next(iter(inputs[1:]), None), on_device(counts, device))
        for mine in zip(*(tokens.split(counts) for tokens in inputs), strict=True):
            hessian = HessianAccumulator(inputs[0].shape[1], device)
            hessian.add(*mine)
            yield hessian

    def first_not_finite(
        self, number: int, rows: Tensor, device: torch.device, *, down: bool
    ) -> tuple[int, int] | None:
        """Return `HessianAccumulator.first_not_finite` for `rows` of batches that were joined.

        The inputs of expert `number` are summed once more, then batch by batch.
        """
        tokens = rows % sum(self.joined)
        of_batches, start = [], 0
        for count in self.joined:
            of_batches.append(rows[(tokens >= start) & (tokens < start + count)])
            start += count
        apart = replace(self, batches=self.batches * len(of_batches))
        return apart.hessian(number, of_batches, device, down=down).first_not_finite()


def quantize_experts(
    inputs: RoutedInputs, linears: Mapping[str, nn.Module], solver: LayerSolver
) -> None:
    """Solve the planned layers of all experts; each of the ranks solves some of the experts.

    Experts with equal shapes and configurations are solved together, as many as the device takes.
    With `true_sequential` down_proj sees the outputs of quantized gate_proj and up_proj. Raises
    GateError E_NUM_EXPERT if an expert is sent no token and the policy is "error".
    """
    run = solver.run
    inputs = replace(inputs, batches=run.ranks.all_gather(inputs.batches))
    if EXPERTS_AT_ONCE[solver.device.type] > 1:
        inputs = inputs.join()
    rows = inputs.rows()
    tokens = [sum(map(len, batches)) for batches in rows]
    report_coverage(inputs.name, tokens, solver)
    planned = [_planned(expert, run.layers, linears) for expert in inputs.experts[0]]
    groups = []
    for alike in _neighbours_alike(planned):
        most = experts_at_once(
            planned[alike[0]].layers, solver.device.type, run.config.max_vram_bytes
        )
        groups += [alike[start : start + most] for start in range(0, len(alike), most)]
    costs = []
    for group in groups:
        costs.append(sum(expert_cost(planned[expert].layers, tokens[expert]) for expert in group))

    def solve(number: int) -> list[SolvedLayer]:
        group = groups[number]
        experts = _Group(inputs, group, [rows[expert] for expert in group], solver)
        return experts.solve([planned[expert] for expert in group], linears)

    for solved_layers, is_mine in run.ranks.map_units(solve, costs):
        if not is_mine:
            for solved in solved_layers:
                solver.put_back(solved, linears)
        solver.finish(solved_layers)


@dataclass(frozen=True, slots=True)
class _Planned:
    """The layers of an expert to quantize: those that see its inputs, and down_proj, if planned."""

    first: Sequence[LayerPlan]
    down: Sequence[LayerPlan]

    @property
    def layers(self) -> list[LayerPlan]:
        return [*self.first, *self.down]

    def part(self, *, down: bool) -> Sequence[LayerPlan]:
        """Return the layers that see the inputs of down_proj, or those of the expert."""
        if down:
            return self.down
        return self.first

    @property
    def kind(self) -> list[tuple[object, ...]]:
        """What is equal in experts that are solved together."""
        n_first: tuple[object, ...] = (len(self.first),)
        shapes = [(layer.out_features, layer.in_features, layer.config) for layer in self.layers]
        return [n_first, *shapes]


def _planned(
    expert: Expert, layers: Mapping[str, LayerPlan], linears: Mapping[str, nn.Module]
) -> _Planned:
    own = set(expert.children())
    found: dict[bool, list[LayerPlan]] = {False: [], True: []}
    for name, linear in linears.items():
        if name in layers and linear in own:
            found[linear is expert.down_proj].append(layers[name])
    return _Planned(found[False], found[True])


def _neighbours_alike(planned: Sequence[_Planned]) -> list[list[int]]:
    """Return the numbers of experts of one kind that follow each other, in one list each."""
    return [list(alike) for _, alike in groupby(range(len(planned)), lambda n: planned[n].kind)]


@dataclass(frozen=True, slots=True)
class _Group:
    """Experts of one kind that are solved together, by their numbers.

    `rows` are those that each expert is sent, one tensor for each batch.
    """

    inputs: RoutedInputs
    experts: Sequence[int]
    rows: Sequence[Sequence[Tensor]]
    solver: LayerSolver

    def solve(
        self, planned: Sequence[_Planned], linears: Mapping[str, nn.Module]
    ) -> list[SolvedLayer]:
        """Solve the layers of all experts, down_proj last, and put their weights back.

        Return them expert by expert.
        """
        parts = []
        for down in (False, True):
            layers = [expert.part(down=down) for expert in planned]
            if layers[0]:
                parts.append((down, layers))
        steps = [parts]  # both parts see the experts as they were
        if self.solver.run.config.true_sequential:
            steps = [[part] for part in parts]
        found: dict[str, SolvedLayer] = {}
        for step in steps:
            seen = [self._seen(down=down) for down, _ in step]
            solved: list[SolvedLayer] = []
            for _, layers in step:
                solved += self.solver.solve(layers, seen.pop(0), SINGLE_PROCESS)
            self.solver.put_back_together(solved, linears)
            found |= {layer.layer.name: layer for layer in solved}
        in_order = chain(*(expert.layers for expert in planned))
        return [found[layer.name] for layer in in_order]

    def _seen(self, *, down: bool) -> Inputs:
        """Return what the experts have seen; with `down` it is the inputs of their down_proj."""
        rows, device = [self._rows(place) for place in range(len(self.experts))], self.solver.device
        if not self.inputs.joined:
            (number,), (mine,) = self.experts, rows
            alone = self.inputs.hessian(number, mine, device, down=down)
            return Inputs.of(_identity_if_unseen(alone))
        joined = [whole for (whole,) in rows]

        def first_not_finite(place: int) -> tuple[int, int] | None:
            number = self.experts[place]
            return self.inputs.first_not_finite(number, joined[place], device, down=down)

        most = routed_bytes(self.solver.run.config.max_vram_bytes)
        sums = self.inputs.hessians(self.experts, joined, device, down=down, most_bytes=most)
        return Inputs.of_experts(
            len(self.experts), map(_identity_if_unseen, sums), first_not_finite
        )

    def _rows(self, place: int) -> Sequence[Tensor]:
        """Return the rows that calibrate an expert: those it is sent, or all if it is sent none."""
        rows = self.rows[place]
        if any(map(len, rows)) or self.solver.policy.moe_uncovered != "all-tokens":
            return rows
        device = self.solver.device
        return [torch.arange(len(first.hidden), device=device) for first, *_ in self.inputs.batches]


def _identity_if_unseen(hessian: HessianAccumulator) -> HessianAccumulator:
    """Return the Hessian of an expert; without tokens it is made to round to nearest."""
    if not hessian.tokens:
        hessian.add_identity()
    return hessian


def _portions(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Yield slices of `counts` whose sums are `most` or less, or that have one number."""
    start, held = 0, 0
    for place, count in enumerate(counts):
        if place > start and held + count > most:
            yield slice(start, place)
            start, held = place, 0
        held += count
    yield slice(start, len(counts))


def report_coverage(name: str, tokens: Sequence[int], solver: LayerSolver) -> None:
    """Report how many tokens each expert of the layer `name` was sent.

    Raises GateError E_NUM_EXPERT if an expert was sent none and the policy is "error".
    """
    uncovered = tuple(number for number, seen in enumerate(tokens) if not seen)
    solver.run.report(ExpertsCovered(name, tuple(tokens), min(tokens), median(tokens), uncovered))
    if not uncovered or solver.policy.moe_uncovered != "error":
        return
    listed = ", ".join(map(str, uncovered[:LISTED]))
    if len(uncovered) > LISTED:
        listed += ", ..."
    count = f"{len(uncovered)} of {len(tokens)} experts of `{name}`"
    raise GateError(
        "E_NUM_EXPERT",
        f"{count} were sent no calibration token: {listed}",
        hint="use more or other text (--nsamples, --dataset), or --moe-uncovered rtn or all-tokens",
    )


def _taken(batch: Sequence[Routed], rows: Tensor) -> list[Tensor]:
    """Return the same rows in each model.

    If the unquantized model sends no such token, the token of the quantized model stands in.
    """
    first, *others = (routed.hidden[rows] for routed in batch)
    if batch[0].experts is None:  # the other model's absent tokens are rows of zeros
        others = [torch.where(other.any(-1, keepdim=True), other, first) for other in others]
    return [first, *others]
