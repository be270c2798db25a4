"""The block loop with paused batches equals the block loop that replays each block per stage."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.errors import GateError, ResourceError, size
from gptq_cli.events import Event, Warned, ignore
from gptq_cli.models.block_calls import Call
from gptq_cli.models.paused_forwards import Prober
from gptq_cli.models.stream import LoadedBlock
from gptq_cli.planning.plan import plan_run
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization import block_loop
from gptq_cli.quantization.block_loop import block_forwards, quantize_stages
from gptq_cli.quantization.layers import Inputs, LayerSolver, SolvedLayer
from gptq_cli.runtime import memory
from gptq_cli.runtime.memory import (
    Memory,
    PauseBudget,
    free_bytes,
    host_bytes,
)
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.runtime.ranks import SINGLE_PROCESS, Ranks
from tests.families import FAMILIES, save_model
from tests.runs import config, digest, messages, quantize_with_events

pytestmark = pytest.mark.usefixtures("nothing_hangs_or_leaks")

CPU = torch.device("cpu")
N_BATCHES = 3  # of 2 windows and 1
SLOW = pytest.mark.slow
LATER = [pytest.param("phi", marks=SLOW)]  # the test of each linear runs it too


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> Counter[nn.Module]:
    """How often each linear was executed."""
    counted: Counter[nn.Module] = Counter()
    forward = nn.Linear.forward

    def count(self: nn.Linear, inputs: Tensor) -> Tensor:
        counted[self] += 1
        return forward(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", count)
    return counted


def quantize(model: Path, output: Path, **changes: object) -> list[Event]:
    return quantize_with_events(model, output, **({"nsamples": 5, "batch_size": 2} | changes))[1]


def warnings(events: Sequence[Event]) -> list[str]:
    return [event.code for event in events if isinstance(event, Warned)]


def replay(
    model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: object
) -> list[Event]:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "WAITING_SHARE", {"cpu": 0.0, "cuda": 0.0})
        return quantize(model, output, **changes)


def executions_by_block(executions: Counter[nn.Module]) -> list[set[int]]:
    """Return the counts of the linears of each of three blocks, in the order of the run."""
    counts = list(executions.values())
    per_block = len(counts) // 3
    return [set(counts[start : start + per_block]) for start in range(0, len(counts), per_block)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_runs_once_per_batch_if_all_batches_pause(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executions: Counter[nn.Module]
) -> None:
    model = save_model(tmp_path / "model", family, dtype=torch.bfloat16)
    quantize(model, tmp_path / "paused")
    # The first block runs once to reveal its result and once to reveal its stages.
    # The other blocks are of the same kind.
    assert executions_by_block(executions) == [{N_BATCHES + 2}, {N_BATCHES}, {N_BATCHES}]
    executions.clear()
    replay(model, tmp_path / "replay", monkeypatch)
    assert max(executions.values()) > 2 * N_BATCHES
    assert digest(tmp_path / "paused") == digest(tmp_path / "replay")


@pytest.mark.parametrize("n_waiting", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"preset": "best", "bits": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", *LATER, pytest.param("gemma2", marks=SLOW)])
def test_some_batches_may_pause_while_the_others_are_replayed(
    family: str,
    settings: dict[str, object],
    n_waiting: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executions: Counter[nn.Module],
) -> None:
    model = save_model(tmp_path / "model", family)
    quantize(model, tmp_path / "all", **settings)
    executions.clear()
    monkeypatch.setattr(PauseBudget, "n_paused", lambda *_: n_waiting)
    quantize(model, tmp_path / "some", **settings)
    assert digest(tmp_path / "some") == digest(tmp_path / "all")
    if family == "llama" and not settings:
        # A replayed batch runs the first linears once per later stage and once to the end.
        n_again = N_BATCHES - n_waiting
        expected = {N_BATCHES + later * n_again for later in range(4)}
        assert executions_by_block(executions)[-1] == expected


def test_a_memory_budget_pauses_fewer_batches_for_the_same_bytes(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    assert warnings(quantize(model, tmp_path / "free")) == []
    tight = quantize(model, tmp_path / "tight", max_ram=host_bytes() + 2**27)
    assert warnings(tight) in ([], ["W_MEM_REPLAY"])
    expected = digest(tmp_path / "free")["model.safetensors"]
    assert digest(tmp_path / "tight")["model.safetensors"] == expected


def test_a_memory_budget_counts_memory_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 8_000)
    monkeypatch.setattr(memory, "host_bytes", lambda: 1_000)
    frees = [Memory(CPU, None, limit).free() for limit in (None, 5_000, 9_001, 100)]
    assert frees == [8_000, 4_000, 8_000, 0]
    assert Memory(CPU, 10, None).free() == 8_000  # of an accelerator that is not used


def test_a_run_over_max_ram_stops_with_flags_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, held = host_bytes() + 2**27, iter([0, 0, 0])
    # The memory in use grows after the second block.
    monkeypatch.setattr(memory, "host_bytes", lambda: next(held, limit + 1))
    with pytest.raises(
        ResourceError, match=rf"holds {size(limit + 1)} of host memory, max_ram"
    ) as caught:
        quantize(save_model(tmp_path / "model"), tmp_path / "out", max_ram=limit)
    assert (caught.value.code, caught.value.exit_code) == ("E_OOM", 5)
    assert "--max-ram" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


SETTINGS: list[dict[str, object]] = [
    {"desc_act": True},
    {"static_groups": True, "bits": 2},
    {"bits": 3, "sym": False, "act_group_aware": False},
    {"lm_head": True, "group_size": -1},
    {
        "dynamic": {
            r"-:.*layers\.1\.self_attn\.(q|k)_proj": {},
            r"-:.*(up_proj|fc1)": {},
            r"+:.*(down_proj|fc2)": {"bits": 8},
        }
    },
    {"dynamic": {r"-:.*layers\.1\.": {}}},
    {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["v_proj", "self_attn.k_proj"]]},
    {"batch_size": 1, "nsamples": 9},
    {"preset": "best", "bits": 2, "lm_head": True},
    {"preset": "best", "dynamic": {r"+:.*layers\.1\.": {"asymmetric_calibration": 0.0}}},
]


def test_the_original_block_runs_once_per_batch_as_well(
    tmp_path: Path, executions: Counter[nn.Module]
) -> None:
    quantize(save_model(tmp_path / "model"), tmp_path / "out", preset="best")
    assert Counter(executions.values()) == {N_BATCHES + 2: 7, N_BATCHES: 2 * 3 * 7 - 7}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", *LATER])
def test_pausing_and_replaying_write_the_same_bytes(
    family: str, settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", family)
    paused = quantize(model, tmp_path / "paused", **settings)
    replayed = replay(model, tmp_path / "replay", monkeypatch, **settings)
    assert digest(tmp_path / "paused") == digest(tmp_path / "replay")
    assert [code for code in warnings(paused) if not code.startswith("W_CFG")] == []
    codes = [code for code in warnings(replayed) if not code.startswith("W_CFG")]
    assert codes == ["W_MEM_REPLAY"]


def test_two_forwards_suffice_without_true_sequential(
    tmp_path: Path, executions: Counter[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PauseBudget, "n_paused", None)
    quantize(save_model(tmp_path / "model"), tmp_path / "out", true_sequential=False)
    # A forward that only gathers inputs ends before the last linear.
    down_proj, others = N_BATCHES, 2 * N_BATCHES
    assert executions_by_block(executions) == [
        {down_proj + 2, others + 2},
        {down_proj, others},
        {down_proj, others},
    ]


@pytest.mark.parametrize("patched", ["HessianOfBatches.add", "LayerSolver.solve"])
def test_a_hessian_or_solver_error_ends_the_run_and_its_threads(
    patched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, method = patched.partition(".")
    usual, calls = getattr(getattr(block_loop, owner), method), []

    def fail_at_the_eleventh_call(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 11:
            raise GateError("E_NUM_ACT", "the eleventh")
        return usual(*arguments)

    monkeypatch.setattr(getattr(block_loop, owner), method, fail_at_the_eleventh_call)
    with pytest.raises(GateError, match="the eleventh"):
        quantize(save_model(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TwiceInARow(nn.Module):
    """A block that calls its first linear twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.last(self.first(self.first(hidden)))


