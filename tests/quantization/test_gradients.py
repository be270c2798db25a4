"""The streamed pass for gradients, against autograd on the whole model in memory."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from gptq_cli.config.layer import LayerConfig
from gptq_cli.errors import InputError, PausedError
from gptq_cli.events import Event, PhaseStarted, Report, StepsDone, WorkKept, ignore
from gptq_cli.planning.plan import plan_run
from gptq_cli.quantization import gradients, layers, reverse_pass
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.factor import HessianFactor, NotPositiveDefiniteError
from gptq_cli.solver.hessian import LONGEST
from gptq_cli.storage.work_directory import JOURNAL
from tests.architectures import build
from tests.disks import CountingDisk, DiesWriting, Killed, damage_last_line, using
from tests.families import save, save_model
from tests.runs import calibration_ids, config, digest, messages, quantize
from tests.tiny import SMALL, WORK, Case, killer
from tests.whole_model import inputs_of, slow_gradients, slow_labels

SETTINGS: dict[str, object] = {"loss_aware": True, "group_size": 16, "batch_size": 4}


def dies_at(phase: str) -> Report:
    """Return a listener that ends the run when a phase begins."""

    def report(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == phase:
            raise Killed

    return report


def written(
    model: Path, output: Path, **changes: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sums and energies that a run has written before its first block, by layer."""
    with pytest.raises(Killed):
        quantize_checkpoint(
            str(model), output, config(**(SETTINGS | changes)), report=dies_at("embeddings")
        )
    sums: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    for path in sorted((output.parent / f".{output.name}.gptq-work" / "gradients").glob("sums-*")):
        of_block = torch.load(path, weights_only=True)
        sums |= of_block[0]
        energies |= of_block[1]
    return sums, energies


def slow_sums(found: dict[str, Tensor], windows: Tensor, piece: int) -> dict[str, Tensor]:
    """Return Σ g gᵀ, token by token. Tokens are limited among those of `piece` windows."""
    sums = {}
    for name, tokens in found.items():
        total = torch.zeros(tokens.shape[1], tokens.shape[1])
        for part in tokens.split(piece * windows.shape[1]):
            total += slow_sum(part)
        sums[name] = total
    return sums


def slow_sum(tokens: Tensor) -> Tensor:
    total = torch.zeros(tokens.shape[1], tokens.shape[1])
    lengths = tokens.norm(dim=1)
    limit = LONGEST * float(lengths.median())
    for token, length in zip(tokens, lengths.tolist(), strict=True):
        while length > limit:
            token, length = token / 2, length / 2
        total += torch.outer(token, token)
    return total


@pytest.mark.parametrize(
    ("family", "n_layers", "n_weighted"),
    [("llama", 21, 21), ("gemma2", 21, 21), ("gpt2", 6, 12), ("opt", 18, 18), ("qwen3_moe", 8, 8)],
)
def test_gradients_equal_those_of_the_whole_model_in_memory(
    family: str, n_layers: int, n_weighted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reverse_pass, "TOKENS_OF_A_PIECE", 128)
    monkeypatch.setattr(reverse_pass, "LOGITS_AT_ONCE", 512 * 20)
    model = save_model(tmp_path / "model", family)
    sums, energies = written(model, tmp_path / "out", moe_uncovered="rtn")
    assert (len(sums), len(energies)) == (n_layers, n_weighted)
    windows = calibration_ids(model, config(**SETTINGS))
    whole = slow_gradients(model, list(energies), windows)
    expected = slow_sums({name: whole[name] for name in sums}, windows, piece=2)
    for name, found in sums.items():
        assert torch.allclose(found, expected[name], rtol=1e-3, atol=1e-4 * float(found.max())), (
            name
        )
    for name, of_tokens in energies.items():
        lengths = torch.tensor([float(token.norm()) for token in whole[name]])
        assert torch.allclose(of_tokens, lengths**2, rtol=1e-3, atol=1e-9), name


def test_the_pass_takes_the_first_windows_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reverse_pass, "GRADIENT_TOKENS", 3 * 64)
    model = save_model(tmp_path / "model")
    sums, energies = written(model, tmp_path / "out")
    windows = calibration_ids(model, config(**SETTINGS))
    whole = slow_gradients(model, list(sums), windows[:3])
    expected = slow_sums(whole, windows, piece=3)
    for name, found in sums.items():
        assert torch.allclose(found, expected[name], rtol=1e-3, atol=1e-4 * float(found.max())), (
            name
        )
    assert {len(of_tokens) for of_tokens in energies.values()} == {3 * 64}


