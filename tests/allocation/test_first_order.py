"""Harms by gradients, compared with autograd on the whole model; experts, resume, processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_cli.allocation.goals import starting_config
from gptq_cli.allocation.harms import Measurement
from gptq_cli.allocation.run import measure_model
from gptq_cli.allocation.saved import read_measurement
from gptq_cli.errors import ResourceError
from gptq_cli.events import Event, Noted, PhaseStarted, Warned
from gptq_cli.planning import checks
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.preview import preview_run
from gptq_cli.quantization import reverse_pass
from gptq_cli.storage.manifest import sealed
from tests.allocation.measuring import SIZES, ends_step, figures, goal, measure, rounded
from tests.allocation.processes import measure_together
from tests.disks import Killed, damage_last_line
from tests.families import save_model, texts
from tests.runs import calibration_ids, config, digest, messages
from tests.whole_model import inputs_of, slow_gradients, whole_model

N_STEPS = 7  # of three blocks forward, the head, and three blocks in reverse


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with tied embeddings."""
    return save_model(tmp_path_factory.mktemp("qwen3") / "model", "qwen3")


def probe_of(model: Path, n_windows: int = SIZES["nsamples"]) -> Tensor:
    """Return the first windows of the probe of a measurement with `SIZES`."""
    return calibration_ids(model, config(**SIZES, seed=1))[:n_windows]


def slow_harms(model: Path, names: list[str], probe: Tensor) -> dict[str, float]:
    """Return half of the mean of (g · ΔW x)² over tokens, for each linear."""
    gradients = slow_gradients(model, names, probe)
    whole = whole_model(model)
    batches = calibration_ids(model, config(**SIZES)).split(SIZES["batch_size"])
    harms = {}
    for name in names:
        with torch.no_grad():
            error = rounded(whole, batches, name) - whole.get_submodule(name).weight
            changes = inputs_of(model, name, probe) @ error.T
        total = 0.0
        for change, gradient in zip(changes, gradients[name], strict=True):
            total += float(change.double() @ gradient.double()) ** 2
        harms[name] = total / 2 / len(changes)
    return harms


