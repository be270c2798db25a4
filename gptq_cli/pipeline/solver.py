"""Layers that share an input, solved: from the plan's layer and its Hessian to codes, a report and a located error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn

from gptq_cli.config.layer import FaultPolicy, LayerConfig
from gptq_cli.engine.asymmetric import follow_original
from gptq_cli.engine.factor import NonFiniteHessianError, NotPositiveDefiniteError, Prepared, prepare
from gptq_cli.engine.grid import ScaleRangeError
from gptq_cli.engine.hessian import HessianAccumulator
from gptq_cli.engine.layer import QuantizedLinear
from gptq_cli.engine.solve import Solution, solve_together
from gptq_cli.errors import GateError, InputError
from gptq_cli.models.skeleton import place
from gptq_cli.models.stream import ModelStream
from gptq_cli.pipeline.events import Fallback, LayerReport, LayerSolved, LayerStarted, Report, Warned
from gptq_cli.pipeline.plan import LayerPlan

# Rows of layers with one input are solved as those of one layer: up to 0.5 GB for a float32 copy of them.
WEIGHTS_TOGETHER = 2**27

Keep = Callable[[LayerPlan, QuantizedLinear], None]


@dataclass(frozen=True, slots=True)
class Usable:
    """What layers are solved with: inputs that can be worked with, their factor, and why they are not those seen."""

    inputs: HessianAccumulator
    factor: Prepared
    fallback: Fallback | None


class LayerSolver:
    """Solves layers that share an input, puts the dequantized weights back and hands the codes to `keep`.

    `batches` is how many windows there are in each batch of the calibration text, to say where a fault lies.
    """

    def __init__(
        self, stream: ModelStream, keep: Keep, report: Report, policy: FaultPolicy, batches: Sequence[int]
    ) -> None:
        self._stream, self._keep, self.report = stream, keep, report
        self.policy, self._batches = policy, batches
        self.device = stream.device
        self._told_few = False

    def solve(self, layers: Sequence[LayerPlan], linears: Mapping[str, nn.Module], inputs: HessianAccumulator) -> None:
        """Quantize `layers`, all of which have seen `inputs`."""
        prepared: dict[LayerConfig, Usable] = {}
        for together in solved_together(layers):
            started = time.perf_counter()
            config = together[0].config
            assert config is not None
            for layer in together:
                self.report(LayerStarted(layer.name))
            with self._located(together, inputs):
                if config not in prepared:
                    prepared[config] = self._usable(inputs, config)
                usable = prepared[config]
                weights = [self._weight(layer, usable) for layer in together]
                solutions = solve_together(weights, usable.inputs.hessian, usable.factor, config)
            del weights
            for layer, solution in zip(together, solutions, strict=True):
                self._take(layer, linears[layer.name], solution.quantized)
            seconds = (time.perf_counter() - started) / sum(layer.out_features for layer in together)
            for layer, solution in zip(together, solutions, strict=True):
                self._warn(layer, usable, inputs)
                share = seconds * layer.out_features
                self.report(LayerSolved(_report_of(layer, config, solution, usable, inputs.tokens, share)))

    def _usable(self, inputs: HessianAccumulator, config: LayerConfig) -> Usable:
        """`inputs` and their factor; where these are of no use and the policy allows it, as if nothing were known."""
        try:
            return Usable(inputs, prepare(inputs.hessian, config, inputs.tokens), None if inputs.tokens else "tokens")
        except (NonFiniteHessianError, NotPositiveDefiniteError) as error:
            if self.policy.on_numeric_fault == "error":
                raise
            unknown = HessianAccumulator(inputs.in_features, self.device)
            unknown.add_nothing_known()
            factor = prepare(unknown.hessian, config, unknown.tokens)
            return Usable(unknown, factor, "inputs" if isinstance(error, NonFiniteHessianError) else "hessian")

    def _weight(self, layer: LayerPlan, usable: Usable) -> Tensor:
        assert layer.config is not None
        weight = self._stream.linear_weight(layer.name, transposed=layer.transposed)
        if layer.config.asymmetric_calibration and usable.inputs.shift is not None:
            return follow_original(weight, usable.inputs.shift, usable.factor, layer.config.asymmetric_calibration)
        return weight

    def _take(self, layer: LayerPlan, linear: nn.Module, quantized: QuantizedLinear) -> None:
        dequantized = quantized.dequantize(linear.get_parameter("weight").dtype)
        place(linear, "weight", dequantized.T if layer.transposed else dequantized)
        self._keep(layer, quantized)

    def _warn(self, layer: LayerPlan, usable: Usable, inputs: HessianAccumulator) -> None:
        factor = usable.factor
        if usable.fallback in ("inputs", "hessian"):
            not_finite = f"its inputs hold NaN or infinity{self._windows(inputs)}"
            why = not_finite if usable.fallback == "inputs" else "its Hessian is not positive definite"
            self.report(Warned("W_NUM_FALLBACK", f"{_where(layer)} was rounded to nearest: {why}"))
        if 0 < inputs.tokens < layer.in_features and not self._told_few:
            self._told_few = True
            few = f"saw {inputs.tokens} calibration tokens for {layer.in_features} inputs; others may have as few"
            self.report(Warned("W_NUM_TOKENS", f"{_where(layer)} {few}"))
        if factor.retries:
            used = f"damp_percent was raised to {factor.damp_percent:g} to make its Hessian positive definite"
            self.report(Warned("W_NUM_DAMPING", f"layer `{layer.name}`: {used}"))
        if factor.dead_columns:
            seen = f"{factor.dead_columns} of {layer.in_features} inputs were always zero, their weights become zero"
            self.report(Warned("W_NUM_DEAD", f"layer `{layer.name}`: {seen}"))

    @contextmanager
    def _located(self, together: Sequence[LayerPlan], inputs: HessianAccumulator) -> Iterator[None]:
        """Turn what the maths refuses into an error that names the layer, of several whose rows are solved as one."""
        first = together[0]
        try:
            yield
        except NonFiniteHessianError as error:
            raise GateError(
                "E_NUM_ACT", f"{_where(first)}: its inputs hold NaN or infinity{self._windows(inputs)}",
                hint="run the model in float32: --dtype float32, or round such layers: --on-numeric-fault rtn",
            ) from error  # fmt: skip
        except NotPositiveDefiniteError as error:
            raise GateError(
                "E_NUM_HESSIAN", f"{_where(first)}: {error}",
                hint=f"use more calibration text, or keep it: --dynamic '-:{first.name}', or --on-numeric-fault rtn",
            ) from error  # fmt: skip
        except ScaleRangeError as error:
            ends = accumulate(layer.out_features for layer in together)
            owner = next(layer for layer, end in zip(together, ends, strict=True) if error.row < end)
            raise InputError(
                "E_CKPT_NONFINITE", f"{_where(owner)}: its weights are not finite or beyond the range of float16",
                hint="download the checkpoint again, or keep the layer with --dynamic",
            ) from error  # fmt: skip

    def _windows(self, inputs: HessianAccumulator) -> str:
        """Where in the calibration text, counted from 1, something first was not finite."""
        found = inputs.first_not_finite()
        if found is None:
            return ""
        addition, n_additions = found
        batch = addition * len(self._batches) // n_additions  # a layer may be called several times for each batch
        first = 1 + sum(self._batches[:batch])
        last = first + self._batches[batch] - 1
        return f", first in window {first}" if first == last else f", first in one of the windows {first} to {last}"


def solved_together(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers with the same input by configuration, as many together as have WEIGHTS_TOGETHER weights, or one."""
    batches: list[list[LayerPlan]] = []
    for layer in layers:
        for batch in batches:
            if batch[0].config == layer.config and _weights([*batch, layer]) <= WEIGHTS_TOGETHER:
                batch.append(layer)
                break
        else:
            batches.append([layer])
    return batches


def _weights(layers: Sequence[LayerPlan]) -> int:
    return sum(layer.out_features * layer.in_features for layer in layers)


def _report_of(
    layer: LayerPlan, config: LayerConfig, solution: Solution, usable: Usable, tokens: int, seconds: float
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