def test_pieces_have_few_tokens_but_a_window_at_least() -> None:
    short = [torch.zeros(8, 800), torch.zeros(8, 500), torch.zeros(80, 500)]
    assert [len(piece) for piece in reverse_pass.pieces_of(short)] == [1] * 8 + [2] * 4 + [
        2
    ] * 5 + [1]
    assert [len(piece) for piece in reverse_pass.pieces_of([torch.zeros(2, 17000)])] == [1]
    assert [len(piece) for piece in reverse_pass.pieces_of([torch.zeros(3, 9000)])] == [1]
    assert [len(piece) for piece in reverse_pass.pieces_of([torch.zeros(2, 7)])] == [2]


def test_labels_are_the_first_to_cumulate_more_than_their_numbers() -> None:
    random = torch.Generator().manual_seed(1)
    likelihoods = torch.randn(200, 13, generator=random).log_softmax(-1)
    uniform = torch.rand(200, generator=random)
    uniform[0], uniform[1] = 0, 1
    labels = reverse_pass.drawn_labels(likelihoods, uniform).tolist()
    assert labels[0] == 0
    assert labels[1] == 12
    assert labels[2:] == slow_labels(likelihoods[2:], uniform[2:])


def test_the_text_ends_with_a_batch_that_is_taken_in_part() -> None:
    batches = [torch.zeros(8, 4096), torch.zeros(3, 100)]
    assert [tuple(piece.shape) for piece in reverse_pass.pieces_of(batches)] == [(1, 4096)] * 4
    batches = [torch.zeros(20, 1000), torch.zeros(3, 100)]
    assert [tuple(piece.shape) for piece in reverse_pass.pieces_of(batches)] == [(1, 1000)] * 16


def test_hessians_weigh_tokens_by_their_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reverse_pass, "GRADIENT_TOKENS", 5 * 64)
    model, seen = save_model(tmp_path / "model"), []
    usual = layers.prepare

    def note(hessian: Tensor, *others: object) -> HessianFactor:
        seen.append(hessian[0].clone())
        return usual(hessian, *others)

    monkeypatch.setattr(layers, "prepare", note)
    quantize(tmp_path, model, **SETTINGS)
    windows, names = calibration_ids(model, config(**SETTINGS)), ["q_proj", "k_proj", "v_proj"]
    paths = [f"model.layers.0.self_attn.{name}" for name in names]
    whole = slow_gradients(model, paths, windows[:5])
    energies = []
    for token in range(320):
        energies.append(sum(float(whole[path][token].norm()) ** 2 for path in paths))
    median = sorted(energies)[159]
    expected = torch.zeros(64, 64)
    for number, token in enumerate(inputs_of(model, paths[0], windows)):
        factor = 1.0
        if number < 320:
            exponent = round(math.log2(energies[number] / median) / 4)
            factor = 2.0 ** max(-2, min(2, exponent))
        expected += factor**2 * torch.outer(token, token)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("missing", ["plan", "file"])
