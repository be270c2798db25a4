"""Statistics of one layer of a checkpoint: the distribution of its codes, scales and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.checkpoint.decoded import packed_linears
from gptq_cli.checkpoint.reader import DequantizingReader, open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import ConfigError, InputError, nearest
from gptq_cli.solver.quantized_linear import QuantizedLinear

BINS = 16


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram: `counts[i]` values are in [edges[i], edges[i + 1]).

    The last bin includes its upper edge.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedView:
    """The grid of a quantized layer.

    `entropy` is that of the codes, in bits; `at_ends` is the fraction of weights with the lowest or
    highest code; `trivial_groups` tells whether g_idx is column // group_size.
    """

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
    """The weights of a layer as a model computes with them, and its grid if it is quantized.

    `shape` is (O, I).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: Histogram
    mean: float
    std: float
    packed: PackedView | None


def view_layer(checkpoint: Checkpoint, name: str) -> LayerView:
    """Return the layer `name`, or the only one whose name ends with `name`.

    Raises ConfigError E_LAYER if there is no such layer or more than one.
    """
    view = _read_view(checkpoint, name)
    checkpoint.check_unchanged()
    return view


def _read_view(checkpoint: Checkpoint, name: str) -> LayerView:
    modules = set()
    if checkpoint.quantization:
        modules = {module.name for module in packed_linears(checkpoint)}
    full = _find(name, sorted(modules | _plain_matrices(checkpoint)))
    if full not in modules:
        weight = open_reader(checkpoint).read(f"{full}.weight")
        return _view(full, weight.float(), str(weight.dtype).removeprefix("torch."), None)
    linear = DequantizingReader(checkpoint, torch.device("cpu"), "torch").linear(full)
    return _view(full, linear.dequantize(), f"{linear.bits} bit", _packed(linear))


def _plain_matrices(checkpoint: Checkpoint) -> set[str]:
    """Return the names of modules with a 2-D weight that is plain, or that `coded` tells."""
    decoded = {name: weight.plain for name, weight in checkpoint.coded().items()}
    names = set()
    for name, info in {**checkpoint.tensors, **decoded}.items():
        if name.endswith(".weight") and len(info.shape) == 2:
            names.add(name.removesuffix(".weight"))
    return names


def _find(name: str, known: list[str]) -> str:
    """Return the known name that equals `name`, or else the only one that ends with it."""
    name = name.removesuffix(".weight")
    if name in known:
        return name
    found = [full for full in known if full.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        message = f"{len(found)} layers are called `{name}`"
        raise ConfigError("E_LAYER", message, hint=f"for example {found[0]}")
    raise ConfigError("E_LAYER", f"there is no layer `{name}`", hint=_suggestion(name, known))


def _suggestion(name: str, known: list[str]) -> str | None:
    """Return a hint with a similar name of as many words, or with any known one."""
    n_words = name.count(".") + 1
    endings = dict.fromkeys([".".join(full.split(".")[-n_words:]) for full in known])
    near = nearest(name, endings)
    if near:
        return f"did you mean {near}?"
    if known:
        return f"for example {known[0]}"
    return None


def _view(name: str, weight: Tensor, dtype: str, packed: PackedView | None) -> LayerView:
    mean, std = float(weight.mean()), float(weight.std())
    return LayerView(name, tuple(weight.shape), dtype, _histogram(weight), mean, std, packed)


def _packed(linear: QuantizedLinear) -> PackedView:
    codes, levels = linear.codes, 2**linear.bits
    counts = torch.bincount(codes.flatten().long(), minlength=levels)
    fractions = counts[counts > 0].double() / codes.numel()
    columns, groups = codes.shape[1], linear.scales.shape[1]
    trivial = torch.arange(columns) // (columns // groups)
    return PackedView(
        bits=linear.bits,
        groups=groups,
        codes=Histogram(tuple(range(levels + 1)), tuple(counts.tolist())),
        entropy=float(-(fractions * fractions.log2()).sum()),
        at_ends=float(counts[[0, -1]].sum()) / codes.numel(),
        scales=_histogram(linear.scales.float()),
        negative_scales=int((linear.scales < 0).sum()),
        zeros=tuple(linear.zeros.unique().tolist()),
        trivial_groups=bool((linear.group_of_column.long() == trivial).all()),
    )


def _histogram(values: Tensor) -> Histogram:
    finite = values[values.isfinite()]
    if not finite.numel():
        message = "the layer holds no finite number"
        raise InputError("E_CKPT_NONFINITE", message, hint="download the checkpoint again")
    counts, edges = torch.histogram(finite.flatten(), BINS)
    return Histogram(tuple(edges.tolist()), tuple(counts.long().tolist()))
