"""Batches that wait inside a block: their order, thread state, errors, and what they free."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.errors import InputError
from gptq_cli.models.paused_forwards import (
    PausedForwards,
    Prober,
    Stage,
    pause_forwards,
    probe_block,
)

pytestmark = pytest.mark.usefixtures("nothing_hangs_or_leaks")

FEATURES = 4
STAGES = [Stage(("a", "b"), 1), Stage(("c",), 1), Stage(("d",), 1)]


class Block(nn.Module):
    """a and b get one tensor, c their sum, d the output of c; `before` gets each linear's name."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name in "abcd":
            setattr(self, name, nn.Linear(FEATURES, FEATURES))
        self.requires_grad_(False)

    def forward(self, x: Tensor, before: Callable[[str], None] = lambda _: None) -> Tensor:
        before("a")
        a = self.a(x)
        before("b")
        b = self.b(x)
        before("c")
        c = self.c(a + b)
        before("d")
        return x + self.d(c)

    @property
    def linears(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


class Deviant(Block):
    """A block that deviates for one batch: the batch with the number `mark` in its input."""

    def __init__(self, deviate: Callable[[Block, Tensor], Tensor], mark: float) -> None:
        super().__init__()
        self.deviate, self.mark = deviate, mark

    def forward(self, x: Tensor, before: Callable[[str], None] = lambda _: None) -> Tensor:
        return self.deviate(self, x) if x[0, 0] == self.mark else super().forward(x, before)


def inputs(n_batches: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    states = [torch.randn(5, FEATURES) for _ in range(n_batches)]
    for number, state in enumerate(states):
        state[0, 0] = number
    return states


def paused(
    block: Block, runs: Sequence[Callable[[], Tensor]]
) -> AbstractContextManager[PausedForwards]:
    return pause_forwards(STAGES, block.linears, runs, block)


def solve(linear: nn.Module, seen: Sequence[Tensor]) -> None:
    """Stands for the solver: weights that depend on everything the stage has seen."""
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(
        linear.weight + sum(x.sum() for x in seen) / 100, requires_grad=False
    )


def in_lockstep(
    block: Block, runs: Sequence[Callable[[], Tensor]], stages: Sequence[Stage] = STAGES
) -> list[Tensor]:
    with pause_forwards(stages, block.linears, runs, block) as batches:
        for stage in stages:
            seen = [seen.inputs for seen in batches.reach(stage)]
            for name in stage.names:
                solve(block.linears[name], seen)
        return list(batches.finish())


def replayed(block: Block, states: Sequence[Tensor]) -> list[Tensor]:
    """The slow truth: whole forwards for every stage."""
    for stage in STAGES:
        seen: list[Tensor] = []
        hook = block.linears[stage.names[0]].register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        for state in states:
            block(state)
        hook.remove()
        for name in stage.names:
            solve(block.linears[name], seen)
    return [block(state) for state in states]


@pytest.mark.parametrize("n_batches", [1, 3, 128])
def test_outputs_and_weights_equal_those_of_whole_forwards(n_batches: int) -> None:
    ours, slow, states = Block(), Block(), inputs(n_batches)
    outputs = in_lockstep(ours, [partial(ours, state) for state in states])
    expected = replayed(slow, states)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), slow.parameters(), strict=True))
    assert not torch.equal(ours.d.weight, Block().d.weight)


def test_batches_run_one_at_a_time_and_stop_before_each_stage() -> None:
    block, log = Block(), []
    runs = [
        partial(block, x, partial(lambda n, name: log.append(f"{n}{name}"), n))
        for n, x in enumerate(inputs(2))
    ]
    with paused(block, runs) as batches:
        for stage in STAGES:
            for _ in batches.reach(stage):
                log.append("seen")
            log.append("solved")
        for _ in batches.finish():
            log.append("done")
    rounds = [
        "0a seen 1a seen solved",
        "0b 0c seen 1b 1c seen solved",
        "0d seen 1d seen solved",
        "done done",
    ]
    assert log == " ".join(rounds).split()


def test_thread_starts_when_its_batch_first_runs() -> None:
    block, before = Block(), threading.active_count()
    with paused(block, [partial(block, x) for x in inputs()]) as batches:
        assert threading.active_count() == before
        assert [threading.active_count() - before for _ in batches.reach(STAGES[0])] == [1, 2, 3]


