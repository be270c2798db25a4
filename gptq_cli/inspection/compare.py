"""The difference between the weights of two checkpoints, tensor by tensor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.checkpoint.decoded import is_stored_transposed, packed_linears, plain_view
from gptq_cli.checkpoint.headers import DAMAGED
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.errors import InputError, size, to_json
from gptq_cli.events import PhaseStarted, Report, ignore
from gptq_cli.files import ByteCount

ELEMENTS_PER_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """The difference between A and B in one tensor.

    `relative_error` is ‖A - B‖² / ‖B‖² (‖A - B‖² if B is zero); `largest` is the largest |A - B|.
    """

    name: str
    shape: tuple[int, ...]
    relative_error: float
    largest: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tensors that both checkpoints have, in the order of B, and names that only one has."""

    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    seconds: float

    @property
    def different(self) -> tuple[TensorDifference, ...]:
        """The tensors whose numbers are not the same."""
        return tuple(tensor for tensor in self.tensors if tensor.largest > 0)

    @property
    def mean_error(self) -> float:
        """The mean weight error of the tensors that differ; 0 if none does."""
        errors = [tensor.relative_error for tensor in self.different]
        if not errors:
            return 0.0
        return sum(errors) / len(errors)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values."""
        return to_json(self)


@torch.inference_mode()
def compare_checkpoints(a: str, b: str, report: Report = ignore) -> Comparison:
    """Return the difference of A from the reference B, each quantized or not.

    One tensor of each is in memory at a time. `report` gets the bytes of B that were compared.
    Raises InputError as opening does, E_COMPARE if the two have no tensor in common or one with two
    shapes, and E_CKPT_NONFINITE if a number is not finite.
    """
    started = time.perf_counter()
    first, second = _Weights(a), _Weights(b)
    common = [name for name in second.names if name in first.names]
    if not common:
        hint = "compare a model with one that was made from it"
        raise InputError("E_COMPARE", f"`{a}` and `{b}` have no tensor name in common", hint=hint)
    total = sum(second.nbytes(name) for name in common)
    report(PhaseStarted("compare", f"{len(common)} tensors, {size(total)}"))
    count, tensors = ByteCount(report, total), []
    for name in common:
        tensors.append(_difference(name, first.read(name), second.read(name)))
        count.passed(second.nbytes(name))
    first.check_unchanged()
    second.check_unchanged()
    return Comparison(
        tensors=tuple(tensors),
        only_a=first.names_not_in(second),
        only_b=second.names_not_in(first),
        seconds=time.perf_counter() - started,
    )


class _Weights:
    """The tensors of a checkpoint as its model would hold them, with packed linears dequantized."""

    def __init__(self, model: str) -> None:
        self._checkpoint: Checkpoint = open_decodable(locate_model(model).directory)
        self._reader = open_reader(self._checkpoint)
        self.names = dict.fromkeys(self._reader.names())  # in order, and quick to search
        self._plain = plain_view(self._checkpoint, allow_requantize=True).tensors
        self._transposed = set()
        for module in packed_linears(self._checkpoint):
            if is_stored_transposed(self._checkpoint.config, module.name):
                self._transposed.add(f"{module.name}.weight")

    def check_unchanged(self) -> None:
        """Raise InputError E_SOURCE_CHANGED if a file of the checkpoint has changed."""
        self._checkpoint.check_unchanged()

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor as its model would store it."""
        return self._plain[name].nbytes

    def read(self, name: str) -> Tensor:
        """Return a tensor in the shape that the model gives it."""
        tensor = self._reader.read(name)
        if name in self._transposed:
            return tensor.T
        return tensor

    def names_not_in(self, other: _Weights) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in other.names)


def _difference(name: str, a: Tensor, b: Tensor) -> TensorDifference:
    if a.shape != b.shape:
        message = f"`{name}` is {list(a.shape)} in one and {list(b.shape)} in the other"
        raise InputError("E_COMPARE", message)
    error = energy = torch.zeros((), dtype=torch.float64)
    largest = 0.0
    for part_of_a, part_of_b in zip(_chunks(a), _chunks(b), strict=True):
        numbers, reference = part_of_a.double(), part_of_b.double()
        _refuse_not_finite(name, "first", numbers)
        _refuse_not_finite(name, "second", reference)
        delta = numbers - reference
        error = error + delta.square().sum()
        energy = energy + reference.square().sum()
        if delta.numel():
            largest = max(largest, float(delta.abs().max()))
    relative = float(error)
    if energy:
        relative = float(error / energy)
    return TensorDifference(name, tuple(b.shape), relative, largest)


def _refuse_not_finite(name: str, which: str, numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        message = f"`{name}` of the {which} checkpoint holds NaN or infinity"
        raise InputError("E_CKPT_NONFINITE", message, hint=DAMAGED)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.reshape(-1), ELEMENTS_PER_CHUNK)
