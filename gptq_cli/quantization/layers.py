"""Solve layers that share an input: from their plan and Hessian to codes and reports.

The maths is in `solver/`: `factor.prepare` factorises the Hessian, `solve.solve_together` rounds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, groupby

import torch
from torch import Tensor, nn

from gptq_cli.config.layer import LayerConfig, keeping
from gptq_cli.errors import GateError, InputError
from gptq_cli.events import Fallback, LayerReport, LayerSolved, LayerStarted, Warned
from gptq_cli.models.skeleton import place
from gptq_cli.planning.estimate import has_shorter_shifts, rows_of_a_part
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.run_state import OutputGradients, Run
from gptq_cli.runtime.memory import give_back_freed_tensors
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.factor import (
    HessianFactor,
    NonFiniteHessianError,
    NotPositiveDefiniteError,
    follow_original,
    follow_together,
    prepare,
)
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.hessian import HessianAccumulator, mirror_
from gptq_cli.solver.numerics import uses_kernels
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.solve import Solution, solve_together

LOST_SHARE = 0.01  # warn of every layer with more of its scales at the smallest number
SUBNORMAL_SHARE = 0.5  # warn once of a layer with at least this share of subnormal scales

# `solve_together`, or what does its work
Way = Callable[[Sequence[Tensor], Tensor, HessianFactor, LayerConfig], list[Solution]]

# What is found for some rows, with the strengths of their corrections if they have any
Solved = tuple[Solution, Tensor | None]

# Of each expert those of both halves of the text, [I, I], or [O, I] of the rows of the only layer;
# none without asymmetric calibration
Shifts = Sequence[Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class SolvedLayer:
    """A solved layer: its plan, codes and report, and its numbers of small scales (see `Solution`).

    `windows` names the windows of the text with the first input that was not finite; "" if none.
    """

    layer: LayerPlan
    quantized: QuantizedLinear
    report: LayerReport
    windows: str
    subnormal: int
    smallest: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of the inputs of E experts of equal shapes; a dense layer is one expert.

    `first_not_finite` takes the number of an expert; see `HessianAccumulator.first_not_finite`.
    """

    hessians: Tensor  # [E, I, I]
    shifts: Shifts
    drifts: Sequence[Tensor]  # of the only layer [O, I], if its output is added to a residual
    tokens: Sequence[int]  # that each expert saw
    first_not_finite: Callable[[int], tuple[int, int] | None]
    shifts_of_rows: bool = False

    @classmethod
    def of(cls, seen: HessianAccumulator) -> Inputs:
        """Return the inputs of one layer, on the memory of their sums."""
        shifts = [seen.shifts] if seen.shifts else []
        return cls(
            seen.hessian[None],
            shifts,
            seen.drifts,
            [seen.tokens],
            lambda _: seen.first_not_finite(),
            seen.shifts_of_rows,
        )

    @classmethod
    def of_experts(
        cls,
        n_experts: int,
        sums: Iterable[HessianAccumulator],
        first_not_finite: Callable[[int], tuple[int, int] | None],
    ) -> Inputs:
        """Return the inputs of several experts; each of `sums` is copied, then dropped."""
        hessians: Tensor | None = None
        shifts, tokens = [], []
        for expert, seen in enumerate(sums):
            if hessians is None:
                hessians = seen.sums[0].new_empty(n_experts, seen.in_features, seen.in_features)
            seen.write_to(hessians[expert])
            if seen.shifts:
                shifts.append(seen.shifts)
            tokens.append(seen.tokens)
        assert hessians is not None
        return cls(mirror_(hessians), shifts, [], tokens, first_not_finite)


@dataclass(frozen=True, slots=True)
class UsableHessians:
    """Hessians [E, I, I] that layers can be solved with, their factor, shifts and drifts.

    `fallbacks` tell why the layers of each expert are rounded to nearest, or that they saw no
    tokens; None if neither.
    """

    hessians: Tensor
    shifts: Shifts
    drifts: Sequence[Tensor]
    factor: HessianFactor
    fallbacks: Sequence[Fallback | None]
    shifts_of_rows: bool


