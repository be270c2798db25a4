"""Harms by copies of the probe, compared with the whole model; resume, processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq_cli.allocation.copies import probe_shape
from gptq_cli.allocation.first_order import HarmPass
from gptq_cli.allocation.harms import REFERENCE
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import PausedError
from gptq_cli.events import BlockFinished, BlockStarted, Event, PhaseStarted, ignore
from gptq_cli.quantization.reverse_pass import NoGradientError
from gptq_cli.quantization.run import calibrate
from gptq_cli.quantization.run_state import Limits, SavingTimes
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from tests.allocation.measuring import SIZES, divergence, figures, goal, measure, rounded
from tests.allocation.processes import measure_together
from tests.architectures import build
from tests.disks import Killed
from tests.families import save, save_model, texts
from tests.runs import calibration_ids, config, messages
from tests.whole_model import whole_model


@pytest.fixture(autouse=True)
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no model have gradients."""

    def refuse(_: HarmPass) -> None:
        raise NoGradientError("this test wants none")

    monkeypatch.setattr(HarmPass, "carry_out", refuse)


def probe_of(model: Path, n_units: int) -> Tensor:
    """Return the tokens of the probe of a measurement with `SIZES`."""
    windows, length = probe_shape(SIZES["nsamples"] * SIZES["seqlen"], n_units, SIZES["seqlen"])
    return calibration_ids(model, config(nsamples=windows, seqlen=length, batch_size=1, seed=1))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with tied embeddings."""
    return save_model(tmp_path_factory.mktemp("qwen3") / "model", "qwen3")


@torch.no_grad()
def test_harms_are_those_of_the_whole_model(qwen3: Path, tmp_path: Path) -> None:
    measured = measure(qwen3, goal(), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")
    model = whole_model(qwen3)
    batches = calibration_ids(qwen3, config(**SIZES)).split(SIZES["batch_size"])
    probe = probe_of(qwen3, len(measured.units))

    def harm(layers: Iterable[str]) -> float:
        weights = {name: rounded(model, batches, name) for name in layers}
        return divergence(model, probe, weights)

    for unit in measured.units[:5]:
        assert found["kl"][unit.name] == pytest.approx(harm(unit.layers), rel=1e-3)
    layers = [*chain.from_iterable(unit.layers for unit in measured.units)]
    assert found["uniform"] == pytest.approx(harm(layers), rel=1e-3)
    total = sum(harms[REFERENCE] for harms in measured.harms)
    assert total == pytest.approx(found["uniform"])
    assert found["tokens"] == probe.numel()


@torch.no_grad()
@pytest.mark.parametrize("wanted", ["auto", "float32"])
def test_calibration_alone_runs_in_16_bits(wanted: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16)
    dtype, other = torch.bfloat16, torch.float32
    if wanted == "float32":
        dtype, other = other, dtype
    measured = measure(model, goal(dtype=wanted), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")["kl"]
    whole = whole_model(model)
    batches = calibration_ids(model, config(**SIZES)).split(SIZES["batch_size"])
    probe = probe_of(model, len(measured.units))
    units = measured.units[:7]

    def harms(calibrated: torch.dtype) -> list[float]:
        values = []
        for unit in units:
            weights = {name: rounded(whole, batches, name, calibrated) for name in unit.layers}
            values.append(divergence(whole, probe, weights))
        return values

    assert [found[unit.name] for unit in units] == pytest.approx(harms(dtype), rel=1e-3)
    assert harms(other) != pytest.approx(harms(dtype), rel=1e-3)


def test_sums_beside_linears_keep_their_dtype(tmp_path: Path) -> None:
    model = save(build("dbrx").bfloat16(), tmp_path / "model")  # adds outputs of experts in place
    measured = measure(model, goal(moe_uncovered="rtn", unfit="keep"), tmp_path / "a.yaml")
    assert len(measured.units) == 8
    assert all(harms[2] > harms[4] > 0 for harms in measured.harms)


@torch.no_grad()
def test_long_windows_are_compared_one_by_one(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3", max_position_embeddings=256)
    sizes = {"nsamples": 13, "seqlen": 256, "batch_size": 13}
    measured = measure(model, goal(**sizes, target="sglang@0.5.19"), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")["kl"]
    whole, batches = whole_model(model), [calibration_ids(model, config(**sizes))]
    shape = probe_shape(13 * 256, len(measured.units), 256)
    assert shape == (2, 138)  # 256 tokens are compared together at most
    probe = calibration_ids(model, config(nsamples=2, seqlen=138, batch_size=1, seed=1))
    for unit in measured.units[:2]:
        weights = {name: rounded(whole, batches, name) for name in unit.layers}
        assert found[unit.name] == pytest.approx(divergence(whole, probe, weights), rel=1e-3)


@torch.no_grad()
def test_harms_of_documents_count_no_padding(qwen3: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": texts(12 + 5 * number, number)[0]}) for number in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    text = {"dataset": str(tmp_path / "rows.jsonl"), "pack": False}
    measured = measure(qwen3, goal(**text), tmp_path / "a.yaml")
    found = figures(tmp_path / "a.yaml")
    model = whole_model(qwen3)
    batches = documents(qwen3, config(**SIZES, **text))
    assert len({len(ids[0]) for ids in batches}) > 1
    n_tokens = SIZES["nsamples"] * SIZES["seqlen"]
    windows, length = probe_shape(n_tokens, len(measured.units), SIZES["seqlen"])
    sizes = {"nsamples": windows, "seqlen": length, "batch_size": 1, "seed": 1}
    probe = documents(qwen3, config(**sizes, **text))
    for unit in measured.units[:3]:
        weights = {name: rounded(model, batches, name) for name in unit.layers}
        harm = total = 0
        for ids in probe:
            harm += divergence(model, ids, weights) * (ids.numel() - 1)
            total += ids.numel() - 1
        assert found["kl"][unit.name] == pytest.approx(harm / total, rel=1e-3)


def documents(model: Path, settings: QuantizeConfig) -> list[Tensor]:
    """Return the token ids [1, length] of each document of a calibration without packing."""
    windows = calibrate(open_checkpoint(model), settings, ignore, SINGLE_PROCESS).windows
    assert windows.lengths is not None
    found = []
    for ids, length in zip(windows.ids, windows.lengths, strict=True):
        found.append(ids[None, :length])
    return found


@torch.no_grad()
def test_a_quantized_head_is_a_unit_of_its_own(qwen3: Path, tmp_path: Path) -> None:
    measured = measure(qwen3, goal(lm_head=True), tmp_path / "a.yaml")
    (head,) = [unit for unit in measured.units if unit.name == "lm_head"]
    model = whole_model(qwen3)
    batches = calibration_ids(qwen3, config(**SIZES)).split(SIZES["batch_size"])
    probe = probe_of(qwen3, len(measured.units))
    embeddings = model.get_input_embeddings().weight.data.clone()
    weight = rounded(model, batches, "lm_head")
    wanted = model(probe).logits[:, :-1].log_softmax(-1)
    hidden = model.model(probe).last_hidden_state[:, :-1]
    got = (hidden @ weight.T).log_softmax(-1)
    expected = float((wanted.exp() * (wanted - got)).sum(-1).mean())
    found = figures(tmp_path / "a.yaml")["kl"]["lm_head"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert torch.equal(model.get_input_embeddings().weight.data, embeddings)
    assert head.layers == ("lm_head",)


def kill_after(block: int) -> object:
    """Return a report that kills the measurement after a block."""

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.index == block:
            raise Killed

    return stop


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_killed_measurement_resumes_to_the_same_bytes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", family)
    monkeypatch.setattr(SavingTimes, "is_due", lambda *_: True)
    measure(model, goal(), tmp_path / "whole.yaml")
    file = tmp_path / "a.yaml"
    for block in (0, 1):
        with pytest.raises(Killed):
            measure(model, goal(), file, kill_after(block))
    events: list[Event] = []
    measure(model, goal(), file, events.append)
    finished = [event.index for event in events if isinstance(event, BlockFinished)]
    assert finished == [2]
    assert figures(file) == figures(tmp_path / "whole.yaml")
    assert not (tmp_path / ".a.yaml.gptq-work").exists()


def count_tries(monkeypatch: pytest.MonkeyPatch, refused: Callable[[], None]) -> list[HarmPass]:
    """Return a list that gets each pass for gradients; `refused` is called when one fails."""
    tries: list[HarmPass] = []

    def refuse(harm_pass: HarmPass) -> None:
        tries.append(harm_pass)
        refused()
        raise NoGradientError("this test wants none")

    monkeypatch.setattr(HarmPass, "carry_out", refuse)
    return tries


def test_gradients_that_fail_once_are_not_tried_again(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = count_tries(monkeypatch, lambda: None)

    def stop(event: Event) -> None:
        if isinstance(event, BlockStarted):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            measure(qwen3, goal(), tmp_path / "a.yaml", stop)
    measure(qwen3, goal(), tmp_path / "a.yaml")
    assert len(tries) == 1
    measure(qwen3, goal(), tmp_path / "whole.yaml")
    assert figures(tmp_path / "a.yaml") == figures(tmp_path / "whole.yaml")


def test_the_time_of_gradients_that_fail_counts(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def pass_time() -> None:
        nonlocal now
        now = 100.0

    tries = count_tries(monkeypatch, pass_time)
    monkeypatch.setattr(Limits.__init__, "__defaults__", (None, 0.0, lambda: now))
    with pytest.raises(PausedError, match="the next block would not finish within"):
        measure(qwen3, goal(), tmp_path / "a.yaml", max_seconds=99)
    measure(qwen3, goal(), tmp_path / "a.yaml", max_seconds=99)
    assert len(tries) == 1


def test_damaged_copies_are_reported_and_repeated(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SavingTimes, "is_due", lambda *_: True)
    measure(qwen3, goal(), tmp_path / "whole.yaml")
    work = tmp_path / ".a.yaml.gptq-work"
    for name in ("allocation.jsonl", "allocation-0"):
        with pytest.raises(Killed):
            measure(qwen3, goal(), tmp_path / "a.yaml", kill_after(1))
        content = bytearray((work / name).read_bytes())
        content[-9] ^= 1
        (work / name).write_bytes(content)
        events: list[Event] = []
        measure(qwen3, goal(), tmp_path / "a.yaml", events.append)
        finished = [event.index for event in events if isinstance(event, BlockFinished)]
        assert finished == [1, 2]
        (warned,) = messages(events, "W_RESUME_DAMAGED")
        assert warned.startswith(f"finished blocks of the measurement in `{work}` are not as")
        assert figures(tmp_path / "a.yaml") == figures(tmp_path / "whole.yaml")
        (tmp_path / "a.json").unlink()


@pytest.mark.filterwarnings("ignore")  # the warnings of transformers do not matter here
@pytest.mark.parametrize("model_type", ["gemma4_text", "zaya"])
def test_several_processes_copy_what_has_no_gradients(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model = save(build(model_type), tmp_path / "model")
    wanted, events = goal(batch_size=1, unfit="keep", moe_uncovered="rtn"), list[Event]()
    measure(model, wanted, tmp_path / "one.yaml", events.append)
    why = "its blocks hand on more than hidden states"
    assert PhaseStarted("probe", f"copies for each unit, because {why}") in events
    measure_together(2, model, tmp_path / "two.yaml", wanted)
    assert figures(tmp_path / "two.yaml") == figures(tmp_path / "one.yaml")
