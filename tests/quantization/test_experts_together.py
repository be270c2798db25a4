"""Experts that are solved together get the codes and the messages of experts solved alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig
from gptq_cli.errors import GateError, GptqError, InputError
from gptq_cli.models.experts import Experts, Routed
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization import layers, routed_experts
from gptq_cli.quantization.routed_experts import RoutedInputs
from gptq_cli.solver.factor import HessianFactor, NotPositiveDefiniteError, prepare
from gptq_cli.solver.hessian import HessianAccumulator
from tests.models.test_experts import mixtral_experts, separated
from tests.quantization.test_routed_experts import N_EXPERTS, NAMES, save_mixture
from tests.runs import digest, messages, quantize_with_events

PATTERN = "model.layers.{}.mlp.experts.{}.{}_proj"
PLAIN = {"preset": "fast", "batch_size": 1}
CPU = torch.device("cpu")
INTERMEDIATE = 64  # features; the proof that experts compute the same has fewer


def at_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Solve this many experts together, from inputs that are joined even if it is one."""
    monkeypatch.setattr(routed_experts, "EXPERTS_AT_ONCE", {"cpu": N_EXPERTS})
    monkeypatch.setattr(routed_experts, "experts_at_once", lambda *_: number)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"preset": "best", "moe_uncovered": "rtn"}),
        ("qwen3_moe", {"preset": "balanced", "moe_uncovered": "all-tokens"}),
        ("qwen3_moe", {"preset": "gptq", "desc_act": True, "moe_uncovered": "rtn"}),
        ("llama4_text", {"preset": "gptq", "true_sequential": False}),
        ("gpt_oss", {"preset": "balanced", "sym": False}),
        ("qwen3_moe", {"dynamic": {r"-:.*experts\.2\.": {}, r"+:.*3\.up": {"bits": 8}}}),
    ],
    ids=str,
)
def test_experts_solved_together_have_the_bytes_of_experts_solved_alone(
    family: str, changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = family in NAMES
    if idle:
        changes = {"moe_uncovered": "rtn"} | changes
    model = save_mixture(tmp_path / "model", family, idle=idle, num_hidden_layers=1)
    at_once(monkeypatch, 1)
    alone, events = quantize_with_events(model, tmp_path / "alone", **changes)
    for number in (3, N_EXPERTS):
        at_once(monkeypatch, number)
        output = tmp_path / f"together-{number}"
        together, told = quantize_with_events(model, output, **changes)
        assert digest(output) == digest(tmp_path / "alone")
        assert [layer.name for layer in together.layers] == [layer.name for layer in alone.layers]
        assert messages(told, "W_NUM_TOKENS") == messages(events, "W_NUM_TOKENS")
        for found, expected in zip(together.layers, alone.layers, strict=True):
            assert found.damp_percent == expected.damp_percent
            assert (found.tokens, found.fallback) == (expected.tokens, expected.fallback)


def test_experts_corrected_together_follow_as_strongly_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_mixture(tmp_path / "model", "qwen3_moe", num_hidden_layers=1)
    settings = {"preset": "best", "moe_uncovered": "rtn"}
    at_once(monkeypatch, 3)
    apart, _ = quantize_with_events(model, tmp_path / "apart", **settings)
    monkeypatch.setattr(layers, "uses_kernels", lambda _: True)
    joined, _ = quantize_with_events(model, tmp_path / "together", **settings)
    assert len(joined.layers) == len(apart.layers)
    assert max(layer.asymmetric_calibration or 0 for layer in apart.layers) > 0.1
    for found, expected in zip(joined.layers, apart.layers, strict=True):
        assert found.asymmetric_calibration == pytest.approx(
            expected.asymmetric_calibration, abs=1e-5
        )
        assert found.relative_error == pytest.approx(expected.relative_error, rel=0.01)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("streams", [1, 2])
def test_hessians_from_joined_inputs_are_those_of_each_expert(down: bool, streams: int) -> None:
    ways = [separated(mixtral_experts()) for _ in range(streams)]
    inputs = RoutedInputs("experts", ways, limited=True)
    for batch in range(3):
        hidden = [torch.randn(20, 32) for _ in ways]
        hidden[0][[2, 9, 11]] *= 1000
        chosen = torch.rand(20, 4).argsort(1)[:, :2].clamp(max=2)  # some choose expert 2 twice
        inputs.add(batch, *(Routed(tokens, chosen) for tokens in hidden))
    inputs = inputs.join()
    rows = [mine for (mine,) in inputs.rows()]
    numbers, mine = [0, 2, 3], [rows[0], rows[2], rows[3]]
    assert not len(rows[3])
    for most_bytes in (1, 10**6):
        sums = inputs.hessians(numbers, mine, CPU, down=down, most_bytes=most_bytes)
        for number, own, found in zip(numbers, mine, sums, strict=True):
            expected = inputs.hessian(number, [own], CPU, down=down)
            assert found.tokens == expected.tokens == len(own)
            assert len(found.shifts) == len(expected.shifts) == 2 * (streams - 1)
            for one, other in zip(found.sums, expected.sums, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def infinite_for_one_token(monkeypatch: pytest.MonkeyPatch, model: Path, expert: int) -> None:
    """Make an expert's input of down_proj infinite for the token with the largest first feature."""
    hessian, intermediate = RoutedInputs.hessian, Experts.intermediate
    seen: list[Tensor] = []

    def noting(
        self: RoutedInputs, number: int, rows: list[Tensor], *others: object, **options: object
    ) -> HessianAccumulator:
        if number == expert:
            for (batch,), mine in zip(self.batches, rows, strict=True):
                seen.append(batch.hidden[mine, 0])
        return hessian(self, number, rows, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RoutedInputs, "hessian", noting)
    quantize_with_events(model, model.parent / "usual", **PLAIN)
    monkeypatch.setattr(RoutedInputs, "hessian", hessian)
    largest = torch.cat(seen).max()

    def infinite(self: Experts, number: int, tokens: Tensor) -> Tensor:
        found = intermediate(self, number, tokens)
        if number == expert and found.shape[1] == INTERMEDIATE:
            found[tokens[:, 0] == largest] = torch.inf
        return found

    def infinite_together(
        self: Experts, numbers: list[int], tokens: Tensor, counts: list[int]
    ) -> Tensor:
        of_experts = zip(numbers, tokens.split(counts), strict=True)
        return torch.cat([self.intermediate(number, mine) for number, mine in of_experts])

    monkeypatch.setattr(Experts, "intermediate", infinite)
    monkeypatch.setattr(Experts, "intermediates", infinite_together)


def without_factor(monkeypatch: pytest.MonkeyPatch, tokens_of_expert: int) -> None:
    """Refuse a factor for the Hessians that have seen this many tokens."""

    def refusing(hessians: Tensor, settings: LayerConfig, tokens: list[int]) -> HessianFactor:
        refused = [expert for expert, seen in enumerate(tokens) if seen == tokens_of_expert]
        if refused:
            raise NotPositiveDefiniteError(0.4, refused)
        return prepare(hessians, settings, tokens)

    monkeypatch.setattr(layers, "prepare", refusing)


def error_of(model: Path, output: Path, **changes: object) -> GptqError:
    with pytest.raises((GateError, InputError)) as caught:
        quantize_with_events(model, output, **changes)
    return caught.value


@pytest.mark.parametrize("fault", ["inputs", "hessian"])
def test_a_faulty_expert_among_others_is_named_and_rounded_as_alone(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_mixture(tmp_path / "model", "qwen3_moe", num_hidden_layers=1)
    faulty = PATTERN.format(0, 2, "down" if fault == "inputs" else "gate")
    if fault == "inputs":
        infinite_for_one_token(monkeypatch, model, 2)
    else:
        usual, _ = quantize_with_events(model, tmp_path / "usual", **PLAIN)
        tokens = {layer.name: layer.tokens for layer in usual.layers}
        without_factor(monkeypatch, tokens[faulty])
    apart = error_of(model, tmp_path / "apart", **PLAIN)
    at_once(monkeypatch, N_EXPERTS)
    error = error_of(model, tmp_path / "together", **PLAIN)
    assert (str(error), error.code, error.hint) == (str(apart), apart.code, apart.hint)
    assert str(error).startswith(f"layer `{faulty}`: ")
    results = []
    for number in (1, N_EXPERTS):
        at_once(monkeypatch, number)
        output = tmp_path / f"rtn-{number}"
        result, events = quantize_with_events(model, output, on_numeric_fault="rtn", **PLAIN)
        told = messages(events, "W_NUM_FALLBACK")
        fallbacks = {layer.name: layer.fallback for layer in result.layers if layer.fallback}
        results.append((digest(output), told, fallbacks))
    assert results[0] == results[1]
    assert results[0][2][faulty] == fault
    assert faulty in results[0][1][0]


def test_an_expert_with_weights_that_are_not_finite_is_named_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_mixture(tmp_path / "model", "qwen3_moe", num_hidden_layers=1)
    faulty = PATTERN.format(0, 3, "up")
    weight = layers.LayerSolver._whole

    def broken(self: layers.LayerSolver, layer: LayerPlan) -> Tensor:
        found = weight(self, layer)
        if layer.name == faulty:
            found = found.clone()
            found[7, 3] = torch.nan
        return found

    monkeypatch.setattr(layers.LayerSolver, "_whole", broken)
    at_once(monkeypatch, N_EXPERTS)
    error = error_of(model, tmp_path / "out", preset="balanced")
    assert (error.code, error.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert str(error).startswith(f"layer `{faulty}`: its weights are not finite")
