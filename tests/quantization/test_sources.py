"""Sources that are stored in codes: block-wise 8-bit floats and GPTQ checkpoints, quantized as what they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import BlockFinished, Event, Warned
from gptq_cli.inspection.compare import compare_checkpoints
from gptq_cli.inspection.convert import dequantize_checkpoint
from gptq_cli.inspection.layer_statistics import view_layer
from gptq_cli.inspection.summary import inspect_checkpoint, plan_rows
from gptq_cli.planning.plan import plan_run
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import FAMILIES, save_model, texts
from tests.planning.test_plan import GPT2
from tests.runs import config, quantize

ROWS, COLUMNS = 48, 40  # neither divides the 64 and 128 features of the models here
PLAIN = "o_proj"  # what the source has not converted
KEPT = {r"-:.*layers\.1\.mlp\.down_proj": {}, r"-:.*layers\.2\.self_attn\.o_proj": {}}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def save_block_floats(folder: Path, family: str = "llama") -> tuple[Path, Path]:
    """A model of several shards in 8-bit floats, and the bfloat16 one that it stands for, worked out block by block."""
    plain = save_model(folder / "plain", family, dtype=torch.bfloat16, max_shard_size="150KB")
    coded = folder / "coded"
    coded.mkdir()
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (coded / file.name).write_bytes(file.read_bytes())
            continue
        stored, meant = load_file(file), load_file(file)
        for name, weight in list(stored.items()):
            if "layers" not in name or weight.dim() != 2 or PLAIN in name:
                continue
            codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
            grid = [
                math.ceil(size / step)
                for size, step in zip(weight.shape, (ROWS, COLUMNS), strict=True)
            ]
            scales = torch.empty(grid)
            for i in range(grid[0]):
                for j in range(grid[1]):
                    place = slice(i * ROWS, (i + 1) * ROWS), slice(j * COLUMNS, (j + 1) * COLUMNS)
                    scales[i, j] = weight[place].float().abs().max() / 448
                    codes[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
                    meant[name][place] = (codes[place].float() * scales[i, j]).bfloat16()
            stored |= {name: codes, f"{name}_scale_inv": scales}
            index["weight_map"][f"{name}_scale_inv"] = file.name
        save_file(stored, coded / file.name, metadata={"format": "pt"})
        save_file(meant, file, metadata={"format": "pt"})
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    said = {
        "quant_method": "fp8",
        "weight_block_size": [ROWS, COLUMNS],
        "activation_scheme": "dynamic",
    }
    change_config(coded, quantization_config=said)
    return coded, plain


def change_config(directory: Path, **changes: object) -> None:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | changes))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_block_floats(tmp_path_factory.mktemp("floats"))


@pytest.mark.parametrize("rules", [{}, KEPT])
def test_block_floats_quantize_like_their_bfloat16_model(
    rules: dict[str, object], floats: tuple[Path, Path], tmp_path: Path
) -> None:
    coded, plain = floats
    events: list[Event] = []
    settings = config(dynamic=rules, lm_head=True, max_shard_size="150KB")
    result = quantize_checkpoint(str(coded), tmp_path / "coded", settings, report=events.append)
    quantize_checkpoint(str(plain), tmp_path / "plain", settings)
    first, second = tensors_of(tmp_path / "coded"), tensors_of(tmp_path / "plain")
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in second)
    told = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("coded", "plain")
    ]
    for content in told:  # in the order of the source's files, which is not that of both
        content["quantization_config"].get("modules_in_block_to_quantize", [[]])[0].sort()
    assert told[0] == told[1]
    assert verify_checkpoint(tmp_path / "coded", full=True).defects == ()
    assert result.source_quantization == "fp8 in blocks of 48x40"
    meta = json.loads((tmp_path / "coded" / "quantize_config.json").read_text())["meta"]
    assert meta["source_quantization"] == "fp8 in blocks of 48x40"
    warned = [
        event.message
        for event in events
        if isinstance(event, Warned) and event.code == "W_CKPT_DECODED"
    ]
    # 64 x 128 weights of one byte with 2 x 4 scales of four become two bytes each; o_proj was never in codes
    more = (64 * 128 - 2 * 4 * 4) / 1e6
    name = "model.layers.1.mlp.down_proj.weight"
    said = (
        "kept weights that are stored as fp8 in blocks of 48x40 become BF16, "
        f"{more:.3g} MB more: `{name}`"
    )
    assert warned == ([said] if rules else [])


def test_experts_in_block_floats_quantize_like_bfloat16_experts(
    tmp_path: Path,
) -> None:
    coded, plain = save_block_floats(tmp_path, "qwen3_moe")
    assert "model.layers.0.mlp.experts.3.down_proj.weight_scale_inv" in tensors_of(coded)
    assert tensors_of(coded)["model.layers.1.mlp.gate.weight"].dtype == torch.float8_e4m3fn
    first, second = (
        tensors_of(quantize(tmp_path, model, moe_uncovered="rtn")[0]) for model in (coded, plain)
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert first["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_the_plan_of_block_floats_is_exact_to_the_byte(
    floats: tuple[Path, Path], tmp_path: Path
) -> None:
    coded, _ = floats
    changes = {"dynamic": KEPT, "max_shard_size": "150KB"}
    plan = plan_run(coded, config(**changes))
    output, result = quantize(tmp_path, coded, **changes)
    written = {file.name: file.stat().st_size for file in output.glob("*.safetensors")}
    assert {shard.file: shard.size for shard in plan.layout.shards} == written
    assert len(written) > 1
    stored = sum(tensor.nbytes for tensor in tensors_of(coded).values())
    assert plan.source.nbytes == result.bytes_before == stored
    rows = {(row.name, row.settings): row for row in plan_rows(plan)[1]}
    assert rows["mlp.down_proj", "BF16 (decoded)"].nbytes == 2 * 64 * 128
    assert rows["self_attn.o_proj", "BF16"].nbytes == 2 * 64 * 128
    assert sum(row.nbytes for part in plan_rows(plan) for row in part) == sum(
        tensor.nbytes for tensor in tensors_of(output).values()
    )


def test_every_command_reads_block_floats(
    floats: tuple[Path, Path],
) -> None:
    coded, plain = floats
    found, same = (
        inspect_checkpoint(open_checkpoint(coded)),
        inspect_checkpoint(open_checkpoint(plain)),
    )
    assert (found.method, found.parameters) == ("fp8", same.parameters)
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors_of(coded).values())
    rows = {row.name: (row.settings, row.nbytes) for row in (*found.quantized, *found.kept)}
    assert rows["mlp.up_proj"] == ("F8_E4M3 in blocks of 48x40", 3 * (128 * 64 + 3 * 2 * 4))
    assert rows["self_attn.o_proj"] == ("BF16", 3 * 2 * 64 * 128)
    name = "model.layers.1.mlp.up_proj"
    assert view_layer(open_checkpoint(coded), name) == view_layer(open_checkpoint(plain), name)
    assert compare_checkpoints(str(coded), str(plain)).different == ()
    request = EvalRequest(
        dataset=texts(), seqlen=64, max_windows=2, device="cpu", baseline=str(plain)
    )
    assert evaluate_perplexity(str(coded), request).kl == 0


def test_scales_apply_as_in_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    from gptq_cli.checkpoint.reader import scale_blocks

    codes = (torch.randn(96, 80) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 4) + 0.01
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(scale_blocks(codes, scales, (48, 20)), expected)
    powers = torch.tensor([[0.5, 2.0, 1.0, 4.0], [8.0, 0.25, 1.0, 2.0]])
    assert torch.equal(
        scale_blocks(codes, powers.to(torch.float8_e8m0fnu), (48, 20)),
        scale_blocks(codes, powers, (48, 20)),
    )


def shrunk(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:-1].clone()


def of_another_kind(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.float8_e5m2)


UP = "model.layers.0.mlp.up_proj.weight"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [ROWS, COLUMNS]}


@pytest.mark.parametrize(
    ("change", "said", "code", "message"),
    [
        (
            lambda t, name: t.pop(f"{name}_scale_inv"),
            BLOCKS,
            "E_CKPT_INCOMPLETE",
            "its scales `.*_inv` are missing",
        ),
        (
            shrunk,
            BLOCKS,
            "E_CKPT_SHAPE",
            r"_inv` is F32 \[2, 2\], but blocks of 48x40 in \[128, 64\] ask for \[3, 2\]",
        ),
        (
            of_another_kind,
            BLOCKS,
            "E_CKPT_FP8",
            "holds F8_E5M2 weights, first `model.layers.0.mlp.up_proj.weight`",
        ),
        (
            None,
            {"quant_method": "fp8", "weight_block_size": None},
            "E_CKPT_FP8",
            "holds F8_E4M3 weights",
        ),
        (None, {**BLOCKS, "activation_scheme": "static"}, "E_CKPT_FP8", "holds F8_E4M3 weights"),
        (None, {"quant_method": "fbgemm_fp8"}, "E_CKPT_FP8", "holds F8_E4M3 weights"),
        (None, None, "E_CKPT_FP8", "holds F8_E4M3 weights"),
    ],
)
def test_block_floats_with_unknown_scales_are_refused(
    change: Callable[[dict[str, Tensor], str], object] | None,
    said: dict[str, object] | None,
    code: str,
    message: str,
    floats: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    tensors = tensors_of(floats[0])
    if change:
        change(tensors, UP)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((floats[0] / "config.json").read_bytes())
    change_config(tmp_path, quantization_config=said)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert caught.value.hint or code == "E_CKPT_SHAPE"


MIXED = {r".*\.1\.mlp\.(gate|up)_proj": {"bits": 4}, r"-:.*\.2\.self_attn\.v_proj": {}}
AGAIN = {
    "bits": 3,
    "group_size": 64,
    "dynamic": KEPT,
    "allow_requantize": True,
    "max_shard_size": "100KB",
}


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8, "dynamic": MIXED},
        {"bits": 8, "sym": False, "format": "gptq_v2"},
        {"bits": 4, "desc_act": True, "lm_head": True},
    ],
)
def test_a_gptq_source_quantizes_like_its_plain_model(
    settings: dict[str, object], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", dtype=torch.float16, max_shard_size="100KB")
    packed, _ = quantize(tmp_path, model, **settings)
    (packed / "gptq_report.json").write_text("{}")
    dequantize_checkpoint(str(packed), tmp_path / "wide", "float32")
    dequantize_checkpoint(str(packed), tmp_path / "half")
    plan = plan_run(packed, config(**AGAIN))
    events: list[Event] = []
    output = tmp_path / "again"
    result = quantize_checkpoint(
        str(packed), output, config(**AGAIN, dtype="float16"), report=events.append
    )
    truth, _ = quantize(tmp_path, tmp_path / "wide", **(AGAIN | {"dtype": "float16"}))
    found, expected, half = tensors_of(output), tensors_of(truth), tensors_of(tmp_path / "half")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        kept = half.get(name)  # in float16, as the model they stand for would be published
        assert torch.equal(found[name], tensor if kept is None else kept), name
    assert {s.file: s.size for s in plan.layout.shards} == {
        f.name: f.stat().st_size for f in output.glob("*.safetensors")
    }
    assert verify_checkpoint(output, full=True).defects == ()
    assert not (output / "gptq_report.json").exists()
    config_of = {path: json.loads((path / "config.json").read_text()) for path in (output, model)}
    told = config_of[output].pop("quantization_config")
    assert (told["bits"], told["group_size"], told["lm_head"]) == (3, 64, False)
    assert config_of[output] == config_of[model] | (
        {"tie_word_embeddings": False} if settings.get("lm_head") else {}
    )
    how = result.source_quantization
    assert how is not None
    assert how.startswith(str(settings.get("format", "gptq")))
    assert "8 bits group_size 32" in how or settings["bits"] == 4
    assert (
        json.loads((output / "quantize_config.json").read_text())["meta"]["source_quantization"]
        == how
    )
    assert inspect_checkpoint(open_checkpoint(output)).provenance["source_quantization"] == how
    assert "allow_requantize: true" in (output / "gptq_config.yaml").read_text()
    warned = {event.code: event.message for event in events if isinstance(event, Warned)}
    assert (
        warned["W_CKPT_REQUANTIZED"]
        == f"the source is quantized ({how}): its rounded weights are rounded a second time"
    )
    assert "kept weights that are stored as gptq" in warned["W_CKPT_DECODED"]


def test_a_gptq_source_must_be_allowed_and_sound(tmp_path: Path) -> None:
    packed, _ = quantize(tmp_path, save_model(tmp_path / "model"), bits=8)
    with pytest.raises(InputError, match=r"already quantized \(gptq\)") as caught:
        plan_run(packed, config())
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_QUANTIZED", 3)
    assert (caught.value.hint or "").endswith(
        "or round its weights a second time: --allow-requantize"
    )
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    change_config(
        packed, quantization_config=said | {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    )
    (packed / "quantize_config.json").unlink()
    with pytest.raises(InputError, match="holds zero points as gptq stores them") as caught:
        quantize_checkpoint(str(packed), tmp_path / "again", config(allow_requantize=True))
    assert caught.value.code == "E_CKPT_ZEROS"
    assert not (tmp_path / "again").exists()


def test_a_gptq_source_needs_no_g_idx_and_no_second_config(tmp_path: Path) -> None:
    packed, _ = quantize(tmp_path, save_model(tmp_path / "model"), bits=8)
    first, _ = quantize(tmp_path, packed, allow_requantize=True)
    for name in ("quantize_config.json", "gptq_config.yaml", "gptq_manifest.json"):
        (packed / name).unlink()
    tensors = {
        name: tensor for name, tensor in tensors_of(packed).items() if not name.endswith(".g_idx")
    }
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    second, _ = quantize(tmp_path, packed, allow_requantize=True)
    expected = tensors_of(first)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(second).items())


def test_a_gptq_source_keeps_transposed_linears_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", GPT2)
    packed, _ = quantize(tmp_path, save_model(tmp_path / "model", "gpt2"), bits=8)
    dequantize_checkpoint(str(packed), tmp_path / "wide")
    rules = {r"-:.*\.0\.mlp\.c_fc": {}, r"-:.*\.1\.attn\.c_proj": {}}
    output, _ = quantize(tmp_path, packed, allow_requantize=True, dynamic=rules)
    truth, _ = quantize(tmp_path, tmp_path / "wide", dynamic=rules)
    expected, found = tensors_of(truth), tensors_of(output)
    assert expected["transformer.h.0.mlp.c_fc.weight"].shape == (64, 256)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_interrupted_run_from_block_floats_resumes(
    floats: tuple[Path, Path], tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.index == 1:
            raise KeyboardInterrupt

    settings = config(dynamic=KEPT)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(floats[0]), tmp_path / "out", settings, report=stop)
    result = quantize_checkpoint(str(floats[0]), tmp_path / "out", settings)
    assert result.resumed_blocks == 2
    quantize_checkpoint(str(floats[0]), tmp_path / "whole", settings)
    whole = tensors_of(tmp_path / "whole")
    assert all(
        torch.equal(tensor, whole[name]) for name, tensor in tensors_of(tmp_path / "out").items()
    )


def test_a_decoded_weight_that_is_not_finite_is_refused(
    floats: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors, model = tensors_of(floats[0]), tmp_path / "model"
    name = "model.layers.2.mlp.down_proj.weight"  # what it spoils is not calibrated on
    tensors[f"{name}_scale_inv"][0, 0] = 3e38
    model.mkdir()
    for file in floats[0].iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            (model / file.name).write_bytes(file.read_bytes())
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert open_reader(open_checkpoint(model)).read(name).isinf().any()
    with pytest.raises(
        InputError, match=f"`{name}` has values that are not finite as BF16"
    ) as caught:
        quantize(tmp_path, model, dynamic={r"-:.*layers\.2\.mlp\.down_proj": {}})
    assert caught.value.code == "E_CKPT_NONFINITE"
    assert "download" in (caught.value.hint or "")