@pytest.mark.parametrize(("inference", "grad"), [(True, False), (False, True), (False, False)])
def test_forwards_run_in_the_modes_of_the_caller(inference: bool, grad: bool) -> None:
    block, seen = Block(), []

    def modes() -> tuple[object, ...]:
        grad, device = torch.is_grad_enabled(), torch.get_default_device()
        return (
            torch.is_inference_mode_enabled(),
            grad,
            device,
            torch.get_default_dtype(),
            torch.get_num_threads(),
        )

    runs = [partial(block, x, lambda _: seen.append(modes())) for x in inputs()]
    with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.device("meta"):
        expected = modes()
        in_lockstep(block, runs)
    assert expected[:3] == (inference, grad, torch.device("meta"))
    assert seen == [expected] * 12


DEVIATIONS: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "leaves a stage out": (lambda m, x: x + m.d(m.a(x) + m.b(x)), "c"),
    "leaves the last stage out": (lambda m, x: m.c(m.a(x) + m.b(x)), "d"),
    "changes the order": (lambda m, x: m.c(m.d(m.a(x) + m.b(x))), "c"),
    "ends at once": (lambda _, x: x, "a"),
    "calls a first linear twice": (lambda m, x: m.d(m.c(m.c(m.a(x) + m.b(x)))), "d"),
    "calls the last linear twice": (lambda m, x: m.d(m.d(m.c(m.a(x) + m.b(x)))), "d"),
    "calls another linear twice": (lambda m, x: m.d(m.c(m.a(x) + m.b(x) + m.b(x))), "b"),
    "leaves another linear out": (lambda m, x: m.d(m.c(m.a(x))), "b"),
    "gives another input": (lambda m, x: m.d(m.c(m.a(x) + m.b(x.clone()))), "b"),
    "gives a part of the input": (lambda m, x: m.d(m.c(m.a(x) + m.b(x[:1]))), "b"),
}


