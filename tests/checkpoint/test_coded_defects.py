"""Sources in codes with something lost or cut are found by verify, and nothing decodes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.cli.app import app
from gptq_cli.errors import InputError
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from gptq_cli.planning.plan import plan_run
from tests.coded import fp8
from tests.families import save_model
from tests.inspection.test_coded import llama, of_awq, w4a8
from tests.quantization.test_coded_sources import Source, deepseek_like, gpt_oss, modelopt, w8a8
from tests.runs import config, quantize

Make = Callable[[Path], Source]
Change = Callable[["dict[str, Tensor]"], object]

BLOCK = "model.layers.0"
Q = f"{BLOCK}.self_attn.q_proj"
UP = f"{BLOCK}.mlp.up_proj"
DOWN = f"{BLOCK}.mlp.experts.down_proj"


def of_fp8(folder: Path) -> Source:
    """Return a model in floats of 8 bits with a scale for each row."""

    def encode(rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        scales = torch.rand(rows, 1).bfloat16()
        return fp8(rows, columns, scales, (1, columns), "weight_scale_inv")

    return llama(folder, {"quant_method": "fp8"}, encode, layers=3)


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def without_module(module: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]

    return change


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def broken(source: Source, change: Change) -> Path:
    """Return the folder of the source in codes, whose tensors are changed."""
    change(source.stored)
    source.save()
    return source.coded


LOST: list[tuple[Make, Change, str, str, str]] = [
    (of_fp8, without_module(Q), "INCOMPLETE", Q, "the same blocks elsewhere have this part"),
    (of_fp8, without(f"{Q}.weight"), "INCOMPLETE", f"{Q}.weight_scale_inv",
     f"is stored without `{Q}.weight`"),
    (w8a8, without(f"{Q}.weight"), "INCOMPLETE", f"{Q}.weight_scale",
     f"is stored without `{Q}.weight`"),
    (of_awq, without(f"{Q}.qweight"), "INCOMPLETE", f"{Q}.qzeros",
     f"is stored without `{Q}.weight`"),
    (w8a8, without_module(BLOCK), "INCOMPLETE", BLOCK, "no tensor of"),
    (deepseek_like, without_module(f"{BLOCK}.mlp.experts.2"), "INCOMPLETE",
     f"{BLOCK}.mlp.experts", "there are 2 experts, but `.*gate.weight` chooses among 3"),
    (gpt_oss, without(f"{DOWN}_blocks"), "INCOMPLETE", f"{DOWN}_scales",
     f"is stored without `{DOWN}_blocks`"),
    (gpt_oss, without(f"{DOWN}_scales"), "INCOMPLETE", f"{DOWN}_blocks",
     f"is stored without `{DOWN}_scales`"),
    (w4a8, changed(f"{UP}.weight_shape", lambda shape: 2 * shape), "SHAPE", f"{UP}.weight_shape",
     r"holds \[128, 64\], but the codes are \[64, 32\]"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "change", "code", "place", "words"), LOST)
def test_what_a_source_in_codes_has_lost_is_found(
    make: Make, change: Change, code: str, place: str, words: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    assert verify_checkpoint(source.coded, full=True).defects == ()
    directory = broken(source, change)
    found = verify_checkpoint(directory).defects
    assert {defect.code for defect in found} == {f"E_CKPT_{code}"}
    assert place in [defect.tensor for defect in found]
    with pytest.raises(InputError, match=words) as caught:
        dequantize_checkpoint(str(directory), tmp_path / "output")
    assert caught.value.code == f"E_CKPT_{code}"
    assert not (tmp_path / "output").exists()
    assert CliRunner().invoke(app, ["verify", str(directory)]).exit_code == 4


@pytest.mark.parametrize(
    ("make", "name"),
    [(of_fp8, f"{Q}.weight_scale_inv"), (modelopt, f"{Q}.weight_scale"),
     (gpt_oss, f"{DOWN}_scales")],
)  # fmt: skip
def test_scales_that_were_never_written_are_found(make: Make, name: str, tmp_path: Path) -> None:
    directory = broken(make(tmp_path), changed(name, torch.zeros_like))
    assert verify_checkpoint(directory).ok  # which reads no numbers
    (defect,) = verify_checkpoint(directory, full=True).defects
    assert (defect.code, defect.tensor) == ("E_CKPT_CORRUPT", name)
    assert "holds nothing but zeros" in defect.message


def plain_gpt_oss(folder: Path) -> Source:
    """Return a model whose experts are stacks in bfloat16, twice."""
    source = Source(folder, "gpt_oss", {}, num_local_experts=3)
    for path in (source.plain, source.coded):
        content = json.loads((path / "config.json").read_text())
        content.pop("quantization_config", None)
        (path / "config.json").write_text(json.dumps(content))
    return source


CUT = [
    (gpt_oss, [f"{DOWN}_blocks", f"{DOWN}_scales"]),
    (gpt_oss, [f"{BLOCK}.mlp.experts.gate_up_proj_{part}" for part in ("blocks", "scales")]),
    (plain_gpt_oss, [DOWN]),
]


@pytest.mark.parametrize(("make", "names"), CUT)
def test_experts_that_are_cut_off_a_stack_are_found(
    make: Make, names: list[str], tmp_path: Path
) -> None:
    source = make(tmp_path)
    for name in names:
        source.stored[name] = source.stored[name][:-1].clone()
    source.save()
    words = f"{names[0]}` holds 2 experts, but the router of `{BLOCK}.mlp` chooses among 3"
    with pytest.raises(InputError, match=words) as caught:
        plan_run(source.coded, config())
    assert caught.value.code == "E_CKPT_SHAPE"
    with pytest.raises(InputError, match=words):
        quantize(tmp_path, source.coded, moe_uncovered="rtn")
    if make is gpt_oss:
        assert names[0].rpartition("_")[0] in str(verify_checkpoint(source.coded).defects)
        with pytest.raises(InputError, match="holds 2 experts"):
            dequantize_checkpoint(str(source.coded), tmp_path / "plain_again")


def test_experts_that_only_config_json_has_stop_a_run(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gpt_oss", num_local_experts=3)
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"num_local_experts": 4}))
    with pytest.raises(InputError, match="holds 3 experts, but config") as caught:
        quantize(tmp_path, model, moe_uncovered="rtn")
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_SHAPE", 3)
    assert caught.value.hint
