"""Mixtures of experts: transformers stacks their matrices into one tensor, here each is a linear layer of its own.

`Experts` takes the place of the stacked module in the skeleton. It computes what that module computes, proven on random
numbers when it is made, and shows who is sent where, so that each expert can be calibrated on its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP = "gate_up_proj"
BIAS = "_bias"  # behind the name of the stacked matrices that it is added to
_PROOF_FEATURES, _PROOF_TOKENS, _PROOF_TOLERANCE = 16, 24, 1e-4


class Routed(NamedTuple):
    """What the experts of a block were given for one batch: hidden states [T, H] and, for each, its experts [T, K].

    Without `experts`, `hidden` [E * T, H] holds the tokens of each expert one after the other, zero where it has none.
    """

    hidden: Tensor
    experts: Tensor | None = None

    def clone(self) -> Routed:
        return Routed(*(None if tensor is None else tensor.clone() for tensor in self))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Slice:
    """The weight [O, I] of one expert's linear inside a stacked tensor of the checkpoint."""

    stack: str
    expert: int
    rows: slice  # of the matrix as [O, I]; every other one where gate and up are interleaved
    turned: bool  # the stack holds matrices [I, O]

    @property
    def stored(self) -> tuple[str]:
        """The tensor that is read for it."""
        return (self.stack,)

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """The weight [O, I], a view of the stack that `read` gives."""
        matrix: Tensor = read(self.stack)[self.expert]
        turned: Tensor = matrix.T if self.turned else matrix
        return turned[self.rows]


class Expert(nn.Module):
    """The linears of one expert; `gate_proj` is None where there is no gate."""

    def __init__(self, hidden: int, intermediate: int, *, gated: bool, dtype: torch.dtype) -> None:
        super().__init__()
        like: dict[str, Any] = {"bias": False, "device": "meta", "dtype": dtype}
        self.gate_proj = nn.Linear(hidden, intermediate, **like) if gated else None
        self.up_proj = nn.Linear(hidden, intermediate, **like)
        self.down_proj = nn.Linear(intermediate, hidden, **like)


class Experts(nn.Module):
    """The experts of a block with a linear for each matrix; `kind` is the stacked module, whose activation they use.

    Biases stay stacked, under their own names. A choice beyond the experts gives a token back as it is.
    """

    def __init__(self, kind: nn.Module) -> None:
        super().__init__()
        shape = StackShape.of(kind)
        assert shape is not None
        self.kind = copy(kind)
        self.kind._parameters = {}
        self.n_experts, self.n_choices = shape.n_experts, shape.n_choices
        self.biased, self._interleaved = shape.biased, shape.interleaved
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
        return (self[number] for number in range(self.n_experts))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """As the stacked module's: [T, H], the weighted sum of the outputs of each token's experts."""
        output = torch.zeros_like(hidden_states)
        weights = None if top_k_weights is None else top_k_weights.T.flatten()
        for number, places in enumerate(self._choices(Routed(hidden_states, top_k_index))):
            rows = _row_of(places, hidden_states, top_k_index)
            if rows.numel():
                down = self[number].down_proj(self.intermediate(number, hidden_states[rows]))
                down = self._with_bias(DOWN, number, down)
                if weights is not None:
                    down = down * weights[places][:, None]
                output.index_add_(0, rows, down.to(output.dtype))
        if self.n_choices > self.n_experts:
            assert top_k_index is not None
            assert top_k_weights is not None
            as_it_is = top_k_weights.masked_fill(top_k_index < self.n_experts, 0).sum(
                -1, keepdim=True
            )
            output += (hidden_states * as_it_is).to(output.dtype)
        return output

    def intermediate(self, number: int, tokens: Tensor) -> Tensor:
        """What expert `number` gives to its down_proj for `tokens` [N, H]: [N, I]."""
        expert = self[number]
        up = expert.up_proj(tokens)
        if expert.gate_proj is None:
            activated: Tensor = self.kind.act_fn(self._with_bias(UP, number, up))  # type: ignore[operator]
            return activated
        gate = expert.gate_proj(tokens)
        if not hasattr(self.kind, "_apply_gate"):
            return self.kind.act_fn(gate) * up  # type: ignore[operator, no-any-return]
        joined = (
            torch.stack([gate, up], -1).flatten(-2)
            if self._interleaved
            else torch.cat([gate, up], dim=-1)
        )
        gated: Tensor = self.kind._apply_gate(self._with_bias(GATE_UP, number, joined))  # type: ignore[operator]
        return gated

    def _with_bias(self, name: str, number: int, output: Tensor) -> Tensor:
        bias = self._parameters.get(name + BIAS)
        return output if bias is None else output + bias[number]

    def rows(self, routed: Routed) -> list[Tensor]:
        """For each expert which rows of `routed.hidden` it is given; waits for the device once or twice for them all.

        A token comes once for each of its choices that is this expert, first choices first.
        """
        return [_row_of(places, *routed) for places in self._choices(routed)]

    def _choices(self, routed: Routed) -> Sequence[Tensor]:
        """For each expert the choices that are this expert, numbered as in [K, T]; without choices, its rows."""
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


