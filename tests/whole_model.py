"""Slow truths about a tiny model, from the model of transformers, which is in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def whole_model(directory: Path) -> PreTrainedModel:
    """Return the model of transformers in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def slow_labels(logits: Tensor, uniform: Tensor) -> list[int]:
    labels = []
    for row, number in zip(logits.double().softmax(-1), uniform.tolist(), strict=True):
        cumulated, label = 0.0, -1
        while cumulated <= number:
            label += 1
            cumulated += float(row[label])
        labels.append(label)
    return labels


def slow_gradients(model: Path, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """Return g [tokens, O] from one backward pass through the whole model."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.__setitem__(name, output)

    for name in names:
        whole.get_submodule(name).register_forward_hook(note(name))
    logits = whole(windows, use_cache=False).logits.flatten(0, 1)
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(slow_labels(logits.detach(), uniform))
    likelihood = logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
    found = torch.autograd.grad(likelihood, [outputs[name] for name in names])
    rows = [of_outputs.reshape(len(labels), -1) for of_outputs in found]
    return dict(zip(names, rows, strict=True))


def inputs_of(model: Path, name: str, windows: Tensor) -> Tensor:
    """Return the inputs [tokens, I] of a linear of the unquantized model."""
    whole, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    linear = whole.get_submodule(name)
    linear.register_forward_hook(lambda _module, args, _output: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        whole(windows, use_cache=False)
    return found[0]
