"""The planned layout compared with the safetensors library, and the checks of the writer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gptq_cli.checkpoint.layout import GPTQ, Layout, Sizes, TensorSpec, packed_specs, plan_layout
from gptq_cli.checkpoint.quantization_config import skip_rules
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.storage.manifest import INDEX_NAME

SPECS = [
    (TensorSpec("a.weight", "F32", (3, 5)),),
    (TensorSpec("b.bias", "F16", (7,)), TensorSpec("b.codes", "U8", (3,))),
    (TensorSpec("scalar", "I64", ()),),
    (TensorSpec("empty", "BF16", (0, 4)),),
]
UNIT_BYTES = [60, 14 + 3, 8, 0]
VALUES = {
    "a.weight": torch.randn(3, 5),
    "b.bias": torch.randn(7).half(),
    "b.codes": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
}


def home_of_tensors(layout: Layout) -> dict[str, str]:
    """Return the file of each tensor by its name."""
    home = {}
    for shard in layout.shards:
        home |= dict.fromkeys(shard.offsets, shard.file)
    return home


def test_the_safetensors_library_reads_a_planned_file(tmp_path: Path) -> None:
    layout = plan_layout([unit for unit in SPECS if unit[0].name != "scalar"], 10**9)
    with CheckpointWriter(tmp_path, layout) as writer:
        for name in reversed(VALUES):
            writer.write(name, VALUES[name])
        writer.finish()
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size == layout.nbytes
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(VALUES)
        for name, tensor in VALUES.items():
            assert opened.get_tensor(name).tolist() == tensor.tolist()
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (83, 2), (60, 2), (20, 3), (1, 4)])
def test_shards_stay_below_the_limit_and_keep_units_whole(limit: int, files: int) -> None:
    layout = plan_layout(SPECS, limit)
    assert len(layout.shards) == files
    home = home_of_tensors(layout)
    assert home["b.bias"] == home["b.codes"]
    assert set(home) == set(layout.specs)
    largest_unit = max(UNIT_BYTES)
    for shard in layout.shards:
        assert sum(layout.specs[name].nbytes for name in shard.offsets) <= max(limit, largest_unit)


@pytest.mark.parametrize(("limit", "files"), [(83, 2), (60, 2), (20, 3), (1, 4)])
def test_the_index_lists_the_shard_of_each_tensor(limit: int, files: int) -> None:
    layout = plan_layout(SPECS, limit)
    index = json.loads(layout.index or "")
    assert index["weight_map"] == home_of_tensors(layout)
    assert index["metadata"]["total_size"] == sum(UNIT_BYTES)
    assert layout.shards[-1].file == f"model-{files:05d}-of-{files:05d}.safetensors"


def test_tensors_are_aligned_to_the_size_of_their_dtype() -> None:
    (shard,) = plan_layout(SPECS, 10**9).shards
    assert shard.offsets["scalar"] % 8 == 0
    assert shard.offsets["a.weight"] % 4 == 0
    assert shard.offsets["b.bias"] % 2 == 0


def test_a_tensor_that_differs_from_the_plan_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, plan_layout([SPECS[0]], 10**9)) as writer:
        with pytest.raises(ValueError, match="planned F32"):
            writer.write("a.weight", torch.zeros(5, 3))
        with pytest.raises(ValueError, match="planned F32"):
            writer.write("a.weight", torch.zeros(3, 5, dtype=torch.bfloat16))


def test_finish_refuses_a_checkpoint_with_missing_tensors(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, plan_layout(SPECS, 10**9)) as writer:
        writer.write("a.weight", VALUES["a.weight"])
        with pytest.raises(ValueError, match=r"never written: b\.bias, b\.codes, empty, scalar"):
            writer.finish()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_specs_have_the_shapes_of_the_format(bits: int) -> None:
    specs = {
        spec.name: (spec.dtype, spec.shape)
        for spec in packed_specs("x.weight", Sizes(64, 96, 3, bits), GPTQ)
    }
    assert specs == {
        "x.qweight": ("I32", (3 * bits, 64)),
        "x.qzeros": ("I32", (3, 2 * bits)),
        "x.scales": ("F16", (3, 64)),
        "x.g_idx": ("I32", (96,)),
    }


def test_skip_rules_match_kept_layers_and_fused_names_only() -> None:
    kept = ["m.1.attn.q_proj", "m.1.attn.k_proj", "m.1.attn.v_proj", "m.2.mlp.up_proj"]
    others = ["m.11.attn.q_proj", "m.2.mlp.gate_up_proj", "m.2.mlp.up_proj2", "xm.1.attn.q_proj"]
    rules = "|".join(f"(?:{rule.removeprefix('-:')})" for rule in skip_rules(kept))
    for name in [*kept, "m.1.attn.qkv_proj"]:
        assert re.match(rules, name), name
    for name in others:
        assert not re.match(rules, name), name
