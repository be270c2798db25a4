"""Which linears see the very same input, and in what order: found by running a block once and watching.

A *stage* is such a set: (q, k, v), (o), (gate, up), (down) for Llama; they share one Hessian. The experts of a block
are one stage, under the name of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptq_cli.models.experts import Experts, Routed

Hook = Callable[[nn.Module, tuple[Any, ...]], None]
Input = Tensor | Routed  # of a linear, or of the experts of a block


@dataclass(frozen=True, slots=True)
class Stage:
    """Names of linears with one input, in order of first call; `calls` of the first of them in one forward."""

    names: tuple[str, ...]
    calls: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What one forward of a block showed.

    `inputs`: for each linear that was called, in order of first call, which tensors it was given. `waiting_bytes`: the
    most that the forward held in memory of its own when it was about to call a linear.
    """

    inputs: Mapping[str, tuple[object, ...]]
    waiting_bytes: int

    def stages(self, names: Container[str]) -> list[Stage]:
        """The stages that the linears `names` form, in the order of the forward; one never called is in none."""
        stages: dict[tuple[object, ...], list[str]] = {}
        for name, given in self.inputs.items():
            if name in names:
                stages.setdefault(given, []).append(name)
        return [Stage(tuple(together), len(given)) for given, together in stages.items()]


class Prober:
    """Probes one block of each kind. Blocks of a kind print alike: the same modules of the same classes and sizes."""

    def __init__(self) -> None:
        self._known: dict[str, Probe] = {}

    def __call__(
        self, block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[], object]
    ) -> Probe:
        """The probe of `block`, whose linears are given by name in an order that its kind shares, by `run` if new."""
        positions = {name: str(position) for position, name in enumerate(linears)}
        kind = str(block)
        if kind not in self._known:
            self._known[kind] = _renamed(probe_block(linears, run), positions)
        return _renamed(self._known[kind], {position: name for name, position in positions.items()})


def probe_block(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> Probe:
    """What `run`, one forward of a block, does with the block's linears."""
    inputs: dict[str, list[object]] = {}
    waiting_bytes = 0
    storages = _Storages()

    def note(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal waiting_bytes
            tensors = [leaf for leaf in tree_leaves(given(module, args)) if leaf is not None]
            inputs.setdefault(name, []).append(tuple(map(storages.identify, tensors)))
            waiting_bytes = max(waiting_bytes, storages.nbytes)

        return hook

    with hooked((linear, note(name)) for name, linear in linears.items()), storages:
        run()
    return Probe({name: tuple(given) for name, given in inputs.items()}, waiting_bytes)


def watch_inputs(
    stages: Iterable[Stage],
    linears: Mapping[str, nn.Module],
    see: Callable[[Stage, Input], None],
    run: Callable[[], object],
) -> None:
    """Run `run`, giving `see` every input of every stage; it ends once the last input has been seen."""
    stages = list(stages)
    left = sum(stage.calls for stage in stages)

    def seen(stage: Stage) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal left
            see(stage, given(module, args))
            left -= 1
            if not left:
                raise _Reached

        return hook

    with hooked((linears[stage.names[0]], seen(stage)) for stage in stages), suppress(_Reached):
        run()


def given(module: nn.Module, args: tuple[Any, ...]) -> Input:
    """What a linear or the experts of a block are called with, as far as calibration is concerned."""
    found: Input = Routed(*args[:2]) if isinstance(module, Experts) else args[0]
    return found


@contextmanager
def hooked(pairs: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Each module calls its hook before its forward; the hooks are gone on leaving."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_memory(a: Input, b: Input) -> bool:
    """Whether two tensors that are both alive are one and the same numbers."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class _Reached(Exception):
    """Ends a forward once the inputs that it was run for have been seen."""


class _Storages(TorchDispatchMode):
    """Tells the memory of tensors apart, also after it was given back, and counts what operations have allocated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocated: WeakSet[torch.UntypedStorage] = WeakSet()
        self._numbers: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self._next = count()

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that operations have allocated under this mode and that are still alive."""
        return sum(storage.nbytes() for storage in self._allocated)

    def identify(self, tensor: Tensor) -> object:
        """A value that only views of the same numbers of the same storage share."""
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            self._numbers[storage] = next(self._next)
        return self._numbers[storage], tensor.storage_offset(), tensor.shape, tensor.stride()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._allocated |= _storages_in(output) - _storages_in((args, kwargs))
        return output


def _storages_in(values: object) -> set[torch.UntypedStorage]:
    return {value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)}


def _renamed(probe: Probe, names: Mapping[str, str]) -> Probe:
    return Probe({names[name]: given for name, given in probe.inputs.items()}, probe.waiting_bytes)
