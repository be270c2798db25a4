"""Stages: the linears of a block that see the very same input, in the order of a forward.

For Llama the stages are (q, k, v), (o), (gate, up), (down); the linears of a stage share one
Hessian. All experts of a block are one stage, under the name of the module that holds them. The
stages are found by running a block once with hooks on its linears.
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
    """Names of linears with one input, in order of first call.

    `calls` counts the calls of the first linear in one forward.
    """

    names: tuple[str, ...]
    calls: int


@dataclass(frozen=True, slots=True)
class Probe:
    """The inputs and the memory of one forward of a block.

    `inputs` identifies the input tensors of each linear that was called, in order of first call.
    `waiting_bytes` is the most memory of its own that the forward held before a call of a linear.
    """

    inputs: Mapping[str, tuple[object, ...]]
    waiting_bytes: int

    def stages(self, names: Container[str]) -> list[Stage]:
        """Return the stages of the linears `names`, in the order of the forward.

        A linear that was never called is in no stage.
        """
        names_by_inputs: dict[tuple[object, ...], list[str]] = {}
        for name, inputs in self.inputs.items():
            if name in names:
                names_by_inputs.setdefault(inputs, []).append(name)
        stages = []
        for inputs, together in names_by_inputs.items():
            stages.append(Stage(tuple(together), calls=len(inputs)))
        return stages


class Prober:
    """A cache of probes: one block of each kind is run.

    Two blocks are of one kind if their `str` is equal: the same modules, classes and sizes.
    """

    def __init__(self) -> None:
        self._known: dict[str, Probe] = {}

    def __call__(
        self, block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[], object]
    ) -> Probe:
        """Return the probe of `block`; `run`, its forward, is called if the kind is new.

        `linears` are by name, in an order that all blocks of a kind share.
        """
        names = list(linears)
        kind = str(block)
        if kind not in self._known:
            positions = {name: str(position) for position, name in enumerate(names)}
            self._known[kind] = _renamed(probe_block(linears, run), positions)
        return _renamed(self._known[kind], {str(i): name for i, name in enumerate(names)})


def probe_block(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> Probe:
    """Run `run`, one forward of a block, and return the inputs of the block's linears."""
    inputs: dict[str, list[object]] = {}
    waiting_bytes = 0
    storages = _Storages()

    def note(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal waiting_bytes
            leaves = tree_leaves(given(module, args))
            tensors = [leaf for leaf in leaves if leaf is not None]
            inputs.setdefault(name, []).append(tuple(map(storages.identify, tensors)))
            waiting_bytes = max(waiting_bytes, storages.nbytes)

        return hook

    with hooked((linear, note(name)) for name, linear in linears.items()), storages:
        run()
    seen = {name: tuple(identities) for name, identities in inputs.items()}
    return Probe(seen, waiting_bytes)


def watch_inputs(
    stages: Iterable[Stage],
    linears: Mapping[str, nn.Module],
    see: Callable[[Stage, Input], None],
    run: Callable[[], object],
) -> None:
    """Run `run`, a forward, and call `see` with every input of every stage.

    The forward is stopped after the last input.
    """
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
    """Return the part of the arguments of a linear, or of experts, that calibration needs."""
    if isinstance(module, Experts):
        return Routed(*args[:2])
    found: Tensor = args[0]
    return found


@contextmanager
def hooked(pairs: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Make each module call its hook before its forward; remove the hooks at the end."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_memory(a: Input, b: Input) -> bool:
    """Return whether two living tensors are the same view of the same memory."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class _Reached(Exception):
    """Stop a forward after the last input that it was run for."""


class _Storages(TorchDispatchMode):
    """Identify the memory of tensors, also after it was freed, and count the allocated bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocated: WeakSet[torch.UntypedStorage] = WeakSet()
        self._numbers: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self._next = count()

    @property
    def nbytes(self) -> int:
        """Bytes of the living storages that operations allocated under this mode."""
        return sum(storage.nbytes() for storage in self._allocated)

    def identify(self, tensor: Tensor) -> object:
        """Return a value that is equal only for equal views of the same storage."""
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            self._numbers[storage] = next(self._next)
        return self._numbers[storage], tensor.storage_offset(), tensor.shape, tensor.stride()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._allocated |= _storages_in(output) - _storages_in((args, kwargs))
        return output


def _storages_in(values: object) -> set[torch.UntypedStorage]:
    """Return the storages of all tensors in `values`."""
    return {value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)}


def _renamed(probe: Probe, names: Mapping[str, str]) -> Probe:
    """Return `probe` with each linear under the name that `names` maps it to."""
    inputs = {names[name]: given for name, given in probe.inputs.items()}
    return Probe(inputs, probe.waiting_bytes)
