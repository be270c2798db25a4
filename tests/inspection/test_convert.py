"""Converted and dequantized checkpoints change the form of the numbers, but no other byte."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from gptq_cli.checkpoint.decoded import TRANSPOSED
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.cli.app import app
from gptq_cli.config.resolve import resolve
from gptq_cli.errors import ConfigError, ExistsError, InputError
from gptq_cli.events import Event
from gptq_cli.inspection.compare import compare_checkpoints
from gptq_cli.inspection.convert import convert_checkpoint
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import FAMILIES, save_model
from tests.runs import config, digest, messages, quantize, reader

GPT2: dict[str, object] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "vocab_size": 512,
}
MIXED = {
    r".*\.1\.mlp": {"bits": 8},
    r".*q_proj": {"bits": 3, "group_size": 64},
    r".*k_proj": {"bits": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("rewrite") / "model", dtype=torch.bfloat16)


def json_of(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def nibbles(words: Tensor) -> Tensor:
    """Return the eight numbers of 4 bits of each word of 32 bits."""
    return torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)])


@pytest.mark.parametrize(
    ("sym", "first", "second"), [(True, "gptq", "gptq_v2"), (False, "gptq_v2", "gptq")]
)
def test_converting_only_shifts_zero_points_by_one(
    sym: bool, first: str, second: str, model: Path, tmp_path: Path
) -> None:
    source, _ = quantize(tmp_path, model, sym=sym, dynamic=MIXED)
    there, back = tmp_path / "there", tmp_path / "back"
    assert convert_checkpoint(str(source), there, second).layers == 21
    before, after = load_file(source / "model.safetensors"), load_file(there / "model.safetensors")
    assert list(before) == list(after)
    step = 1 if second == "gptq_v2" else -1
    for name in before:
        if not name.endswith("qzeros"):
            assert torch.equal(before[name], after[name])
    old, new = (
        nibbles(tensors["model.layers.0.mlp.up_proj.qzeros"]) for tensors in (before, after)
    )
    assert torch.equal(new, old + step)
    for name in reader(source).names():
        assert torch.equal(reader(source).read(name), reader(there).read(name))
    convert_checkpoint(str(there), back, first)
    original, converted = digest(source), digest(back)
    # The manifests differ, because they record how each checkpoint was made.
    assert original.pop("gptq_manifest.json") != converted.pop("gptq_manifest.json")
    assert converted == original


def test_converted_settings_change_only_the_format(model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model)
    (source / "gptq_manifest.json").unlink()
    convert_checkpoint(str(source), tmp_path / "v2", "gptq_v2")
    changed = {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    old, new = (json_of(folder, "quantize_config.json") for folder in (source, tmp_path / "v2"))
    assert new == old | changed
    old, new = (json_of(folder, "config.json") for folder in (source, tmp_path / "v2"))
    assert new["quantization_config"] == old["quantization_config"] | changed
    assert resolve({}, {}, tmp_path / "v2" / "gptq_config.yaml").config.format == "gptq_v2"
    assert verify_checkpoint(tmp_path / "v2", full=True).ok  # with a manifest of its own
    tokenizer = (model / "tokenizer.json").read_bytes()
    assert (tmp_path / "v2" / "tokenizer.json").read_bytes() == tokenizer


def test_a_zero_point_of_zero_does_not_fit_the_gptq_format(model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model, format="gptq_v2", sym=False)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.qzeros"][1, 3] &= ~(15 << 8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "gptq_manifest.json").unlink()
    with pytest.raises(
        InputError, match=r"`model\.layers\.1\.mlp\.up_proj` has zero points of 0"
    ) as caught:
        convert_checkpoint(str(source), tmp_path / "v1", "gptq")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_ZEROS", 3)
    assert "keep gptq_v2" in (caught.value.hint or "")
    assert not (tmp_path / "v1").exists()
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_impossible_conversions_are_refused(model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model)
    with pytest.raises(ConfigError, match="is of format gptq already") as same:
        convert_checkpoint(str(source), tmp_path / "out", "gptq")
    with pytest.raises(InputError, match="is not quantized") as plain:
        convert_checkpoint(str(model), tmp_path / "out", "gptq")
    with pytest.raises(InputError, match="is not quantized"):
        dequantize_checkpoint(str(model), tmp_path / "out")
    with pytest.raises(ExistsError):
        convert_checkpoint(str(source), model.parent, "gptq_v2")
    with pytest.raises(ConfigError, match="own directory"):
        dequantize_checkpoint(str(source), source)
    assert (same.value.code, plain.value.code) == ("E_CFG_NOTHING_TO_DO", "E_CKPT_QUANTIZED")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantize the model with its head to 8 bits and keep each v_proj."""
    rules = {r".*k_proj": {"bits": 4}, r"-:.*v_proj": {}}
    folder = tmp_path_factory.mktemp("packed")
    return quantize(folder, model, bits=8, dynamic=rules, lm_head=True)[0]


