"""A block that runs out of memory anywhere runs once more, and the output is the same."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import ResourceError
from gptq_cli.events import BlockFinished, BlockStarted, Event, PhaseStarted, Resumed, Warned
from gptq_cli.models.stream import LoadedBlock, ModelStream
from gptq_cli.quantization import block_loop, layers, resume
from gptq_cli.quantization.block_loop import HessianOfBatches
from gptq_cli.quantization.run import QuantizeResult
from gptq_cli.runtime import memory
from gptq_cli.runtime.device import Worker
from gptq_cli.runtime.memory import Memory, PauseBudget
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.hessian import HessianAccumulator
from tests.architectures import build
from tests.families import save, save_model
from tests.runs import digest, messages
from tests.tiny import Case

pytestmark = pytest.mark.usefixtures("nothing_hangs_or_leaks")

CPU = torch.device("cpu")
SETTINGS: dict[str, object] = {"asymmetric_calibration": 0.5, "nsamples": 3}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has none"
HEAD = 2  # the step after two blocks
SITES: dict[str, tuple[object, str]] = {
    "a forward": (nn.Linear, "forward"),
    "a Hessian": (HessianOfBatches, "add"),
    "the solver": (layers, "solve_together"),
    "reading a weight": (ModelStream, "linear_weight"),
    "keeping a layer": (CheckpointWriter, "write"),
    "taking a tensor from its device": (CheckpointWriter, "_write"),
    "the unquantized twin": (LoadedBlock, "unquantized_copy"),
    "the states after the block": (HiddenStates, "__setitem__"),
    "saving the states": (resume, "save_tensors"),
}


class Shortage:
    """Memory that runs out in each step of a run, at the call that `when` chooses.

    `when` maps the `expected` number of calls in a step to the number of the call that fails.
    `failures` is the number of attempts at each of `steps` that fail. The shortage receives the
    events of the run, because they show the step.
    """

    def __init__(
        self, expected: Counter[int], when: Callable[[int], int], failures: int = 1
    ) -> None:
        self.expected, self.when, self.failures = expected, when, failures
        self.steps: tuple[int, ...] = (0, 1, HEAD)
        self.step = -1
        self.calls: Counter[int] = Counter()
        self.attempts: Counter[int] = Counter()
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, BlockStarted):
            self.begin(event.index)
        elif isinstance(event, PhaseStarted):
            self.begin(HEAD if event.name == "head" else -1)

    def begin(self, step: int) -> None:
        self.step = step
        self.calls[step] = 0
        self.attempts[step] += 1

    def count(self) -> None:
        self.calls[self.step] += 1
        if self.step not in self.steps or self.attempts[self.step] > self.failures:
            return
        total = self.expected[self.step]
        if self.calls[self.step] == max(1, self.when(total)) <= total:
            error = torch.OutOfMemoryError(f"{OUT_OF_MEMORY}. Process 7 has more")
            raise error  # which this frame holds, so that only a collector of garbage can free it

    @property
    def warnings(self) -> list[str]:
        return messages(self.events, "W_OOM_RETRY")


def watched(site: str, shortage: Shortage, patch: pytest.MonkeyPatch) -> None:
    owner, name = SITES[site]
    usual = getattr(owner, name)

    @wraps(usual)
    def counted(*args: Any, **kwargs: Any) -> Any:
        shortage.count()
        return usual(*args, **kwargs)

    patch.setattr(owner, name, counted)


def layer_results(result: QuantizeResult) -> list[tuple[str, float, int]]:
    return [(layer.name, layer.relative_error, layer.tokens) for layer in result.layers]


@pytest.fixture(scope="module")
def undisturbed(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizeResult, dict[str, Any]]:
    """Return the output, its result, and the number of calls by site and step."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    counters = {site: Shortage(Counter(), int) for site in SITES}

    def tell(event: Event) -> None:
        for counter in counters.values():
            counter(event)

    with pytest.MonkeyPatch.context() as patch:
        for site, counter in counters.items():
            watched(site, counter, patch)
        result = case.run(output, report=tell, **SETTINGS)
    return output, result, {site: counter.calls for site, counter in counters.items()}


