"""A measurement of a tiny model, what it has found, and the slow truth about rounding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_cli.allocation.goals import starting_config
from gptq_cli.allocation.harms import REFERENCE
from gptq_cli.allocation.run import MeasuredModel, Place, measure_model
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import Event, Report, StepsDone, ignore
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.planning.measuring import QUICK
from gptq_cli.runtime.device import Worker
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.hessian import HessianAccumulator
from gptq_cli.solver.solve import solve
from tests.runs import config

WIDTHS = [2, 3, 4]
SIZES = {"nsamples": 4, "batch_size": 2, "seqlen": 64}


def goal(**changes: object) -> QuantizeConfig:
    """Return the settings of a measurement of a second; the goal is an average of 3 bits."""
    settings: dict[str, object] = {"bits": 3, "allow_bits": WIDTHS, **SIZES}
    return config(**(settings | changes))


def measure(
    model: Path,
    wanted: QuantizeConfig,
    file: Path,
    report: Report = ignore,
    worker: Worker | None = None,
    **options: Any,
) -> MeasuredModel:
    """Measure a model at the widths that `wanted` allows; keep the measurement beside `file`."""
    start = starting_config(wanted)
    prepared = prepare_run(str(model), file, start, RunOptions(**options), writes=False)
    return measure_model(prepared, wanted, report, worker, Place.beside(file))


def ends_step(event: Event) -> bool:
    """Return whether the last piece of the probe has passed a block."""
    return isinstance(event, StepsDone) and event.done == int(event.done)


def figures(file: Path) -> dict[str, Any]:
    """Return what the measurement beside `file` has found."""
    content = json.loads(file.with_suffix(".json").read_text())
    found: dict[str, Any] = content["measured"]
    return found


def rounded(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    name: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight of a linear as quick rounding leaves it, given inputs of the whole model.

    The inputs are those of the unquantized model on `batches` of ids, whose linears compute in
    `dtype`.
    """
    linear = model.get_submodule(name)
    hessian = HessianAccumulator(linear.in_features, "cpu")
    hooks = [linear.register_forward_pre_hook(lambda _, inputs: hessian.add(inputs[0]))]

    def in_dtype(module: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        return (inputs[0].to(dtype) @ module.weight.to(dtype).T).to(inputs[0].dtype)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(in_dtype))
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    base = config(bits=REFERENCE, **QUICK).base
    assert isinstance(base, LayerConfig)
    factor = prepare(hessian.hessian, base, hessian.tokens)
    return solve(linear.weight.data, hessian.hessian, factor, base).quantized.dequantize()


def divergence(model: PreTrainedModel, probe: Tensor, weights: dict[str, Tensor]) -> float:
    """Return the mean KL on the probe of the model with other `weights`."""
    wanted = model(probe).logits[:, :-1].log_softmax(-1)
    before = {}
    for name, weight in weights.items():
        parameter = model.get_submodule(name).weight
        before[name] = parameter.data.clone()
        parameter.data.copy_(weight)
    got = model(probe).logits[:, :-1].log_softmax(-1)
    for name, weight in before.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())
