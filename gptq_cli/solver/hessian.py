"""The Hessian of a layer's output error, H = Σ x xᵀ over all calibration tokens x.

The result of GPTQ does not depend on the scale of H, so H stays a plain sum, without a factor or a
mean. H is symmetric: only the blocks on and above the diagonal are computed and kept, a little over
half of the work and memory. They are mirrored when H is read. If the inputs x₀ of the unquantized
model are given too, the shift C = Σ (x₀ - x) xᵀ is summed as well, for each half of the windows:
`factor` compares the two. If the output of the layer is added to a residual r, which is r₀ in the
unquantized model, and both are given, the drift E = Σ (r₀ - r) xᵀ is summed like the shift. If the
weight W [O, I] of the only layer with these inputs is given, W C is summed in place of C, as
Σ W (x₀ - x) xᵀ: fewer products and numbers if O is much smaller than I. The drift is added to it.

Some models have massive activations: the first token of a window, or a few others, has thousands of
times the energy of the median token (Sun et al. 2024, arXiv 2402.17762). Such tokens would be
nearly all of H, and of its damping, although the norms of the next layers make of each no more than
a token. If tokens are `limited`, each counts at most as 16 median tokens of its batch.

The loss of the model notices some tokens more than others, as the energies ‖g‖² of their gradients
at the outputs of the layers tell. With `factors_of_tokens`, a token with four times the energy of
the median token counts twice. The whole energy, as in GuidedQuant (Kim et al. 2025, arXiv
2505.07004), is too noisy with one label for each token.

`HessianOfBatches` adds batches in a binary tree over their numbers. The order of additions, and
thus every bit of H, does not depend on how batches are shared among processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
# Bound the differences of bfloat16 inputs on CUDA, which take fewer bytes than those of a chunk. As
# a rule these are half the tokens of a batch at once, whose products become its sum.
TOKENS_OF_A_SHIFT = 16384
LONGEST = 4.0  # times the length of the median token; its square is 16
LARGEST_FACTOR = 4.0  # of a token for its gradients; the smallest one is 1/4
PANELS = 8  # on the CPU; they need 9/16 of the products of a full multiplication
SMALLEST_PANEL = 128
# Columns of a panel on CUDA: a row of 16 x 8 tiles of 128 x 256 keeps a large GPU busy, and no
# panel leaves most of it idle in its last round of tiles. To be measured on a GPU.
CUDA_PANEL = 2048


class HessianAccumulator:
    """The sum of x xᵀ over the inputs of one or more linear layers that see the same tensor.

    The sum is float32, or float64 after float64 inputs were added. `tokens` counts the rows added
    so far; if they are `limited`, long ones were scaled down. Shifts are those of the rows of
    `weight` [O, I] if it is given. With `factors` [tokens], powers of 2, all vectors of each token
    are multiplied by its factor; each `add` must have these tokens.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str,
        *,
        limited: bool = False,
        weight: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> None:
        self.tokens, self._limited, self._weight = 0, limited, weight
        self._factors = factors
        self._shifts: list[Tensor | None] = [None, None]
        self._drifts: list[Tensor | None] = [None, None]
        self._size, self._device, self._dtype = in_features, torch.device(device), torch.float32
        self._bounds = _panels(in_features, self._device)
        self._panels: list[Tensor] = []  # empty until they are needed on CUDA
        if self._device.type == "cpu":
            self.add_zeros()
        # After each `add`, the largest number of the diagonal, which is infinite or NaN if any is:
        self.peaks: list[Tensor] = []
        self._whole: Tensor | None = None  # H, if it was read; the panels are then views of it

    @torch.no_grad()
    @full_precision()
    def add(
        self,
        inputs: Tensor,
        original: Tensor | None = None,
        half: int = 0,
        residuals: Sequence[Tensor] = (),
    ) -> None:
        """Add inputs [..., I]; all leading dimensions count tokens, so there must be no padding.

        `original` [..., I] are the inputs of the same tokens in the unquantized model. Of the items
        of the first dimension, such as windows, those before the middle belong to one half of the
        text and the others to the other half; the one in the middle belongs to `half`.

        `residuals` are two tensors [..., O], to which the outputs of the same tokens are added in
        this model and in the unquantized model. They are only taken together with `original`.
        """
        others = [] if original is None else [original, *residuals]
        tokens, *others = self._rows(inputs, others)
        if tokens.dtype == torch.float64 != self._dtype:
            self._dtype, self._whole = torch.float64, None
            self._panels = [panel.double() for panel in self._panels]
        if _exact_on_tensor_cores(tokens) or tokens.dtype == self._dtype:
            self._add_products(tokens)
        else:
            with bfloat16_factors(tokens):
                for chunk in torch.split(tokens, TOKENS_PER_CHUNK[self._device.type]):
                    self._add_products(chunk.to(self._dtype))
        if others:
            n_items = (len(inputs) + 1 - half) // 2
            cut = n_items * len(tokens) // max(1, len(inputs))
            if self._weight is not None:
                self._add_rows(self._weight, [tokens, *others], cut)
            else:
                self._add_halves(self._shifts, tokens, others[0], tokens, cut)
            if residuals and self._weight is None:
                self._add_halves(self._drifts, tokens, others[2], others[1], cut)
        self.tokens += tokens.shape[0]
        self.peaks.append(self._peak())

    def _rows(self, inputs: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """Return all as rows [n, ...], scaled if tokens are limited or have factors.

        `others` are the original inputs and two residuals, as far as there are any.
        """
        tokens = inputs.reshape(-1, self._size)
        rows = [tokens, *(other.reshape(len(tokens), other.shape[-1]) for other in others)]
        if self._limited and len(tokens):
            rows = _limited(rows)
        if self._factors is None:
            return rows
        return _scaled(rows, self._factors.to(tokens.dtype).unsqueeze(1))

    @property
    def in_features(self) -> int:
        """The number I of rows and columns of H."""
        return self._size

    def absorb(self, other: HessianAccumulator) -> None:
        """Add the sums and the tokens of `other`, which has seen inputs of the same kind."""
        self.tokens += other.tokens
        self.peaks += other.peaks
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine += theirs

    @property
    def shifts_of_rows(self) -> bool:
        """Whether the shifts are those of the rows of a weight, W C [O, I]."""
        return self._weight is not None

    @property
    def shifts(self) -> list[Tensor]:
        """C = Σ (x₀ - x) xᵀ [I, I] over each half of the text, or W C [O, I] of a given weight.

        There are none if no original x₀ was added.
        """
        return _both(self._shifts)

    @property
    def drifts(self) -> list[Tensor]:
        """Σ (r₀ - r) xᵀ [O, I] over each half of the text; none if no residuals were added."""
        return _both(self._drifts)

    @property
    def sums(self) -> list[Tensor]:
        """The tensors that hold the sums; accumulators of inputs of one kind have equal shapes.

        They exist after the first `add`.
        """
        return [*self._panels, *self.shifts, *self.drifts]

    def add_identity(self) -> None:
        """Add the identity without tokens, with which solving a layer is rounding to nearest."""
        self.add_zeros()
        for diagonal in self._diagonal():
            diagonal.add_(1)

    @property
    def hessian(self) -> Tensor:
        """H [I, I] over all tokens so far: the accumulator's own tensor, not a copy."""
        if self._whole is None:
            self.add_zeros()
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
        if not self.peaks:
            return None
        finite = torch.stack(self.peaks).isfinite().tolist()
        if all(finite):
            return None
        return finite.index(False), len(finite)

    def _diagonal(self) -> list[Tensor]:
        """Return the diagonal of H as one view for each panel."""
        return [panel.diagonal(panel.shape[1] - panel.shape[0]) for panel in self._panels]

    def _peak(self) -> Tensor:
        diagonal = self._diagonal()
        if len(diagonal) == 1:
            return diagonal[0].amax()
        return torch.cat(diagonal).amax()

    def add_zeros(self) -> None:
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

    def _add_halves(
        self, sums: list[Tensor | None], tokens: Tensor, wanted: Tensor, found: Tensor, cut: int
    ) -> None:
        """Add (wanted - found) xᵀ of tokens before `cut` to the first sum, of others to the second.

        A half without tokens is left out, except if there are none at all.
        """
        for half, rows in enumerate((slice(0, cut), slice(cut, None))):
            if len(tokens[rows]) or not len(tokens):
                self._add_shift(sums, half, tokens[rows], wanted[rows], found[rows])

    def _add_shift(
        self, sums: list[Tensor | None], half: int, tokens: Tensor, wanted: Tensor, found: Tensor
    ) -> None:
        n_tokens = TOKENS_PER_CHUNK[self._device.type]
        exact = _exact_on_tensor_cores(tokens)
        if exact and _all_bfloat16(tokens, wanted, found):
            n_tokens = TOKENS_OF_A_SHIFT
        pieces = (tokens.split(n_tokens), wanted.split(n_tokens), found.split(n_tokens))
        for chunk, before, after in zip(*pieces, strict=True):
            if exact:
                self._add_exact_shift(sums, half, chunk, before, after)
                continue
            shift = sums[half]
            if shift is None:
                shift = chunk.new_zeros(wanted.shape[1], self._size, dtype=self._dtype)
                sums[half] = shift
            difference = before.to(shift.dtype) - after.to(shift.dtype)
            shift.addmm_(difference.T, chunk.to(shift.dtype))

    def _add_exact_shift(
        self, sums: list[Tensor | None], half: int, tokens: Tensor, wanted: Tensor, found: Tensor
    ) -> None:
        """Add (wanted - found) xᵀ on tensor cores, with the difference in 16 bits."""
        difference, tokens = _difference(tokens, wanted, found)
        self._add_product(sums, half, difference, tokens)

    def _add_product(
        self, sums: list[Tensor | None], half: int, difference: Tensor, tokens: Tensor
    ) -> None:
        shift = sums[half]
        if shift is None:
            sums[half] = _product(difference.T, tokens)
            return
        for start, stop in self._bounds:  # which bounds the memory of the product
            shift[:, start:stop].add_(_product(difference.T, tokens[:, start:stop]))

    def _add_rows(self, weight: Tensor, tokens: Sequence[Tensor], cut: int) -> None:
        """Add (W (x₀ - x) + r₀ - r) xᵀ, of tokens before `cut` to the first half.

        `tokens` are x and x₀, and r and r₀ if the outputs are added to a residual.
        """
        n_tokens = TOKENS_OF_A_SHIFT
        if not _exact_on_tensor_cores(tokens[0]):
            n_tokens, tokens = TOKENS_PER_CHUNK["cpu"], [part.to(self._dtype) for part in tokens]
        for half, rows in enumerate((slice(0, cut), slice(cut, None))):
            for chunk in zip(*(part[rows].split(n_tokens) for part in tokens), strict=True):
                if len(chunk[0]) or not len(tokens[0]):
                    self._add_product(self._shifts, half, _of_rows(weight, *chunk), chunk[0])


def _of_rows(weight: Tensor, tokens: Tensor, original: Tensor, *residuals: Tensor) -> Tensor:
    """Return W (x₀ - x) [n, O], and r₀ - r added if there are residuals, in the dtype of x."""
    weight, difference = weight.to(tokens.dtype).T, original - tokens
    if not residuals:
        return difference @ weight
    found, wanted = residuals
    return torch.addmm((wanted - found).to(tokens.dtype), difference, weight)


def _both(halves: list[Tensor | None]) -> list[Tensor]:
    """Return the sums of both halves, none if there is neither; a missing half becomes zeros."""
    first, second = halves
    known = first if second is None else second
    if known is None:
        return []
    for half, sum_ in enumerate(halves):
        if sum_ is None:
            halves[half] = torch.zeros_like(known)
    return [sum_ for sum_ in halves if sum_ is not None]


def _all_bfloat16(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors)


def _difference(tokens: Tensor, wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return wanted - found in the 16 bits of `tokens`, and the tokens it is to be multiplied with.

    In bfloat16 it is rounded, by less than both themselves were. A difference of other numbers may
    be too large for a float16: it is the sum of two, so each token comes twice.
    """
    if _all_bfloat16(tokens, wanted, found):
        return wanted - found, tokens
    difference = split(wanted.float() - found.float(), tokens.dtype)
    return torch.cat(difference), torch.cat([tokens, tokens])


def _limits(tokens: Tensor) -> Tensor:
    """Return factors [n, 1] that make tokens [n, ...] `LONGEST` times the median one at most.

    Factors are powers of 2, so that scaled numbers of 16 bits are exact. Those of tokens without a
    finite length are 1.
    """
    lengths = _lengths(tokens)
    return _shortening(lengths, lengths.median()).to(tokens.dtype).unsqueeze(1)


def _limited(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return inputs [n, I], and what else there is of the same tokens, with massive ones limited.

    A token may be massive in the hidden states, but not in the inputs: it counts less in the drift
    then.
    """
    limits = _limits(rows[0])
    limited = _scaled(rows[:2], limits)
    if len(rows) > 2:
        limited += _scaled(rows[2:], limits * _limits(rows[3]))
    return limited


def factors_of_tokens(energies: Tensor) -> Tensor:
    """Return the factors [n] of tokens whose gradients have these energies [n].

    They are the powers of 2 nearest to the fourth root of the energy in medians, so that a token
    counts in H by about the square root of its energy.
    """
    exponents = (energies / energies.median()).log2() / 4
    limit = math.log2(LARGEST_FACTOR)
    return torch.exp2(exponents.nan_to_num(0.0).round().clamp(-limit, limit))


def _scaled(tensors: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Return the tensors [n, ...] multiplied with factors [n, 1]."""
    if factors.is_cpu and bool((factors == 1).all()):
        return [*tensors]  # without a copy
    return [tensor * factors for tensor in tensors]


def limit_parts_(tokens: Tensor, original: Tensor | None, counts: Tensor) -> None:
    """Limit massive tokens in parts of `tokens` [n, I], and scale their originals, in place.

    The parts follow each other; `counts`, int64 on the device, are their numbers of tokens. A token
    may be as long as if a `HessianAccumulator` with limited tokens had got its part alone.
    """
    if not len(tokens):
        return
    lengths, ends = _lengths(tokens), counts.cumsum(0)
    numbers = torch.arange(len(tokens), device=tokens.device)
    part_of = torch.searchsorted(ends, numbers, right=True)
    medians = _medians(lengths, part_of, ends - counts // 2 - 1)
    factors = _shortening(lengths, medians[part_of]).to(tokens.dtype).unsqueeze(1)
    tokens.mul_(factors)
    if original is not None:
        original.mul_(factors)


def _lengths(tokens: Tensor) -> Tensor:
    """Return the lengths [n] of tokens [n, I], at least in float32."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(tokens, dim=1, dtype=dtype)
    return lengths


def _medians(lengths: Tensor, part_of: Tensor, middles: Tensor) -> Tensor:
    """Return the median of the lengths of each part; NaN is larger than all numbers.

    Lengths [n] belong to the parts `part_of` [n]. `middles` are the places of the medians among
    the lengths, if the lengths of each part are sorted.
    """
    by_length, order = lengths.sort()
    by_part = part_of[order].sort(stable=True).indices
    return by_length[by_part[middles]]


def _shortening(lengths: Tensor, medians: Tensor) -> Tensor:
    """Return the power of 2, 1 or less, by which each token of these lengths is scaled.

    If most tokens are zero, which makes a median 0, none is scaled.
    """
    excess = lengths / (LONGEST * medians)
    excess = excess.nan_to_num(1.0, posinf=1.0).clamp(min=1.0)
    return torch.exp2(-excess.log2().ceil())


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

    Batches must be added in the order of their numbers. If there are `factors`, they have those of
    the tokens of each batch (see `HessianAccumulator`).
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str,
        *,
        limited: bool = False,
        weight: Tensor | None = None,
        factors: Sequence[Tensor] = (),
    ) -> None:
        self._factors = factors
        self._new = partial(HessianAccumulator, in_features, device, limited=limited, weight=weight)
        self._batch = -1
        self._open: HessianAccumulator | None = None
        self._nodes: list[Node[HessianAccumulator]] = []

    def add(
        self, batch: int, inputs: Tensor, original: Tensor | None = None, *residuals: Tensor
    ) -> None:
        """Add inputs of a batch (see `HessianAccumulator.add`); a batch may add several times."""
        if batch != self._batch or self._open is None:
            self._close()
            factors = None
            if self._factors:
                factors = self._factors[batch]
            self._batch, self._open = batch, self._new(factors=factors)
        self._open.add(inputs, original, batch % 2, residuals)

    def nothing(self) -> HessianAccumulator:
        """Return the sum over no batch."""
        empty = self._new()
        empty.add_zeros()
        return empty

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