@pytest.mark.parametrize("name", DEVIATIONS)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_deviating_batch_raises_error_with_its_number_and_linear(name: str, batch: int) -> None:
    deviate, linear = DEVIATIONS[name]
    block = Deviant(deviate, batch)
    with pytest.raises(InputError, match=f"batch {batch} does not call `{linear}`") as caught:
        in_lockstep(block, [partial(block, state) for state in inputs()])
    assert caught.value.code == "E_ARCH"
    assert caught.value.hint == f"keep it: --dynamic '-:{linear}'"
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("where", "abcd")
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_error_in_one_forward_reaches_the_caller_and_ends_others(where: str, batch: int) -> None:
    block, ended = Block(), []

    def fail(number: int, name: str) -> None:
        if (number, name) == (batch, where):
            raise torch.OutOfMemoryError("too much")

    def run(number: int, state: Tensor) -> Tensor:
        try:
            return block(state, partial(fail, number))
        finally:
            ended.append(number)

    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        in_lockstep(block, [partial(run, number, state) for number, state in enumerate(inputs())])
    assert sorted(ended) == ([0, 1, 2] if where != "a" else list(range(batch + 1)))
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_error_of_the_caller_ends_all_forwards(stage: int) -> None:
    block = Block()

    def use() -> None:
        with paused(block, [partial(block, state) for state in inputs()]) as batches:
            for number in range(stage):
                assert len(list(batches.reach(STAGES[number]))) == 3
            next(batches.reach(STAGES[stage]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_interrupt_in_one_forward_ends_all_forwards() -> None:
    block = Block()

    def interrupt(number: int, name: str) -> None:
        if (number, name) == (1, "c"):
            os.kill(os.getpid(), signal.SIGINT)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_lockstep(
                block,
                [
                    partial(block, x, partial(interrupt, number))
                    for number, x in enumerate(inputs())
                ],
            )
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("fails", ["nothing", "the caller", "a forward"])
def test_no_tensor_outlives_its_forward(fails: str) -> None:
    block, alive, outputs = Block(), [], []

    def run(state: Tensor) -> Tensor:
        own = state.clone()
        alive.append(weakref.ref(own))
        output = block(own)
        outputs.append(weakref.ref(output))
        if fails == "a forward" and state[0, 0] == 2:
            raise ZeroDivisionError
        return output

    def use() -> None:
        with paused(block, [partial(run, state) for state in inputs()]) as batches:
            for stage in STAGES:
                alive.extend(weakref.ref(seen.inputs) for seen in batches.reach(stage))
            for number, output in enumerate(batches.finish()):
                assert output is outputs[number]()
                assert [reference() for reference in outputs[:number]] == [None] * number
            if fails == "the caller":
                raise ZeroDivisionError

    gc.collect()
    gc.disable()
    try:
        with suppress(ZeroDivisionError):
            use()
        assert [reference() for reference in alive + outputs] == [None] * (3 + 9 + 3)
    finally:
        gc.enable()


def test_block_of_a_known_kind_gets_own_names_without_a_new_run() -> None:
    runs: list[str] = []

    def probe(block: Block, prefix: str) -> list[tuple[str, ...]]:
        named = {f"{prefix}.{name}": linear for name, linear in block.linears.items()}

        def run() -> Tensor:
            runs.append(prefix)
            return block(inputs(1)[0])

        return [stage.names for stage in prober(block, named, run).stages(named)]

    prober = Prober()
    assert probe(Block(0), "first") == [("first.a", "first.b"), ("first.c",), ("first.d",)]
    assert probe(Block(1), "second") == [("second.a", "second.b"), ("second.c",), ("second.d",)]
    other = Block()
    other.b = nn.Linear(FEATURES, FEATURES, bias=False)
    assert probe(other, "third") == [("third.a", "third.b"), ("third.c",), ("third.d",)]
    assert runs == ["first", "third"]


def test_stages_follow_the_order_of_the_calls() -> None:
    class Parallel(Block):
        def forward(self, x: Tensor, before: Callable[[str], None] = lambda _: None) -> Tensor:
            del before
            return self.b(self.a(x)) + self.d(self.c(x))

    block = Parallel()
    probe = probe_block(block.linears, lambda: block(inputs(1)[0]))
    assert [stage.names for stage in probe.stages("abcd")] == [("a", "c"), ("b",), ("d",)]
    assert [stage.names for stage in probe.stages("bcd")] == [("b",), ("c",), ("d",)]
    outputs = in_lockstep(block, [partial(block, x) for x in inputs()], probe.stages("bcd"))
    assert len(outputs) == 3


def test_stages_count_repeated_calls_and_omit_uncalled_linears() -> None:
    block = Deviant(lambda m, x: m.a(m.a(x)), 0)
    stages = probe_block(block.linears, lambda: block(inputs(1)[0])).stages("abcd")
    assert stages == [Stage(("a",), 2)]


def test_reused_memory_counts_as_another_input() -> None:
    memory = bytearray(5 * FEATURES * 4)

    def allocate() -> Tensor:
        return torch.frombuffer(memory, dtype=torch.float32).view(5, FEATURES)

    def reuse(block: Block, x: Tensor) -> Tensor:
        block.a(allocate())
        block.b(allocate())  # a new tensor where the first one was
        return x

    assert allocate().data_ptr() == allocate().data_ptr()
    block = Deviant(reuse, 0)
    assert len(probe_block(block.linears, lambda: block(inputs(1)[0])).stages("ab")) == 2


def test_different_slices_of_one_tensor_are_different_inputs() -> None:
    block = Deviant(lambda m, x: m.a(x[:2]) + m.b(x[2:4]) + m.c(x[:2]), 0)
    stages = probe_block(block.linears, lambda: block(inputs(1)[0])).stages("abc")
    assert [stage.names for stage in stages] == [("a", "c"), ("b",)]


def test_waiting_bytes_are_the_peak_held_at_any_linear() -> None:
    def hold(block: Block, x: Tensor) -> Tensor:
        kept = torch.cat([x, x])
        block.a(kept[:5])  # 2: a view allocates nothing
        freed = torch.cat([x, x, x, x])
        del freed
        block.b(x + 1)  # 3, the most: what is kept, and the sum; the output of a was dropped
        del kept
        return block.d(block.c(x))  # 0, then 1

    block = Deviant(hold, 0)
    x = inputs(1)[0]
    probe = probe_block(block.linears, lambda: block(x))
    assert probe.waiting_bytes == 3 * x.nbytes
    # Of the whole forward: what is kept, and what is freed before the next linear
    assert probe.forward_bytes == 6 * x.nbytes
    with torch.inference_mode():
        assert probe_block(block.linears, lambda: block(x)).waiting_bytes == 3 * x.nbytes