@pytest.mark.parametrize("target", ["gptqmodel@7.7", "sglang@0.5.19"])
def test_harms_are_those_of_gradients_of_the_whole_model(
    target: str, qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reverse_pass, "TOKENS_OF_A_PIECE", 128)  # two pieces
    measured = measure(qwen3, goal(target=target), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")
    names = [name for unit in measured.units for name in unit.layers]
    assert len(names) == 21
    expected = slow_harms(qwen3, names, probe_of(qwen3))
    for unit in measured.units:
        of_unit = sum(expected[name] for name in unit.layers)
        assert found["kl"][unit.name] == pytest.approx(of_unit, rel=1e-3), unit.name
    assert found["uniform"] == pytest.approx(sum(expected.values()), rel=1e-3)
    assert found["tokens"] == measured.probe_tokens == 256


@torch.no_grad()
def test_the_harm_of_the_head_is_its_kl(qwen3: Path, tmp_path: Path) -> None:
    measured = measure(qwen3, goal(lm_head=True), tmp_path / "a.yaml")
    assert [unit.layers for unit in measured.units][-1] == ("lm_head",)
    model = whole_model(qwen3)
    batches = calibration_ids(qwen3, config(**SIZES)).split(SIZES["batch_size"])
    weight = rounded(model, batches, "lm_head")
    hidden = model.model(probe_of(qwen3)).last_hidden_state
    wanted = (hidden @ model.lm_head.weight.T).log_softmax(-1)
    got = (hidden @ weight.T).log_softmax(-1)
    expected = float((wanted.exp() * (wanted - got)).sum(-1).mean())
    assert figures(tmp_path / "a.yaml")["kl"]["lm_head"] == pytest.approx(expected, rel=1e-3)


def test_the_probe_is_as_long_as_the_calibration_and_no_longer_than_a_pass(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_cli.planning.measuring.GRADIENT_TOKENS", 3 * 64)
    events: list[Event] = []
    measured = measure(qwen3, goal(), tmp_path / "a.yaml", events.append)
    assert measured.probe_tokens == 3 * 64
    assert PhaseStarted("probe", "3 windows of 64 tokens for 21 units") in events


@torch.no_grad()
def test_transposed_linears_are_measured_like_others(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gpt2")
    measure(model, goal(), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")["kl"]
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
    with torch.enable_grad():
        gradients = slow_gradients(model, names, probe_of(model))
    whole = whole_model(model)
    for name in names:
        changes = inputs_of(model, name, probe_of(model)) @ whole.get_submodule(name).weight
        zero = changes.double().mul(gradients[name].double()).sum(-1).square().mean() / 2
        assert 0 < found[name] < float(zero), "less harm than without the layer"


def test_all_experts_of_a_block_are_one_unit(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe")
    wanted = goal(bits=2.5, moe_uncovered="rtn")
    measured = measure(model, wanted, tmp_path / "a.yaml")
    experts = [unit for unit in measured.units if unit.kind == "mlp.experts"]
    assert [len(unit.layers) for unit in experts] == [15, 15]
    chosen = measured.configured(measured.choose(wanted).allocation.widths)
    plan = measured.plan_of(chosen)
    for unit in experts:
        assert len({chosen.choose(name).config for name in unit.layers}) == 1
    assert plan.split_experts == []
    assert all(harms[2] > harms[4] > 0 for harms in measured.harms)


def test_a_finished_measurement_serves_another_goal(qwen3: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    first = measure(qwen3, goal(), file)
    before = digest(tmp_path)
    again = measure(qwen3, goal(bits=2.75, protect=".*v_proj"), file)
    assert (first.already_done, again.already_done) == (False, True)
    assert digest(tmp_path) == before
    other = measure(qwen3, goal(seed=5), file)
    assert not other.already_done
    assert digest(tmp_path) != before


def test_units_for_another_engine_are_measured_anew(qwen3: Path, tmp_path: Path) -> None:
    file, events = tmp_path / "a.yaml", list[Event]()
    apart = measure(qwen3, goal(), file)
    fused = measure(qwen3, goal(target="sglang@0.5.19"), file, events.append)
    assert (apart.already_done, fused.already_done) == (False, False)
    assert (len(apart.units), len(fused.units)) == (21, 12)
    assert not [event for event in events if isinstance(event, Warned)]


def kill_after(n_steps: int, events: list[Event]) -> Any:
    """Return a report that kills the measurement in the step after this many; it keeps events."""

    def stop(event: Event) -> None:
        events.append(event)
        if sum(map(ends_step, events)) > n_steps:
            raise Killed

    return stop


def test_the_plan_knows_what_a_measurement_keeps(qwen3: Path, tmp_path: Path) -> None:
    wanted = goal(bits=2.5)
    with pytest.raises(Killed):
        measure(qwen3, wanted, tmp_path / "a.yaml", kill_after(3, []))  # where it turns round
    files = (tmp_path / ".a.yaml.gptq-work" / "harms").iterdir()
    nbytes = sum(path.stat().st_size for path in files)
    disk = preview_run(str(qwen3), wanted).disk
    assert disk.measuring == pytest.approx(nbytes, rel=0.3)  # tiny tensors have long headers
    assert disk.needed == max(disk.measuring, disk.output + disk.states)


@pytest.mark.parametrize(
    ("family", "head"),
    [("qwen3", True), pytest.param("gemma3_text", False, marks=pytest.mark.slow)],
)
def test_a_killed_measurement_resumes_to_the_same_bytes(
    family: str, head: bool, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", family)
    wanted = goal(lm_head=head)
    measure(model, wanted, tmp_path / "whole.yaml")
    file = tmp_path / "a.yaml"
    for n_steps in range(1, N_STEPS):
        with pytest.raises(Killed):
            measure(model, wanted, file, kill_after(1, []))
        events: list[Event] = []
        with pytest.raises(Killed):
            measure(model, wanted, file, kill_after(0, events))
        assert (
            PhaseStarted(
                "resume", f"{n_steps} of {N_STEPS} steps of the pass for gradients are finished"
            )
            in events
        )
        kept = tmp_path / ".a.yaml.gptq-work"
        assert events[-1] == Noted(f"finished work is kept in {kept}: the same command resumes")
    measure(model, wanted, file)
    assert figures(file) == figures(tmp_path / "whole.yaml")
    assert not (tmp_path / ".a.yaml.gptq-work").exists()


OTHER = json.dumps(sealed({"identity": {}})).encode()  # a file of gptq, but not this one


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"{}", b"", OTHER])
def test_a_damaged_seed_is_reported_and_the_pass_starts_over(
    content: bytes, qwen3: Path, tmp_path: Path
) -> None:
    measure(qwen3, goal(), tmp_path / "whole.yaml")
    with pytest.raises(Killed):
        measure(qwen3, goal(), tmp_path / "a.yaml", kill_after(2, []))
    harms = tmp_path / ".a.yaml.gptq-work" / "harms"
    (harms / "seed.json").write_bytes(content)
    events: list[Event] = []
    measure(qwen3, goal(), tmp_path / "a.yaml", events.append)
    text = "`seed.json` is not as it was written: the run repeats the pass"
    assert Warned("W_RESUME_DAMAGED", f"gradients in `{harms}`: {text}") in events
    assert sum(map(ends_step, events)) == N_STEPS
    assert figures(tmp_path / "a.yaml") == figures(tmp_path / "whole.yaml")


def edit_beside_calibration(model: Path, file: Path, text: str) -> None:
    """Write `text` to `file` with four words turned round, which the probe alone reads."""
    words = text.split()
    read, wanted = probe_text(model, file), calibration_ids(model, goal(dataset=str(file)))
    for number in range(0, len(words), 8):
        turned = words[number : number + 4][::-1]
        file.write_text(" ".join([*words[:number], *turned, *words[number + 4 :]]))
        if not torch.equal(calibration_ids(model, goal(dataset=str(file))), wanted):
            continue
        if not torch.equal(probe_text(model, file), read):
            return
    raise AssertionError("no words are read by the probe alone")


def probe_text(model: Path, file: Path) -> Tensor:
    return calibration_ids(model, goal(dataset=str(file), seed=1))


@pytest.mark.parametrize("finished", [True, False])
def test_a_measurement_of_another_probe_is_not_used(
    finished: bool, qwen3: Path, tmp_path: Path
) -> None:
    text, file = " ".join(texts(4000, 3)[0].split()), tmp_path / "text.txt"
    file.write_text(text)
    wanted = goal(dataset=str(file))
    if finished:
        measure(qwen3, wanted, tmp_path / "a.yaml")
    else:
        with pytest.raises(Killed):
            measure(qwen3, wanted, tmp_path / "a.yaml", kill_after(2, []))
    edit_beside_calibration(qwen3, file, text)
    events: list[Event] = []
    measure(qwen3, wanted, tmp_path / "a.yaml", events.append, overwrite=True)
    assert sum(map(ends_step, events)) == N_STEPS
    measure(qwen3, wanted, tmp_path / "whole.yaml")
    assert figures(tmp_path / "a.yaml") == figures(tmp_path / "whole.yaml")


@pytest.mark.parametrize("changed", [{"seed": 1}, {"damp_percent": 0.2}])
def test_an_unfinished_measurement_of_other_settings_is_discarded_with_a_warning(
    changed: dict[str, object], qwen3: Path, tmp_path: Path
) -> None:
    measure(qwen3, goal(**changed), tmp_path / "whole.yaml")
    with pytest.raises(Killed):
        measure(qwen3, goal(), tmp_path / "a.yaml", kill_after(2, []))
    events: list[Event] = []
    measure(qwen3, goal(**changed), tmp_path / "a.yaml", events.append)
    harms = tmp_path / ".a.yaml.gptq-work" / "harms"
    text = f"discarding the unfinished pass for gradients in `{harms}`"
    why = "the settings, the model or the text are not those of that pass"
    assert messages(events, "W_RESUME_DROPPED") == [f"{text}: {why}"]
    assert sum(map(ends_step, events)) == N_STEPS
    assert figures(tmp_path / "a.yaml") == figures(tmp_path / "whole.yaml")


def test_a_measurement_whose_last_step_is_damaged_resumes_at_the_step_before_it(
    qwen3: Path, tmp_path: Path
) -> None:
    wanted, file = goal(lm_head=True), tmp_path / "a.yaml"
    measure(qwen3, wanted, tmp_path / "whole.yaml")
    journal = tmp_path / ".a.yaml.gptq-work" / "harms" / "journal.jsonl"
    for n_steps in range(1, N_STEPS):
        events: list[Event] = []
        with pytest.raises(Killed):
            measure(qwen3, wanted, file, kill_after(min(n_steps, 2), events))
        damaged = messages(events, "W_RESUME_DAMAGED")
        assert len(damaged) == (n_steps > 1)
        damage_last_line(journal, n_steps)
    events = []
    measure(qwen3, wanted, file, events.append)
    assert sum(map(ends_step, events)) == 2
    assert figures(file) == figures(tmp_path / "whole.yaml")


def test_the_states_of_the_calibration_are_removed_when_the_pass_turns_round(
    qwen3: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        measure(qwen3, goal(lm_head=True), tmp_path / "a.yaml", kill_after(5, []))
    harms = tmp_path / ".a.yaml.gptq-work" / "harms"
    states = ["gradients-2", "gradients-3", "states-0", "states-1", "states-2"]
    rounded = ["rounded-0", "rounded-1", "rounded-2"]
    kept = ["journal.jsonl", "seed.json", *rounded, *states]
    assert sorted(path.name for path in harms.iterdir()) == sorted(kept)


def test_a_measurement_that_shall_never_resume_starts_over(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        measure(qwen3, goal(), tmp_path / "a.yaml", kill_after(2, []))
    events: list[Event] = []
    measure(qwen3, goal(), tmp_path / "a.yaml", events.append, resume="never")
    assert sum(map(ends_step, events)) == N_STEPS
    again = measure(qwen3, goal(), tmp_path / "a.yaml", events.append, resume="never")
    assert not again.already_done
    assert sum(map(ends_step, events)) == 2 * N_STEPS


@pytest.fixture(scope="module")
def finished(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the content of the file of a finished measurement."""
    file = tmp_path_factory.mktemp("finished") / "a.yaml"
    measure(qwen3, goal(), file)
    content: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    return content


@pytest.mark.parametrize(
    "change",
    [
        None,
        [1],
        {},
        {"extra": 1},
        {"kl": None},
        {"kl": {}},
        {"kl": [1]},
        {"uniform": "x"},
        {"uniform": True},
        {"uniform": math.nan},
        {"uniform": -1},
        {"uniform": 1e308},
        {"uniform": math.inf},
        {"tokens": "x"},
    ],
    ids=str,
)
def test_a_measurement_without_usable_figures_is_damaged(
    change: Any, finished: dict[str, Any], tmp_path: Path
) -> None:
    measured, units = finished["measured"], [*finished["measured"]["kl"]]
    planted = change
    if isinstance(change, dict) and change:
        planted = measured | change
    text = json.dumps(sealed(finished | {"measured": planted}))
    file = tmp_path / "a.json"
    file.write_text(text)
    events: list[Event] = []
    assert read_measurement([file], finished["identity"], units, events.append) is None
    text = f"`{file}` has no usable figures: the run measures again"
    assert events == [Warned("W_RESUME_DAMAGED", text)]
    planted = measured | {"kl": measured["kl"] | {units[1]: "x"}}
    file.write_text(json.dumps(sealed(finished | {"measured": planted})))
    assert read_measurement([file], finished["identity"], units) is None
    file.write_text(json.dumps(finished))
    found = read_measurement([file], finished["identity"], units)
    assert found == Measurement(**measured)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_measure_the_same(size: int, qwen3: Path, tmp_path: Path) -> None:
    wanted = goal(batch_size=1, lm_head=True)
    measure(qwen3, wanted, tmp_path / "one.yaml")
    measure_together(size, qwen3, tmp_path / "two.yaml", wanted)
    assert figures(tmp_path / "two.yaml") == figures(tmp_path / "one.yaml")


def test_processes_pause_together_and_others_continue(qwen3: Path, tmp_path: Path) -> None:
    wanted = goal(batch_size=1, lm_head=True)
    measure(qwen3, wanted, tmp_path / "one.yaml")
    journal = tmp_path / ".a.yaml.gptq-work" / "harms" / "journal.jsonl"
    measure_together(2, qwen3, tmp_path / "a.yaml", wanted, n_steps=2)
    assert journal.read_bytes().count(b"\n") == 2
    measure_together(3, qwen3, tmp_path / "a.yaml", wanted, n_steps=3)
    assert journal.read_bytes().count(b"\n") == 5
    events: list[Event] = []
    measure(qwen3, wanted, tmp_path / "a.yaml", events.append)
    assert sum(map(ends_step, events)) == 2
    assert figures(tmp_path / "a.yaml") == figures(tmp_path / "one.yaml")


def test_a_temporary_directory_without_room_is_refused(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = goal()
    prepared = prepare_run(
        str(qwen3), Path("out"), starting_config(wanted), RunOptions(), writes=False
    )
    full = SimpleNamespace(f_bavail=99, f_frsize=1)
    monkeypatch.setattr(checks.os, "statvfs", lambda _: full)
    with pytest.raises(ResourceError) as caught:
        measure_model(prepared, wanted)
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 5)
    assert str(caught.value).startswith(f"`{gettempdir()}/gptq-")
    assert "has 99 B free" in str(caught.value)
    hint = "set TMPDIR to a directory on another disk, or use fewer --nsamples"
    assert caught.value.hint == hint


def test_several_processes_measure_the_same_experts(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe")
    wanted = goal(batch_size=1, moe_uncovered="rtn")
    measure(model, wanted, tmp_path / "one.yaml")
    measure_together(2, model, tmp_path / "two.yaml", wanted)
    assert figures(tmp_path / "two.yaml") == figures(tmp_path / "one.yaml")
