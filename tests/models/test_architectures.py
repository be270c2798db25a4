"""Architectures of every kind, end to end: quantized and computed as transformers does, or refused for a stated reason.

The table of all of them is made by scripts/architecture_matrix.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import try_type

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what transformers says about its own models is not at stake
]

WORKING = [
    "bloom",  # ALiBi
    "falcon",  # parallel blocks, fused qkv
    "falcon_mamba",  # state space
    "gemma3n_text",  # inputs of each layer, several streams of hidden states
    "gemma4_text",  # keys and values shared between blocks
    "git",  # a vision tower beside the decoder
    "gpt2",  # Conv1D
    "granitemoe",  # experts stored in one tensor, under a name of their own
    "kimi_linear",  # convolutions that loading makes of several tensors
    "llama4",  # experts stored in one tensor, and a vision tower
    "minicpm3",  # low-rank attention
    "qwen3_5_text",  # linear attention between full attention
    "recurrent_gemma",  # recurrences
]
REFUSED = {
    "gpt_oss": "`model.layers.0.mlp.experts.gate_up_proj` [4, 64, 256]: stacked matrices that are not of experts",
    "hrm_text": "`model.H_module.layers.0.attn.gqkv_proj.weight` is split into",
    "inkling2_text": "the experts of `model.layers.0.mlp.experts` are stored as",
    "zamba2": "`model.layers.6.shared_transformer.self_attn.q_proj` is shared by several blocks",
    "zaya": "`model.layers.1` is called with more results of earlier blocks than hidden states",
    "xlm": "what enters `transformer.ffns.1` is not what `transformer.ffns.0` returns",
}


@pytest.mark.parametrize("model_type", WORKING)
def test_logits_of_the_quantized_model_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    outcome = try_type(model_type, tmp_path)
    assert (outcome.status, outcome.difference) == ("worked", pytest.approx(0, abs=1e-6)), outcome.why
    assert outcome.quantized >= 8
    assert outcome.share > 0.45


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_quantized_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    outcome = try_type(model_type, tmp_path)
    assert outcome.status == "refused", outcome.why
    assert outcome.why.startswith("E_ARCH: ")
    assert REFUSED[model_type] in outcome.why
    assert not (tmp_path / "quantized").exists()
