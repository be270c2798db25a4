"""Layers that share an input, solved: from the plan's layer and its Hessian to codes, a report and a located error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

# Rows of layers with one input are solved as those of one layer: up to 0.5 GB for a float32 copy of them.
WEIGHTS_TOGETHER = 2**27

Keep = Callable[[LayerPlan, QuantizedLinear], None]


class LayerSolver:
    """Solves layers that share an input, puts the dequantized weights back and hands the codes to `keep`."""

    def __init__(self, stream: ModelStream, keep: Keep, report: Report, moe_uncovered: Uncovered) -> None:
        self._stream, self._keep, self.report = stream, keep, report
        self.moe_uncovered = moe_uncovered
        self.device = stream.device

    def solve(self, layers: Sequence[LayerPlan], linears: Mapping[str, nn.Module], inputs: HessianAccumulator) -> None:
        """Quantize `layers`, all of which have seen `inputs`."""
        hessian = inputs.hessian
        prepared: dict[LayerConfig, Prepared] = {}
        for together in solved_together(layers):
            started = time.perf_counter()
            config = together[0].config
            assert config is not None
            for layer in together:
                self.report(LayerStarted(layer.name))
            with located(together):
                if config not in prepared:
                    prepared[config] = prepare(hessian, config, inputs.tokens)
                factor = prepared[config]
                weights = [self._weight(layer, inputs, factor) for layer in together]
                solutions = solve_together(weights, hessian, factor, config)
            del weights
            for layer, solution in zip(together, solutions, strict=True):
                self._take(layer, linears[layer.name], solution.quantized)
            seconds = (time.perf_counter() - started) / sum(layer.out_features for layer in together)
            for layer, solution in zip(together, solutions, strict=True):
                self._warn(layer, factor)
                share = seconds * layer.out_features
                self.report(LayerSolved(_report_of(layer, config, solution, factor, inputs.tokens, share)))

    def _weight(self, layer: LayerPlan, inputs: HessianAccumulator, factor: Prepared) -> Tensor:
        assert layer.config is not None
        weight = self._stream.linear_weight(layer.name, transposed=layer.transposed)
        if layer.config.asymmetric_calibration and inputs.shift is not None:
            return follow_original(weight, inputs.shift, factor, layer.config.asymmetric_calibration)
        return weight

    def _take(self, layer: LayerPlan, linear: nn.Module, quantized: QuantizedLinear) -> None:
        dequantized = quantized.dequantize(linear.get_parameter("weight").dtype)
        place(linear, "weight", dequantized.T if layer.transposed else dequantized)
        self._keep(layer, quantized)

    def _warn(self, layer: LayerPlan, factor: Prepared) -> None:
        if factor.retries:
            used = f"damp_percent was raised to {factor.damp_percent:g} to make its Hessian positive definite"
            self.report(Warned("W_NUM_DAMPING", f"layer `{layer.name}`: {used}"))
        if factor.dead_columns:
            seen = f"{factor.dead_columns} of {layer.in_features} inputs were always zero, their weights become zero"
            self.report(Warned("W_NUM_DEAD", f"layer `{layer.name}`: {seen}"))


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


def _where(layer: LayerPlan) -> str:
    return f"layer `{layer.name}` (block {layer.block})"


@contextmanager
def located(together: Sequence[LayerPlan]) -> Iterator[None]:
    """Turn what the maths refuses into an error that names the layer, of several whose rows are solved as one."""
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
        ends = accumulate(layer.out_features for layer in together)
        owner = next(layer for layer, end in zip(together, ends, strict=True) if error.row < end)
        raise InputError(
            "E_CKPT_NONFINITE", f"{_where(owner)}: its weights are not finite or beyond the range of float16",
            hint="download the checkpoint again, or keep the layer with --dynamic",
        ) from error  # fmt: skip
