"""Layers that share an input, solved: from the plan's layer and its Hessian to codes, a report and a located error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from gptq_cli.config.layer import LayerConfig
from gptq_cli.engine.asymmetric import follow_original
from gptq_cli.engine.factor import NonFiniteHessianError, NotPositiveDefiniteError, Prepared, prepare
from gptq_cli.engine.grid import ScaleRangeError
from gptq_cli.engine.hessian import HessianAccumulator
from gptq_cli.engine.layer import QuantizedLinear
from gptq_cli.engine.solve import solve
from gptq_cli.errors import GateError, InputError
from gptq_cli.models.skeleton import place
from gptq_cli.models.stream import ModelStream
from gptq_cli.pipeline.events import LayerReport, LayerSolved, LayerStarted, Report, Warned
from gptq_cli.pipeline.plan import LayerPlan

Keep = Callable[[LayerPlan, QuantizedLinear], None]


class LayerSolver:
    """Solves layers that share an input, puts the dequantized weights back and hands the codes to `keep`."""

    def __init__(self, stream: ModelStream, keep: Keep, report: Report) -> None:
        self._stream, self._keep, self._report = stream, keep, report
        self.device = stream.device

    def solve(self, layers: Sequence[LayerPlan], linears: Mapping[str, nn.Module], inputs: HessianAccumulator) -> None:
        """Quantize `layers`, all of which have seen `inputs`."""
        hessian = inputs.hessian
        prepared: dict[LayerConfig, Prepared] = {}
        for layer in layers:
            assert layer.config is not None
            started = time.perf_counter()
            self._report(LayerStarted(layer.name))
            with located(layer):
                if layer.config not in prepared:
                    prepared[layer.config] = prepare(hessian, layer.config, inputs.tokens)
                factor = prepared[layer.config]
                weight = self._stream.stored_weight(layer.name)
                weight = weight.T if layer.transposed else weight
                if layer.config.asymmetric_calibration and inputs.shift is not None:
                    weight = follow_original(weight, inputs.shift, factor, layer.config.asymmetric_calibration)
                solution = solve(weight, hessian, factor, layer.config)
            linear = linears[layer.name]
            dequantized = solution.quantized.dequantize(linear.get_parameter("weight").dtype)
            place(linear, "weight", dequantized.T if layer.transposed else dequantized)
            self._keep(layer, solution.quantized)
            self._warn(layer, factor)
            self._report(
                LayerSolved(
                    LayerReport(
                        name=layer.name,
                        block=layer.block,
                        bits=layer.config.bits,
                        group_size=layer.config.group_size,
                        relative_error=solution.relative_error,
                        rtn_relative_error=solution.rtn_relative_error,
                        damp_percent=factor.damp_percent,
                        damp_retries=factor.retries,
                        dead_columns=factor.dead_columns,
                        tokens=inputs.tokens,
                        seconds=time.perf_counter() - started,
                    )
                )
            )

    def _warn(self, layer: LayerPlan, factor: Prepared) -> None:
        if factor.retries:
            used = f"damp_percent was raised to {factor.damp_percent:g} to make its Hessian positive definite"
            self._report(Warned("W_NUM_DAMPING", f"layer `{layer.name}`: {used}"))
        if factor.dead_columns:
            seen = f"{factor.dead_columns} of {layer.in_features} inputs were always zero, their weights become zero"
            self._report(Warned("W_NUM_DEAD", f"layer `{layer.name}`: {seen}"))


@contextmanager
def located(layer: LayerPlan) -> Iterator[None]:
    """Turn what the maths refuses into an error that names the layer."""
    where = f"layer `{layer.name}` (block {layer.block})"
    try:
        yield
    except NonFiniteHessianError as error:
        raise GateError(
            "E_NUM_ACT",
            f"{where}: its inputs hold NaN or infinity",
            hint="run the model in float32 or bfloat16: --dtype float32",
        ) from error
    except NotPositiveDefiniteError as error:
        raise GateError(
            "E_NUM_HESSIAN", f"{where}: {error}",
            hint=f"use more calibration text, or keep the layer: --dynamic '-:{layer.name}'",
        ) from error  # fmt: skip
    except ScaleRangeError as error:
        raise InputError(
            "E_CKPT_NONFINITE", f"{where}: its weights are not finite or beyond the range of float16",
            hint="download the checkpoint again, or keep the layer with --dynamic",
        ) from error  # fmt: skip
