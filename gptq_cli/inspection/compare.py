"""How far the weights of one checkpoint are from another's, tensor by tensor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.checkpoint.decoded import is_stored_transposed
from gptq_cli.checkpoint.headers import DAMAGED
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.packed import packed_modules
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.errors import InputError

ELEMENTS_PER_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of both: `relative_error` is ‖A - B‖² / ‖B‖², 0 where both are the same numbers; `largest` is the
    largest |A - B|."""

    name: str
    shape: tuple[int, ...]
    relative_error: float
    largest: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tensors of both checkpoints in B's order, and names that only one of them has."""

    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    seconds: float

    @property
    def different(self) -> tuple[TensorDifference, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.largest > 0)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        tensors = [
            {key: getattr(tensor, key) for key in tensor.__slots__} for tensor in self.tensors
        ]
        return {
            "tensors": tensors,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "seconds": self.seconds,
        }


@torch.inference_mode()
def compare_checkpoints(a: str, b: str) -> Comparison:
    """The difference of A from the reference B, each quantized or not, with one tensor of each in memory.

    Raises InputError as opening does, and E_COMPARE if the two have no tensor in common or one with two shapes,
    E_CKPT_NONFINITE for numbers that are not finite, whose difference is no number.
    """
    started = time.perf_counter()
    first, second = _Weights(a), _Weights(b)
    common = [name for name in second.names if name in first.names]
    if not common:
        hint = "compare a model with what was made from it"
        raise InputError("E_COMPARE", f"`{a}` and `{b}` have no tensor name in common", hint=hint)
    tensors = tuple(_difference(name, first.read(name), second.read(name)) for name in common)
    for weights in (first, second):
        weights.check_unchanged()
    return Comparison(
        tensors=tensors,
        only_a=tuple(name for name in first.names if name not in second.names),
        only_b=tuple(name for name in second.names if name not in first.names),
        seconds=time.perf_counter() - started,
    )


class _Weights:
    """The tensors of a checkpoint as its model would hold them, packed linears dequantized."""

    def __init__(self, model: str) -> None:
        self._checkpoint: Checkpoint = open_decodable(locate_model(model).directory)
        self._reader = open_reader(self._checkpoint)
        self.names = dict.fromkeys(self._reader.names())
        config, modules = self._checkpoint.config, packed_modules(self._checkpoint.tensors)
        self._turned = {
            f"{module.name}.weight"
            for module in modules
            if is_stored_transposed(config, module.name)
        }

    def check_unchanged(self) -> None:
        """As the checkpoint does."""
        self._checkpoint.check_unchanged()

    def read(self, name: str) -> Tensor:
        tensor = self._reader.read(name)
        return tensor.T if name in self._turned else tensor


def _difference(name: str, a: Tensor, b: Tensor) -> TensorDifference:
    if a.shape != b.shape:
        raise InputError(
            "E_COMPARE", f"`{name}` is {list(a.shape)} in one and {list(b.shape)} in the other"
        )
    error = energy = torch.zeros((), dtype=torch.float64)
    largest = 0.0
    for mine, reference in zip(_chunks(a), _chunks(b), strict=True):
        exact, meant = mine.double(), reference.double()
        for which, numbers in (("first", exact), ("second", meant)):
            if not bool(numbers.isfinite().all()):
                message = f"`{name}` of the {which} checkpoint holds NaN or infinity"
                raise InputError("E_CKPT_NONFINITE", message, hint=DAMAGED)
        delta = exact - meant
        error, energy = error + delta.square().sum(), energy + meant.square().sum()
        largest = max(largest, float(delta.abs().max())) if delta.numel() else largest
    relative = float(error / energy) if energy else float(error)
    return TensorDifference(name, tuple(b.shape), relative, largest)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.reshape(-1), ELEMENTS_PER_CHUNK)