def test_layers_without_an_energy_weigh_tokens_alike(missing: str, tmp_path: Path) -> None:
    plan = plan_run(save_model(tmp_path / "model"), config(**SETTINGS))
    by_name = {layer.name: layer for layer in plan.layers}
    gate, up = (by_name[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    known = {gate.name: torch.tensor([1.0, 9, 16 * 40]), up.name: torch.tensor([1.0, 31, 0])}
    if missing == "file":
        del known[gate.name]
    store = reverse_pass.PassStore(tmp_path / "store", "", ignore)
    store.finish({"sums-0": ({}, known)}, [], None)
    found = gradients.SummedGradients(Ranks(), torch.device("cpu"), store, 3, [2, 2])
    if missing == "plan":
        assert [part.tolist() for part in found.factors([gate, up])] == [[0.5, 1], [2, 1]]
        gate = replace(gate, config=LayerConfig())
    assert found.factors([gate, up]) == ()


def test_a_linear_that_sees_some_tokens_or_some_twice_has_no_energy() -> None:
    ones = torch.ones(6)
    seen = [("all", 4 * ones), ("some", ones[:3]), ("twice", ones), ("twice", 2 * ones)]
    energies = gradients.energies_of(seen, 6)
    assert {name: of_tokens.tolist() for name, of_tokens in energies.items()} == {"all": [4.0] * 6}


def test_gradients_change_the_layers_that_they_are_for(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=192)
    settings: dict[str, object] = {"preset": "gptq", "bits": 3, "true_sequential": False}
    _, plain = quantize(tmp_path, model, **settings)
    _, aware = quantize(tmp_path, model, **settings, loss_aware=True)
    ratios = {layer.name: layer.loss_ratio for layer in aware.layers}
    wide = [name for name in ratios if "gate" in name or "up" in name]
    assert [name for name, ratio in ratios.items() if ratio is None] == wide
    assert min(ratio for ratio in ratios.values() if ratio is not None) < 0.95
    assert {layer.loss_ratio for layer in plain.layers} == {None}


def test_a_layer_rounded_to_nearest_does_without_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = layers.prepare

    def refuse_first(hessian: Tensor, settings: LayerConfig, tokens: list[int]) -> HessianFactor:
        if tokens != [0]:  # which stands for a Hessian that was given up
            raise NotPositiveDefiniteError(0.1)
        return usual(hessian, settings, tokens)

    monkeypatch.setattr(layers, "prepare", refuse_first)
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    _, result = quantize(tmp_path, model, loss_aware=True, on_numeric_fault="rtn")
    assert [layer.fallback for layer in result.layers] == ["hessian"] * 7
    assert {layer.loss_ratio for layer in result.layers} == {None}


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.float16)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    weights.model.layers[0].mlp.up_proj.weight.data.mul_(3e4)
    weights.save_pretrained(model)
    settings = SETTINGS | {"on_numeric_fault": "rtn", "dtype": "float16"}
    with pytest.raises(InputError) as caught:
        quantize(tmp_path, model, **settings)
    assert (caught.value.code, caught.value.exit_code) == ("E_GRADIENT", 3)
    assert "is not finite" in str(caught.value)
    without = "leave out loss_aware (--no-loss-aware)"
    assert caught.value.hint == f"run the model in float32: --dtype float32, or {without}"
    assert reverse_pass.not_finite("a", torch.float32).hint is None


# ------------------------------------------------------------ refusals


def refused(tmp_path: Path, model: Path, **changes: object) -> InputError:
    with pytest.raises(InputError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config(**(SETTINGS | changes)))
    assert (caught.value.code, caught.value.exit_code) == ("E_GRADIENT", 3)
    assert not (tmp_path / WORK).exists()
    return caught.value


def test_a_block_without_a_derivative_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", torch.no_grad()(forward))
    error = refused(tmp_path, save_model(tmp_path / "model"))
    assert str(error).startswith(
        "loss_aware needs the model's gradient, but `model.layers.2` cannot be differentiated: "
    )
    assert error.hint == "leave out loss_aware (--no-loss-aware)"


def test_a_linear_that_no_gradient_reaches_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaMLP.forward

    def cut(self: nn.Module, hidden: Tensor) -> Tensor:
        return forward(self, hidden).detach()

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", cut)
    error = refused(tmp_path, save_model(tmp_path / "model"))
    parts = [f"`model.layers.2.mlp.{part}_proj`" for part in ("down", "gate", "up")]
    assert str(error).endswith(f"but no gradient reaches the outputs of {', '.join(parts)}")


@pytest.mark.filterwarnings("ignore")  # the warnings of transformers do not matter here
def test_layers_that_only_choose_tokens_can_be_kept(tmp_path: Path) -> None:
    model = save(build("deepseek_v32"), tmp_path / "model")
    settings = {"unfit": "keep", "moe_uncovered": "rtn"}
    error = refused(tmp_path, model, **settings)
    assert error.hint is not None
    (rule,) = re.findall(r"--dynamic '(.*)'", error.hint)
    assert "indexer" in rule
    _, result = quantize(tmp_path, model, **(SETTINGS | settings), dynamic={rule: {}})
    assert any(layer.loss_ratio is not None for layer in result.layers)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_rescales_its_weights_in_place_has_gradients(tmp_path: Path) -> None:
    model = save(build("rwkv"), tmp_path / "model")
    sums, energies = written(model, tmp_path / "out", unfit="keep")
    assert sums.keys() <= energies.keys()
    for name, found in sums.items():
        assert float(found.trace()) > 0, name


@pytest.mark.filterwarnings("ignore")  # the warnings of transformers do not matter here
@pytest.mark.parametrize("model_type", ["gemma4_text", "zaya"])
def test_blocks_that_hand_on_more_are_refused(model_type: str, tmp_path: Path) -> None:
    model = save(build(model_type), tmp_path / "model")
    error = refused(tmp_path, model, unfit="keep", moe_uncovered="rtn")
    assert str(error).endswith("but its blocks hand on more than hidden states")


# ------------------------------------------------------------ resuming


@dataclass(frozen=True)
class LossAware(Case):
    """The smallest run, loss-aware; the pass in reverse takes the first `n_of_pass` operations."""

    n_of_pass: int = 0

    def run(self, output: Path, **changes: object) -> QuantizeResult:
        return super().run(output, **({"loss_aware": True} | changes))


@pytest.fixture(scope="module")
def aware(tmp_path_factory: pytest.TempPathFactory) -> LossAware:
    directory = tmp_path_factory.mktemp("aware")
    model = save_model(directory / "model", **SMALL)
    disk = CountingDisk()
    before_blocks: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == "embeddings":
            before_blocks.append(len(disk.operations))

    with using(disk):
        LossAware(model, {}, []).run(directory / "out", report=note)
    tree = digest(directory / "out")
    return LossAware(model, tree, disk.operations, n_of_pass=before_blocks[0])


def phases(events: list[Event]) -> list[str]:
    return [event.name for event in events if isinstance(event, PhaseStarted)]


@pytest.mark.parametrize("all_of_the_run", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rerun_after_any_kill_in_the_pass_writes_the_same_bytes(
    all_of_the_run: bool, aware: LossAware, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    moments = [last for last in aware.moments(every=False) if last <= aware.n_of_pass]
    assert 10 < len(moments) < len(aware.moments(every=False))
    if all_of_the_run:
        moments = aware.moments(every=True)
    for last in moments:
        assert aware.interrupted(output, last)
        with using(CountingDisk()):
            aware.run(output)
        assert digest(output) == aware.tree, f"another output after a kill at operation {last}"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(output)


@pytest.mark.parametrize(("phase", "repeated"), [("gradients", True), ("embeddings", False)])
def test_only_a_complete_pass_is_not_repeated(
    phase: str, repeated: bool, aware: LossAware, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        aware.run(tmp_path / "out", report=dies_at(phase))
    assert (tmp_path / WORK).exists() is not repeated
    events: list[Event] = []
    aware.run(tmp_path / "out", report=events.append)
    assert ("gradients" in phases(events)) is repeated
    using_them = PhaseStarted("resume", "using the gradients of an earlier call")
    assert (using_them in events) is not repeated
    assert digest(tmp_path / "out") == aware.tree


def ends_step(event: Event) -> bool:
    """Return whether the last piece of the text has passed a block."""
    return isinstance(event, StepsDone) and event.done == int(event.done)


@pytest.mark.parametrize("n_steps", range(1, 5))
def test_a_pass_that_was_killed_resumes_at_the_next_step(
    n_steps: int, aware: LossAware, tmp_path: Path
) -> None:
    passed = 0

    def stop(event: Event) -> None:
        nonlocal passed
        passed += ends_step(event)
        if passed > n_steps:  # the step itself ends after the report
            raise Killed

    with pytest.raises(Killed):
        aware.run(tmp_path / "out", report=stop)
    events: list[Event] = []
    aware.run(tmp_path / "out", report=events.append)
    assert (
        PhaseStarted("resume", f"{n_steps} of 5 steps of the pass for gradients are finished")
        in events
    )
    assert sum(map(ends_step, events)) == 5 - n_steps
    assert digest(tmp_path / "out") == aware.tree


def test_a_run_that_ends_after_the_pass_says_how_to_resume(
    aware: LossAware, tmp_path: Path
) -> None:
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if isinstance(event, PhaseStarted) and event.name == "embeddings":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aware.run(tmp_path / "out", report=stop)
    assert events[-1] == WorkKept(tmp_path / WORK, blocks=False)


def test_a_resumed_block_uses_the_gradients_on_the_disk(aware: LossAware, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        aware.run(tmp_path / "out", report=killer(0), max_seconds=1e6)
    events: list[Event] = []
    result = aware.run(tmp_path / "out", report=events.append)
    assert result.resumed_blocks == 1
    assert "gradients" not in phases(events)
    assert digest(tmp_path / "out") == aware.tree


def damage(work: Path) -> None:
    path = work / "gradients" / "sums-1"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(work: Path) -> None:
    (work / "gradients" / "sums-0").unlink()


def damage_journal(work: Path) -> None:
    path = work / "gradients" / JOURNAL
    path.write_bytes(path.read_bytes().replace(b"needless", b"useless", 1))


def deepen_journal(work: Path) -> None:
    (work / "gradients" / JOURNAL).write_bytes(b"[" * 100_000)


def remove_journal(work: Path) -> None:
    (work / "gradients" / JOURNAL).unlink()


def remove_seed(work: Path) -> None:
    (work / "gradients" / "seed.json").unlink()


CHANGES = [damage, remove, damage_journal, deepen_journal, remove_journal, remove_seed]


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_sum_is_reported_and_summed_anew(
    change: Callable[[Path], None], aware: LossAware, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        aware.run(tmp_path / "out", report=dies_at("embeddings"))
    change(tmp_path / WORK)
    events: list[Event] = []
    aware.run(tmp_path / "out", report=events.append)
    (warned,) = messages(events, "W_RESUME_DAMAGED")
    assert warned.startswith(f"gradients in `{tmp_path / WORK / 'gradients'}`: ")
    assert phases(events).count("gradients") == 2
    assert digest(tmp_path / "out") == aware.tree


@pytest.mark.parametrize("n_steps", range(1, 6))
def test_a_pass_whose_last_step_is_damaged_resumes_at_the_step_before_it(
    n_steps: int, aware: LossAware, tmp_path: Path
) -> None:
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if sum(map(ends_step, events)) > n_steps or phases(events)[-1] == "embeddings":
            raise Killed

    with pytest.raises(Killed):
        aware.run(tmp_path / "out", report=stop)
    damage_last_line(tmp_path / WORK / "gradients" / JOURNAL, n_steps)
    again: list[Event] = []
    aware.run(tmp_path / "out", report=again.append)
    assert sum(map(ends_step, again)) == 5 - (n_steps - 1)
    (warned,) = messages(again, "W_RESUME_DAMAGED")
    assert warned.endswith(
        " bytes of its journal are not valid: the run repeats what they stand for"
    )
    assert digest(tmp_path / "out") == aware.tree


def test_a_pass_that_was_killed_in_its_first_step_is_not_damaged(
    aware: LossAware, tmp_path: Path
) -> None:
    with pytest.raises(Killed), using(DiesWriting("states-1")):
        aware.run(tmp_path / "out")
    assert (tmp_path / WORK / "gradients" / "states-1").exists()
    events: list[Event] = []
    aware.run(tmp_path / "out", report=events.append)
    assert messages(events, "W_RESUME_DAMAGED") == []


@pytest.mark.parametrize("changes", [{"seed": 1}, {"resume": "never"}])
def test_gradients_of_another_run_are_not_used(
    changes: dict[str, object], aware: LossAware, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        aware.run(tmp_path / "out", report=dies_at("embeddings"))
    events: list[Event] = []
    aware.run(tmp_path / "out", report=events.append, **changes)
    assert phases(events).count("gradients") == 2


def test_each_piece_is_reported_in_each_block_forward_and_in_head_and_blocks_backward(
    aware: LossAware, tmp_path: Path
) -> None:
    events: list[Event] = []
    aware.run(tmp_path / "out", report=events.append, nsamples=2, batch_size=1)  # two pieces
    passed = [event for event in events if isinstance(event, StepsDone)]
    forward = [StepsDone(done, 5, 0) for done in (0.5, 1, 1.5, 2)]
    backward = [StepsDone(done, 5, 2) for done in (2.5, 3, 3.5, 4, 4.5, 5)]
    assert passed == [*forward, *backward]


def test_the_pass_ends_when_the_time_is_over(aware: LossAware, tmp_path: Path) -> None:
    with pytest.raises(PausedError, match="the next step would not finish") as late:
        aware.run(tmp_path / "out", max_seconds=1e-6)
    assert late.value.hint == "this call has finished no step: allow more time"
    assert not (tmp_path / WORK).exists()