class LayerSolver:
    """Solves layers that share an input, puts the dequantized weights back and keeps the codes."""

    def __init__(self, run: Run) -> None:
        self.run, self.device = run, run.stream.device
        self.policy = run.config.fault_policy
        # The windows of each batch, to tell where in the text a fault lies
        self._batches = [len(batch) for batch in run.batches]
        self._warned_of_tokens = self._warned_of_subnormal = False
        self._lost: str | None = None  # the last layer whose weights were too small for its scales
        self._read: tuple[str, Tensor] | None = None  # the weight read last, of this layer

    def solve(
        self, experts: Sequence[Sequence[LayerPlan]], inputs: Inputs, ranks: Ranks
    ) -> Iterator[SolvedLayer]:
        """Solve the layers of each of the `experts`, whose shapes and configurations are equal.

        Dense layers that have seen the same inputs are those of one expert.

        Each of `ranks` solves some of the rows of every expert. Layers of one configuration are
        solved together, as the rows of one matrix. Raises GateError E_NUM_ACT or E_NUM_HESSIAN, or
        InputError E_CKPT_NONFINITE, with the name of the layer.
        """
        for together in zip(*map(of_one_configuration, experts), strict=True):
            started = time.perf_counter()
            config = together[0][0].config
            assert config is not None
            usable = self._prepare(together, inputs, config)
            most = rows_of_a_part(self.device.type, inputs.hessians.shape[-1])
            cut = [self._row_parts(layers, most) for layers in together]
            parts = [list(chain(*same)) for same in zip(*cut, strict=True)]
            owners = ranks.deal([sum(map(len, part)) for part in parts])
            mine: dict[int, list[Solved]] = {}
            for number, part in enumerate(parts):
                gradients = self._gradients_of(part)
                if owners[number] != ranks.rank:
                    continue
                with located([rows.layer for rows in part], list(map(len, part))):
                    weights, strengths = self._weights(part, usable, config)
                    solve_part = _way_to_solve(gradients, usable)
                    solutions = solve_part(weights, usable.hessians, usable.factor, config)
                    mine[number] = list(zip(solutions, strengths, strict=True))
            self._read = None
            found: dict[str, list[Solved]] = defaultdict(list)
            for part, results in zip(parts, ranks.exchange(mine, owners), strict=True):
                for rows, result in zip(part, results, strict=True):
                    found[rows.layer.name].append(result)
            n_rows = sum(layer.out_features for layer in chain(*together))
            followed = _strengths(config, found)
            seconds_per_row = (time.perf_counter() - started) / n_rows
            for expert, layers in enumerate(together):
                for layer in layers:
                    solution = Solution.of_rows([part for part, _ in found.pop(layer.name)])
                    solved = self._solved(layer, expert, solution, usable, inputs, seconds_per_row)
                    strength = followed.get(layer.name)
                    report = replace(solved.report, asymmetric_calibration=strength)
                    yield replace(solved, report=report)

    def _row_parts(self, layers: Sequence[LayerPlan], most: int) -> list[list[Rows]]:
        """Cut the rows of `layers`, except for those with gradients, each of which is one part."""
        parts = row_parts([layer for layer in layers if not self._has_gradients(layer)], most)
        for layer in layers:
            if self._has_gradients(layer):
                parts.append([Rows(layer, 0, layer.out_features)])
        return parts

    def _has_gradients(self, layer: LayerPlan) -> bool:
        return layer.sums_gradients and self.run.gradients is not None

    def _gradients_of(self, part: Sequence[Rows]) -> OutputGradients | None:
        """Return the gradients of the layer that is the `part`; every process must ask for them."""
        layer = part[0].layer
        if not self._has_gradients(layer):
            return None
        assert self.run.gradients is not None
        return self.run.gradients.of(layer)

    def put_back(self, solved: SolvedLayer, linears: Mapping[str, nn.Module]) -> None:
        """Replace the weight of the layer's linear with the dequantized weight."""
        dtype = linears[solved.layer.name].get_parameter("weight").dtype
        _place(solved.layer, linears, solved.quantized.dequantize(dtype))

    def put_back_together(
        self, solved: Sequence[SolvedLayer], linears: Mapping[str, nn.Module]
    ) -> None:
        """Do what `put_back` does for layers that share their groups, on CUDA in few launches."""
        if self.device.type == "cpu":
            for layer in solved:
                self.put_back(layer, linears)
            return
        for _, same in groupby(solved, lambda layer: (layer.layer.in_features, layer.layer.config)):
            alike = list(same)
            whole = QuantizedLinear.of_rows([layer.quantized for layer in alike])
            dtype = linears[alike[0].layer.name].get_parameter("weight").dtype
            weights = whole.dequantize(dtype).split([layer.layer.out_features for layer in alike])
            for layer, weight in zip(alike, weights, strict=True):
                _place(layer.layer, linears, weight)

    def finish(self, solved: Sequence[SolvedLayer]) -> None:
        """Keep the codes, report the layers and warn of what a user should know about them.

        Raises GateError E_NUM_FALLBACKS if too many layers were rounded to nearest.
        """
        self.run.keep([(layer.layer, layer.quantized) for layer in solved])
        for layer in solved:
            self._warn_of_inputs(layer)
            self._warn_of_scales(layer)
            self.run.report(LayerSolved(layer.report))
            self.run.limits.check_fallbacks([layer.report])

    def _prepare(
        self, together: Sequence[Sequence[LayerPlan]], inputs: Inputs, config: LayerConfig
    ) -> UsableHessians:
        """Report the start of the layers of all experts and return what they are solved with."""
        for layer in chain(*together):
            self.run.report(LayerStarted(layer.name))
        self.run.limits.check_time()
        first_layers = [layers[0] for layers in together]
        windows, dtype = partial(self._windows, inputs), self.run.stream.dtype
        with located(first_layers, windows=windows, dtype=dtype):
            usable = self._usable(inputs, config)
        if self.device.type == "cpu":
            give_back_freed_tensors()  # of forwards and of factorising: solving wants as much
        return usable

    def _solved(
        self,
        layer: LayerPlan,
        expert: int,
        solution: Solution,
        usable: UsableHessians,
        inputs: Inputs,
        seconds_per_row: float,
    ) -> SolvedLayer:
        assert layer.config is not None
        fallback, factor = usable.fallbacks[expert], usable.factor
        windows = ""
        if fallback == "inputs":
            windows = self._windows(inputs, expert)
        report = LayerReport(
            name=layer.name,
            block=layer.block,
            bits=layer.config.bits,
            group_size=layer.config.group_size,
            relative_error=solution.relative_error,
            rtn_relative_error=solution.rtn_relative_error,
            rtn_rows=solution.sampled_rows,
            damp_percent=factor.damp_percent[expert],
            damp_retries=factor.retries[expert],
            dead_columns=factor.dead_columns[expert],
            loss_ratio=solution.loss_ratio,
            tokens=inputs.tokens[expert],
            seconds=seconds_per_row * layer.out_features,
            fallback=fallback,
        )
        small = (solution.subnormal, solution.smallest)
        return SolvedLayer(layer, solution.quantized, report, windows, *small)

    def _usable(self, inputs: Inputs, config: LayerConfig) -> UsableHessians:
        """Return the Hessians of `inputs` with their factor.

        If an expert has none and the policy allows it, it gets the identity instead: its layers are
        then rounded to nearest.
        """
        hessians, tokens = inputs.hessians, list(inputs.tokens)
        shifts, drifts = inputs.shifts, inputs.drifts
        fallbacks = [_without_tokens(seen) for seen in tokens]
        while True:
            try:
                factor = prepare(hessians, config, tokens)
            except (NonFiniteHessianError, NotPositiveDefiniteError) as error:
                if self.policy.on_numeric_fault == "error":
                    raise
                hessians, shifts = _forgotten(hessians, shifts, error.experts)
                drifts = []  # there is one layer if there are any
                for expert in error.experts:
                    fallbacks[expert], tokens[expert] = _reason(error), 0
            else:
                return UsableHessians(
                    hessians, shifts, drifts, factor, fallbacks, inputs.shifts_of_rows
                )

    def _weights(
        self, part: Sequence[Rows], usable: UsableHessians, config: LayerConfig
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the weights [rows, in_features] to quantize, corrected if the layers want it.

        The second list has the strengths [rows] of the corrections, None for weights without one.
        """
        weights = [self._whole(rows.layer)[rows.start : rows.stop] for rows in part]
        if not config.follows_original or not usable.shifts:
            return weights, [None] * len(weights)
        if len(usable.shifts) > 1 and uses_kernels(usable.hessians):
            return _followed_together(weights, usable, config)
        strengths: list[Tensor | None] = []
        per_expert = len(part) // len(usable.shifts)
        for number, weight in enumerate(weights):
            expert = number // per_expert
            shifts, factor = usable.shifts[expert], usable.factor.of(expert)
            rows, strength = part[number], config.asymmetric_calibration
            mine, of_rows = slice(rows.start, rows.stop), usable.shifts_of_rows
            if of_rows:
                shifts = [shift[mine] for shift in shifts]
            drifts = [drift[mine] for drift in usable.drifts]
            followed = follow_original(weight, shifts, factor, strength, drifts, of_rows=of_rows)
            weights[number] = followed[0]
            strengths.append(followed[1])
        return weights, strengths

    def _whole(self, layer: LayerPlan) -> Tensor:
        if self._read is None or self._read[0] != layer.name:
            self._read = None  # so that two weights are never held at once
            weight = self.run.stream.linear_weight(layer.name, transposed=layer.transposed)
            self._read = (layer.name, weight)
        return self._read[1]

    def _warn(self, code: str, text: str) -> None:
        self.run.report(Warned(code, text))

    def _warn_of_inputs(self, solved: SolvedLayer) -> None:
        """Warn if the layer was rounded to nearest, or of its inputs' number and range."""
        layer, report = solved.layer, solved.report
        name = f"layer `{layer.name}`"
        if report.fallback == "inputs":
            why = f"its inputs hold NaN or infinity{solved.windows}"
            self._warn("W_NUM_FALLBACK", f"{name} was rounded to nearest: {why}")
        elif report.fallback == "hessian":
            why = "its Hessian is not positive definite"
            self._warn("W_NUM_FALLBACK", f"{name} was rounded to nearest: {why}")
        if 0 < report.tokens < layer.in_features and not self._warned_of_tokens:
            self._warned_of_tokens = True
            seen = f"saw {report.tokens} calibration tokens for {layer.in_features} inputs"
            self._warn("W_NUM_TOKENS", f"{name} {seen}; others may have as few")
        if report.damp_retries:
            raised = f"damp_percent was raised to {report.damp_percent:g}"
            why = "to make its Hessian positive definite"
            self._warn("W_NUM_DAMPING", f"layer `{layer.name}`: {raised} {why}")
        if report.dead_columns:
            dead = f"{report.dead_columns} of {layer.in_features} inputs were always zero"
            text = f"layer `{layer.name}`: {dead}, their weights become zero"
            if self._lost:
                text += f"; `{self._lost}` before it has lost weights"
            self._warn("W_NUM_DEAD", text)

    def _warn_of_scales(self, solved: SolvedLayer) -> None:
        """Warn of scales that are too small for float16; a group of zeros has no such scale."""
        layer, n_scales = solved.layer, solved.quantized.scales.numel()
        subnormal, smallest = solved.subnormal, solved.smallest
        if not subnormal:
            return
        small = f"layer `{layer.name}` has so small weights that"
        if smallest > LOST_SHARE * n_scales:
            self._lost = layer.name
            lost = (
                f"{smallest} of {n_scales} scales are held at 2^-24, the smallest number of float16"
            )
            error = f"its relative error is {solved.report.relative_error:.2g}"
            self._warn("W_NUM_SCALES", f"{small} {lost}; {error}")
        elif subnormal >= SUBNORMAL_SHARE * n_scales and not self._warned_of_subnormal:
            self._warned_of_subnormal = True
            below = f"{subnormal} of {n_scales} scales are below 2^-14"
            flushed = "which makes them subnormal in float16; hardware that flushes such numbers"
            others = "reads zeros; other layers may have them, too"
            self._warn("W_NUM_SCALES", f"{small} {below}, {flushed} {others}")

    def _windows(self, inputs: Inputs, expert: int) -> str:
        """Name the windows of the text, counted from 1, with the first input that is not finite."""
        found = inputs.first_not_finite(expert)
        if found is None:
            return ""
        addition, n_additions = found
        # A layer may be called several times for each batch.
        batch = addition * len(self._batches) // n_additions
        first = 1 + sum(self._batches[:batch])
        last = first + self._batches[batch] - 1
        if first == last:
            return f", first in window {first}"
        return f", first in one of the windows {first} to {last}"


def weight_for_shifts(layer: LayerPlan, linear: nn.Module) -> Tensor | None:
    """Return the weight [O, I] of a layer with inputs of its own, if shifts of its rows cost less.

    None on the CPU, and if the forward is not in bfloat16, in which differences are exact enough.
    """
    weight = linear.get_parameter("weight")
    if weight.is_cuda and weight.dtype == torch.bfloat16 and has_shorter_shifts(layer):
        return weight
    return None


def _way_to_solve(gradients: OutputGradients | None, usable: UsableHessians) -> Way:
    """Return `solve_together`, or what does its work for the only weight of a part with gradients.

    A layer that is to be rounded to nearest does without them.
    """
    if gradients is None or usable.fallbacks[0] is not None:
        return solve_together
    return partial(_solve_with, gradients)


def _solve_with(
    gradients: OutputGradients,
    weights: Sequence[Tensor],
    hessians: Tensor,
    factor: HessianFactor,
    config: LayerConfig,
) -> list[Solution]:
    from gptq_cli.solver.two_sided import solve_in_row_blocks

    [weight], [hessian] = weights, hessians
    sums, tokens = gradients.sums, gradients.tokens
    return [solve_in_row_blocks(weight, hessian, factor.of(0), config, sums, tokens)]


def _place(layer: LayerPlan, linears: Mapping[str, nn.Module], weight: Tensor) -> None:
    if layer.transposed:
        weight = weight.T
    place(linears[layer.name], "weight", weight)


def _without_tokens(tokens: int) -> Fallback | None:
    if tokens:
        return None
    return "tokens"


def _reason(error: NonFiniteHessianError | NotPositiveDefiniteError) -> Fallback:
    if isinstance(error, NonFiniteHessianError):
        return "inputs"
    return "hessian"


def _forgotten(hessians: Tensor, shifts: Shifts, experts: Sequence[int]) -> tuple[Tensor, Shifts]:
    """Return Hessians and shifts with nothing known of the inputs of `experts`."""
    hessians = hessians.clone()
    hessians[experts] = torch.eye(hessians.shape[-1], device=hessians.device).to(hessians.dtype)
    known = list(shifts)
    for expert in experts:
        if known:
            known[expert] = [torch.zeros_like(shift) for shift in known[expert]]
    return hessians, known


def _followed_together(
    weights: Sequence[Tensor], usable: UsableHessians, config: LayerConfig
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the corrected weights of several experts, as many of each, and their strengths."""
    sizes = list(map(len, weights))
    stack = torch.cat(list(weights)).unflatten(0, (len(usable.shifts), -1))
    strength = config.asymmetric_calibration
    followed, strengths = follow_together(stack, usable.shifts, usable.factor, strength)
    return [*followed.flatten(0, 1).split(sizes)], [*strengths.flatten().split(sizes)]


def _strengths(config: LayerConfig, found: Mapping[str, Sequence[Solved]]) -> dict[str, float]:
    """Return by name the strength with which each layer follows the unquantized model, if it does.

    If the text has decided it, this is the mean over the rows of the layer. The host waits once.
    """
    of_rows: dict[str, list[Tensor]] = {}
    for name, parts in found.items():
        known = [strengths for _, strengths in parts if strengths is not None]
        if known:
            of_rows[name] = known
    if config.asymmetric_calibration != "auto":
        return dict.fromkeys(of_rows, float(config.asymmetric_calibration))
    if not of_rows:
        return {}
    on_host = torch.cat(list(chain(*of_rows.values()))).cpu()
    sizes = [sum(map(len, parts)) for parts in of_rows.values()]
    means = [float(mine.mean()) for mine in on_host.split(sizes)]
    return dict(zip(of_rows, means, strict=True))


def of_one_configuration(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Return `layers` in lists of one configuration each, in the order of their first layers."""
    together: dict[LayerConfig | None, list[LayerPlan]] = {}
    for layer in layers:
        together.setdefault(layer.config, []).append(layer)
    return list(together.values())


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start..stop of a layer."""

    layer: LayerPlan
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def row_parts(layers: Sequence[LayerPlan], most: int) -> list[list[Rows]]:
    """Cut the rows of `layers` into parts of `most` rows; the last part may have fewer."""
    parts: list[list[Rows]] = []
    free = 0
    for layer in layers:
        start = 0
        while start < layer.out_features:
            if not free:
                parts.append([])
                free = most
            stop = min(layer.out_features, start + free)
            parts[-1].append(Rows(layer, start, stop))
            free -= stop - start
            start = stop
    return parts


@contextmanager
def located(
    together: Sequence[LayerPlan],
    rows: Sequence[int] = (),
    windows: Callable[[int], str] = str,
    dtype: torch.dtype | None = None,
) -> Iterator[None]:
    """Turn an error of the solver in the body into one that names its layer and gives advice.

    An error of a Hessian belongs to the layer of `together` with the number of its first expert.
    `rows` are the numbers of rows of the layers in `together`; `windows` returns the place in the
    text of the first input of an expert that was not finite. `dtype` is that of the inputs.
    """
    try:
        yield
    except NonFiniteHessianError as error:
        expert = error.experts[0]
        hint = "round such layers to nearest: --on-numeric-fault rtn"
        if dtype != torch.float32:
            hint = f"run the model in float32: --dtype float32, or {hint}"
        raise GateError(
            "E_NUM_ACT",
            f"layer `{together[expert].name}`: its inputs hold NaN or infinity{windows(expert)}",
            hint=hint,
        ) from error
    except NotPositiveDefiniteError as error:
        layer = together[error.experts[0]]
        keep = f"keep it: {keeping([layer.name]).option}"
        raise GateError(
            "E_NUM_HESSIAN",
            f"layer `{layer.name}`: {error}",
            hint=f"use more calibration text, or {keep}, or --on-numeric-fault rtn",
        ) from error
    except ScaleRangeError as error:
        ends = accumulate(rows)
        owner = next(layer for layer, end in zip(together, ends, strict=True) if error.row < end)
        keep = keeping([owner.name]).option
        raise InputError(
            "E_CKPT_NONFINITE",
            f"layer `{owner.name}`: its weights are not finite or beyond the range of float16",
            hint=f"keep the layer: {keep}; if it is not finite, download the checkpoint again",
        ) from error
