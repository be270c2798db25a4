"""Commands that look at weights or decode them do so for sources in codes of every kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.cli.app import app
from gptq_cli.inspection.compare import compare_checkpoints
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from gptq_cli.inspection.layer_statistics import view_layer
from tests.coded import awq, grouped, packed
from tests.quantization.test_coded_sources import SMALL, Source, tensors_of, w8a8

Encode = Callable[[int, int], "tuple[dict[str, Tensor], Tensor]"]
Make = Callable[[Path], Source]


def llama(folder: Path, settings: dict[str, object], encode: Encode, layers: int = 2) -> Source:
    """Return a model whose linears are the parts that `encode` returns for rows and columns."""
    source = Source(folder, "llama", settings, **SMALL | {"num_hidden_layers": layers})
    for name, (rows, columns) in source.matrices("layers.*_proj.weight"):
        parts, weight = encode(rows, columns)
        module = name.removesuffix(".weight")
        source.replace(name, {f"{module}.{part}": parts[part] for part in parts}, weight)
    source.save()
    return source


def of_awq(folder: Path) -> Source:
    settings: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 16}
    return llama(folder, settings, lambda rows, columns: awq(rows, columns, 16))


def w4a8(folder: Path, *, asymmetric: bool = False) -> Source:
    """Return a model in packed integers beside quantized activations."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    settings = grouped(weights | {"symmetric": not asymmetric}, "pack-quantized")
    encode = partial(packed, group=16, asymmetric=asymmetric)
    return llama(folder, settings, encode)


@pytest.mark.parametrize("make", [of_awq, w4a8])
def test_integers_dequantize_to_the_weights_they_mean(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path)
    result = dequantize_checkpoint(str(source.coded), tmp_path / "output")
    found = tensors_of(tmp_path / "output")
    assert result.layers == 14
    assert set(found) == set(source.meant)
    for name, tensor in source.meant.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("make", [of_awq, w4a8, w8a8])
def test_compare_decodes_sources_in_codes(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path)
    found = compare_checkpoints(str(source.coded), str(source.plain))
    assert len(found.tensors) == len(source.meant)
    assert (found.only_a, found.only_b, found.different) == ((), (), ())


@pytest.mark.parametrize("make", [of_awq, w4a8, w8a8])
def test_a_layer_of_a_source_in_codes_is_shown(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path)
    checkpoint = open_checkpoint(source.coded)
    for layer in ("0.self_attn.q_proj", "1.mlp.down_proj"):
        weight = source.meant[f"model.layers.{layer}.weight"]
        found = view_layer(checkpoint, layer)
        assert (found.name, found.shape) == (f"model.layers.{layer}", tuple(weight.shape))
        assert found.mean == pytest.approx(float(weight.double().mean()), abs=1e-6)
        assert sum(found.weights.counts) == weight.numel()


@pytest.mark.parametrize("make", [of_awq, w8a8])
def test_convert_refuses_a_source_in_codes_for_its_form(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path)
    command = ["convert", str(source.coded), "-o", str(tmp_path / "output"), "--to", "gptq"]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 3
    assert "E_CKPT_QUANTIZED" in printed.stderr
    assert not (tmp_path / "output").exists()