def _row_of(choices: Tensor, hidden: Tensor, chosen: Tensor | None) -> Tensor:
    return choices if chosen is None else choices % len(hidden)


@dataclass(frozen=True, slots=True)
class StackShape:
    """Sizes of a module that holds the matrices of `n_experts` experts stacked, [E, O, I] or, `turned`, [E, I, O].

    `interleaved`: rows of gate and up take turns, else those of gate come first. `n_choices`: of a token, those that
    are no expert included.
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
        """The sizes of `module`, None if it is not such a module or has other weights besides."""
        own = {
            name: parameter
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        first = GATE_UP if GATE_UP in own else UP
        biased = DOWN + BIAS in own
        names = {first, DOWN} | ({first + BIAS, DOWN + BIAS} if biased else set())
        if set(own) != names or any(own[name].dim() != 3 for name in (first, DOWN)):
            return None
        if any(True for child in module.children() for _ in child.parameters()):
            return None
        (n_choices, *outer), (n_experts, *_) = own[first].shape, own[DOWN].shape
        factor = 2 if first == GATE_UP else 1
        interleaved = not getattr(module, "is_concatenated", True)
        for turned in (False, True):
            wide, hidden = reversed(outer) if turned else outer
            intermediate = wide // factor
            expected = (
                (n_experts, intermediate, hidden) if turned else (n_experts, hidden, intermediate)
            )
            if (
                wide == factor * intermediate
                and tuple(own[DOWN].shape) == expected
                and n_choices >= n_experts
            ):
                return cls(
                    n_experts,
                    n_choices,
                    hidden,
                    intermediate,
                    factor == 2,
                    turned,
                    interleaved=interleaved,
                    biased=biased,
                )
        return None

    def slices(
        self, parameter: str, stack: str, *, interleaved: bool | None = None
    ) -> Iterator[tuple[int, str, Slice]]:
        """(expert, linear, slice) for all that `parameter` holds, when the checkpoint has it as one tensor `stack`.

        `interleaved`: of that tensor, if it is not as in the module.
        """
        halves = (slice(0, self.intermediate), slice(self.intermediate, None))
        if self.interleaved if interleaved is None else interleaved:
            halves = (slice(0, None, 2), slice(1, None, 2))
        parts = {GATE_UP: dict(zip((GATE, UP), halves, strict=True))}.get(
            parameter, {parameter: slice(None)}
        )
        for number in range(self.n_experts):
            for part, rows in parts.items():
                yield number, part, Slice(stack, number, rows, self.turned)


def computes_the_same(kind: nn.Module) -> bool:
    """Whether `Experts` computes what the stacked module `kind` does, tried on random numbers, few hidden features."""
    shape = StackShape.of(kind)
    assert shape is not None
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).div_(sizes[-1] ** 0.5)

    e, h, i = shape.n_experts, shape.hidden, _PROOF_FEATURES
    first, wide = (GATE_UP, 2 * i) if shape.gated else (UP, i)
    stacks = {
        first: random(shape.n_choices, *((h, wide) if shape.turned else (wide, h))),
        DOWN: random(e, *((i, h) if shape.turned else (h, i))),
    }
    biases = (
        {first + BIAS: random(shape.n_choices, wide), DOWN + BIAS: random(e, h)}
        if shape.biased
        else {}
    )
    stacked = copy(kind)
    stacked._parameters = {
        name: nn.Parameter(tensor, requires_grad=False)
        for name, tensor in (stacks | biases).items()
    }
    small = StackShape.of(stacked)
    assert small is not None
    experts = Experts(stacked)
    for name in stacks:
        for number, part, piece in small.slices(name, name):
            linear = experts[number].get_submodule(part)
            linear._parameters["weight"] = nn.Parameter(
                piece.read(stacks.__getitem__), requires_grad=False
            )
    tokens = random(_PROOF_TOKENS, h) * h**0.5
    k = min(2, e)
    chosen = torch.stack(
        [torch.randperm(shape.n_choices, generator=generator)[:k] for _ in range(_PROOF_TOKENS)]
    )
    weights = torch.rand(chosen.shape, generator=generator)
    spread = torch.zeros(shape.n_choices, _PROOF_TOKENS, h)
    spread[chosen[:, 0], torch.arange(_PROOF_TOKENS)] = tokens
    for args in ((tokens, chosen, weights), (spread.view(-1, h),)):
        try:
            expected = stacked(*args)
        except TypeError:  # called with what it does not take: the other way of routing
            continue
        found = experts(*args)
        return bool((found - expected).abs().max() <= _PROOF_TOLERANCE * expected.abs().max())
    return False


def find_stacks(model: nn.Module) -> dict[str, StackShape]:
    """The modules of `model` that `Experts` can take the place of, by name."""
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
    """Put `Experts` in the place of the stacked modules `paths` of `model`."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Experts(model.get_submodule(path)))