class HessianKeeper(LayerSolver):
    """Keep each given Hessian, and change the weights of `module` by it."""

    run: Any

    def __init__(self, module: nn.Module) -> None:
        self.device, self.seen, self.module = CPU, [], module

    def solve(
        self, experts: Sequence[Sequence[LayerPlan]], inputs: Inputs, ranks: Ranks
    ) -> Iterator[SolvedLayer]:
        assert ranks is SINGLE_PROCESS
        (hessian,) = inputs.hessians
        self.seen.append((inputs.tokens[0], hessian.clone()))
        for layer in experts[0]:
            linear = self.module.get_submodule(layer.name)
            linear.weight = nn.Parameter(linear.weight + hessian / 1e4, requires_grad=False)
        yield from ()


def test_a_linear_called_twice_is_replayed_with_both_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PauseBudget, "n_paused", None)
    some_layer = plan_run(save_model(tmp_path / "model"), config()).quantized[0]
    layers = {name: replace(some_layer, name=name, in_features=32) for name in ("first", "last")}
    module = TwiceInARow()
    solver = HessianKeeper(module)
    states = [torch.randn(2, 8, 32) for _ in range(N_BATCHES)]
    block = LoadedBlock(
        module, {"first": module.first, "last": module.last}, [Call((), {}, True)] * N_BATCHES
    )
    hidden = HiddenStates(states, Memory(CPU))
    solver.run = SimpleNamespace(
        config=config(),
        layers=layers,
        prober=Prober(),
        budget=PauseBudget(Memory(CPU), ignore),
        ranks=SINGLE_PROCESS,
        batches=states,
        gradients=None,
        stream=SimpleNamespace(device=CPU),
    )
    with block_forwards(block, [hidden], solver.run) as forwards:
        for together in forwards.stages:
            quantize_stages(together, forwards, solver)
        forwards.finish()
    assert [tokens for tokens, _ in solver.seen] == [2 * 16 * N_BATCHES, 16 * N_BATCHES]
    assert all(torch.equal(hidden[batch], module(state)) for batch, state in enumerate(states))
    lasts = [module.first(module.first(state)).flatten(0, 1) for state in states]
    assert torch.allclose(solver.seen[1][1], sum(x.T @ x for x in lasts), rtol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((4, 1_000), 4),
        ((4, 1_001), 3),
        ((5, 1_000), 4),
        ((5, 1_000, 2), 2),
        ((5, 4_001), 0),
        ((2, 2_000), 2),
        ((7, 0), 7),
    ],
)
def test_paused_batches_fill_half_of_free_memory_at_most(
    wanted: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 8_000)
    assert PauseBudget(Memory(CPU), ignore).n_paused(*wanted) == expected


