"""The Hessian of a layer's output error, H = Σ x xᵀ over all calibration tokens x.

The result of GPTQ does not depend on the scale of H, so H stays a plain sum, without a factor or a
mean. H is symmetric: only the blocks on and above the diagonal are computed and kept, a little over
half of the work and memory. They are mirrored when H is read. If the inputs x₀ of the unquantized
model are given too, the shift C = Σ (x₀ - x) xᵀ is summed as well (see `factor`).

`HessianOfBatches` adds batches in a binary tree over their numbers. The order of additions, and
thus every bit of H, does not depend on how batches are shared among processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gptq_cli.solver.numerics import bfloat16_factors, full_precision, on_tensor_cores, split

HALF = (torch.bfloat16, torch.float16)

Value = TypeVar("Value")
Add = Callable[[Value, Value], None]  # adds the second to the first


@dataclass(frozen=True, slots=True)
class Node(Generic[Value]):
    """The sum of the summands start..stop; their count is a power of two that divides `start`."""

    start: int
    stop: int
    value: Value


def push(nodes: list[Node[Value]], node: Node[Value], add: Add[Value]) -> None:
    """Append `node`, which starts at the end of the last one, and merge siblings of the tree."""
    while nodes and _siblings(nodes[-1], node):
        left = nodes.pop()
        add(left.value, node.value)
        node = Node(left.start, node.stop, left.value)
    nodes.append(node)


def total(nodes: list[Node[Value]], add: Add[Value]) -> Value:
    """Return the sum of all nodes, and empty `nodes`."""
    value = nodes.pop().value
    while nodes:
        left = nodes.pop().value
        add(left, value)
        value = left
    return value


def kept_apart(numbers: range) -> list[range]:
    """Return the summands of each node that remains after the summands `numbers` were pushed."""
    nodes: list[Node[None]] = []
    for number in numbers:
        push(nodes, Node(number, number + 1, None), lambda _left, _right: None)
    return [range(node.start, node.stop) for node in nodes]


def _siblings(left: Node[Value], right: Node[Value]) -> bool:
    size = left.stop - left.start
    return right.stop - right.start == size and left.start % (2 * size) == 0


# Bound the float32 copy of the inputs. Each chunk of a shift on CUDA reads and writes the sum.
TOKENS_PER_CHUNK = {"cpu": 1024, "cuda": 4096}
PANELS = 8  # on the CPU; they need 9/16 of the products of a full multiplication
SMALLEST_PANEL = 128
# Columns of a panel on CUDA: a row of 16 x 8 tiles of 128 x 256 keeps a large GPU busy, and no
# panel leaves most of it idle in its last round of tiles. To be measured on a GPU.
CUDA_PANEL = 2048


class HessianAccumulator:
    """The sum of x xᵀ over the inputs of one or more linear layers that see the same tensor.

    The sum is float32, or float64 after float64 inputs were added. `tokens` counts the rows added
    so far. `shift` [I, I] is Σ (x₀ - x) xᵀ over the rows that were added with their original x₀,
    None if there are none.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.tokens = 0
        self.shift: Tensor | None = None
        self._size, self._device, self._dtype = in_features, torch.device(device), torch.float32
        self._bounds = _panels(in_features, self._device)
        self._panels: list[Tensor] = []  # empty until they are needed on CUDA
        if self._device.type == "cpu":
            self._add_zeros()
        self.finite: list[Tensor] = []  # for each `add`, whether the diagonal was finite after it
        self._whole: Tensor | None = None  # H, if it was read; the panels are then views of it

    @torch.no_grad()
    @full_precision()
    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """Add inputs [..., I]; all leading dimensions count tokens, so there must be no padding.

        `original` [..., I] are the inputs of the same tokens in the unquantized model.
        """
        tokens = inputs.reshape(-1, self._size)
        if tokens.dtype == torch.float64 != self._dtype:
            self._dtype, self._whole = torch.float64, None
            self._panels = [panel.double() for panel in self._panels]
        if _exact_on_tensor_cores(tokens) or tokens.dtype == self._dtype:
            self._add_products(tokens)
        else:
            with bfloat16_factors(tokens):
                for chunk in torch.split(tokens, TOKENS_PER_CHUNK[self._device.type]):
                    self._add_products(chunk.to(self._dtype))
        if original is not None:
            self._add_shift(tokens, original.reshape(tokens.shape))
        self.tokens += tokens.shape[0]
        self.finite.append(torch.isfinite(torch.cat(self._diagonal())).all())

    @property
    def in_features(self) -> int:
        """The number I of rows and columns of H."""
        return self._size

    def absorb(self, other: HessianAccumulator) -> None:
        """Add the sums and the tokens of `other`, which has seen inputs of the same kind."""
        self.tokens += other.tokens
        self.finite += other.finite
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine += theirs

    @property
    def sums(self) -> list[Tensor]:
        """The tensors that hold the sums; accumulators of inputs of one kind have equal shapes.

        They exist after the first `add`.
        """
        if self.shift is None:
            return [*self._panels]
        return [*self._panels, self.shift]

    def add_identity(self) -> None:
        """Add the identity without tokens, with which solving a layer is rounding to nearest."""
        self._add_zeros()
        for diagonal in self._diagonal():
            diagonal.add_(1)

    @property
    def hessian(self) -> Tensor:
        """H [I, I] over all tokens so far: the accumulator's own tensor, not a copy."""
        if self._whole is None:
            self._add_zeros()
            self._whole = self._panels[0].new_empty(self._size, self._size)
            for number, (start, stop) in enumerate(self._bounds):
                view = self._whole[:stop, start:stop]
                self._panels[number] = view.copy_(self._panels[number])
        for start, stop in self._bounds:
            self._whole[stop:, start:stop] = self._whole[start:stop, stop:].T
            mirror_(self._whole[start:stop, start:stop])
        return self._whole

    def write_to(self, matrix: Tensor) -> None:
        """Write H on and above its diagonal to `matrix` [I, I]; `mirror_` completes it."""
        for panel, (start, stop) in zip(self._panels, self._bounds, strict=True):
            matrix[:stop, start:stop] = panel

    def first_not_finite(self) -> tuple[int, int] | None:
        """Return (index, count) of the first `add` call after which H was not finite, or None.

        The cause is an input that is not finite or an overflow of the sum. Both show on the
        diagonal, which sums the squares of each feature. Waits for the device once.
        """
        if not self.finite:
            return None
        finite = torch.stack(self.finite).tolist()
        if all(finite):
            return None
        return finite.index(False), len(finite)

    def _diagonal(self) -> list[Tensor]:
        """Return the diagonal of H as one view for each panel."""
        return [panel.diagonal(panel.shape[1] - panel.shape[0]) for panel in self._panels]

    def _add_zeros(self) -> None:
        """Make the sums zero if nothing was added yet."""
        if self._panels:
            return
        for start, stop in self._bounds:
            shape = (stop, stop - start)
            self._panels.append(torch.zeros(shape, dtype=self._dtype, device=self._device))

    def _add_products(self, tokens: Tensor) -> None:
        """Add x xᵀ over `tokens`; on CUDA the first products become the sums themselves."""
        is_first = not self._panels
        for number, (start, stop) in enumerate(self._bounds):
            left, right = tokens[:, :stop].T, tokens[:, start:stop]
            if tokens.dtype == self._dtype and not is_first:
                self._panels[number].addmm_(left, right)
                continue
            product = _product(left, right)
            if is_first:
                self._panels.append(product)
            else:
                self._panels[number] += product

    def _add_shift(self, tokens: Tensor, original: Tensor) -> None:
        n_tokens = TOKENS_PER_CHUNK[self._device.type]
        for chunk, before in zip(tokens.split(n_tokens), original.split(n_tokens), strict=True):
            if _exact_on_tensor_cores(chunk):
                self._add_split_shift(chunk, before)
                continue
            if self.shift is None:
                self.shift = chunk.new_zeros(self._size, self._size, dtype=self._dtype)
            inputs = chunk.to(self.shift.dtype)
            self.shift.addmm_((before.to(self.shift.dtype) - inputs).T, inputs)

    def _add_split_shift(self, tokens: Tensor, original: Tensor) -> None:
        """Add (x₀ - x) xᵀ on tensor cores, where x₀ - x is the sum of two 16-bit numbers.

        Both parts are rows of one product, which reads and writes the sum only once.
        """
        difference = torch.cat(split(original.float() - tokens.float(), tokens.dtype)).T
        twice = torch.cat([tokens, tokens])
        if self.shift is None:
            self.shift = _product(difference, twice)
            return
        for start, stop in self._bounds:  # which bounds the memory of the product
            self.shift[:, start:stop] += _product(difference, twice[:, start:stop])


