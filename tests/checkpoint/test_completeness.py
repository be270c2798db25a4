"""A full verification finds each lost parameter, and tells if it could not look for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gptq_cli.api import verify
from gptq_cli.cli.app import app
from gptq_cli.storage.manifest import MANIFEST
from tests.checkpoint.gptq_files import gptq_files
from tests.families import save_model
from tests.runs import quantize

WEIGHTS = "model.safetensors"
FAMILIES = {"llama": {"num_hidden_layers": 2, "tie_word_embeddings": False}, "mixtral": {}}
BLOCK = "model.layers.1"
Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Return the checkpoint of a family, which has no manifest."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = save_model(folder / "model", family, **FAMILIES[family])
            made[family], _ = quantize(folder, model)
            (made[family] / MANIFEST).unlink()
        return made[family]

    return of


def without(source: Path, directory: Path, *beginnings: str) -> Path:
    """Return a copy of `source` without the tensors whose names begin so."""
    copytree(source, directory)
    tensors = load_file(directory / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}
    assert len(kept) < len(tensors)
    save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_with_all_parameters_is_sound(family: str, checkpoints: Checkpoints) -> None:
    found = verify(checkpoints(family), full=True)
    assert (found.defects, found.unchecked) == ((), "")


@pytest.mark.parametrize(
    ("family", "lost", "first"),
    [
        ("llama", ["model.embed_tokens."], "`model.embed_tokens.weight`"),
        ("llama", ["lm_head."], "`lm_head.weight`: it has no output head"),
        ("llama", ["model.norm."], "`model.norm.weight`"),
        ("llama", [f"{BLOCK}.input_layernorm."], f"`{BLOCK}.input_layernorm.weight`"),
        ("llama", [f"{BLOCK}.mlp."], f"3 parameters, first `{BLOCK}.mlp.down_proj.weight`"),
        ("llama", [f"{BLOCK}.self_attn.q_", f"{BLOCK}.self_attn.k_"], "2 parameters, first"),
        ("llama", ["model.layers.0.self_attn.q_", f"{BLOCK}.self_attn.q_"], "2 parameters, first"),
        ("llama", [f"{BLOCK}.self_attn.o_"], f"`{BLOCK}.self_attn.o_proj.weight`"),
        ("mixtral", [f"{BLOCK}.block_sparse_moe.experts.2.w1."], "has 4 tensors for gate_proj"),
        ("mixtral", [f"{BLOCK}.block_sparse_moe.gate."], f"`{BLOCK}.mlp.gate.weight`"),
    ],
)
def test_a_lost_parameter_is_a_defect(
    family: str, lost: list[str], first: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory = without(checkpoints(family), tmp_path / "c", *lost)
    (found,) = verify(directory, full=True).defects
    assert found.code == "E_CKPT_INCOMPLETE"
    assert first in found.message
    assert found.hint


def test_a_lost_parameter_exits_with_4(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = without(checkpoints("llama"), tmp_path / "c", "model.norm.")
    done = CliRunner().invoke(app, ["verify", str(directory), "--full"])
    assert done.exit_code == 4
    assert done.stdout == (
        "E_CKPT_INCOMPLETE the checkpoint has no tensor for 1 parameters, "
        "first `model.norm.weight`\n"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unknown"}, "does not recognize this architecture"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "config.json names the class 'LlamaForSequenceClassification'",
        ),
        ({"architectures": ["a\nb"]}, r"config.json names the class 'a\nb'"),
    ],
)
def test_an_unknown_model_is_said_to_be_unchecked(
    changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    files = gptq_files()
    files.config.update(changes)
    directory = files.write(tmp_path / "c")
    done = CliRunner().invoke(app, ["verify", str(directory), "--full"])
    assert done.exit_code == 0
    assert "; read every byte; did not look for missing parameters: " in done.stdout
    assert reason in done.stdout
    shown = CliRunner().invoke(app, ["verify", str(directory), "--full", "--json"])
    assert reason in json.loads(shown.stdout)["unchecked"]


@pytest.mark.parametrize("classes", [5, "LlamaForCausalLM", {}])
def test_a_damaged_list_of_classes_is_passed_over(
    classes: object, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory = without(checkpoints("llama"), tmp_path / "c", "model.norm.")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": classes}))
    (found,) = verify(directory, full=True).defects
    assert "first `model.norm.weight`" in found.message
