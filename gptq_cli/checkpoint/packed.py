"""Quantized linears as their packed tensors tell, from headers alone. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.errors import InputError

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class PackedModule:
    """A linear as its packed tensors tell; `nbytes` of all of them."""

    name: str
    out_features: int
    in_features: int
    bits: int
    groups: int
    nbytes: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale, -1 for one group a row."""
        return -1 if self.groups == 1 else self.in_features // self.groups

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def packed_modules(tensors: dict[str, TensorInfo]) -> tuple[PackedModule, ...]:
    """The quantized linears among `tensors`, in file order, each by the shapes of its parts."""
    return tuple(
        _module(name.removesuffix(".qweight"), tensors)
        for name in tensors
        if name.endswith(".qweight")
    )


def _module(name: str, tensors: dict[str, TensorInfo]) -> PackedModule:
    found = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    absent = [part for part in PARTS[:3] if part not in found]
    if absent:
        raise InputError("E_CKPT_INCOMPLETE", f"`{name}` has a qweight but no {', '.join(absent)}")
    shapes = {part: tensor.shape for part, tensor in found.items()}
    if any(len(shapes[part]) != 2 or 0 in shapes[part] for part in PARTS[:3]):
        raise _misfit(name, shapes)
    (rows, out_features), (groups, words) = shapes["qweight"], shapes["qzeros"]
    bits, rest = divmod(words * 32, out_features)
    if rest or not bits or rows * 32 % bits or shapes["scales"] != (groups, out_features):
        raise _misfit(name, shapes)
    return PackedModule(
        name,
        out_features,
        rows * 32 // bits,
        bits,
        groups,
        sum(tensor.nbytes for tensor in found.values()),
    )


def _misfit(name: str, shapes: dict[str, tuple[int, ...]]) -> InputError:
    said = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
    return InputError("E_CKPT_INCOMPLETE", f"the parts of `{name}` do not fit each other: {said}")
