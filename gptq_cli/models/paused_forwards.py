"""Forwards of a block that are paused before each stage, until the stage is quantized.

Each batch runs the block's ordinary forward in a thread of its own, which pauses before the call of
the first linear of a stage. Once all batches are paused there, the Hessian of the stage is complete
and the stage can be quantized. Then the batches continue with quantized weights, and their outputs
are the input of the next block. Thus each linear runs once per batch, but its input comes from
quantized linears:

with pause_forwards(stages, linears, runs) as batches:
    for stage in stages:
        quantize(stage, [inputs for inputs in batches.reach(stage)])
    hidden = list(batches.finish())

Only one thread runs at a time, the caller's or that of one batch. The results are therefore those
of running the block again for each stage, bit for bit. Threads are needed because Python has no
other way to pause in the middle of a model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Semaphore, Thread, current_thread
from typing import Any

import torch
from torch import nn

from gptq_cli.errors import InputError
from gptq_cli.models.block_calls import State
from gptq_cli.models.stages import Hook, Input, Stage, given, hooked, same_memory

ThreadState = Callable[[], AbstractContextManager[None]]


@contextmanager
def pause_forwards(
    stages: Sequence[Stage], linears: Mapping[str, nn.Module], runs: Sequence[Callable[[], State]]
) -> Iterator[PausedForwards]:
    """Yield the forwards `runs` of one block, which have not started; end their threads at the end.

    `stages` are in the order of a forward, and each of their linears is called at most once in it.
    """
    batches = PausedForwards(runs)
    hooks = []
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

    def reach(self, stage: Stage) -> Iterator[Any]:
        """Run each batch up to `stage`; yield its input there, a tensor [..., I] or `Routed`."""
        return self._resume_each(stage)

    def finish(self) -> Iterator[State]:
        """Run each batch to its end; yield its output."""
        return self._resume_each(None)

    def hook(self, stage: Stage, name: str) -> Hook:
        """Return the hook that linear `name` of `stage` calls before its forward."""

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Other forwards of the block, such as a probe, are not paused.
            if self._running is not None and self._running.is_current_thread():
                self._running.before_linear(stage, name, given(module, args))

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
        self._value: Input | State | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        # Linears of reached stages that are still to be called, with the input of their stage:
        self._expected: dict[str, Input] = {}
        self._may_run, self._has_paused = Semaphore(0), Semaphore(0)
        self._thread = Thread(
            target=self._forward, args=(run, thread_state), name=f"calibration batch {number}"
        )

    def resume(self) -> Input | State:
        """Run up to the next stage and return its input, or to the end and return the output."""
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
            self._pause(stage, inputs)
            self._may_run.acquire()
            if self._cancelled:
                raise _Cancelled
            self._expected |= dict.fromkeys(stage.names[1:], inputs)
        elif name not in self._expected or not same_memory(self._expected.pop(name), inputs):
            raise _unlike_the_probe(name, self.number)

    def is_current_thread(self) -> bool:
        """Return whether the caller is in the thread of this batch."""
        return current_thread() is self._thread

    def cancel(self) -> None:
        self._cancelled = True
        self._may_run.release()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _pause(self, stage: Stage | None, value: Input | State | None) -> None:
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


def _unlike_the_probe(name: str, batch: int) -> InputError:
    return InputError(
        "E_ARCH",
        f"calibration batch {batch} does not call `{name}` at the time or with the input "
        "that a first forward showed",
        hint=f"keep it: --dynamic '-:{name}'",
    )