def mirror_(matrices: Tensor) -> Tensor:
    """Copy what is above the diagonals of `matrices` [..., n, n] below them; return `matrices`."""
    return matrices.copy_(matrices.triu() + matrices.triu(1).mT)


def _exact_on_tensor_cores(tokens: Tensor) -> bool:
    """Return whether products of `tokens` with each other need no float32 copy of them.

    Two 16-bit floats multiply exactly in float32, in which tensor cores sum.
    """
    return tokens.dtype in HALF and on_tensor_cores(tokens)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, in float32 if the factors have 16 bits."""
    if left.dtype in HALF:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


class HessianOfBatches:
    """The Hessian of numbered batches, added in an order that does not depend on the processes.

    Batches must be added in the order of their numbers.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._new = partial(HessianAccumulator, in_features, device)
        self._batch = -1
        self._open: HessianAccumulator | None = None
        self._nodes: list[Node[HessianAccumulator]] = []

    def add(self, batch: int, inputs: Tensor, original: Tensor | None = None) -> None:
        """Add inputs of a batch (see `HessianAccumulator.add`); a batch may add several times."""
        if batch != self._batch or self._open is None:
            self._close()
            self._batch, self._open = batch, self._new()
        self._open.add(inputs, original)

    def nodes(self) -> list[Node[HessianAccumulator]]:
        """Return the sums over all batches so far, as few as the order of additions allows."""
        self._close()
        return self._nodes

    def _close(self) -> None:
        if self._open is not None:
            node = Node(self._batch, self._batch + 1, self._open)
            push(self._nodes, node, HessianAccumulator.absorb)
            self._open = None


def _panels(size: int, device: torch.device) -> list[tuple[int, int]]:
    """Return first column and end of each panel of H; its rows are all before that end."""
    width = max(SMALLEST_PANEL, -(-size // PANELS))
    if device.type == "cuda":
        width = CUDA_PANEL
    return [(start, min(start + width, size)) for start in range(0, size, width)]
