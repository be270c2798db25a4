"""Which linears see the very same input, and in what order: found by running a block once and watching.

A *stage* is such a set: (q, k, v), (o), (gate, up), (down) for Llama; they share one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Stage:
    """Names of linears with one input, in order of first call; `calls` of the first of them in one forward."""

    names: tuple[str, ...]
    calls: int


class _Reached(Exception):
    """Ends a forward once the inputs that it was run for have been seen."""


def find_stages(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> list[Stage]:
    """The stages of `linears` in the order of `run`, one forward of their block; linears never called are in none."""
    inputs: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: inputs.setdefault(name, []).append(
            args[0]
        )  # kept alive: a pointer names one tensor only

    with _hooks((linear, note(name)) for name, linear in linears.items()):
        run()
    stages: dict[tuple[object, ...], list[str]] = {}
    for name, seen in inputs.items():
        stages.setdefault(tuple((x.data_ptr(), x.shape, x.stride()) for x in seen), []).append(name)
    return [Stage(tuple(names), len(inputs[names[0]])) for names in stages.values()]


def watch_inputs(
    stages: Iterable[Stage],
    linears: Mapping[str, nn.Module],
    see: Callable[[Stage, Tensor], None],
    runs: Iterable[Callable[[], object]],
) -> None:
    """Run each of `runs`, giving `see` every input of every stage; a run ends once the last input has been seen."""
    stages = list(stages)
    expected = sum(stage.calls for stage in stages)
    left = expected

    def seen(stage: Stage) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal left
            see(stage, args[0])
            left -= 1
            if not left:
                raise _Reached

        return hook

    with _hooks((linears[stage.names[0]], seen(stage)) for stage in stages):
        for run in runs:
            left = expected
            try:
                run()
            except _Reached:
                continue


@contextmanager
def _hooks(pairs: Iterable[tuple[nn.Module, Callable[[nn.Module, tuple[Any, ...]], None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
