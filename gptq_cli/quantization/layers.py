"""Solve layers that share an input: from their plan and Hessian to codes and reports.

The maths is in `solver/`: `factor.prepare` factorises the Hessian, `solve.solve_together` rounds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from torch import Tensor, nn

from gptq_cli.config.layer import LayerConfig, keeping
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

LOST_SHARE = 0.01  # warn of every layer with more of its scales at the smallest number
SUBNORMAL_SHARE = 0.5  # warn once of a layer with at least this share of subnormal scales


@dataclass(frozen=True, slots=True)
class SolvedLayer:
    """A solved layer: its plan, codes and report.

    `windows` names the windows of the text with the first input that was not finite; "" if none.
    """

    layer: LayerPlan
    quantized: QuantizedLinear
    report: LayerReport
    windows: str


@dataclass(frozen=True, slots=True)
class UsableHessian:
    """A Hessian that layers can be solved with, and its factor.

    `fallback` tells why the layer is rounded to nearest, or that it saw no tokens; None if neither.
    """

    inputs: HessianAccumulator
    factor: HessianFactor
    fallback: Fallback | None


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
        self, layers: Sequence[LayerPlan], inputs: HessianAccumulator, ranks: Ranks
    ) -> Iterator[SolvedLayer]:
        """Solve `layers`, which have all seen `inputs`; each of `ranks` solves some of their rows.

        Raises GateError E_NUM_ACT or E_NUM_HESSIAN, or InputError E_CKPT_NONFINITE, with the name
        of the layer. Layers of one configuration are solved together, as the rows of one matrix.
        """
        for together in of_one_configuration(layers):
            started = time.perf_counter()
            config = together[0].config
            assert config is not None
            usable = self._prepare(together, inputs, config)
            parts = row_parts(together, ROWS_OF_A_PART[self.device.type])
            owners = ranks.deal([sum(map(len, part)) for part in parts])
            mine: dict[int, list[Solution]] = {}
            for number, part in enumerate(parts):
                if owners[number] != ranks.rank:
                    continue
                with located([rows.layer for rows in part], list(map(len, part))):
                    weights = [self._weight(rows, usable) for rows in part]
                    hessian = usable.inputs.hessian
                    mine[number] = solve_together(weights, hessian, usable.factor, config)
            self._read = None
            found: dict[str, list[Solution]] = defaultdict(list)
            for part, solutions in zip(parts, ranks.exchange(mine, owners), strict=True):
                for rows, solution in zip(part, solutions, strict=True):
                    found[rows.layer.name].append(solution)
            n_rows = sum(layer.out_features for layer in together)
            seconds_per_row = (time.perf_counter() - started) / n_rows
            for layer in together:
                solution = Solution.of_rows(found.pop(layer.name))
                yield self._solved(layer, solution, usable, inputs, seconds_per_row)

    def put_back(self, solved: SolvedLayer, linears: Mapping[str, nn.Module]) -> None:
        """Replace the weight of the layer's linear with the dequantized weight."""
        linear = linears[solved.layer.name]
        weight = solved.quantized.dequantize(linear.get_parameter("weight").dtype)
        if solved.layer.transposed:
            weight = weight.T
        place(linear, "weight", weight)

    def finish(self, solved: SolvedLayer) -> None:
        """Keep the codes, report the layer and warn of what a user should know about it.

        Raises GateError E_NUM_FALLBACKS if too many layers were rounded to nearest.
        """
        self.run.keep(solved.layer, solved.quantized)
        self._warn_of_inputs(solved)
        self._warn_of_scales(solved)
        self.run.report(LayerSolved(solved.report))
        self.run.limits.check_fallbacks([solved.report])

    def _prepare(
        self, together: Sequence[LayerPlan], inputs: HessianAccumulator, config: LayerConfig
    ) -> UsableHessian:
        """Report the start of the layers and return what they are solved with."""
        for layer in together:
            self.run.report(LayerStarted(layer.name))
        self.run.limits.check_time()
        with located(together, windows=partial(self._windows, inputs)):
            usable = self._usable(inputs, config)
        if self.device.type == "cpu":
            give_back_freed_tensors()  # of forwards and of factorising: solving wants as much
        return usable

    def _solved(
        self,
        layer: LayerPlan,
        solution: Solution,
        usable: UsableHessian,
        inputs: HessianAccumulator,
        seconds_per_row: float,
    ) -> SolvedLayer:
        assert layer.config is not None
        windows = ""
        if usable.fallback == "inputs":
            windows = self._windows(inputs)
        report = LayerReport(
            name=layer.name,
            block=layer.block,
            bits=layer.config.bits,
            group_size=layer.config.group_size,
            relative_error=solution.relative_error,
            rtn_relative_error=solution.rtn_relative_error,
            rtn_rows=solution.sampled_rows,
            damp_percent=usable.factor.damp_percent[0],
            damp_retries=usable.factor.retries[0],
            dead_columns=usable.factor.dead_columns[0],
            tokens=inputs.tokens,
            seconds=seconds_per_row * layer.out_features,
            fallback=usable.fallback,
        )
        return SolvedLayer(layer, solution.quantized, report, windows)

    def _usable(self, inputs: HessianAccumulator, config: LayerConfig) -> UsableHessian:
        """Return `inputs` with their factor.

        If they have none and the policy allows it, return the identity instead: the layer is then
        rounded to nearest.
        """
        try:
            factor = prepare(inputs.hessian, config, inputs.tokens)
        except (NonFiniteHessianError, NotPositiveDefiniteError) as error:
            if self.policy.on_numeric_fault == "error":
                raise
            fallback: Fallback = "hessian"
            if isinstance(error, NonFiniteHessianError):
                fallback = "inputs"
            unknown = HessianAccumulator(inputs.in_features, self.device)
            unknown.add_identity()
            return UsableHessian(
                unknown, prepare(unknown.hessian, config, unknown.tokens), fallback
            )
        if not inputs.tokens:
            return UsableHessian(inputs, factor, "tokens")
        return UsableHessian(inputs, factor, None)

    def _weight(self, rows: Rows, usable: UsableHessian) -> Tensor:
        """Return the weights [rows, in_features] to quantize, corrected if the layer wants it."""
        config, shift = rows.layer.config, usable.inputs.shift
        assert config is not None
        weight = self._whole(rows.layer)[rows.start : rows.stop]
        if config.asymmetric_calibration and shift is not None:
            return follow_original(weight, shift, usable.factor, config.asymmetric_calibration)
        return weight

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
        name = _where(layer)
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
        layer, sizes = solved.layer, solved.quantized.scales.abs()
        n_scales = sizes.numel()
        subnormal = int((sizes < SMALLEST_NORMAL).sum())
        if not subnormal:
            return
        smallest = int((sizes == SMALLEST).sum())
        small = f"{_where(layer)} has so small weights that"
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

    def _windows(self, inputs: HessianAccumulator) -> str:
        """Name the windows of the text, counted from 1, with the first input that is not finite."""
        found = inputs.first_not_finite()
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


