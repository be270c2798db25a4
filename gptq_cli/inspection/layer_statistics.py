"""One layer of a checkpoint in numbers: how its codes, scales and weights are spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.checkpoint.packed import packed_modules
from gptq_cli.checkpoint.reader import DequantizingReader, open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.finding import nearest
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.solver.quantized_linear import QuantizedLinear

BINS = 16


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` values lie in [edges[i], edges[i + 1]); the last bin holds its upper edge too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedView:
    """The grid of a quantized layer. `entropy` is that of the codes in bits, `at_ends` the share of weights with the
    lowest or highest code; `trivial_groups`: g_idx says column // group_size."""

    bits: int
    groups: int
    codes: Histogram
    entropy: float
    at_ends: float
    scales: Histogram
    negative_scales: int
    zeros: tuple[int, ...]
    trivial_groups: bool


@dataclass(frozen=True, slots=True)
class LayerView:
    """A layer's weights as a model computes with them, and its grid if it has one; `shape` is (O, I)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: Histogram
    mean: float
    std: float
    packed: PackedView | None


def view_layer(checkpoint: Checkpoint, name: str) -> LayerView:
    """The layer called `name`, or the only one whose name ends so; ConfigError E_LAYER if there is none or several."""
    view = _looked_at(checkpoint, name)
    checkpoint.check_unchanged()
    return view


def _looked_at(checkpoint: Checkpoint, name: str) -> LayerView:
    modules = (
        {module.name for module in packed_modules(checkpoint.tensors)}
        if checkpoint.quantization
        else set()
    )
    plain = {
        tensor.removesuffix(".weight")
        for tensor, info in checkpoint.tensors.items()
        if tensor.endswith(".weight") and len(info.shape) == 2
    }
    full = _find(name, sorted(modules | plain))
    if full not in modules:
        weight = open_reader(checkpoint).read(f"{full}.weight")
        return _view(full, weight.float(), str(weight.dtype).removeprefix("torch."), None)
    linear = DequantizingReader(checkpoint, torch.device("cpu"), "torch").linear(full)
    return _view(full, linear.dequantize(), f"{linear.bits} bit", _packed(linear))


def _find(name: str, known: list[str]) -> str:
    name = name.removesuffix(".weight")
    found = [name] if name in known else [full for full in known if full.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            "E_LAYER", f"{len(found)} layers are called `{name}`", hint=f"for example {found[0]}"
        )
    parts = name.count(".") + 1
    near = nearest(name, dict.fromkeys(".".join(full.split(".")[-parts:]) for full in known))
    hint = f"did you mean {near}?" if near else (f"for example {known[0]}" if known else None)
    raise ConfigError("E_LAYER", f"there is no layer `{name}`", hint=hint)


def _view(name: str, weight: Tensor, dtype: str, packed: PackedView | None) -> LayerView:
    mean, std = float(weight.mean()), float(weight.std())
    return LayerView(name, tuple(weight.shape), dtype, _histogram(weight), mean, std, packed)


def _packed(linear: QuantizedLinear) -> PackedView:
    codes, levels = linear.codes, 2**linear.bits
    counts = torch.bincount(codes.flatten().long(), minlength=levels)
    share = counts[counts > 0].double() / codes.numel()
    columns, groups = codes.shape[1], linear.scales.shape[1]
    trivial = torch.arange(columns) // (columns // groups)
    return PackedView(
        bits=linear.bits,
        groups=groups,
        codes=Histogram(tuple(range(levels + 1)), tuple(counts.tolist())),
        entropy=float(-(share * share.log2()).sum()),
        at_ends=float(counts[[0, -1]].sum()) / codes.numel(),
        scales=_histogram(linear.scales.float()),
        negative_scales=int((linear.scales < 0).sum()),
        zeros=tuple(linear.zeros.unique().tolist()),
        trivial_groups=bool((linear.group_of_column.long() == trivial).all()),
    )


def _histogram(values: Tensor) -> Histogram:
    finite = values[values.isfinite()]
    if not finite.numel():
        raise InputError(
            "E_CKPT_NONFINITE",
            "the layer holds no finite number",
            hint="download the checkpoint again",
        )
    counts, edges = torch.histogram(finite.flatten(), BINS)
    return Histogram(tuple(edges.tolist()), tuple(int(count) for count in counts))
