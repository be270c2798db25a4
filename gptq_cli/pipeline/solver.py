"""Layers that share an input, solved: from the plan's layer and its Hessian to codes, a report and a located error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from torch import Tensor, nn

from gptq_cli.config.layer import LayerConfig, Uncovered
from gptq_cli.engine.asymmetric import follow_original
from gptq_cli.engine.factor import NonFiniteHessianError, NotPositiveDefiniteError, Prepared, prepare
from gptq_cli.engine.grid import ScaleRangeError
from gptq_cli.engine.hessian import HessianAccumulator
from gptq_cli.engine.layer import QuantizedLinear
from gptq_cli.engine.solve import Solution, solve_together
from gptq_cli.errors import GateError, InputError
from gptq_cli.models.skeleton import place
from gptq_cli.models.stream import ModelStream
from gptq_cli.pipeline.events import LayerReport, LayerSolved, LayerStarted, Report, Warned
from gptq_cli.pipeline.plan import LayerPlan
from gptq_cli.pipeline.team import ALONE, Team

# Rows that one process solves at a time. Everybody cuts alike, so that products have the same shape, and the same bits,
# whoever multiplies them. Smaller parts balance better among processes; larger ones fill an accelerator.
ROWS_OF_A_PART = {"cpu": 1024, "cuda": 4096}

Keep = Callable[[LayerPlan, QuantizedLinear], None]


@dataclass(frozen=True, slots=True)
class Solved:
    """A layer, what became of it, and what there is to say about that."""

    layer: LayerPlan
    quantized: QuantizedLinear
    report: LayerReport
    warnings: tuple[Warned, ...]


class LayerSolver:
    """Solves layers that share an input, puts the dequantized weights back and hands the codes to `keep`."""

    def __init__(
        self, stream: ModelStream, keep: Keep, report: Report, moe_uncovered: Uncovered, team: Team = ALONE
    ) -> None:
        self._stream, self._keep, self.report = stream, keep, report
        self.moe_uncovered, self.team = moe_uncovered, team
        self.device = stream.device

    def solve(self, layers: Sequence[LayerPlan], linears: Mapping[str, nn.Module], inputs: HessianAccumulator) -> None:
        """Quantize `layers`, all of which have seen `inputs`, each process some of their rows."""
        for solved in self.solutions(layers, inputs, self.team):
            self.put_back(solved, linears)
            self.finish(solved)

    def solutions(self, layers: Sequence[LayerPlan], inputs: HessianAccumulator, team: Team) -> Iterator[Solved]:
        """What becomes of `layers` if `team` solves them; all of its processes have the same `inputs`."""
        hessian = inputs.hessian
        for together in of_one_configuration(layers):
            started = time.perf_counter()
            config = together[0].config
            assert config is not None
            for layer in together:
                self.report(LayerStarted(layer.name))
            with located(together):
                factor = prepare(hessian, config, inputs.tokens)
            parts = row_parts(together, ROWS_OF_A_PART[self.device.type])
            solve = partial(self._solve_part, parts, inputs, factor, config)
            found: dict[str, list[Solution]] = {layer.name: [] for layer in together}
            for number, solutions, _ in team.shared(solve, [sum(rows.number for rows in part) for part in parts]):
                for rows, solution in zip(parts[number], solutions, strict=True):
                    found[rows.layer.name].append(solution)
            seconds = (time.perf_counter() - started) / sum(layer.out_features for layer in together)
            for layer in together:
                solution = Solution.of_rows(found.pop(layer.name))
                report = _report_of(layer, config, solution, factor, inputs.tokens, seconds * layer.out_features)
                yield Solved(layer, solution.quantized, report, tuple(_warnings(layer, factor)))

    def put_back(self, solved: Solved, linears: Mapping[str, nn.Module]) -> None:
        """Let the linear compute with what its codes stand for."""
        linear = linears[solved.layer.name]
        dequantized = solved.quantized.dequantize(linear.get_parameter("weight").dtype)
        place(linear, "weight", dequantized.T if solved.layer.transposed else dequantized)

    def finish(self, solved: Solved) -> None:
        """Keep the codes and tell what became of the layer."""
        self._keep(solved.layer, solved.quantized)
        for warning in solved.warnings:
            self.report(warning)
        self.report(LayerSolved(solved.report))

    def _solve_part(
        self, parts: Sequence[Sequence[Rows]], inputs: HessianAccumulator, factor: Prepared, config: LayerConfig, n: int
    ) -> list[Solution]:
        with located([rows.layer for rows in parts[n]], [rows.number for rows in parts[n]]):
            weights = [self._weight(rows, inputs, factor) for rows in parts[n]]
            return solve_together(weights, inputs.hessian, factor, config)

    def _weight(self, rows: Rows, inputs: HessianAccumulator, factor: Prepared) -> Tensor:
        layer = rows.layer
        assert layer.config is not None
        weight = self._stream.stored_weight(layer.name)
        weight = (weight.T if layer.transposed else weight)[rows.start : rows.stop].to(self.device)
        if layer.config.asymmetric_calibration and inputs.shift is not None:
            return follow_original(weight, inputs.shift, factor, layer.config.asymmetric_calibration)
        return weight


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

    @property
    def number(self) -> int:
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
    layer: LayerPlan, config: LayerConfig, solution: Solution, factor: Prepared, tokens: int, seconds: float
) -> LayerReport:
    return LayerReport(
        name=layer.name,
        block=layer.block,
        bits=config.bits,
        group_size=config.group_size,
        relative_error=solution.relative_error,
        rtn_relative_error=solution.rtn_relative_error,
        damp_percent=factor.damp_percent,
        damp_retries=factor.retries,
        dead_columns=factor.dead_columns,
        tokens=tokens,
        seconds=seconds,
    )


def _warnings(layer: LayerPlan, factor: Prepared) -> Iterator[Warned]:
    if factor.retries:
        used = f"damp_percent was raised to {factor.damp_percent:g} to make its Hessian positive definite"
        yield Warned("W_NUM_DAMPING", f"layer `{layer.name}`: {used}")
    if factor.dead_columns:
        seen = f"{factor.dead_columns} of {layer.in_features} inputs were always zero, their weights become zero"
        yield Warned("W_NUM_DEAD", f"layer `{layer.name}`: {seen}")


def _where(layer: LayerPlan) -> str:
    return f"layer `{layer.name}` (block {layer.block})"


@contextmanager
def located(together: Sequence[LayerPlan], rows: Sequence[int] = ()) -> Iterator[None]:
    """Turn what the maths refuses into an error that names the layer, of several with so many `rows` solved as one."""
    first = together[0]
    try:
        yield
    except NonFiniteHessianError as error:
        raise GateError(
            "E_NUM_ACT",
            f"{_where(first)}: its inputs hold NaN or infinity",
            hint="run the model in float32 or bfloat16: --dtype float32",
        ) from error
    except NotPositiveDefiniteError as error:
        raise GateError(
            "E_NUM_HESSIAN", f"{_where(first)}: {error}",
            hint=f"use more calibration text, or keep the layer: --dynamic '-:{first.name}'",
        ) from error  # fmt: skip
    except ScaleRangeError as error:
        ends = accumulate(rows)
        owner = next(layer for layer, end in zip(together, ends, strict=True) if error.row < end)
        raise InputError(
            "E_CKPT_NONFINITE", f"{_where(owner)}: its weights are not finite or beyond the range of float16",
            hint="download the checkpoint again, or keep the layer with --dynamic",
        ) from error  # fmt: skip