@pytest.fixture(scope="module")
def dequantized(packed: Path) -> Path:
    output = packed.parent / "plain"
    assert dequantize_checkpoint(str(packed), output).layers == 3 * 6 + 1
    return output


def test_dequantized_weights_equal_the_decoded_weights(
    model: Path, packed: Path, dequantized: Path
) -> None:
    tensors = load_file(dequantized / "model.safetensors")
    original = load_file(model / "model.safetensors")
    assert set(tensors) == set(original)
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (original[name].shape, original[name].dtype)
        assert torch.equal(tensor, reader(packed).read(name).bfloat16())
    kept = "model.layers.2.self_attn.v_proj.weight"
    assert torch.equal(tensors[kept], original[kept])
    assert not torch.equal(tensors["lm_head.weight"], original["lm_head.weight"])


def test_a_dequantized_config_declares_no_quantization(model: Path, dequantized: Path) -> None:
    found = json_of(dequantized, "config.json")
    assert "quantization_config" not in found
    assert found == json_of(model, "config.json") | {"tie_word_embeddings": False}
    assert not (dequantized / "quantize_config.json").exists()
    assert not (dequantized / "gptq_config.yaml").exists()


def test_transformers_computes_with_the_dequantized_weights(
    model: Path, packed: Path, dequantized: Path
) -> None:
    truth = AutoModelForCausalLM.from_pretrained(model)
    names = load_file(dequantized / "model.safetensors")
    truth.load_state_dict({name: reader(packed).read(name).bfloat16() for name in names})
    found = AutoModelForCausalLM.from_pretrained(dequantized)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, truth(ids).logits)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_dtype_applies_to_all_floats(dtype: str, model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model)
    dequantize_checkpoint(str(source), tmp_path / "plain", dtype)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert json_of(tmp_path / "plain", "config.json")["dtype"] == dtype
    name = "model.layers.0.input_layernorm.weight"
    expected = load_file(model / "model.safetensors")[name].to(getattr(torch, dtype))
    assert torch.equal(tensors[name], expected)


def test_weights_that_a_dtype_cannot_hold_are_refused(model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = 60_000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "gptq_manifest.json").unlink()
    with pytest.raises(InputError, match="not finite as float16") as caught:
        dequantize_checkpoint(str(source), tmp_path / "plain", "float16")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert "bfloat16" in (caught.value.hint or "")
    dequantize_checkpoint(str(source), tmp_path / "plain", "bfloat16")


def test_numbers_that_no_dtype_can_hold_are_damage(model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] = math.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "gptq_manifest.json").unlink()
    with pytest.raises(InputError, match="not finite: the checkpoint is damaged") as caught:
        dequantize_checkpoint(str(source), tmp_path / "plain", "float16")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert caught.value.hint == "download or quantize it again"


def test_transposed_linears_are_dequantized_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", GPT2)
    model = save_model(tmp_path / "model", "gpt2")
    source, _ = quantize(tmp_path, model, bits=8)
    dequantize_checkpoint(str(source), tmp_path / "plain")
    found = compare_checkpoints(str(tmp_path / "plain"), str(model))
    assert {tensor.name for tensor in found.tensors} == set(open_checkpoint(model).tensors)
    # c_proj is square, so its shape does not reveal its orientation.
    assert all(tensor.relative_error < 1e-3 for tensor in found.tensors)
    packed = compare_checkpoints(str(source), str(model))
    assert packed.tensors == found.tensors


