"""Mixtures of experts: transformers stacks their matrices into one tensor; here each is a linear.

`Experts` replaces the stacked module in the skeleton. It computes the same outputs, which
`computes_the_same` proves on random numbers before the replacement, and it shows which tokens are
sent to which expert, so that each expert can be calibrated on its own tokens (see
`quantization/routed_experts.py`).

Letters for shapes:  T tokens   H hidden features   I intermediate features   E experts
K chosen experts of a token   N tokens of one expert   [O, I] a matrix of outputs and inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP = "gate_up_proj"
BIAS = "_bias"  # suffix of the name of the stacked matrices that a bias is added to
# Compute capabilities, by their first number, on which torch has one kernel for the products of
# several experts in bfloat16 (GroupedBlas.cpp); its rows are multiples of so many numbers:
_GROUPED_PRODUCTS, _ALIGNED = (9, 10), 8
_PROOF_FEATURES, _PROOF_TOKENS, _PROOF_TOLERANCE = 16, 24, 1e-4


class Routed(NamedTuple):
    """Input of the experts of a block for one batch: hidden states [T, H], chosen experts [T, K].

    If `experts` is None, `hidden` [E * T, H] holds the tokens of each expert one after the other; a
    token that is not sent to that expert is zero.
    """

    hidden: Tensor
    experts: Tensor | None = None

    def clone(self) -> Routed:
        if self.experts is None:
            return Routed(self.hidden.clone())
        return Routed(self.hidden.clone(), self.experts.clone())


@dataclass(frozen=True, slots=True)
class Slice:
    """The weight [O, I] of one expert's linear inside a stacked tensor of the checkpoint."""

    stack: str
    expert: int
    rows: slice  # of the matrix [O, I]; every second row if gate and up are interleaved
    turned: bool  # the stack holds matrices [I, O]

    @property
    def stored(self) -> tuple[str]:
        """The name of the tensor that holds it."""
        return (self.stack,)

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the weight [O, I] as a view of the stack that `read` returns."""
        matrix: Tensor = read(self.stack)[self.expert]
        if self.turned:
            matrix = matrix.T
        return matrix[self.rows]


class Expert(nn.Module):
    """The linears of one expert; `gate_proj` is None if there is no gate."""

    def __init__(self, hidden: int, intermediate: int, *, gated: bool, dtype: torch.dtype) -> None:
        super().__init__()
        like: dict[str, Any] = {"bias": False, "device": "meta", "dtype": dtype}
        self.gate_proj = nn.Linear(hidden, intermediate, **like) if gated else None
        self.up_proj = nn.Linear(hidden, intermediate, **like)
        self.down_proj = nn.Linear(intermediate, hidden, **like)


class Experts(nn.Module):
    """The experts of a block with one linear per matrix; `kind` is the stacked module.

    The activation is that of `kind`. Biases stay stacked, under their own names. A chosen number
    beyond the experts returns the token unchanged.
    """

    def __init__(self, kind: nn.Module) -> None:
        super().__init__()
        shape = StackShape.of(kind)
        assert shape is not None
        self.kind = copy(kind)
        self.kind._parameters = {}
        self.n_experts, self.n_choices = shape.n_experts, shape.n_choices
        self.biased, self._interleaved = shape.biased, shape.interleaved
        self._first = [GATE, UP] if shape.gated else [UP]  # the linears that see the tokens
        dtype = kind.get_parameter(DOWN).dtype
        for number in range(shape.n_experts):
            expert = Expert(shape.hidden, shape.intermediate, gated=shape.gated, dtype=dtype)
            self.add_module(str(number), expert.requires_grad_(False))
        for name in (GATE_UP + BIAS, UP + BIAS, DOWN + BIAS):
            self.register_parameter(name, kind._parameters.get(name))

    def __getitem__(self, number: int) -> Expert:
        expert = self._modules[str(number)]
        assert isinstance(expert, Expert)
        return expert

    def __iter__(self) -> Iterator[Expert]:
        for number in range(self.n_experts):
            yield self[number]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Return [T, H], the weighted sum of the outputs of each token's experts.

        Arguments are those of the stacked module: hidden states [T, H], or [E * T, H] without
        choices, then the chosen experts and their weights [T, K].
        """
        output = torch.zeros_like(hidden_states)
        weights = None if top_k_weights is None else top_k_weights.T.flatten()
        add_outputs = self._add_one_by_one
        # A backward pass needs the call of each linear, and no output that is written in place.
        if hidden_states.is_cuda and not torch.is_grad_enabled():
            add_outputs = self._add_together
        add_outputs(output, Routed(hidden_states, top_k_index), weights)
        if self.n_choices > self.n_experts:
            assert top_k_index is not None
            assert top_k_weights is not None
            unchanged = top_k_weights.masked_fill(top_k_index < self.n_experts, 0)
            output += (hidden_states * unchanged.sum(-1, keepdim=True)).to(output.dtype)
        return output

    def _add_one_by_one(self, output: Tensor, routed: Routed, weights: Tensor | None) -> None:
        """Add the weighted outputs of the experts to `output` [T, H], in little memory."""
        for number, choices in enumerate(self._choices(routed)):
            rows = _row_of(choices, *routed)
            if not rows.numel():
                continue
            down = self[number].down_proj(self.intermediate(number, routed.hidden[rows]))
            down = self._with_bias(DOWN, number, down)
            if weights is not None:
                down = down * weights[choices][:, None]
            output.index_add_(0, rows, down.to(output.dtype))

    def _add_together(self, output: Tensor, routed: Routed, weights: Tensor | None) -> None:
        """Add what `_add_one_by_one` adds, in few launches.

        A row of `output` receives its experts in their order, so that two runs add the same
        numbers.
        """
        of_experts = self._choices(routed)
        choices = torch.cat(list(of_experts))
        tokens = routed.hidden[_row_of(choices, *routed)]
        outputs = output.new_empty(len(choices) + 1, output.shape[1])
        outputs[-1:].zero_()  # what choices that are no expert add here
        scales = None if weights is None else weights[choices][:, None]
        start = 0
        for run in self._runs(output):
            counts = [len(of_experts[number]) for number in run]
            mine = slice(start, start + sum(counts))
            start = mine.stop
            down = self._outputs(run, tokens[mine], counts)
            if scales is None:
                outputs[mine] = down
            else:
                torch.mul(down, scales[mine], out=outputs[mine])
        if routed.experts is None:  # then no row has two experts
            output.index_add_(0, choices, outputs[:-1])
            return
        for of_choices in outputs[_places_of_choices(choices, routed.experts)]:
            output += of_choices

    def lay_out(self) -> None:
        """Make the weights of all experts follow each other, if the device then takes one product.

        They become views of two tensors. The memory of a weight that is replaced later is not freed
        before the others are.
        """
        for parts in (self._first, [DOWN]):
            weights = []
            for number in range(self.n_experts):
                weights += self._weights(parts, number)
            if not _has_grouped_products(weights[0], weights[0]):
                return
            places = product(self, parts)
            for (expert, part), weight in zip(places, torch.stack(weights), strict=True):
                linear = expert.get_submodule(part)
                linear.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def intermediates(
        self, numbers: Sequence[int], tokens: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Return what `intermediate` returns for each of the experts `numbers`, joined, [N, I].

        `tokens` [N, H] are `counts` many for each of them.
        """
        return self._between(numbers, tokens, counts, self._owners(numbers, tokens, counts))

    def _outputs(self, numbers: Sequence[int], tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the outputs [N, H] of the experts `numbers`, for `counts` tokens of each."""
        owners = self._owners(numbers, tokens, counts)
        between = self._between(numbers, tokens, counts, owners)
        return self._with_bias(DOWN, owners, self._products([DOWN], numbers, between, counts))

    def _owners(
        self, numbers: Sequence[int], tokens: Tensor, counts: Sequence[int]
    ) -> Tensor | None:
        """Return the expert of each token, int64 [N], which chooses biases; None without them."""
        if not self.biased:
            return None
        experts, sizes = on_device([*numbers, *counts], tokens.device).chunk(2)
        return experts.repeat_interleave(sizes, output_size=len(tokens))

    def _between(
        self,
        numbers: Sequence[int],
        tokens: Tensor,
        counts: Sequence[int],
        owners: Tensor | None,
    ) -> Tensor:
        joined = self._products(self._first, numbers, tokens, counts)
        if self._first == [UP]:
            return self._activated(None, joined, owners)
        if hasattr(self.kind, "_apply_gate") and not self._interleaved:
            return self._activated_together(joined, owners)
        gate, up = joined.chunk(2, dim=-1)
        return self._activated(gate, up, owners)

    def _products(
        self, parts: Sequence[str], numbers: Sequence[int], tokens: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Return the outputs [N, O] of the linears `parts`, side by side.

        `tokens` [N, ...] are `counts` many for each of the experts `numbers`. If the weights of all
        follow each other in memory, they take one product on devices that have such products.
        """
        weights = [self._weights(parts, number) for number in numbers]
        first = weights[0][0]
        outputs = len(parts) * len(first)
        is_stack = _follow_each_other(list(chain(*weights)))
        if is_stack and len(tokens) and _has_grouped_products(tokens, first):
            size, stride = (len(weights), outputs, first.shape[1]), outputs * first.shape[1]
            stack = first.as_strided(size, (stride, *first.stride()))
            return _grouped_product(tokens, stack, counts)
        found = tokens.new_empty(len(tokens), outputs)
        for mine, given, target in zip(
            weights, tokens.split(counts), found.split(counts), strict=True
        ):
            if len(given):
                _multiply_each(given, mine, target)
        return found

    def _runs(self, like: Tensor) -> list[range]:
        """Return the experts in runs: their weights follow each other in memory, or all are apart.

        If a device like that of `like` has no products of several experts, there is one run.
        """
        weights = [self._weights(self._first, number) for number in range(self.n_experts)]
        starts = [0]
        if _has_grouped_products(like, weights[0][0]):
            follows = [_follow_each_other([*one, *other]) for one, other in pairwise(weights)]
            neighbours = zip([False, *follows], follows, [*follows[1:], False], strict=False)
            for number, (before, here, after) in enumerate(neighbours, 1):
                if not here and (before or after):
                    starts.append(number)
        return [range(start, stop) for start, stop in pairwise([*starts, self.n_experts])]

    def _weights(self, parts: Sequence[str], number: int) -> list[Tensor]:
        expert = self[number]
        return [getattr(expert, part).weight for part in parts]

    def intermediate(self, number: int, tokens: Tensor) -> Tensor:
        """Return the input [N, I] of the down_proj of expert `number` for `tokens` [N, H]."""
        expert = self[number]
        gate = None
        if expert.gate_proj is not None:
            gate = expert.gate_proj(tokens)
        return self._activated(gate, expert.up_proj(tokens), number)

    def _activated(self, gate: Tensor | None, up: Tensor, number: int | Tensor | None) -> Tensor:
        """Return the input [N, I] of down_proj for the outputs of the other linears.

        `number` is that of the expert, or those of the experts of each row; it chooses the biases.
        """
        if gate is None:
            up = self._with_bias(UP, number, up)
            activated: Tensor = self.kind.act_fn(up)  # type: ignore[operator]
            return activated
        if not hasattr(self.kind, "_apply_gate"):
            return self.kind.act_fn(gate) * up  # type: ignore[operator, no-any-return]
        if self._interleaved:
            joined = torch.stack([gate, up], -1).flatten(-2)
        else:
            joined = torch.cat([gate, up], dim=-1)
        return self._activated_together(joined, number)

    def _activated_together(self, joined: Tensor, number: int | Tensor | None) -> Tensor:
        """Return `_activated` of outputs that are joined as the stacked module joins them."""
        joined = self._with_bias(GATE_UP, number, joined)
        gated: Tensor = self.kind._apply_gate(joined)  # type: ignore[operator]
        return gated

    def _with_bias(self, name: str, number: int | Tensor | None, output: Tensor) -> Tensor:
        bias = self._parameters.get(name + BIAS)
        if bias is None:
            return output
        return output + bias[number]

    def rows(self, routed: Routed) -> list[Tensor]:
        """Return for each expert the rows of `routed.hidden` that it is sent, int64 [N].

        A token appears once for each of its choices that is this expert, first choices first.
        Waits for the device once or twice for all experts together.
        """
        of_experts = self._choices(routed)
        rows = _row_of(torch.cat(list(of_experts)), *routed)
        return list(rows.split(list(map(len, of_experts))))

    def n_tokens(self, routed: Routed) -> int:
        """Return the number of tokens of a batch, however many experts each is sent to."""
        if routed.experts is None:
            return len(routed.hidden) // self.n_experts
        return len(routed.hidden)

    def joined(self, batches: Sequence[Routed]) -> Routed:
        """Return the inputs of all `batches` as those of one batch, token after token."""
        hidden = [routed.hidden for routed in batches]
        chosen = [routed.experts for routed in batches if routed.experts is not None]
        if chosen:
            return Routed(torch.cat(hidden), torch.cat(chosen))
        of_experts = [tokens.unflatten(0, (self.n_experts, -1)) for tokens in hidden]
        return Routed(torch.cat(of_experts, dim=1).flatten(0, 1))

    def _choices(self, routed: Routed) -> Sequence[Tensor]:
        """Return for each expert the choices that are this expert, numbered as in [K, T].

        If there are no choices, return the rows of each expert.
        """
        hidden, chosen = routed
        if chosen is None:
            sent = hidden.any(-1)
            counts: list[int] = sent.view(self.n_experts, -1).sum(1).tolist()
            rows: tuple[Tensor, ...] = sent.nonzero()[:, 0].split(counts)
            return rows
        choices, numbers = chosen.T.flatten().sort(stable=True)
        experts = torch.arange(self.n_experts + 1, device=choices.device, dtype=choices.dtype)
        bounds = torch.searchsorted(choices, experts).tolist()
        return [numbers[start:stop] for start, stop in pairwise(bounds)]


def on_device(
    numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return whole numbers on a device; the host does not wait for it if it can pin memory."""
    tensor = torch.tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        with suppress(RuntimeError):  # the system pins no more memory
            tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _has_grouped_products(tokens: Tensor, weight: Tensor) -> bool:
    """Return whether one product on the device takes tokens and weights of several experts.

    Elsewhere torch computes it expert by expert, and waits for the device. It wants rows that start
    at multiples of 16 bytes.
    """
    if not tokens.is_cuda or tokens.dtype != torch.bfloat16:
        return False
    if weight.shape[0] % _ALIGNED or weight.shape[1] % _ALIGNED:
        return False
    return torch.cuda.get_device_capability(tokens.device)[0] in _GROUPED_PRODUCTS


def _follow_each_other(tensors: Sequence[Tensor]) -> bool:
    """Return whether each of the tensors, of equal shapes, starts where the one before it ends."""
    for before, after in pairwise(tensors):
        alike = before.is_contiguous() and after.is_contiguous() and before.shape == after.shape
        memory = before.untyped_storage().data_ptr()
        if not alike or memory != after.untyped_storage().data_ptr():
            return False
        if after.storage_offset() != before.storage_offset() + before.numel():
            return False
    return True


def _grouped_product(tokens: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the outputs [N, O] of weights [E, O, I] for `counts` tokens of each."""
    ends = on_device(list(accumulate(counts)), tokens.device, torch.int32)
    product: Tensor = torch._grouped_mm(tokens, weights.transpose(1, 2), offs=ends)
    return product


def _multiply_each(tokens: Tensor, weights: Sequence[Tensor], target: Tensor) -> None:
    """Write the products of `tokens` with each of the weights of an expert to `target`."""
    for weight, columns in zip(weights, target.chunk(len(weights), dim=1), strict=True):
        torch.mm(tokens, weight.T, out=columns)


def _places_of_choices(order: Tensor, chosen: Tensor) -> Tensor:
    """Return int64 [K, T], the places of the choices [T, K] of each token in `order`, sorted.

    `order` numbers choices as in [K, T]. Choices that it lacks get the place after its last one.
    """
    places = torch.full((chosen.numel(),), len(order), device=order.device)
    places[order] = torch.arange(len(order), device=order.device)
    return places.view(chosen.shape[1], -1).sort(0).values


def _row_of(choices: Tensor, hidden: Tensor, chosen: Tensor | None) -> Tensor:
    if chosen is None:
        return choices
    return choices % len(hidden)


@dataclass(frozen=True, slots=True)
class StackShape:
    """Sizes of a module that stacks the matrices of its experts: [E, O, I] or, `turned`, [E, I, O].

    `interleaved`: rows of gate and up alternate, else all rows of gate come first. `n_choices`
    counts the experts and the choices that are no expert.
    """

    n_experts: int
    n_choices: int
    hidden: int
    intermediate: int
    gated: bool
    turned: bool
    interleaved: bool
    biased: bool

    @classmethod
    def of(cls, module: nn.Module) -> StackShape | None:
        """Return the sizes of `module`, None if it is no such module or has other weights too."""
        own = _stacked_parameters(module)
        if not own:
            return None
        gated = GATE_UP in own
        name, factor = UP, 1
        if gated:
            name, factor = GATE_UP, 2
        n_choices, *first = own[name].shape
        n_experts, *down = own[DOWN].shape
        for turned in (False, True):
            wide, hidden = _as_stored(*first, turned=turned)
            intermediate, rest = divmod(wide, factor)
            fits = rest == 0 and tuple(down) == _as_stored(hidden, intermediate, turned=turned)
            if fits and n_choices >= n_experts:
                return cls(
                    n_experts=n_experts,
                    n_choices=n_choices,
                    hidden=hidden,
                    intermediate=intermediate,
                    gated=gated,
                    turned=turned,
                    interleaved=not getattr(module, "is_concatenated", True),
                    biased=DOWN + BIAS in own,
                )
        return None

    def slices(
        self, parameter: str, stack: str, *, interleaved: bool | None = None
    ) -> Iterator[tuple[int, str, Slice]]:
        """Yield (expert, linear, slice) for all linears that `parameter` holds.

        `stack` is the tensor of the checkpoint that fills `parameter`. `interleaved` describes the
        rows of that tensor, if they differ from those of the module.
        """
        if interleaved is None:
            interleaved = self.interleaved
        if parameter != GATE_UP:
            parts = {parameter: slice(None)}
        elif interleaved:
            parts = {GATE: slice(0, None, 2), UP: slice(1, None, 2)}
        else:
            parts = {GATE: slice(0, self.intermediate), UP: slice(self.intermediate, None)}
        for number in range(self.n_experts):
            for part, rows in parts.items():
                yield number, part, Slice(stack, number, rows, self.turned)


def _stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacked matrices and biases of `module`; nothing if it has any other weights."""
    own = dict(module.named_parameters(recurse=False))
    first = GATE_UP if GATE_UP in own else UP
    expected = {first, DOWN}
    if DOWN + BIAS in own:
        expected |= {first + BIAS, DOWN + BIAS}
    if own.keys() != expected or own[first].dim() != 3 or own[DOWN].dim() != 3:
        return {}
    for child in module.children():
        if next(child.parameters(), None) is not None:
            return {}
    return own


def _as_stored(outputs: int, inputs: int, *, turned: bool) -> tuple[int, int]:
    """Return the sizes of a matrix [O, I] as the stack stores it, or the reverse."""
    if turned:
        return inputs, outputs
    return outputs, inputs


def computes_the_same(kind: nn.Module) -> bool:
    """Return whether `Experts` computes the outputs of the stacked module `kind`.

    The comparison runs both on random numbers, with few intermediate features.
    """
    shape = StackShape.of(kind)
    assert shape is not None
    generator = torch.Generator().manual_seed(0)
    stacked = copy(kind)
    stacked._parameters = _random_parameters(shape, generator)
    experts = _with_weights_of(stacked)
    for arguments in _random_inputs(shape, generator):
        try:
            expected = stacked(*arguments)
        except TypeError:  # the module takes the other kind of routing
            continue
        found = experts(*arguments)
        return bool((found - expected).abs().max() <= _PROOF_TOLERANCE * expected.abs().max())
    return False


def _random(generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=generator).div_(sizes[-1] ** 0.5)


def _random_parameters(
    shape: StackShape, generator: torch.Generator
) -> dict[str, nn.Parameter | None]:
    """Return random stacked matrices and biases like those of `shape`, with few features I."""
    hidden, intermediate = shape.hidden, _PROOF_FEATURES
    first, wide = UP, intermediate
    if shape.gated:
        first, wide = GATE_UP, 2 * intermediate
    sizes: dict[str, tuple[int, ...]] = {
        first: (shape.n_choices, *_as_stored(wide, hidden, turned=shape.turned)),
        DOWN: (shape.n_experts, *_as_stored(hidden, intermediate, turned=shape.turned)),
    }
    if shape.biased:
        sizes[first + BIAS] = (shape.n_choices, wide)
        sizes[DOWN + BIAS] = (shape.n_experts, hidden)
    parameters: dict[str, nn.Parameter | None] = {}
    for name, size in sizes.items():
        parameters[name] = nn.Parameter(_random(generator, *size), requires_grad=False)
    return parameters


def _with_weights_of(stacked: nn.Module) -> Experts:
    """Return `Experts` in place of `stacked`, with views of its weights."""
    shape = StackShape.of(stacked)
    assert shape is not None
    experts = Experts(stacked)
    for name in (GATE_UP, UP, DOWN):
        if name not in stacked._parameters:
            continue
        for number, part, piece in shape.slices(name, name):
            weight = nn.Parameter(piece.read(stacked.get_parameter), requires_grad=False)
            experts[number].get_submodule(part)._parameters["weight"] = weight
    return experts


def _random_inputs(
    shape: StackShape, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return random arguments with chosen experts, and arguments without (see `Routed`)."""
    tokens = _random(generator, _PROOF_TOKENS, shape.hidden) * shape.hidden**0.5
    n_chosen = min(2, shape.n_experts)
    choices = []
    for _ in range(_PROOF_TOKENS):
        choices.append(torch.randperm(shape.n_choices, generator=generator)[:n_chosen])
    chosen = torch.stack(choices)
    weights = torch.rand(chosen.shape, generator=generator)
    spread = torch.zeros(shape.n_choices, _PROOF_TOKENS, shape.hidden)
    spread[chosen[:, 0], torch.arange(_PROOF_TOKENS)] = tokens
    return (tokens, chosen, weights), (spread.view(-1, shape.hidden),)


def find_stacks(model: nn.Module) -> dict[str, StackShape]:
    """Return the modules of `model` that `Experts` can replace, by name."""
    proven: dict[object, bool] = {}
    found = {}
    for path, module in model.named_modules():
        shape = StackShape.of(module)
        if shape is None:
            continue
        kind = (type(module), shape)
        if kind not in proven:
            proven[kind] = computes_the_same(module)
        if proven[kind]:
            found[path] = shape
    return found


def separate(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace the stacked modules `paths` of `model` with `Experts`."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Experts(model.get_submodule(path)))
