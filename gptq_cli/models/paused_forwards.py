"""Forwards of a block that are paused before each stage, until the stage is quantized.

A stage is a set of linears of a block that see the very same input. For Llama the stages are
(q, k, v), (o), (gate, up), (down), in the order of a forward; the linears of a stage share one
Hessian. All experts of a block are one stage, under the name of the module that holds them. The
stages are found by running a block once with hooks on its linears (`Prober`).

Each batch runs the block's ordinary forward in a thread of its own, which pauses before the call of
the first linear of a stage. Once all batches are paused there, the Hessian of the stage is complete
and the stage can be quantized. Then the batches continue with quantized weights, and their outputs
are the input of the next block. Thus each linear runs once per batch, but its input comes from
quantized linears:

with pause_forwards(stages, linears, runs) as batches:
    for stage in stages:
        quantize(stage, [inputs for inputs in batches.reach(stage)])
    hidden = list(batches.finish())

Some linears write into the hidden states: their output y is added to a tensor r that an earlier
module of the block has got as its input, as r + y is the input of a later module or the output of
the block. Which linears these are shows in the numbers of the probe. If a stage is such a linear
alone, r is seen with its input.

Only one thread runs at a time, the caller's or that of one batch. The results are therefore those
of running the block again for each stage, bit for bit. Threads are needed because Python has no
other way to pause in the middle of a model's own forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count
from threading import Semaphore, Thread, current_thread
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptq_cli.errors import InputError
from gptq_cli.models.block_calls import State
from gptq_cli.models.experts import Experts, Routed

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
Input = Tensor | Routed  # of a linear, or of the experts of a block


@dataclass(frozen=True, slots=True)
class Stage:
    """Names of linears with one input, in order of first call.

    `calls` counts the calls of the first linear in one forward. If the output of the only linear is
    added to the input of a module of the block, `residual` is the path of that module in the block.
    """

    names: tuple[str, ...]
    calls: int
    residual: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """The input of a stage in one call, and `residual`, what its output is added to, if known."""

    stage: Stage
    inputs: Any  # a tensor [..., I], or Routed
    residual: Tensor | None = None  # [..., O]

    def clone(self) -> Seen:
        """Return a copy that keeps its numbers if a later part of the forward writes into them."""
        residual = self.residual
        if residual is not None:
            residual = residual.clone()
        return Seen(self.stage, self.inputs.clone(), residual)


@dataclass(frozen=True, slots=True)
class Probe:
    """The inputs and the memory of one forward of a block.

    `inputs` identifies the input tensors of each linear that was called, in order of first call.
    `waiting_bytes` is the most memory of its own that the forward held before a call of a linear,
    `forward_bytes` the most that it held at all. `residuals` has the path of the module to whose
    input the output of a linear is added, for those linears that have one.
    """

    inputs: Mapping[str, tuple[object, ...]]
    waiting_bytes: int
    forward_bytes: int
    residuals: Mapping[str, str] = field(default_factory=dict)

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
            residual = None
            if len(together) == 1:
                residual = self.residuals.get(together[0])
            stages.append(Stage(tuple(together), len(inputs), residual))
        return stages


class Prober:
    """A cache of probes: one block of each kind is run.

    Two blocks are of one kind if they have the same modules, classes and sizes, and if their
    scalars are 1 in the same places: a multiplier that is 1 hides in a sum.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Probe] = {}

    def __call__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        run: Callable[[], object],
        *,
        residuals: bool = False,
    ) -> Probe:
        """Return the probe of `block`; `run`, its forward, is called if the kind is new.

        `linears` are by name, in an order that all blocks of a kind share. The probe has residuals
        if they are asked for.
        """
        names = list(linears)
        kind = (str(block), *_scalars_of_one(block))
        if kind not in self._known:
            positions = {name: str(position) for position, name in enumerate(names)}
            probe = probe_block(linears, run, block if residuals else None)
            self._known[kind] = _renamed(probe, positions)
        return _renamed(self._known[kind], {str(i): name for i, name in enumerate(names)})


