"""Sources in floats of few bits and in bytes quantize like the models they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.cli.app import app
from gptq_cli.errors import InputError
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from gptq_cli.planning.plan import plan_run
from gptq_cli.quantization.run import quantize_checkpoint
from tests.coded import fp8, grouped, int8, mxfp4, nvfp4, random_bytes
from tests.disks import Killed
from tests.families import save_model
from tests.quantization.test_adapters import pair, write_adapter
from tests.runs import config, digest, messages, quantize, quantize_with_events
from tests.tiny import killer

Encode = Callable[[str, int, int], "dict[str, Tensor]"]


class Source:
    """A model in codes, and the plain model it stands for, in folders of `folder`."""

    def __init__(self, folder: Path, family: str, settings: dict[str, object], **sizes: object):
        self.plain = save_model(folder / "plain", family, dtype=torch.bfloat16, **sizes)
        self.coded = copytree(self.plain, folder / "coded")
        self.meant = load_file(self.plain / "model.safetensors")
        self.stored = dict(self.meant)
        content = json.loads((self.coded / "config.json").read_text())
        content["quantization_config"] = settings
        (self.coded / "config.json").write_text(json.dumps(content))

    def matrices(self, pattern: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return the names and shapes of the tensors whose names match."""
        found = [name for name in self.meant if re.search(pattern, name)]
        return [(name, tuple(self.meant[name].shape)) for name in found]

    def replace(self, name: str, parts: dict[str, Tensor], weight: Tensor) -> None:
        """Store `parts`, by their full names, in place of the tensor that means `weight`."""
        del self.stored[name]
        self.stored |= parts
        self.meant[name] = weight.contiguous()

    def save(self) -> None:
        for folder, tensors in ((self.coded, self.stored), (self.plain, self.meant)):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gpt_oss(folder: Path) -> Source:
    """Return a model whose experts are stacks in mxfp4."""
    sizes = {"num_local_experts": 3, "hidden_size": 32, "intermediate_size": 64}
    source = Source(folder, "gpt_oss", {"quant_method": "mxfp4"}, **sizes)
    for name, (experts, inputs, outputs) in source.matrices("experts.(gate_up|down)_proj$"):
        stacks = [mxfp4(outputs, inputs) for _ in range(experts)]
        codes = torch.stack([stack[0].view(outputs, inputs // 32, 16) for stack in stacks])
        parts = {f"{name}_blocks": codes}
        parts[f"{name}_scales"] = torch.stack([stack[1] for stack in stacks])
        source.replace(name, parts, torch.stack([stack[2].T for stack in stacks]))
    source.save()
    return source


def deepseek_like(folder: Path) -> Source:
    """Return a mixture whose experts are mxfp4 in bytes, and whose attention is fp8 in blocks."""
    settings = {"quant_method": "fp8", "weight_block_size": [48, 40], "scale_fmt": "ue8m0"}
    sizes = {"num_experts": 3, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    source = Source(folder, "qwen3_moe", settings, **sizes)
    for name, (rows, columns) in source.matrices("experts.*weight"):
        codes, scales, weight = mxfp4(rows, columns)
        exponents = scales.view(torch.float8_e8m0fnu)
        module = name.removesuffix(".weight")
        parts = {name: codes.view(torch.int8), f"{module}.scale": exponents}
        source.replace(name, parts, weight)
    for name, (rows, columns) in source.matrices("self_attn.*_proj.weight"):
        scales = random_bytes(-(-rows // 48), -(-columns // 40), low=115, high=118)
        parts, weight = fp8(rows, columns, scales, (48, 40), "scale")
        parts["scale"] = scales.view(torch.float8_e8m0fnu)
        module = name.removesuffix(".weight")
        source.replace(name, {f"{module}.{part}": parts[part] for part in parts}, weight)
    source.save()
    return source


SMALL: dict[str, object] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}


def modelopt(folder: Path) -> Source:
    """Return a model in nvfp4 with scales of activations, whose cache has scales as well."""
    source = Source(folder, "llama", {"quant_method": "modelopt"}, **SMALL)
    for name, (rows, columns) in source.matrices("layers.*_proj.weight"):
        codes, scales, of_all, weight = nvfp4(rows, columns, 0.001, divides=False)
        parts = {name: codes, f"{name}_scale": scales, f"{name}_scale_2": of_all}
        module = name.removesuffix(".weight")
        source.replace(name, parts | {f"{module}.input_scale": torch.tensor(1.0)}, weight)
    source.stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    source.save()
    (source.coded / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    return source


def w8a8(folder: Path) -> Source:
    """Return a model in bytes with a scale and a zero point for each row."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    settings = grouped(weights, "int-quantized")
    source = Source(folder, "llama", settings, **SMALL)
    for name, (rows, columns) in source.matrices("layers.*_proj.weight"):
        parts, weight = int8(rows, columns, columns, asymmetric=True)
        module = name.removesuffix(".weight")
        source.replace(name, {f"{module}.{part}": parts[part] for part in parts}, weight)
    source.save()
    return source


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


EXPERTS_KEPT = {r"-:.*layers\.0\.mlp\.experts.*": {}}
FIRST_KEPT = {r"-:.*layers\.0\.self_attn\.v_proj": {}}


@pytest.mark.parametrize(
    ("make", "settings", "form"),
    [
        (gpt_oss, {"dynamic": EXPERTS_KEPT, "moe_uncovered": "rtn"}, "mxfp4 in groups of 32"),
        (
            deepseek_like,
            {"moe_uncovered": "rtn"},
            "fp8 in blocks of 48x40, mxfp4 in groups of 32",
        ),
        (modelopt, {"dynamic": FIRST_KEPT}, "nvfp4 in groups of 16"),
        (
            w8a8,
            {"dynamic": FIRST_KEPT, "allow_requantize": True},
            "int8 with a scale for each row",
        ),
    ],
)
def test_a_source_in_codes_quantizes_like_its_plain_model(
    make: Callable[[Path], Source], settings: dict[str, object], form: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = make(tmp_path)
    output = tmp_path / "output"
    result, events = quantize_with_events(source.coded, output, **settings)
    truth, _ = quantize(tmp_path, source.plain, **settings)
    found, expected = tensors_of(output), tensors_of(truth)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert verify_checkpoint(output, full=True).defects == ()
    assert not (output / "hf_quant_config.json").exists()
    meta = json.loads((output / "quantize_config.json").read_text())["meta"]
    parts = sorted((result.source_quantization or "").replace(", mxfp4", "\0mxfp4").split("\0"))
    assert ", ".join(parts) == form
    assert meta["source_quantization"] == result.source_quantization
    origin = json.loads((output / "gptq_manifest.json").read_text())["origin"]
    assert origin["source_quantization"] == result.source_quantization
    again = messages(events, "W_CKPT_REQUANTIZED")
    assert len(again) == bool(settings.get("allow_requantize"))


@pytest.mark.parametrize("make", [gpt_oss, w8a8])
def test_dequantizing_a_source_in_codes_writes_its_plain_model(
    make: Callable[[Path], Source], tmp_path: Path
) -> None:
    source = make(tmp_path)
    result = dequantize_checkpoint(str(source.coded), tmp_path / "output")
    found = tensors_of(tmp_path / "output")
    assert set(found) == set(source.meant)
    for name, tensor in source.meant.items():
        assert torch.equal(found[name], tensor), name
    written, expected = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "output", source.plain)
    )
    assert written == expected
    assert result.layers == len(source.stored.keys() - source.meant.keys()) // 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (gpt_oss, "ok, 4 weights in codes (mxfp4 in groups of 32) in"),
        (modelopt, "ok, 14 weights in codes (nvfp4 in groups of 16) in"),
    ],
)
def test_verify_reads_a_source_in_codes(
    make: Callable[[Path], Source], words: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    printed = CliRunner().invoke(app, ["verify", str(source.coded)])
    assert printed.exit_code == 0
    assert words in " ".join(printed.stdout.split())
    assert " ".join(printed.stdout.split()).endswith("; read headers")
    found = verify_checkpoint(source.coded, full=True)
    assert (found.ok, found.bits, found.tensors) == (True, (), len(source.stored))
    name = next(name for name in source.stored if name.endswith(("_scales", "weight_scale")))
    changed = {**source.stored, name: source.stored[name][1:].clone()}
    save_file(changed, source.coded / "model.safetensors", metadata={"format": "pt"})
    (defect,) = verify_checkpoint(source.coded).defects
    assert defect.code == "E_CKPT_SHAPE"


@pytest.mark.parametrize(
    ("make", "part"),
    [(gpt_oss, "0.mlp.experts.down_proj_scales"), (deepseek_like, "0.self_attn.q_proj.scale")],
)
def test_scales_that_are_no_numbers_are_refused(
    make: Callable[[Path], Source], part: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    name = f"model.layers.{part}"
    scales = source.stored[name].view(torch.uint8).clone()
    scales.view(-1)[-2:] = 255
    source.stored[name] = scales.view(source.stored[name].dtype)
    source.save()
    assert verify_checkpoint(source.coded).ok  # which reads headers
    (defect,) = verify_checkpoint(source.coded, full=True).defects
    assert (defect.code, defect.tensor) == ("E_CKPT_NONFINITE", name)
    assert "holds NaN or infinity, 2 times" in defect.message
    printed = CliRunner().invoke(app, ["verify", "--full", str(source.coded)])
    assert printed.exit_code == 4
    with pytest.raises(InputError) as caught:
        quantize(tmp_path, source.coded, moe_uncovered="rtn")
    assert caught.value.code == "E_CKPT_NONFINITE"


@pytest.mark.parametrize("make", [deepseek_like, modelopt])
def test_the_plan_of_a_source_in_codes_is_exact(
    make: Callable[[Path], Source], tmp_path: Path
) -> None:
    source = make(tmp_path)
    settings = {"dynamic": FIRST_KEPT, "moe_uncovered": "rtn"}
    plan = plan_run(source.coded, config(**settings))
    output, result = quantize(tmp_path, source.coded, **settings)
    assert plan.layout.nbytes == (output / "model.safetensors").stat().st_size
    stored = sum(tensor.nbytes for tensor in source.stored.values())
    assert plan.source.nbytes == result.bytes_before == stored


def test_scales_of_activations_are_left_out_and_named(tmp_path: Path) -> None:
    source = modelopt(tmp_path)
    rules = {r"-:.*layers\.1\..*": {}}
    _, events = quantize_with_events(source.coded, tmp_path / "output", dynamic=rules)
    stored = tensors_of(tmp_path / "output")
    assert not [name for name in stored if name.endswith(("input_scale", "k_scale"))]
    decoded, left_out = messages(events, "W_CKPT_DECODED")
    assert "kept weights that are stored as nvfp4 in groups of 16 become BF16" in decoded
    assert left_out == (
        "scales of activations and caches mean nothing beside decoded weights, and are left out: "
        "`model.layers.0.mlp.down_proj.input_scale` and 14 more"
    )


@pytest.mark.parametrize("make", [gpt_oss, modelopt, w8a8])
def test_an_interrupted_run_from_codes_resumes(
    make: Callable[[Path], Source], tmp_path: Path
) -> None:
    source = str(make(tmp_path).coded)
    settings = config(moe_uncovered="rtn", allow_requantize=True, nsamples=4)
    with pytest.raises(Killed):
        quantize_checkpoint(source, tmp_path / "output", settings, report=killer(0))
    assert quantize_checkpoint(source, tmp_path / "output", settings).resumed_blocks == 1
    quantize_checkpoint(source, tmp_path / "whole", settings)
    assert digest(tmp_path / "output") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (deepseek_like, ["self_attn.q_proj", "mlp.experts.1.up_proj"]),  # in fp8, in mxfp4
        (modelopt, ["self_attn.q_proj", "mlp.up_proj"]),
    ],
)
def test_an_adapter_is_merged_into_weights_in_codes(
    make: Callable[[Path], Source], modules: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = make(tmp_path)
    factors: dict[str, Tensor] = {}
    for module in modules:
        name = f"model.layers.0.{module}"
        factors |= pair(name, *source.meant[f"{name}.weight"].shape)
    adapter = str(write_adapter(tmp_path / "adapter", factors))
    settings: dict[str, object] = {"moe_uncovered": "rtn", "dynamic": {r"-:.*up_proj": {}}}
    output, _ = quantize(tmp_path, source.coded, lora=adapter, **settings)
    truth, _ = quantize(tmp_path, source.plain, lora=adapter, **settings)
    found, expected = tensors_of(output), tensors_of(truth)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    name = f"model.layers.0.{modules[-1]}"
    b, a = factors[f"{name}.lora_B.weight"], factors[f"{name}.lora_A.weight"]
    weight = source.meant[f"{name}.weight"]
    wanted = (weight.double() + 2 * b.double() @ a.double()).bfloat16()
    assert (found[f"{name}.weight"] == wanted).float().mean() > 0.99
    assert not torch.equal(found[f"{name}.weight"], weight)