def test_transposed_model_types_equal_those_of_transformers() -> None:
    folder = Path(transformers.__file__).parent / "models"
    texts = [file.read_text() for file in folder.glob("*/modeling_*.py")]
    sources = "\n".join(text for text in texts if re.search(r"\bConv1D\(", text))
    assert sources
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    assert {kind for kind, name in names if f"class {name}(" in sources} == TRANSPOSED


def test_checkpoints_differ_as_their_weights_differ(model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model, dynamic={r"-:.*v_proj": {}})
    found = {tensor.name: tensor for tensor in compare_checkpoints(str(source), str(model)).tensors}
    original = load_file(model / "model.safetensors")
    assert set(found) == set(original)
    for name, tensor in found.items():
        a, b = reader(source).read(name).double().numpy(), original[name].double().numpy()
        assert tensor.relative_error == pytest.approx(((a - b) ** 2).sum() / (b**2).sum(), rel=1e-9)
        assert tensor.largest == pytest.approx(abs(a - b).max(), rel=1e-9)
    assert found["model.layers.0.self_attn.v_proj.weight"].largest == 0
    assert found["model.layers.0.self_attn.q_proj.weight"].largest > 0


def test_one_sided_names_and_unequal_shapes_are_reported(model: Path, tmp_path: Path) -> None:
    deeper = save_model(tmp_path / "deeper", num_hidden_layers=4)
    found = compare_checkpoints(str(model), str(deeper))
    assert found.only_a == ()
    assert len(found.only_b) == 9
    wider = save_model(tmp_path / "wider", intermediate_size=160)
    with pytest.raises(InputError, match="in one and") as caught:
        compare_checkpoints(str(model), str(wider))
    assert (caught.value.code, caught.value.exit_code) == ("E_COMPARE", 3)
    other = save_model(tmp_path / "other", "gpt_neox")
    save_file({"x": torch.ones(2)}, other / "model.safetensors")
    with pytest.raises(InputError, match="no tensor name in common"):
        compare_checkpoints(str(model), str(other))


@pytest.mark.parametrize("command", ["convert", "dequantize"])
def test_a_rewritten_checkpoint_may_be_replaced(command: str, model: Path, tmp_path: Path) -> None:
    (model / "picture.png").write_bytes(b"of the model card")
    source, _ = quantize(tmp_path, model)
    output = tmp_path / "out"

    def rewrite(**options: bool) -> object:
        if command == "convert":
            return convert_checkpoint(str(source), output, "gptq_v2", **options)
        return dequantize_checkpoint(str(source), output, **options)

    rewrite()
    first = digest(output)
    assert {"gptq_manifest.json", "picture.png"} <= set(first)
    rewrite(overwrite=True)
    assert digest(output) == first
    (output / "mine.txt").write_text("x")
    with pytest.raises(ExistsError, match=r"mine\.txt") as caught:
        rewrite(overwrite=True)
    assert (caught.value.code, caught.value.exit_code) == ("E_OUT_FOREIGN", 6)
    assert digest(output).keys() == first.keys() | {"mine.txt"}


@pytest.mark.parametrize("command", ["convert", "dequantize"])
def test_a_call_removes_remains_of_a_killed_equal_call(
    command: str, model: Path, tmp_path: Path
) -> None:
    source, _ = quantize(tmp_path, model)
    words = [command, str(source), "-o", str(tmp_path / "out")]
    if command == "convert":
        words += ["--to", "gptq_v2"]
    assert CliRunner().invoke(app, words).exit_code == 0
    work = tmp_path / ".out.gptq-work"
    (work / "out").mkdir(parents=True, mode=0o700)
    work.chmod(0o700)
    for name in ("lock", "holder.json", "out/model.safetensors"):
        (work / name).touch()
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "error[E_OUT_EXISTS]" in result.stderr) == (6, True)
    assert not work.exists()


