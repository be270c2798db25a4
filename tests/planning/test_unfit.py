"""Layers that cannot be packed: kept with `unfit: keep`, and a group size that fits all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import ConfigError
from gptq_cli.planning.plan import plan_checkpoint, plan_run, with_group_size
from gptq_cli.planning.run_plan import remarks
from tests import architectures
from tests.architectures import own_logits, streamed_logits
from tests.families import save, save_model
from tests.runs import config, messages, quantize_with_events

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of two blocks whose down_proj has 96 inputs, all others 64 or 128."""
    return save_model(tmp_path_factory.mktemp("unfit") / "model", **WIDE)


def test_what_does_not_fit_is_kept_and_named_with_its_number(model: Path) -> None:
    settings = config(group_size=64, unfit="keep")
    plan = plan_run(model, settings)
    kept = {layer.name: layer.why for layer in plan.kept}
    why = "does not fit: group_size 64 does not divide the 96 input features"
    assert kept == {f"model.layers.{block}.mlp.down_proj": why for block in (0, 1)}
    assert len(plan.quantized) == 12
    told = [text for code, text in remarks(plan, settings) if code == "W_CFG_UNFIT"]
    assert told == ["kept because they cannot be packed: 2 x `model.layers.N.mlp.down_proj`"]
    fitting = plan_run(model, config(group_size=32, unfit="keep"))
    assert not [code for code, _ in remarks(fitting, settings) if code == "W_CFG_UNFIT"]


def test_a_run_that_keeps_what_does_not_fit_can_be_read_back(model: Path, tmp_path: Path) -> None:
    settings = {"bits": 8, "group_size": 64, "unfit": "keep"}
    result, events = quantize_with_events(model, tmp_path / "out", **settings)
    assert result.kept == tuple(f"model.layers.{block}.mlp.down_proj" for block in (0, 1))
    assert len(messages(events, "W_CFG_UNFIT")) == 1
    assert distance(tmp_path / "out", model) < 0.05


def distance(output: Path, model: Path) -> float:
    """Return the median over positions of the relative distance of the logits.

    It is the median because a router that is nearly undecided may choose another expert.
    """
    ours = torch.cat([logits.flatten(0, 1) for logits in streamed_logits(output)])
    theirs = torch.cat([logits.flatten(0, 1) for logits in own_logits(model)])
    return ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median().item()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss", "jamba", "qwen3_next"])
def test_types_with_narrow_layers_are_quantized_but_for_these(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "mamba_dt_rank": 8}
    monkeypatch.setattr(architectures, "SIZES", architectures.SIZES | sizes)
    monkeypatch.setattr(architectures, "with_noise", lambda built: built)
    save(architectures.build(model_type), tmp_path / "model")
    settings = {"bits": 8, "unfit": "keep", "moe_uncovered": "rtn"}
    result, _ = quantize_with_events(tmp_path / "model", tmp_path / "out", **settings)
    assert len(result.layers) > 9
    assert distance(tmp_path / "out", tmp_path / "model") < 0.05


@pytest.mark.parametrize(
    ("sizes", "changes", "expected"),
    [
        ({"hidden_size": 128, "intermediate_size": 256}, {}, 128),
        ({"hidden_size": 128, "intermediate_size": 192}, {}, 64),
        (WIDE, {}, 32),
        (WIDE, {"dynamic": {"-:.*down_proj": {}}}, 64),
        (WIDE, {"dynamic": {"+:.*down_proj": {"group_size": 32}}}, 64),
        ({"hidden_size": 128, "intermediate_size": 80}, {"unfit": "keep"}, 128),
    ],
)
def test_auto_is_the_largest_size_that_fits_all(
    sizes: dict[str, int], changes: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    sizes = {"num_hidden_layers": 1} | sizes
    source = open_checkpoint(save_model(tmp_path / "model", **sizes))
    settings = with_group_size(source, config(group_size="auto", **changes))
    assert settings.group_size == expected
    plan = plan_checkpoint(source, settings)
    ruled = {layer.config.group_size for layer in plan.quantized if layer.why == "default"}
    assert ruled == {expected}


def test_auto_counts_the_inputs_of_stacked_experts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 96}
    source = open_checkpoint(save_model(tmp_path / "model", "qwen3_moe", **sizes))
    assert with_group_size(source, config(group_size="auto")).group_size == 32


def test_a_run_with_auto_tells_and_stores_the_number(model: Path, tmp_path: Path) -> None:
    _, events = quantize_with_events(model, tmp_path / "out", group_size="auto")
    told = [event.detail for event in events if getattr(event, "name", "") == "layers"]
    assert told == ["group_size auto is 32, the largest of 128, 64, 32 that fits"]
    assert "group_size: 32\n" in (tmp_path / "out" / "gptq_config.yaml").read_text()


def test_the_refusal_names_both_ways_out(model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config(group_size=64))
    assert (caught.value.code, caught.value.exit_code) == ("E_SHAPE", 2)
    hint = caught.value.hint or ""
    assert hint == (
        "use --group-size auto, which takes 32, or --group-size -1; "
        "or keep what does not fit: --unfit keep"
    )


@pytest.mark.parametrize("wrong", ["automatic", "128", 1.5, True])
def test_a_group_size_is_a_number_or_auto(wrong: object) -> None:
    with pytest.raises(ConfigError, match="-1 for one group per row, or auto, got ") as caught:
        config(group_size=wrong)
    assert caught.value.code == "E_CFG_TYPE"
