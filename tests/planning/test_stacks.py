"""Experts that share a tensor are planned from headers as the model has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import ConfigError
from gptq_cli.events import Event, Noted
from gptq_cli.planning.plan import plan_run, refine_plan
from gptq_cli.preview import preview_run
from gptq_cli.runtime.open_model import open_stream
from tests.architectures import build
from tests.families import DRAFTED, MIXTURES, save_drafted, save_model, text_file
from tests.quantization.test_coded_sources import deepseek_like, gpt_oss
from tests.runs import CPU, config, quantize
from tests.vision import save_vision_model

STACKING = [  # by the names and the shapes of their stacks
    "aria_text",  # fc1, fc2, stored [I, O]
    "gpt_oss",  # gate and up alternate, stored [I, O]
    "granitemoe",  # input_linear, output_linear
    "granitemoehybrid",  # recurrences beside them
    "granitemoe_swa",
    "hy_v4",  # experts in some blocks alone
    "inkling_text",  # and stacks of shared experts, which stay
    "inkling2_text",  # w13_weight, w2_weight
    "jamba",  # experts stored one by one
    "llama4",
    "minimax_m3_vl_text",
    "recurrent_gemma",  # stacks that hold no experts
    "zaya",
]
KEPT_UNFIT: dict[str, object] = {"unfit": "keep", "moe_uncovered": "rtn"}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "vision": lambda folder: save_vision_model(folder / "model", "llama4"),
    "mxfp4": lambda folder: gpt_oss(folder).coded,
    "coded one by one": lambda folder: deepseek_like(folder).coded,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", STACKING)
def test_headers_give_the_layers_of_the_built_model(model_type: str, tmp_path: Path) -> None:
    model = build(model_type).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    settings = config(**KEPT_UNFIT)
    planned = plan_run(tmp_path, settings)
    stream = open_stream(
        open_checkpoint(tmp_path), device=CPU, dtype="bfloat16", trust_remote_code=False
    )
    facts = stream.all_linears(), stream.stacked_linears(), stream.unused
    refined = refine_plan(planned, settings, *facts)
    assert {layer.name: layer for layer in planned.quantized} == {
        layer.name: layer for layer in refined.quantized
    }
    assert planned.layout == refined.layout


@pytest.mark.parametrize("family", MIXTURES)
def test_planned_bytes_of_experts_are_those_written(family: str, tmp_path: Path) -> None:
    check_bytes(save_model(tmp_path / "model", family, dtype=torch.bfloat16), tmp_path)


@pytest.mark.parametrize("family", DRAFTED)
def test_planned_bytes_beside_a_drafting_block_are_exact(family: str, tmp_path: Path) -> None:
    check_bytes(save_drafted(tmp_path / "model", family), tmp_path)


@pytest.mark.parametrize("kind", MAKERS)
def test_planned_bytes_of_other_experts_are_exact(kind: str, tmp_path: Path) -> None:
    check_bytes(MAKERS[kind](tmp_path), tmp_path)


def check_bytes(model: Path, folder: Path) -> None:
    settings = KEPT_UNFIT | {"nsamples": 4, "trust_remote_code": True, "preset": "fast"}
    planned = {}
    for shard in plan_run(model, config(**settings)).layout.shards:
        planned[shard.file] = shard.size
    output, _ = quantize(folder, model, **settings)
    assert planned == {file.name: file.stat().st_size for file in output.glob("*.safetensors")}


def test_a_plan_counts_the_experts_in_stacks(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gpt_oss", dtype=torch.bfloat16)
    rows = preview_run(str(model), config(dataset=text_file())).quantized
    counts = {row.name: row.count for row in rows if "experts" in row.name}
    assert counts == {f"mlp.experts.N.{part}_proj": 10 for part in ("gate", "up", "down")}


def test_a_rule_without_an_expert_is_refused_by_headers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gpt_oss", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="matches no layer") as caught:
        plan_run(model, config(dynamic={r"-:.*experts\.7\.": {}}))
    assert caught.value.code == "E_CFG_NO_MATCH"
    plan_run(model, config(dynamic={r"-:.*experts\.": {}}))


def test_a_stack_of_unknown_meaning_is_named_in_the_plan(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gpt_oss", dtype=torch.bfloat16)
    file = model / "model.safetensors"
    tensors = {name.replace("up_proj", "x"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    events: list[Event] = []
    preview_run(str(model), config(dataset=text_file()), report=events.append)
    notes = [event.text for event in events if isinstance(event, Noted)]
    assert any(
        "whether `model.layers.0.mlp.experts.down_proj` [5, 128, 64] and 3 more hold" in note
        for note in notes
    )