@pytest.mark.parametrize(
    ("kind", "solving", "forward", "expected"),
    [
        ("cpu", 0, 0, 4),
        ("cpu", 3_000, 500, 4),  # half of the free memory is less than what they leave
        ("cpu", 4_000, 2_000, 1),
        ("cpu", 9_000, 0, 0),
        ("cuda", 0, 0, 7),
        ("cuda", 3_000, 0, 4),
        ("cuda", 3_000, 2_000, 2),
    ],
)
def test_a_forward_and_the_solver_fit_beside_paused_batches(
    kind: str, solving: int, forward: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 8_000)
    monkeypatch.setattr(memory, "CUBLAS_WORKSPACE_BYTES", 0)
    events: list[Event] = []
    budget = PauseBudget(Memory(torch.device(kind)), events.append, solving)
    assert budget.n_paused(20, 1_000, 1, forward) == expected
    assert f"{size(max(0, 8_000 - solving - forward))} free" in messages(events, "W_MEM_REPLAY")[0]


def test_a_lack_of_memory_for_paused_batches_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 8_000)
    events: list[Event] = []
    budget = PauseBudget(Memory(CPU), events.append)
    assert budget.n_paused(4, 1_000) == 4
    assert events == []
    assert [budget.n_paused(4, 1_001), budget.n_paused(5, 1_000)] == [3, 4]
    assert [budget.n_paused(5, 1_000, 2), budget.n_paused(5, 4_001)] == [2, 0]
    assert warnings(events) == ["W_MEM_REPLAY"]
    assert [budget.n_paused(2, 2_000), budget.n_paused(7, 0)] == [2, 7]


def test_paused_threads_count_with_their_worker_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    events: list[Event] = []
    budget = PauseBudget(Memory(CPU), events.append)
    assert budget.n_paused(16, 0) == 16
    assert events == []
    assert budget.n_paused(17, 0) == 16
    (warning,) = [event for event in events if isinstance(event, Warned)]
    assert "1 of 17 batches cannot wait inside a block" in warning.message
    assert "1088 threads" in warning.message


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_the_machine_and_the_control_group_bound_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    assert 2**20 < free_bytes(CPU) < total
    for name, content in {
        "max": "5000",
        "current": "3000",
        "stat": "anon 7\ninactive_file 500\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(content)
    assert free_bytes(CPU) == 5000 - 3000 + 500
    (tmp_path / "memory.max").write_text("max\n")
    assert 2**20 < free_bytes(CPU) < total


# Prints how many bytes four waiting threads hold after each has freed 20 tensors of 4 MiB.
WAITING_THREADS = """
import threading
import torch
from gptq_cli.runtime.memory import give_back_freed_tensors, host_bytes

freed, go_on = threading.Semaphore(0), threading.Semaphore(0)

def work():
    for _ in range(3):  # from the second round on the default is to keep it
        tensors = [torch.ones(2**20) for _ in range(20)]
        kept = torch.ones(2**10)  # above the others in their arena
        del tensors
    freed.release()
    go_on.acquire()
    del kept

give_back_freed_tensors()
before = host_bytes()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
    freed.acquire()
print(host_bytes() - before)
go_on.release(len(threads))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_paused_thread_returns_its_freed_memory() -> None:
    # A process of its own: here other tests have left threads and memory.
    child = subprocess.run(
        [sys.executable, "-c", WAITING_THREADS], capture_output=True, text=True, check=True
    )
    freed = 4 * 20 * 4 * 2**20
    assert int(child.stdout) < freed / 3