PLACES = {
    "first": lambda _: 1,
    "a third": lambda n: n // 3,
    "late": lambda n: n * 4 // 5,
    "last": int,
}
TRIED = [("a forward", when) for when in PLACES] + [
    ("a Hessian", "last"),
    ("the states after the block", "last"),
]
TRIED += [(site, "late") for site in SITES if site != "a forward"]


@pytest.mark.parametrize(("site", "when"), TRIED)
def test_a_shortage_in_every_step_does_not_change_the_output(
    site: str,
    when: str,
    case: Case,
    undisturbed: tuple[Path, QuantizeResult, dict[str, Counter[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, expected, calls = undisturbed
    steps = [step for step in (0, 1, HEAD) if calls[site][step]]
    shortage = Shortage(calls[site], PLACES[when])
    watched(site, shortage, monkeypatch)
    result = case.run(tmp_path / "out", report=shortage, **SETTINGS)
    assert len(steps) >= 2 or site == "saving the states"
    names = [["model.layers.0", "model.layers.1", "lm_head"][step] for step in steps]
    assert [message.split("`")[1] for message in shortage.warnings] == names
    assert digest(tmp_path / "out") == digest(output)
    assert layer_results(result) == layer_results(expected)
    assert [event.index for event in shortage.events if isinstance(event, BlockFinished)] == [0, 1]
    assert not [event for event in shortage.events if isinstance(event, Resumed)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("site", ["a forward", "keeping a layer"])
def test_two_shortages_in_one_block_end_a_resumable_run(
    site: str,
    case: Case,
    undisturbed: tuple[Path, QuantizeResult, dict[str, Counter[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, _, calls = undisturbed
    shortage = Shortage(calls[site], PLACES["late"], failures=2)
    shortage.steps = (1,)
    with monkeypatch.context() as patch:
        watched(site, shortage, patch)
        with pytest.raises(ResourceError) as caught:
            case.run(tmp_path / "out", report=shortage, **SETTINGS)
    assert (caught.value.code, caught.value.exit_code) == ("E_OOM", 5)
    assert str(caught.value) == f"there is not enough memory: {OUT_OF_MEMORY}"
    for flag in ("--batch-size 1", "--seqlen", "--device cpu"):
        assert flag in (caught.value.hint or "")
    assert len(shortage.warnings) == 1
    assert not (tmp_path / "out").exists()
    assert case.run(tmp_path / "out", **SETTINGS).resumed_blocks == 1
    assert digest(tmp_path / "out") == digest(output)


def test_a_shortage_in_the_embeddings_retries_the_first_block(
    case: Case,
    undisturbed: tuple[Path, QuantizeResult, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, calls = ModelStream.embed, []

    def embed(*arguments: Any) -> object:
        calls.append(arguments)
        states = usual(*arguments)
        if len(calls) == 1:
            raise MemoryError
        return states

    monkeypatch.setattr(ModelStream, "embed", embed)
    shortage = Shortage(Counter(), int)
    case.run(tmp_path / "out", report=shortage, **SETTINGS)
    (message,) = shortage.warnings
    assert message.startswith("out of memory in `model.layers.0`, which runs again with less: ")
    assert message.endswith("(the host has no more)")
    assert digest(tmp_path / "out") == digest(undisturbed[0])


def test_a_shortage_warns_with_flags_that_avoid_it(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortage = Shortage(Counter({1: 1}), int)
    watched("the unquantized twin", shortage, monkeypatch)
    case.run(tmp_path / "out", report=shortage, **SETTINGS)
    assert shortage.warnings == [
        "out of memory in `model.layers.1`, which runs again with less: "
        "no batch pauses inside it, and half as many inside later blocks; "
        f"a smaller --max-ram pauses fewer batches from the start ({OUT_OF_MEMORY})"
    ]
    gpu = torch.device("cuda", 0)
    assert block_loop._advice(Memory(gpu, 2**30)) == "a larger --max-vram avoids it"
    assert block_loop._advice(Memory(gpu)) == "fewer --nsamples or a shorter --seqlen avoid it"


def test_a_retried_block_lists_its_experts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", "mixtral", hidden_size=32, intermediate_size=64)
    tiny = Case(model, {}, [])
    changes = {"dynamic": {}, "lm_head": False, "nsamples": 6, "seqlen": 64, "preset": "gptq"}
    changes |= {"moe_uncovered": "rtn", "max_fallbacks": None}
    whole = tiny.run(tmp_path / "whole", **changes)
    shortage = Shortage(Counter({0: 20, 1: 20}), int)
    watched("keeping a layer", shortage, monkeypatch)
    result = tiny.run(tmp_path / "out", report=shortage, **changes)
    assert len(shortage.warnings) == 2
    assert (layer_results(result), result.experts) == (layer_results(whole), whole.experts)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore")  # the warnings of transformers do not matter here
def test_a_retry_restores_values_carried_between_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Case(save(build("gemma4_text"), tmp_path / "model"), {}, [])
    changes = {"dynamic": {}, "lm_head": False, "asymmetric_calibration": 0.5}
    tiny.run(tmp_path / "whole", **changes)
    shortage = Shortage(Counter({0: 2, 1: 2}), int)
    watched("the states after the block", shortage, monkeypatch)
    tiny.run(tmp_path / "out", report=shortage, **changes)
    assert len(shortage.warnings) == 2
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_retry_starts_after_the_first_attempt_is_freed(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    usual_sum, usual_state = HessianAccumulator.__init__, HiddenStates.__getitem__

    def sums(self: HessianAccumulator, *arguments: Any, **options: Any) -> None:
        usual_sum(self, *arguments, **options)
        held.append(weakref.ref(self._panels[0]))

    def state(self: HiddenStates, batch: int) -> Any:
        found = usual_state(self, batch)
        held.extend([weakref.ref(found), weakref.ref(self)])
        return found

    monkeypatch.setattr(HessianAccumulator, "__init__", sums)
    monkeypatch.setattr(HiddenStates, "__getitem__", state)
    alive: list[int] = []

    class Look(Shortage):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, Warned) and event.code == "W_OOM_RETRY":
                assert not [thread for thread in threading.enumerate() if "batch" in thread.name]
                alive.append(sum(reference() is not None for reference in held))

    shortage = Look(Counter({1: 30}), int)
    watched("a forward", shortage, monkeypatch)
    case.run(tmp_path / "out", report=shortage, **SETTINGS)
    assert len(held) > 20
    assert alive == [0]


class Pair(Ranks):
    """Two processes in appearance; this one has all of the work."""

    size = 2

    def share(self, n_batches: int) -> range:
        return range(n_batches)


def test_one_of_several_processes_does_not_retry_alone(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortage = Shortage(Counter({1: 1}), int)
    watched("the solver", shortage, monkeypatch)
    with pytest.raises(ResourceError) as caught:
        case.run(tmp_path / "out", report=shortage, worker=Worker(Pair(), CPU))
    assert (caught.value.code, shortage.warnings, shortage.attempts[1]) == ("E_OOM", [], 1)
    assert case.run(tmp_path / "out").resumed_blocks == 1
    assert digest(tmp_path / "out") == case.tree


def test_fewer_batches_pause_after_a_shortage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 20_000)
    events: list[Event] = []
    budget = PauseBudget(Memory(CPU), events.append)
    assert budget.n_paused(9, 1_000) == 9
    budget.shrink_after_oom()
    assert [budget.n_paused(9, 1_000) for _ in range(3)] == [0, 4, 4]
    assert budget.n_paused(9, 5_000) == 2
    assert budget.n_paused(9, 1_000) == 4
    budget.shrink_after_oom()
    assert [budget.n_paused(9, 1_000) for _ in range(2)] == [0, 2]
    budget.shrink_after_oom()
    budget.n_paused(9, 1_000)
    budget.shrink_after_oom()
    assert [budget.n_paused(9, 1_000) for _ in range(3)] == [0, 0, 0]
    assert events == []


def test_hidden_states_move_to_the_host_after_a_shortage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 2**30)
    pinned = torch.zeros(2, 3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _self: pinned)
    budget = PauseBudget(Memory(torch.device("cuda", 0)), lambda _: None)
    states = [torch.ones(2, 3), torch.ones(2, 3)]
    assert HiddenStates(states, budget.memory).stored == tuple(states)
    budget.shrink_after_oom()
    assert all(state is pinned for state in HiddenStates(states, budget.memory).stored)
    assert (
        HiddenStates([torch.ones(2, 3)], Memory(CPU, states_on_host=True)).stored[0] is not pinned
    )
