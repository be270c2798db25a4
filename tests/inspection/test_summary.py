"""What `inspect` tells of a checkpoint is what it was made with, whoever wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli import __version__
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.serving import verdicts
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.inspection.layer_statistics import view_layer
from gptq_cli.inspection.summary import inspect_checkpoint
from gptq_cli.planning.plan import plan_checkpoint
from gptq_cli.planning.run_plan import export_of_layers, judge_plan
from tests.checkpoint.gptq_files import gptq_files
from tests.families import save_model, text_file
from tests.runs import config, quantize, reader


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    model = save_model(folder / "model", dtype=torch.bfloat16)
    rules = {
        r".*\.1\.mlp": {"bits": 8, "group_size": -1},
        r".*q_proj": {"bits": 3, "group_size": 64},
        r"-:.*o_proj": {},
    }
    return quantize(folder, model, bits=2, sym=False, dynamic=rules, seed=7)[0]


def test_shapes_determine_bits_and_groups(mixed: Path) -> None:
    found = inspect_checkpoint(open_checkpoint(mixed))
    by_name = {module.name: (module.bits, module.group_size) for module in found.modules}
    assert by_name["model.layers.0.mlp.down_proj"] == (2, 32)
    assert by_name["model.layers.1.mlp.down_proj"] == (8, -1)
    assert by_name["model.layers.1.mlp.up_proj"] == (8, -1)
    assert by_name["model.layers.2.self_attn.q_proj"] == (3, -1)  # a group of all 64 columns
    assert len(by_name) == 3 * 6
    assert (found.method, found.format, found.sym) == ("gptq", "gptq_v2", False)
    rows = {(row.count, row.name, row.shape, row.settings) for row in found.quantized}
    assert (2, "mlp.down_proj", (64, 128), "2 bit g32 asym") in rows
    assert (1, "mlp.down_proj", (64, 128), "8 bit channel asym") in rows
    assert (3, "self_attn.o_proj", (64, 128), "BF16") in {
        (r.count, r.name, r.shape, r.settings) for r in found.kept
    }


@pytest.mark.parametrize(
    "changes", [{"group_size": 64}, {"dynamic": {r"+:.*down_proj": {"sym": False}}}]
)
def test_engines_judge_an_output_as_they_judged_the_plan(
    changes: dict[str, object], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", hidden_size=64, num_hidden_layers=1)
    settings = config(**changes)
    plan = plan_checkpoint(open_checkpoint(model), settings)
    output, _ = quantize(tmp_path, model, **changes)
    export = inspect_checkpoint(open_checkpoint(output)).export
    assert export is not None
    assert verdicts(export) == judge_plan(plan, settings)
    assert export == export_of_layers(plan.layers, settings)


def test_every_byte_and_every_parameter_counts_once(mixed: Path) -> None:
    found = inspect_checkpoint(open_checkpoint(mixed))
    assert (
        sum(row.nbytes for row in (*found.quantized, *found.kept))
        == found.nbytes
        == sum(found.files.values())
    )
    original = load_file(mixed.parent / "model" / "model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in original.values())
    packed = load_file(mixed / "model.safetensors")
    stored = sum(
        t.nbytes
        for name, t in packed.items()
        if name.endswith(("qweight", "qzeros", "scales", "g_idx"))
    )
    assert found.bits_per_weight == 8 * stored / sum(module.weights for module in found.modules)


def test_the_summary_shows_the_origin(mixed: Path) -> None:
    origin = inspect_checkpoint(open_checkpoint(mixed)).provenance
    assert origin["model_type"] == "llama"
    assert origin["quantizer"] == [f"gptq_cli:{__version__}"]
    assert origin["seed"] == 7
    assert origin["dataset"] == text_file()


def test_plain_checkpoints_and_foreign_methods_are_summarized(mixed: Path, tmp_path: Path) -> None:
    plain = inspect_checkpoint(open_checkpoint(mixed.parent / "model"))
    assert (plain.method, plain.modules, plain.quantized, plain.bits_per_weight) == (
        None,
        (),
        (),
        None,
    )
    assert plain.bits_per_parameter == 16
    foreign = save_model(tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq"}})
    )
    found = inspect_checkpoint(open_checkpoint(foreign))
    assert (found.method, found.format, found.modules) == ("awq", None, ())


def test_headers_from_the_hub_have_no_defects_of_files(tmp_path: Path) -> None:
    found = open_checkpoint(gptq_files().write(tmp_path / "c"))
    (tmp_path / "cache").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / "cache" / name).write_bytes((tmp_path / "c" / name).read_bytes())
    tensors = {
        name: replace(tensor, file=Path("a/b") / tensor.file.name)
        for name, tensor in found.tensors.items()
    }
    remote = Checkpoint(tmp_path / "cache", found.config, tensors)
    assert inspect_checkpoint(remote).defects == ()
    assert inspect_checkpoint(remote).export is not None
    headless = dict(
        found.config, quantization_config=found.config["quantization_config"] | {"bits": 8}
    )
    assert inspect_checkpoint(replace(remote, config=headless)).export is None


@pytest.mark.parametrize(
    ("drop", "reshape"), [("scales", None), (None, "scales"), (None, "qzeros")]
)
def test_missing_and_unfit_parts_are_refused(
    drop: str | None, reshape: str | None, mixed: Path, tmp_path: Path
) -> None:
    tensors = load_file(mixed / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    if drop:
        del tensors[f"{module}.{drop}"]
    else:
        tensors[f"{module}.{reshape}"] = tensors[f"{module}.{reshape}"][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((mixed / "config.json").read_bytes())
    with pytest.raises(InputError, match=module) as caught:
        inspect_checkpoint(open_checkpoint(tmp_path))
    assert caught.value.code == "E_CKPT_INCOMPLETE"


def test_histograms_count_every_code_scale_and_weight(mixed: Path) -> None:
    view = view_layer(open_checkpoint(mixed), "2.self_attn.q_proj")
    linear = reader(mixed).linear("model.layers.2.self_attn.q_proj")
    assert view.name == "model.layers.2.self_attn.q_proj"
    assert view.shape == (128, 64)
    assert view.packed is not None
    codes = linear.codes.flatten().tolist()
    assert view.packed.codes.counts == tuple(codes.count(code) for code in range(8))
    assert view.packed.at_ends == (codes.count(0) + codes.count(7)) / len(codes)
    assert view.packed.zeros == tuple(sorted(set(linear.zeros.flatten().tolist())))
    assert sum(view.packed.scales.counts) == 128
    assert sum(view.weights.counts) == 128 * 64
    assert view.weights.edges[0] == float(linear.dequantize().min())
    assert 0 < view.packed.entropy <= 3
    assert view.packed.trivial_groups


def test_unordered_groups_and_negative_scales_are_reported(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    ordered = view_layer(
        open_checkpoint(quantize(tmp_path, model, desc_act=True, signed_scales=False)[0]),
        "0.mlp.up_proj",
    ).packed
    signed = view_layer(
        open_checkpoint(quantize(tmp_path, model, signed_scales=True)[0]), "0.mlp.up_proj"
    ).packed
    assert ordered is not None
    assert signed is not None
    assert not ordered.trivial_groups
    assert ordered.negative_scales == 0
    assert signed.negative_scales > 0


def test_a_plain_layer_has_weights_only(mixed: Path) -> None:
    view = view_layer(open_checkpoint(mixed), "0.self_attn.o_proj")
    assert (view.packed, view.dtype, view.shape) == (None, "bfloat16", (64, 128))


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        (
            "mlp.up_proj",
            "3 layers are called `mlp.up_proj`",
            "for example model.layers.0.mlp.up_proj",
        ),
        ("mlp.up_praj", "there is no layer `mlp.up_praj`", "did you mean mlp.up_proj?"),
        ("nothing", "there is no layer `nothing`", "for example"),
    ],
)
def test_an_absent_layer_is_refused(name: str, message: str, hint: str, mixed: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        view_layer(open_checkpoint(mixed), name)
    assert (caught.value.code, caught.value.exit_code) == ("E_LAYER", 2)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("part", "shape"), [("qweight", (8,)), ("qzeros", (2, 0)), ("scales", (2, 64, 1))]
)
def test_parts_of_strange_shapes_are_refused(
    part: str, shape: tuple[int, ...], mixed: Path, tmp_path: Path
) -> None:
    tensors = load_file(mixed / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    save_file(
        tensors | {name: torch.zeros(shape, dtype=tensors[name].dtype)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_bytes((mixed / "config.json").read_bytes())
    with pytest.raises(
        InputError, match=r"the parts of `model\.layers\.0\.mlp\.up_proj` do not fit each other"
    ) as caught:
        inspect_checkpoint(open_checkpoint(tmp_path))
    assert caught.value.code == "E_CKPT_INCOMPLETE"