def flip_a_bit(checkpoint: Path) -> None:
    """Change one bit in the last packed word of the first linear's codes."""
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    name = next(name for name in header if name.endswith(".qweight"))
    content[8 + header_bytes + header[name]["data_offsets"][1] - 1] ^= 1
    file.write_bytes(content)


DAMAGED = {
    "convert": ["convert", "--to", "compressed-tensors"],
    "dequantize": ["dequantize"],
    "quantize": ["quantize", "--group-size", "64", "--allow-requantize"],
}


@pytest.mark.parametrize("command", DAMAGED)
def test_a_flipped_bit_of_the_source_is_refused(command: str, packed: Path, tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    shutil.copytree(packed, source)
    flip_a_bit(source)
    text.write_text("one two three " * 2000)
    words = [*DAMAGED[command], str(source), "-o", str(tmp_path / "out")]
    if command == "quantize":
        words += ["--dataset", str(text), "--nsamples", "4", "--seqlen", "32"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 4, result.stderr
    line = rf"error\[E_CKPT_HASH\]: `{source}`, model\.safetensors: has SHA-256 \w+\.\.\., but the"
    assert re.search(line, re.sub(r"\s*\n\s*", " ", result.stderr)), result.stderr
    hint = "copy or download it again; if you changed it on purpose, remove gptq_manifest.json"
    assert hint in re.sub(r"\s*\n\s*", " ", result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_a_changed_source_without_a_manifest_is_converted(packed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed, source)
    flip_a_bit(source)
    (source / "gptq_manifest.json").unlink()
    convert_checkpoint(str(source), tmp_path / "out", "gptq_v2")
    assert verify_checkpoint(tmp_path / "out", full=True).ok


def test_convert_does_not_remove_work_of_quantize(model: Path, tmp_path: Path) -> None:
    source, _ = quantize(tmp_path, model)
    convert_checkpoint(str(source), tmp_path / "out", "gptq_v2")
    work = tmp_path / ".out.gptq-work"
    work.mkdir(mode=0o700)
    (work / "journal.jsonl").write_text("finished blocks")
    with pytest.raises(ExistsError) as caught:
        convert_checkpoint(str(source), tmp_path / "out", "gptq_v2")
    assert caught.value.code == "E_OUT_EXISTS"
    assert (work / "journal.jsonl").read_text() == "finished blocks"


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_an_old_output_that_remains_is_a_warning_each_time(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = quantize(tmp_path, model)
    output = shutil.copytree(source, tmp_path / "out")
    (output / "fixed").mkdir()
    (output / "fixed" / "file").write_text("x")
    monkeypatch.setattr(
        "gptq_cli.storage.replacing.os.access", lambda path, _: path.name != "fixed"
    )
    for _ in range(2):
        events: list[Event] = []
        if command == "quantize":
            quantize_checkpoint(
                str(model), output, config(seed=3), overwrite=True, report=events.append
            )
        else:
            convert_checkpoint(str(source), output, "gptq_v2", overwrite=True, report=events.append)
        assert messages(events, "W_OUT_LEFT") == [
            f"`{tmp_path}/.out.gptq-work` holds files of the old `{output}` "
            "that could not be removed: fixed/file: gptq has not written it"
        ]
        assert verify_checkpoint(output, full=True).ok
    assert [path.read_text() for path in (tmp_path / ".out.gptq-work").rglob("file")] == ["x"]


@pytest.mark.parametrize(("spoilt", "which"), [("a", "first"), ("b", "second")])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_nonfinite_numbers_have_no_difference(
    spoilt: str, which: str, value: float, tmp_path: Path
) -> None:
    models = {name: save_model(tmp_path / name, num_hidden_layers=1) for name in "ab"}
    assert compare_checkpoints(str(models["a"]), str(models["b"])).different == ()
    file, name = models[spoilt] / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][2, 3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        compare_checkpoints(str(models["a"]), str(models["b"]))
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert str(caught.value) == f"`{name}` of the {which} checkpoint holds NaN or infinity"
    assert "download it again" in (caught.value.hint or "")
