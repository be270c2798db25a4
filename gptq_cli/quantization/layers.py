"""Layers that share an input, solved: from the plan's layer and its Hessian to codes, a report and a located error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from torch import Tensor, nn

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import keeping
from gptq_cli.errors import GateError, InputError
from gptq_cli.events import Fallback, LayerReport, LayerSolved, LayerStarted, Warned
from gptq_cli.models.skeleton import place
from gptq_cli.planning.estimate import ROWS_OF_A_PART
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.run_state import Run
from gptq_cli.runtime.memory import give_back_freed_tensors
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.factor import (
    HessianFactor,
    NonFiniteHessianError,
    NotPositiveDefiniteError,
    follow_original,
    prepare,
)
from gptq_cli.solver.float16 import SMALLEST, SMALLEST_NORMAL
from gptq_cli.solver.grid import ScaleRangeError
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.quantized_linear import QuantizedLinear
from gptq_cli.solver.solve import Solution, solve_together

LOST_SHARE = 0.01  # of a layer's scales at the smallest number: it gets a warning of its own
SUBNORMAL_SHARE = 0.5  # of a layer's scales: somebody should know, once


@dataclass(frozen=True, slots=True)
class SolvedLayer:
    """A layer, what became of it, and in which windows of the text its inputs were not finite, if so."""

    layer: LayerPlan
    quantized: QuantizedLinear
    report: LayerReport
    windows: str


@dataclass(frozen=True, slots=True)
class UsableHessian:
    """What layers are solved with: inputs that can be worked with, their factor, and why they are not those seen."""

    inputs: HessianAccumulator
    factor: HessianFactor
    fallback: Fallback | None


class LayerSolver:
    """Solves layers that share an input, puts the dequantized weights back and hands the codes to `run.keep`."""

    def __init__(self, run: Run) -> None:
        self.run, self.device = run, run.stream.device
        self.policy = run.config.fault_policy
        self._batches = [
            len(batch) for batch in run.batches
        ]  # windows in each, to say where a fault lies
        self._told_few = self._told_subnormal = False
        self._lost: str | None = None  # the last layer whose weights were too small for its scales
        self._read: tuple[str, Tensor] | None = None  # the layer whose rows were solved last

    def solve(
        self,
        layers: Sequence[LayerPlan],
        linears: Mapping[str, nn.Module],
        inputs: HessianAccumulator,
    ) -> None:
        """Quantize `layers`, all of which have seen `inputs`, each process some of their rows."""
        for solved in self.solutions(layers, inputs, self.run.ranks):
            self.put_back(solved, linears)
            self.finish(solved)

    def solutions(
        self, layers: Sequence[LayerPlan], inputs: HessianAccumulator, ranks: Ranks
    ) -> Iterator[SolvedLayer]:
        """Solve `layers`, whose rows `ranks` share; all of them have the same `inputs`."""
        for together in of_one_configuration(layers):
            started = time.perf_counter()
            config = together[0].config
            assert config is not None
            for layer in together:
                self.run.report(LayerStarted(layer.name))
            self.run.limits.check_time()
            with located(together, windows=partial(self._windows, inputs)):
                usable = self._usable(inputs, config)
            if self.device.type == "cpu":
                give_back_freed_tensors()  # of forwards and of factorising: solving wants as much
            parts = row_parts(together, ROWS_OF_A_PART[self.device.type])
            solve = partial(self._solve_part, parts, usable, config)
            found: dict[str, list[Solution]] = {layer.name: [] for layer in together}
            for number, solutions, _ in ranks.map_units(
                solve, [sum(map(len, part)) for part in parts]
            ):
                for rows, solution in zip(parts[number], solutions, strict=True):
                    found[rows.layer.name].append(solution)
            self._read = None
            seconds = (time.perf_counter() - started) / sum(
                layer.out_features for layer in together
            )
            for layer in together:
                solution = Solution.of_rows(found.pop(layer.name))
                report = _report_of(
                    layer, config, solution, usable, inputs.tokens, seconds * layer.out_features
                )
                windows = self._windows(inputs) if usable.fallback == "inputs" else ""
                yield SolvedLayer(layer, solution.quantized, report, windows)

    def put_back(self, solved: SolvedLayer, linears: Mapping[str, nn.Module]) -> None:
        """Let the linear compute with what its codes stand for."""
        linear = linears[solved.layer.name]
        dequantized = solved.quantized.dequantize(linear.get_parameter("weight").dtype)
        place(linear, "weight", dequantized.T if solved.layer.transposed else dequantized)

    def finish(self, solved: SolvedLayer) -> None:
        """Keep the codes and tell what became of the layer."""
        self.run.keep(solved.layer, solved.quantized)
        self._warn(solved)
        self.run.report(LayerSolved(solved.report))
        self.run.limits.check_fallbacks([solved.report])

    def _solve_part(
        self,
        parts: Sequence[Sequence[Rows]],
        usable: UsableHessian,
        config: LayerConfig,
        number: int,
    ) -> list[Solution]:
        with located([rows.layer for rows in parts[number]], list(map(len, parts[number]))):
            weights = [self._weight(rows, usable) for rows in parts[number]]
            return solve_together(weights, usable.inputs.hessian, usable.factor, config)

    def _usable(self, inputs: HessianAccumulator, config: LayerConfig) -> UsableHessian:
        """`inputs` and their factor; where these are of no use and the policy allows it, as if nothing were known."""
        try:
            return UsableHessian(
                inputs,
                prepare(inputs.hessian, config, inputs.tokens),
                None if inputs.tokens else "tokens",
            )
        except (NonFiniteHessianError, NotPositiveDefiniteError) as error:
            if self.policy.on_numeric_fault == "error":
                raise
            unknown = HessianAccumulator(inputs.in_features, self.device)
            unknown.add_identity()
            factor = prepare(unknown.hessian, config, unknown.tokens)
            return UsableHessian(
                unknown, factor, "inputs" if isinstance(error, NonFiniteHessianError) else "hessian"
            )

    def _weight(self, rows: Rows, usable: UsableHessian) -> Tensor:
        layer = rows.layer
        assert layer.config is not None
        weight = self._whole(layer)[rows.start : rows.stop]
        if layer.config.asymmetric_calibration and usable.inputs.shift is not None:
            return follow_original(
                weight, usable.inputs.shift, usable.factor, layer.config.asymmetric_calibration
            )
        return weight

    def _whole(self, layer: LayerPlan) -> Tensor:
        if self._read is None or self._read[0] != layer.name:
            self._read = None  # before another takes its place
            self._read = (
                layer.name,
                self.run.stream.linear_weight(layer.name, transposed=layer.transposed),
            )
        return self._read[1]

    def _warn(self, solved: SolvedLayer) -> None:
        layer, report = solved.layer, solved.report
        if report.fallback in ("inputs", "hessian"):
            not_finite = f"its inputs hold NaN or infinity{solved.windows}"
            why = (
                not_finite
                if report.fallback == "inputs"
                else "its Hessian is not positive definite"
            )
            self.run.report(
                Warned("W_NUM_FALLBACK", f"{_where(layer)} was rounded to nearest: {why}")
            )
        if 0 < report.tokens < layer.in_features and not self._told_few:
            self._told_few = True
            few = f"saw {report.tokens} calibration tokens for {layer.in_features} inputs; others may have as few"
            self.run.report(Warned("W_NUM_TOKENS", f"{_where(layer)} {few}"))
        if report.damp_retries:
            used = f"damp_percent was raised to {report.damp_percent:g} to make its Hessian positive definite"
            self.run.report(Warned("W_NUM_DAMPING", f"layer `{layer.name}`: {used}"))
        if report.dead_columns:
            seen = f"{report.dead_columns} of {layer.in_features} inputs were always zero, their weights become zero"
            before = f"; `{self._lost}` before it has lost weights" if self._lost else ""
            self.run.report(Warned("W_NUM_DEAD", f"layer `{layer.name}`: {seen}{before}"))
        self._warn_of_scales(solved)

    def _warn_of_scales(self, solved: SolvedLayer) -> None:
        """Tell of scales that are too small for float16; a group of zeros has none of them."""
        layer, sizes = solved.layer, solved.quantized.scales.abs()
        subnormal = int((sizes < SMALLEST_NORMAL).sum())
        smallest = int((sizes == SMALLEST).sum()) if subnormal else 0
        if smallest > LOST_SHARE * sizes.numel():
            self._lost = layer.name
            held = f"{smallest} of {sizes.numel()} scales are held at 2^-24, the smallest number of float16"
            error = f"its relative error is {solved.report.relative_error:.2g}"
            self.run.report(
                Warned("W_NUM_SCALES", f"{_where(layer)} has so small weights that {held}; {error}")
            )
        elif subnormal >= SUBNORMAL_SHARE * sizes.numel() and not self._told_subnormal:
            self._told_subnormal = True
            small = f"{subnormal} of {sizes.numel()} scales are below 2^-14, which makes them subnormal in float16"
            others = (
                "hardware that flushes such numbers reads zeros; other layers may have them, too"
            )
            self.run.report(
                Warned(
                    "W_NUM_SCALES", f"{_where(layer)} has so small weights that {small}; {others}"
                )
            )

    def _windows(self, inputs: HessianAccumulator) -> str:
        """Where in the calibration text, counted from 1, something first was not finite."""
        found = inputs.first_not_finite()
        if found is None:
            return ""
        addition, n_additions = found
        batch = (
            addition * len(self._batches) // n_additions
        )  # a layer may be called several times for each batch
        first = 1 + sum(self._batches[:batch])
        last = first + self._batches[batch] - 1
        return (
            f", first in window {first}"
            if first == last
            else f", first in one of the windows {first} to {last}"
        )


def of_one_configuration(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers with the same input by configuration."""
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
    """The rows of `layers`, one after the other, in parts of `most` rows; the last one may have fewer."""
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


