"""Sources in codes (8-bit floats in blocks, GPTQ) quantize like the models they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
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
from gptq_cli.events import BlockFinished, Event
from gptq_cli.inspection.compare import compare_checkpoints
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from gptq_cli.inspection.layer_statistics import view_layer
from gptq_cli.inspection.summary import inspect_checkpoint, plan_rows
from gptq_cli.planning.plan import plan_run
from gptq_cli.quantization.run import QuantizeResult, quantize_checkpoint
from tests.families import FAMILIES, save_model, text_file
from tests.planning.test_plan import GPT2
from tests.runs import config, messages, quantize, quantize_with_events

ROWS, COLUMNS = 48, 40  # neither divides the 64 and 128 features of the models here
PLAIN = "o_proj"  # the linear that the source has not converted
BLOCKS: dict[str, object] = {"quant_method": "fp8", "weight_block_size": [ROWS, COLUMNS]}
KEPT = {r"-:.*layers\.1\.mlp\.down_proj": {}, r"-:.*layers\.2\.self_attn\.o_proj": {}}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same(directory: Path, other: Path) -> bool:
    """Return whether two checkpoints hold the same tensors."""
    tensors, expected = tensors_of(directory), tensors_of(other)
    if set(tensors) != set(expected):
        return False
    return all(torch.equal(tensors[name], expected[name]) for name in expected)


def encoded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of a weight, the scale of each block, and the values they stand for."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty_like(weight)
    scales = torch.empty(math.ceil(len(weight) / ROWS), math.ceil(weight.shape[1] / COLUMNS))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * ROWS, (i + 1) * ROWS), slice(j * COLUMNS, (j + 1) * COLUMNS)
            scales[i, j] = weight[block].float().abs().max() / 448
            codes[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[block] = (codes[block].float() * scales[i, j]).bfloat16()
    return codes, scales, meant


def save_block_floats(folder: Path, family: str = "llama") -> tuple[Path, Path]:
    """Save a model of several shards in 8-bit floats and the bfloat16 model it stands for."""
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
            scale = f"{name}_scale_inv"
            stored[name], stored[scale], meant[name] = encoded(weight)
            index["weight_map"][scale] = file.name
        save_file(stored, coded / file.name, metadata={"format": "pt"})
        save_file(meant, file, metadata={"format": "pt"})
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    change_config(coded, quantization_config=BLOCKS | {"activation_scheme": "dynamic"})
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
    settings = {"dynamic": rules, "lm_head": True, "max_shard_size": "150KB"}
    result, events = quantize_with_events(coded, tmp_path / "coded", **settings)
    quantize_with_events(plain, tmp_path / "plain", **settings)
    assert list(tensors_of(tmp_path / "coded")) == list(tensors_of(tmp_path / "plain"))
    assert same(tmp_path / "coded", tmp_path / "plain")
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("coded", "plain")
    )
    for content in (first, second):  # the order of the list follows the files of each source
        content["quantization_config"].get("modules_in_block_to_quantize", [[]])[0].sort()
    assert first == second
    assert verify_checkpoint(tmp_path / "coded", full=True).defects == ()
    assert result.source_quantization == "fp8 in blocks of 48x40"
    meta = json.loads((tmp_path / "coded" / "quantize_config.json").read_text())["meta"]
    assert meta["source_quantization"] == "fp8 in blocks of 48x40"
    # 64 x 128 weights of one byte, with 2 x 4 scales of four bytes, become two bytes each.
    # o_proj was never in codes.
    more = (64 * 128 - 2 * 4 * 4) / 1e6
    expected = "kept weights that are stored as fp8 in blocks of 48x40 become BF16, "
    expected += f"{more:.3g} MB more: `model.layers.1.mlp.down_proj.weight`"
    warned = messages(events, "W_CKPT_DECODED")
    assert warned == ([expected] if rules else [])


def test_experts_in_block_floats_quantize_like_bfloat16_experts(
    tmp_path: Path,
) -> None:
    coded, plain = save_block_floats(tmp_path, "qwen3_moe")
    assert "model.layers.0.mlp.experts.3.down_proj.weight_scale_inv" in tensors_of(coded)
    assert tensors_of(coded)["model.layers.1.mlp.gate.weight"].dtype == torch.float8_e4m3fn
    first, second = (quantize(tmp_path, model, moe_uncovered="rtn")[0] for model in (coded, plain))
    assert same(first, second)
    assert tensors_of(first)["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


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
    found = inspect_checkpoint(open_checkpoint(coded))
    expected = inspect_checkpoint(open_checkpoint(plain))
    assert (found.method, found.parameters) == ("fp8", expected.parameters)
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors_of(coded).values())
    rows = {row.name: (row.settings, row.nbytes) for row in (*found.quantized, *found.kept)}
    assert rows["mlp.up_proj"] == ("fp8 in blocks of 48x40", 3 * (128 * 64 + 3 * 2 * 4))
    assert rows["self_attn.o_proj"] == ("BF16", 3 * 2 * 64 * 128)
    name = "model.layers.1.mlp.up_proj"
    assert view_layer(open_checkpoint(coded), name) == view_layer(open_checkpoint(plain), name)
    assert compare_checkpoints(str(coded), str(plain)).different == ()
    request = EvalRequest(
        dataset=text_file(), seqlen=64, max_windows=2, device="cpu", baseline=str(plain)
    )
    assert evaluate_perplexity(str(coded), request).kl == 0


def shrunk(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:-1].clone()


def of_another_kind(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.float8_e5m2)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "declared", "code", "message"),
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
        (None, {"quant_method": "fbgemm_fp8"}, "E_CKPT_FP8", "holds F8_E4M3 weights"),
        (None, None, "E_CKPT_FP8", "holds F8_E4M3 weights"),
    ],
)
def test_block_floats_with_unknown_scales_are_refused(
    change: Callable[[dict[str, Tensor], str], object] | None,
    declared: dict[str, object] | None,
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
    change_config(tmp_path, quantization_config=declared)
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


@dataclass(frozen=True)
class Requantized:
    """A GPTQ checkpoint of `model` in `packed`, and its quantization with AGAIN in `output`."""

    settings: dict[str, object]
    model: Path
    packed: Path
    output: Path
    result: QuantizeResult
    events: list[Event]


@pytest.fixture(
    scope="module",
    params=[
        {"bits": 8, "dynamic": MIXED},
        {"bits": 8, "sym": False, "format": "gptq_v2"},
        {"bits": 4, "desc_act": True, "lm_head": True},
    ],
    ids=str,
)
def requantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Requantized:
    folder = tmp_path_factory.mktemp("requantized")
    model = save_model(folder / "model", dtype=torch.float16, max_shard_size="100KB")
    packed, _ = quantize(folder, model, **request.param)
    (packed / "gptq_report.json").write_text("{}")
    output = folder / "again"
    result, events = quantize_with_events(packed, output, **AGAIN, dtype="float16")
    return Requantized(request.param, model, packed, output, result, events)


def test_a_gptq_source_quantizes_like_its_plain_model(
    requantized: Requantized, tmp_path: Path
) -> None:
    dequantize_checkpoint(str(requantized.packed), tmp_path / "wide", "float32")
    dequantize_checkpoint(str(requantized.packed), tmp_path / "half")
    truth, _ = quantize(tmp_path, tmp_path / "wide", **AGAIN, dtype="float16")
    found, expected = tensors_of(requantized.output), tensors_of(truth)
    half = tensors_of(tmp_path / "half")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        # A kept tensor is in float16, as it is in the published plain model.
        assert torch.equal(found[name], half.get(name, tensor)), name


def test_requantized_files_equal_their_plan_and_are_sound(
    requantized: Requantized,
) -> None:
    output = requantized.output
    plan = plan_run(requantized.packed, config(**AGAIN))
    written = {file.name: file.stat().st_size for file in output.glob("*.safetensors")}
    assert {shard.file: shard.size for shard in plan.layout.shards} == written
    assert verify_checkpoint(output, full=True).defects == ()
    assert not (output / "gptq_report.json").exists()


def test_a_requantized_config_describes_the_new_settings(requantized: Requantized) -> None:
    found, expected = (
        json.loads((directory / "config.json").read_text())
        for directory in (requantized.output, requantized.model)
    )
    described = found.pop("quantization_config")
    assert (described["bits"], described["group_size"], described["lm_head"]) == (3, 64, False)
    if requantized.settings.get("lm_head"):
        expected["tie_word_embeddings"] = False
    assert found == expected
    assert "allow_requantize: true" in (requantized.output / "gptq_config.yaml").read_text()


def test_a_requantized_checkpoint_records_its_source(requantized: Requantized) -> None:
    settings, output = requantized.settings, requantized.output
    source = requantized.result.source_quantization
    assert source is not None
    assert source.startswith(str(settings.get("format", "gptq")))
    assert "8 bits group_size 32" in source or settings["bits"] == 4
    meta = json.loads((output / "quantize_config.json").read_text())["meta"]
    assert meta["source_quantization"] == source
    assert inspect_checkpoint(open_checkpoint(output)).provenance["source_quantization"] == source


def test_a_second_rounding_causes_warnings(requantized: Requantized) -> None:
    (rounded,) = messages(requantized.events, "W_CKPT_REQUANTIZED")
    assert rounded == (
        f"the source is quantized ({requantized.result.source_quantization}): "
        "its rounded weights are rounded a second time"
    )
    decoded = messages(requantized.events, "W_CKPT_DECODED")
    assert "kept weights that are stored as gptq" in decoded[-1]


def test_a_gptq_source_must_be_allowed_and_sound(tmp_path: Path) -> None:
    packed, _ = quantize(tmp_path, save_model(tmp_path / "model"), bits=8)
    with pytest.raises(InputError, match=r"already quantized \(gptq\)") as caught:
        plan_run(packed, config())
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_QUANTIZED", 3)
    assert (caught.value.hint or "").endswith(
        "or round its weights a second time: --allow-requantize"
    )
    described = json.loads((packed / "config.json").read_text())["quantization_config"]
    described |= {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    change_config(packed, quantization_config=described)
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
    tensors = tensors_of(packed)
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(".g_idx")}
    save_file(rest, packed / "model.safetensors", metadata={"format": "pt"})
    second, _ = quantize(tmp_path, packed, allow_requantize=True)
    assert same(second, first)


def test_a_gptq_source_keeps_transposed_linears_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", GPT2)
    packed, _ = quantize(tmp_path, save_model(tmp_path / "model", "gpt2"), bits=8)
    dequantize_checkpoint(str(packed), tmp_path / "wide")
    rules = {r"-:.*\.0\.mlp\.c_fc": {}, r"-:.*\.1\.attn\.c_proj": {}}
    output, _ = quantize(tmp_path, packed, allow_requantize=True, dynamic=rules)
    truth, _ = quantize(tmp_path, tmp_path / "wide", dynamic=rules)
    expected = tensors_of(truth)
    assert expected["transformer.h.0.mlp.c_fc.weight"].shape == (64, 256)
    assert list(tensors_of(output)) == list(expected)
    assert same(output, truth)


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
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_decoded_weight_that_is_not_finite_is_refused(
    floats: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors, model = tensors_of(floats[0]), tmp_path / "model"
    name = "model.layers.2.mlp.down_proj.weight"  # no later layer sees its outputs
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
