"""Batches that wait inside a block: each linear runs once per batch, and yet sees quantized what comes before it.

Every batch runs the block's ordinary forward in a thread of its own, and stops where it is about to call the first
linear of a stage. Once all batches wait there, the stage's Hessian is complete and the stage can be solved; then they
go on with quantized weights, and the ends of their forwards are what the next block sees:

with waiting_batches(stages, linears, runs) as batches:
    for stage in stages:
        solve(stage, [inputs for inputs in batches.reach(stage)])
    hidden = list(batches.finish())

Only one thread moves at a time, the caller's or one batch's, so results are those of running the block again for each
stage, bit for bit. Threads, because nothing else in Python can stop in the middle of somebody else's forward.
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

Surroundings = Callable[[], AbstractContextManager[None]]


@contextmanager
def waiting_batches(
    stages: Sequence[Stage], linears: Mapping[str, nn.Module], runs: Sequence[Callable[[], State]]
) -> Iterator[WaitingBatches]:
    """The forwards `runs` of one block, none of them begun; whatever happens, their threads have ended on leaving.

    `stages` are in the order of a forward, and none of their linears is called twice in it.
    """
    batches = WaitingBatches(runs)
    with hooked(
        (linears[name], batches.hook(stage, name)) for stage in stages for name in stage.names
    ):
        try:
            yield batches
        finally:
            batches.release()


class WaitingBatches:
    """Forwards of one block that wait for each other. Errors of a forward are raised where it is told to go on.

    InputError E_ARCH for a forward that does not call the linears in the order and with the shared inputs that `stages`
    promise.
    """

    def __init__(self, runs: Sequence[Callable[[], State]]) -> None:
        surroundings = _surroundings()
        self._batches = [_Batch(number, run, surroundings) for number, run in enumerate(runs)]
        self._moving: _Batch | None = None

    def reach(self, stage: Stage) -> Iterator[Any]:
        """Let each batch run as far as `stage`; yields the input, [..., I] or routed, that it waits with there."""
        return self._go_on(stage)

    def finish(self) -> Iterator[State]:
        """Let each batch run to its end; yields its output."""
        return self._go_on(None)

    def hook(self, stage: Stage, name: str) -> Hook:
        """What linear `name` of `stage` calls before its forward."""

        def meet(module: nn.Module, args: tuple[Any, ...]) -> None:
            if (
                self._moving is not None and self._moving.is_here()
            ):  # else a forward that waits for nobody
                self._moving.meet(stage, name, given(module, args))

        return meet

    def release(self) -> None:
        """End all forwards, wherever they are."""
        for batch in self._batches:
            batch.release()
        for batch in self._batches:
            batch.join()

    def _go_on(self, stage: Stage | None) -> Iterator[Any]:
        for batch in self._batches:
            self._moving = batch
            value = batch.go_on()
            if batch.waits_at != stage:
                unexpected = stage or batch.waits_at
                assert unexpected is not None
                raise _unlike_the_probe(unexpected.names[0], batch.number)
            yield value


class _Released(BaseException):
    """Ends a forward that nobody waits for any more."""


class _Batch:
    """One forward in a thread of its own, which moves only while somebody is inside `go_on`."""

    def __init__(self, number: int, run: Callable[[], State], surroundings: Surroundings) -> None:
        self.number = number
        self.waits_at: Stage | None = None
        self._value: Input | State | None = None
        self._error: BaseException | None = None
        self._released = False
        self._due: dict[
            str, Input
        ] = {}  # linears yet to be called, with an input that their stage has seen
        self._told_to_go, self._stopped = Semaphore(0), Semaphore(0)
        self._thread = Thread(
            target=self._forward, args=(run, surroundings), name=f"calibration batch {number}"
        )

    def go_on(self) -> Input | State:
        """Run to the first linear of the next stage, `waits_at`, for its input; or to the end, for the output."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._told_to_go.release()
        self._stopped.acquire()
        value, error = self._value, self._error
        self._value = self._error = None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, which would hold the error
        assert value is not None
        return value

    def meet(self, stage: Stage, name: str, inputs: Input) -> None:
        """Called in the thread of this batch when linear `name` of `stage` is about to be called with `inputs`."""
        if name == stage.names[0]:
            self._stop(stage, inputs)
            self._told_to_go.acquire()
            if self._released:
                raise _Released
            self._due |= dict.fromkeys(stage.names[1:], inputs)
        elif name not in self._due or not same_memory(self._due.pop(name), inputs):
            raise _unlike_the_probe(name, self.number)

    def is_here(self) -> bool:
        """Whether the caller is in the thread of this batch."""
        return current_thread() is self._thread

    def release(self) -> None:
        self._released = True
        self._told_to_go.release()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _stop(self, stage: Stage | None, value: Input | State | None) -> None:
        self.waits_at, self._value = stage, value
        self._stopped.release()

    def _forward(self, run: Callable[[], State], surroundings: Surroundings) -> None:
        value: State | None = None
        try:
            with surroundings():
                value = run()
            for name in self._due:
                raise _unlike_the_probe(name, self.number)
        except _Released:
            pass
        except BaseException as error:  # noqa: BLE001  it is raised again in the caller's thread
            self._error = error
        self._stop(None, value)


def _surroundings() -> Surroundings:
    """What torch keeps for each thread, as it is here: gradient modes, default device, CUDA device and stream."""
    inference, grad, device = (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_device(),
    )
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def enter() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if device != torch.get_default_device():
                stack.enter_context(device)
            stack.enter_context(torch.cuda.stream(stream))  # of its device, too; nothing for None
            yield

    return enter


def _unlike_the_probe(name: str, batch: int) -> InputError:
    return InputError(
        "E_ARCH",
        f"calibration batch {batch} does not call `{name}` at the time or with the input that a first forward showed",
        hint=f"keep it: --dynamic '-:{name}'",
    )