def _report_of(
    layer: LayerPlan,
    config: LayerConfig,
    solution: Solution,
    usable: UsableHessian,
    tokens: int,
    seconds: float,
) -> LayerReport:
    return LayerReport(
        name=layer.name,
        block=layer.block,
        bits=config.bits,
        group_size=config.group_size,
        relative_error=solution.relative_error,
        rtn_relative_error=solution.rtn_relative_error,
        damp_percent=usable.factor.damp_percent,
        damp_retries=usable.factor.retries,
        dead_columns=usable.factor.dead_columns,
        tokens=tokens,
        seconds=seconds,
        fallback=usable.fallback,
    )


def _where(layer: LayerPlan) -> str:
    return f"layer `{layer.name}` (block {layer.block})"


@contextmanager
def located(
    together: Sequence[LayerPlan], rows: Sequence[int] = (), windows: Callable[[], str] = str
) -> Iterator[None]:
    """Turn what the maths refuses into an error that names the layer, of several with so many `rows` each.

    `windows` says where in the text an input was not finite.
    """
    first = together[0]
    try:
        yield
    except NonFiniteHessianError as error:
        raise GateError(
            "E_NUM_ACT", f"{_where(first)}: its inputs hold NaN or infinity{windows()}",
            hint="run the model in float32: --dtype float32, or round such layers: --on-numeric-fault rtn",
        ) from error  # fmt: skip
    except NotPositiveDefiniteError as error:
        raise GateError(
            "E_NUM_HESSIAN", f"{_where(first)}: {error}",
            hint=f"use more calibration text, or keep it: {keeping([first.name])[1]}, or --on-numeric-fault rtn",
        ) from error  # fmt: skip
    except ScaleRangeError as error:
        ends = accumulate(rows)
        owner = next(layer for layer, end in zip(together, ends, strict=True) if error.row < end)
        raise InputError(
            "E_CKPT_NONFINITE", f"{_where(owner)}: its weights are not finite or beyond the range of float16",
            hint=f"keep the layer: {keeping([owner.name])[1]}; if it is not finite, download the checkpoint again",
        ) from error  # fmt: skip
