"""What one block has lost is found by names alone; what architectures leave out is no defect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptq_cli.checkpoint.claims import check_complete
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.cli.app import app
from gptq_cli.config.layer import list_item
from gptq_cli.storage.manifest import MANIFEST
from tests.checkpoint.test_completeness import without
from tests.families import DRAFTED, FAMILIES, MIXTURES, OTHERS, save_drafted, save_model
from tests.runs import quantize

LAST = 5
HINT = "download the checkpoint again, or write it again with the tool that wrote it"
EXPERTS = "block_sparse_moe.experts"
Open = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Return the opened checkpoint of a family, with six blocks."""
    made: dict[str, Checkpoint] = {}

    def of(family: str) -> Checkpoint:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            made[family] = open_checkpoint(save_model(folder, family, num_hidden_layers=LAST + 1))
        return made[family]

    return of


def places(source: Checkpoint, *lost: str, **claimed: object) -> list[str]:
    """Return the tensors of the defects of `source` without what is `lost`, such as `2.mlp`."""
    beginnings = tuple(f"model.layers.{name}." for name in lost)
    tensors = {}
    for name, tensor in source.tensors.items():
        if not name.startswith(beginnings):
            tensors[name] = tensor
    assert bool(lost) == (len(tensors) < len(source.tensors))
    linears = []
    for name, tensor in tensors.items():
        if list_item(name) and len(tensor.shape) == 2:
            linears.append(name.removesuffix(".weight"))
    changed = replace(source, tensors=tensors, config=source.config | claimed)
    found = []
    for defect in check_complete(changed, linears):
        assert (defect.code, defect.hint, defect.effect) == ("E_CKPT_INCOMPLETE", HINT, "numbers")
        found.append(str(defect.tensor).removeprefix("model.layers."))
    return found


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        (["3.mlp"], ["3.mlp"]),
        (["3.mlp", "3.self_attn.o_proj"], ["3.mlp", "3.self_attn.o_proj"]),
        (["3.self_attn"], ["3.self_attn"]),
        (["3.mlp.up_proj", "3.mlp.down_proj"], ["3.mlp.down_proj", "3.mlp.up_proj"]),
        (["3.input_layernorm"], ["3.input_layernorm"]),
        (["0.mlp", f"{LAST}.self_attn"], ["0.mlp", f"{LAST}.self_attn"]),
        (["0.mlp.up_proj"], ["0.mlp.up_proj"]),
    ],
)
def test_what_one_block_has_lost_is_found(lost: list[str], found: list[str], opened: Open) -> None:
    assert places(opened("llama"), *lost) == found


def test_a_block_of_a_rare_kind_is_compared_as_well(opened: Open) -> None:
    rare = ["full" if index in (0, 3) else "sliding" for index in range(LAST + 1)]
    assert places(opened("llama"), "3.mlp", layer_types=rare) == ["3.mlp"]


@pytest.mark.parametrize("lost", [EXPERTS, f"{EXPERTS}.1.w1"])
def test_lost_linears_of_experts_are_found(lost: str, opened: Open) -> None:
    assert places(opened("mixtral"), f"3.{lost}") == [f"3.{lost}"]


def test_a_lost_expert_is_found_once_by_its_router(opened: Open) -> None:
    assert places(opened("mixtral"), f"3.{EXPERTS}.1") == [f"3.{EXPERTS}"]


def test_experts_that_one_block_has_fewer_of_are_no_defect(opened: Open) -> None:
    source = opened("mixtral")
    router = source.tensors["model.layers.3.block_sparse_moe.gate.weight"]
    four = replace(router, shape=(4, *router.shape[1:]))
    pruned = replace(source, tensors=source.tensors | {router.name: four})
    assert places(pruned, f"3.{EXPERTS}.1") == []


NO_MLP = [{"ffn": {"no_op": index == 3}} for index in range(LAST + 1)]


@pytest.mark.parametrize(
    ("lacking", "claimed"),
    [
        (["0.input_layernorm"], {}),  # ModernBERT
        ([f"{LAST}.self_attn.k_proj", f"{LAST}.self_attn.v_proj"], {}),  # those of another block
        (["2.self_attn", "3.self_attn"], {}),
        (["3.mlp"], {"block_configs": NO_MLP}),  # Nemotron
        (["3.mlp"], {"layer_types": ["a", "a", "a", "b", "a", "a"]}),
        (["3.mlp"], {"hybrid_override_pattern": "***-**"}),
        (["3.mlp"], {"n_mlps": [1, 2, 2, 0, 1, 1]}),
        (["3.mlp"], {"attention_only_layers": [3]}),
    ],
)
def test_what_an_architecture_leaves_out_is_no_defect(
    lacking: list[str], claimed: dict[str, object], opened: Open
) -> None:
    assert places(opened("llama"), *lacking, **claimed) == []


@pytest.mark.parametrize("key", ["architectures", "eos_token_id"])
def test_lists_about_no_block_hide_no_loss(key: str, opened: Open) -> None:
    assert places(opened("llama"), "3.mlp", **{key: [3, 7]}) == ["3.mlp"]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, *MIXTURES, *DRAFTED])
def test_no_whole_model_seems_to_lack_a_part(family: str, tmp_path: Path) -> None:
    if family in DRAFTED:
        directory = save_drafted(tmp_path / "model", family)
    else:
        directory = save_model(tmp_path / "model", family)
    assert places(open_checkpoint(directory)) == []


def test_a_plain_verify_finds_a_lost_part_and_exits_with_4(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=4, hidden_size=32)
    output, _ = quantize(tmp_path, model)
    (output / MANIFEST).unlink()
    assert CliRunner().invoke(app, ["verify", str(output)]).exit_code == 0
    lost = ["model.layers.1.mlp.", "model.layers.2.input_layernorm."]
    directory = without(output, tmp_path / "lost", *lost)
    done = CliRunner().invoke(app, ["verify", str(directory)])
    assert done.exit_code == 4
    assert done.stdout == (
        "E_CKPT_INCOMPLETE model.layers.1.mlp: has no tensor, but the same blocks elsewhere have "
        "this part\n"
        "E_CKPT_INCOMPLETE model.layers.2.input_layernorm: has no tensor, but the same blocks "
        "elsewhere have this part\n"
    )
    assert f"hint: {HINT}" in " ".join(done.stderr.split())