def _where(layer: LayerPlan) -> str:
    return f"layer `{layer.name}` (block {layer.block})"


@contextmanager
def located(
    together: Sequence[LayerPlan], rows: Sequence[int] = (), windows: Callable[[], str] = str
) -> Iterator[None]:
    """Turn an error of the solver in the body into one that names its layer and gives advice.

    `rows` are the numbers of rows of the layers in `together`; `windows` returns the place in the
    text of the first input that was not finite.
    """
    first = _where(together[0])
    keep = f"keep it: {keeping([together[0].name]).option}"
    try:
        yield
    except NonFiniteHessianError as error:
        raise GateError(
            "E_NUM_ACT",
            f"{first}: its inputs hold NaN or infinity{windows()}",
            hint="run the model in float32: --dtype float32, "
            "or round such layers: --on-numeric-fault rtn",
        ) from error
    except NotPositiveDefiniteError as error:
        raise GateError(
            "E_NUM_HESSIAN",
            f"{first}: {error}",
            hint=f"use more calibration text, or {keep}, or --on-numeric-fault rtn",
        ) from error
    except ScaleRangeError as error:
        ends = accumulate(rows)
        owner = next(layer for layer, end in zip(together, ends, strict=True) if error.row < end)
        keep = keeping([owner.name]).option
        raise InputError(
            "E_CKPT_NONFINITE",
            f"{_where(owner)}: its weights are not finite or beyond the range of float16",
            hint=f"keep the layer: {keep}; if it is not finite, download the checkpoint again",
        ) from error