def _scalars_of_one(block: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that are a single 1."""
    found = []
    for name, tensor in chain(block.named_parameters(), block.named_buffers()):
        if tensor.numel() == 1 and tensor.item() == 1:
            found.append(name)
    return found


def probe_block(
    linears: Mapping[str, nn.Module], run: Callable[[], object], block: nn.Module | None = None
) -> Probe:
    """Run `run`, one forward of a block, and return the inputs of the block's linears.

    If `block` is given, find the residuals of its linears as well.
    """
    inputs: dict[str, list[object]] = {}
    waiting_bytes = 0
    storages = _Storages()
    flow = _Flow(storages)

    def note(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
            nonlocal waiting_bytes
            leaves = tree_leaves(given(module, args))
            tensors = [leaf for leaf in leaves if leaf is not None]
            inputs.setdefault(name, []).append(tuple(map(storages.identify, tensors)))
            waiting_bytes = max(waiting_bytes, storages.nbytes)

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(hooked((linear, note(name)) for name, linear in linears.items()))
        if block is not None:
            hooks.enter_context(flow.through(block, linears))
        hooks.enter_context(storages)
        run()
    seen = {name: tuple(identities) for name, identities in inputs.items()}
    return Probe(seen, waiting_bytes, storages.peak, flow.residuals())


def watch_inputs(
    stages: Iterable[Stage],
    linears: Mapping[str, nn.Module],
    see: Callable[[Seen], None],
    run: Callable[[], object],
    block: nn.Module,
) -> None:
    """Run `run`, a forward of `block`, and call `see` with every input of every stage.

    The forward is stopped after the last input. Raises InputError E_ARCH if it does not call the
    module whose input is the residual of a stage.
    """
    stages = list(stages)
    left = sum(stage.calls for stage in stages)
    residuals: dict[Stage, Tensor | None] = {}

    def keep(stage: Stage) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            residuals[stage] = first_tensor(args, kwargs)

        return hook

    def seen(stage: Stage) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
            nonlocal left
            residual = residuals.pop(stage, None)
            if residual is None and stage.residual is not None:
                raise _unlike_the_probe(stage.names[0])
            see(Seen(stage, given(module, args), residual))
            left -= 1
            if not left:
                raise _Reached

        return hook

    hooks = residual_hooks(stages, block, keep)
    hooks += [(linears[stage.names[0]], seen(stage)) for stage in stages]
    with hooked(hooks), suppress(_Reached):
        run()


def residual_hooks(
    stages: Iterable[Stage], block: nn.Module, hook_of: Callable[[Stage], Hook]
) -> list[tuple[nn.Module, Hook]]:
    """Return the modules of `block` whose inputs are residuals of `stages`, each with its hook."""
    hooks = []
    for stage in stages:
        if stage.residual is not None:
            hooks.append((block.get_submodule(stage.residual), hook_of(stage)))
    return hooks


def given(module: nn.Module, args: tuple[Any, ...]) -> Input:
    """Return the part of the arguments of a linear, or of experts, that calibration needs."""
    if isinstance(module, Experts):
        return Routed(*args[:2])
    found: Tensor = args[0]
    return found


def first_tensor(*values: object) -> Tensor | None:
    """Return the first tensor in `values` that may be hidden states, None if there is none."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            return leaf
    return None


@contextmanager
def hooked(pairs: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Make each module call its hook before its forward; remove the hooks at the end."""
    handles = []
    for module, hook in pairs:
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
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
        self._counts = True
        self.peak = 0  # the most bytes at once

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
        if self._counts:
            self._allocated |= _storages_in(output) - _storages_in((args, kwargs))
            self.peak = max(self.peak, self.nbytes)
        return output

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing that is allocated in the body."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True


FEW = 64  # tokens by which a sum is recognised


@dataclass(frozen=True, slots=True)
class _Rows:
    """The first tokens of a tensor [..., features] of `n_tokens`, `FEW` or less."""

    few: Tensor
    n_tokens: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Rows:
        """Return a copy of the first tokens."""
        tokens = tensor.flatten(0, -2)
        return cls(tokens[:FEW].clone(), len(tokens))

    def make_one_of(self, sums: Iterable[_Rows], added: _Rows) -> bool:
        """Return whether these numbers and those of `added` make one of `sums`, bit by bit."""
        if not self._like(added):
            return False
        both = replace(self, few=self.few + added.few)
        if not any(both._like(sum_) and torch.equal(both.few, sum_.few) for sum_ in sums):
            return False
        # If either are too small to change the others, that shows nothing.
        return bool((both.few != self.few).any()) and bool((both.few != added.few).any())

    def _like(self, other: _Rows) -> bool:
        if self.few.dtype != other.few.dtype:
            return False
        return self.few.shape == other.few.shape and self.n_tokens == other.n_tokens


class _Flow:
    """What the modules of a block have got in one forward, and what its linears have made of it."""

    def __init__(self, storages: _Storages) -> None:
        self._storages = storages
        # By the path of the module, in order of the calls; the output of the block is the last one.
        self._inputs: list[tuple[str, _Rows]] = []
        # Of each linear, with the number of inputs before
        self._outputs: dict[str, list[tuple[int, _Rows]]] = {}

    @contextmanager
    def through(self, block: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch the forward of `block` in the body."""
        with ExitStack() as hooks:
            paths = block.named_modules()
            hooks.enter_context(hooked((module, self._before(path)) for path, module in paths))
            for name, linear in linears.items():
                if not isinstance(linear, Experts):
                    hooks.callback(linear.register_forward_hook(self._after(name)).remove)
            hooks.callback(block.register_forward_hook(self._end).remove)
            yield

    def residuals(self) -> dict[str, str]:
        """Return for each linear whose output is added to the input of a module its path."""
        calls = Counter(path for path, _ in self._inputs)
        found: dict[str, str] = {}
        for name, outputs in self._outputs.items():
            n_before, output = outputs[0]
            later = [rows for _, rows in self._inputs[n_before:]]
            for path, rows in self._inputs[:n_before]:
                once = len(outputs) == calls[path] == 1
                if once and name not in found and rows.make_one_of(later, output):
                    found[name] = path
        return found

    def _before(self, path: str) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._note(path, first_tensor(args, kwargs))

        return hook

    def _end(self, _block: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        self._note("output", first_tensor(output))

    def _note(self, path: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._inputs.append((path, self._copied(tensor)))

    def _after(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                self._show_zeros(tensor)
                made = (len(self._inputs), self._copied(tensor))
                self._outputs.setdefault(name, []).append(made)

        return hook

    def _show_zeros(self, output: Tensor) -> None:
        """Replace an output of zeros by ones, because adding zeros shows nothing.

        Some models have blocks that change nothing, such as those with which a model was made
        deeper. What is found must not depend on the block of a kind that is probed: a run that
        resumes probes another one.
        """
        with self._storages.uncounted():
            if not output.any():
                output.fill_(1)

    def _copied(self, tensor: Tensor) -> _Rows:
        with self._storages.uncounted():
            return _Rows.of(tensor)


def _storages_in(values: object) -> set[torch.UntypedStorage]:
    """Return the storages of all tensors in `values`."""
    return {value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)}


def _renamed(probe: Probe, names: Mapping[str, str]) -> Probe:
    """Return `probe` with each linear under the name that `names` maps it to."""
    inputs = {names[name]: given for name, given in probe.inputs.items()}
    residuals = {names[name]: path for name, path in probe.residuals.items()}
    return replace(probe, inputs=inputs, residuals=residuals)


ThreadState = Callable[[], AbstractContextManager[None]]


@contextmanager
def pause_forwards(
    stages: Sequence[Stage],
    linears: Mapping[str, nn.Module],
    runs: Sequence[Callable[[], State]],
    block: nn.Module,
) -> Iterator[PausedForwards]:
    """Yield the forwards `runs` of `block`, which have not started; end their threads at the end.

    `stages` are in the order of a forward, and each of their linears is called at most once in it.
    """
    batches = PausedForwards(runs)
    hooks = residual_hooks(stages, block, batches.residual_hook)
    for stage in stages:
        hooks += [(linears[name], batches.hook(stage, name)) for name in stage.names]
    with hooked(hooks):
        try:
            yield batches
        finally:
            batches.cancel()


class PausedForwards:
    """Forwards of one block that pause before the same stage.

    An error of a forward is raised in the caller's thread, by `reach` or `finish`. InputError
    E_ARCH is raised if a forward does not call the linears in the order and with the shared inputs
    of the stages.
    """

    def __init__(self, runs: Sequence[Callable[[], State]]) -> None:
        thread_state = _thread_state()
        self._batches = [_Batch(number, run, thread_state) for number, run in enumerate(runs)]
        self._running: _Batch | None = None

    def reach(self, stage: Stage) -> Iterator[Seen]:
        """Run each batch up to `stage`; yield what is `Seen` there."""
        return self._resume_each(stage)

    def finish(self) -> Iterator[State]:
        """Run each batch to its end; yield its output."""
        return self._resume_each(None)

    def hook(self, stage: Stage, name: str) -> Hook:
        """Return the hook that linear `name` of `stage` calls before its forward."""

        def before_forward(module: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
            # Other forwards of the block, such as a probe, are not paused.
            if self._running is not None and self._running.is_current_thread():
                self._running.before_linear(stage, name, given(module, args))

        return before_forward

    def residual_hook(self, stage: Stage) -> Hook:
        """Return the hook that a module calls whose input is the residual of `stage`."""

        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._running is not None and self._running.is_current_thread():
                self._running.keep_residual(stage, first_tensor(args, kwargs))

        return before_forward

    def cancel(self) -> None:
        """End all forwards, wherever they are paused."""
        for batch in self._batches:
            batch.cancel()
        for batch in self._batches:
            batch.join()

    def _resume_each(self, stage: Stage | None) -> Iterator[Any]:
        for batch in self._batches:
            self._running = batch
            value = batch.resume()
            if batch.paused_at != stage:
                unexpected = stage or batch.paused_at
                assert unexpected is not None
                raise _unlike_the_probe(unexpected.names[0], batch.number)
            yield value


class _Cancelled(BaseException):
    """End a forward whose output is no longer needed."""


class _Batch:
    """One forward in a thread of its own, which runs only while the caller is inside `resume`."""

    def __init__(self, number: int, run: Callable[[], State], thread_state: ThreadState) -> None:
        self.number = number
        self.paused_at: Stage | None = None
        self._value: Seen | State | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        # Linears of reached stages that are still to be called, with the input of their stage:
        self._expected: dict[str, Input] = {}
        # Of stages to be reached. They are no copies: the forward holds them until it adds to them.
        self._residuals: dict[Stage, Tensor | None] = {}
        self._may_run, self._has_paused = Semaphore(0), Semaphore(0)
        self._thread = Thread(
            target=self._forward, args=(run, thread_state), name=f"calibration batch {number}"
        )

    def resume(self) -> Any:
        """Run up to the next stage and return what is `Seen`, or to the end; return its output."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._may_run.release()
        self._has_paused.acquire()
        value, error = self._value, self._error
        self._value = self._error = None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, which would hold the error
        assert value is not None
        return value

    def before_linear(self, stage: Stage, name: str, inputs: Input) -> None:
        """Pause if linear `name` is the first of `stage`, else check its input.

        Called in the thread of this batch, before the linear is called with `inputs`.
        """
        if name == stage.names[0]:
            residual = self._residuals.pop(stage, None)
            if residual is None and stage.residual is not None:
                raise _unlike_the_probe(name, self.number)
            self._pause(stage, Seen(stage, inputs, residual))
            self._may_run.acquire()
            if self._cancelled:
                raise _Cancelled
            self._expected |= dict.fromkeys(stage.names[1:], inputs)
        elif name not in self._expected or not same_memory(self._expected.pop(name), inputs):
            raise _unlike_the_probe(name, self.number)

    def keep_residual(self, stage: Stage, residual: Tensor | None) -> None:
        """Keep what the output of `stage` will be added to until the stage is reached."""
        self._residuals[stage] = residual

    def is_current_thread(self) -> bool:
        """Return whether the caller is in the thread of this batch."""
        return current_thread() is self._thread

    def cancel(self) -> None:
        self._cancelled = True
        self._may_run.release()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _pause(self, stage: Stage | None, value: Seen | State | None) -> None:
        self.paused_at, self._value = stage, value
        self._has_paused.release()

    def _forward(self, run: Callable[[], State], thread_state: ThreadState) -> None:
        value: State | None = None
        try:
            with thread_state():
                value = run()
            for name in self._expected:
                raise _unlike_the_probe(name, self.number)
        except _Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001  it is raised again in the caller's thread
            self._error = error
        self._pause(None, value)


def _thread_state() -> ThreadState:
    """Return a context that sets torch's per-thread state to that of the calling thread.

    It holds the gradient modes, the default device, and the CUDA device and stream.
    """
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    device = torch.get_default_device()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def enter() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if device != torch.get_default_device():
                stack.enter_context(device)
            # The context of a stream also selects its device; that of None does nothing.
            stack.enter_context(torch.cuda.stream(stream))
            yield

    return enter


def _unlike_the_probe(name: str, batch: int | None = None) -> InputError:
    which = "a calibration batch"
    if batch is not None:
        which = f"calibration batch {batch}"
    return InputError(
        "E_ARCH",
        f"{which} does not call `{name}` at the time or with the input that a first forward showed",
        hint=f"keep it: --dynamic '-:{name}'",
    )
