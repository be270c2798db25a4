"""The demo model is trained on a known language: rounding damages it visibly, GPTQ less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.evaluation.perplexity import Perplexity, evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.solver.quantized_linear import round_to_nearest

DEMO = Path(__file__).resolve().parents[1] / "scripts" / "demo"
MODEL = DEMO / "model"
SEQLEN, WINDOWS = 256, 24
ENTROPY = 1.6192  # nats per token of the held-out text, by the grammar that wrote it


def rtn_perplexity(bits: int) -> float:
    """The whole model in memory with every linear of its blocks rounded to nearest."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = round_to_nearest(
                module.weight.data, LayerConfig(bits=bits)
            ).dequantize()
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(MODEL)((DEMO / "heldout.txt").read_text())["input_ids"]
    )
    perplexity = Perplexity()
    for window in ids[: SEQLEN * WINDOWS].split(SEQLEN):
        with torch.no_grad():
            perplexity.add(model(input_ids=window[None]).logits[0], window)
    return perplexity.value


@pytest.mark.parametrize(
    ("bits", "least_damage"), [(2, 1.15), pytest.param(3, 1.005, marks=pytest.mark.slow)]
)
def test_gptq_damages_the_demo_model_less_than_rounding(
    bits: int, least_damage: float, tmp_path: Path
) -> None:
    settings = QuantizeConfig(
        bits=bits,
        dataset=str(DEMO / "calibration.txt"),
        nsamples=48,
        seqlen=SEQLEN,
        device="cpu",
        dtype="float32",
    )
    quantize_checkpoint(str(MODEL), tmp_path / "out", settings)
    request = EvalRequest(
        dataset=str(DEMO / "heldout.txt"),
        seqlen=SEQLEN,
        max_windows=WINDOWS,
        dtype="float32",
        baseline=str(MODEL),
    )
    gptq = evaluate_perplexity(str(tmp_path / "out"), request)
    assert gptq.baseline_perplexity is not None
    rtn_damage = rtn_perplexity(bits) / gptq.baseline_perplexity
    gptq_damage = gptq.perplexity / gptq.baseline_perplexity
    assert rtn_damage > least_damage
    assert gptq_damage - 1 < 0.6 * (rtn_damage - 1)


def test_demo_model_perplexity_is_near_the_entropy() -> None:
    request = EvalRequest(
        dataset=str(DEMO / "heldout.txt"),
        seqlen=512,
        dtype="float32",
        batch_size=8,
        max_windows=WINDOWS,
    )
    result = evaluate_perplexity(str(MODEL), request)
    assert 1 < result.perplexity / torch.tensor(ENTROPY).exp().item() < 1.2
