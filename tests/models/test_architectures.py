"""Architectures of every kind, end to end: they give the logits of transformers, or are refused.

The table of all of them is made by scripts/architecture_matrix.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import try_type

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore"
    ),  # what transformers says about its own models is not at stake
]

WORKING = [
    "bloom",  # ALiBi
    "falcon",  # parallel blocks, fused qkv
    "falcon_mamba",  # state space
    "gemma3n_text",  # inputs of each layer, several streams of hidden states
    "gemma4_text",  # keys and values shared between blocks
    "git",  # a vision tower beside the decoder
    "gpt2",  # Conv1D
    "gpt_oss",  # experts with biases, gate and up interleaved
    "granitemoe",  # experts stored in one tensor, under a name of their own
    "hy_v4",  # tokens to attend to, handed from block to block
    "inkling2_text",  # experts interleaved in the checkpoint alone
    "kimi_linear",  # convolutions that loading makes of several tensors
    "longcat_flash",  # choices that are no expert
    "llama4",  # experts stored in one tensor, and a vision tower
    "minicpm3",  # low-rank attention
    "qwen3_5_text",  # linear attention between full attention
    "recurrent_gemma",  # recurrences
    "zamba",  # blocks that share linears, which are kept
    "zaya",  # states of routers, handed from block to block
]
REFUSED = {
    "dbrx": "`transformer.blocks.0.ffn.experts.mlp.w1`",
    "hrm_text": "`model.H_module.layers.0.attn.gqkv_proj.weight` is split into",
    "jetmoe": "`model.layers.0.mlp.input_linear.weight` [4, 256, 64]: "
    "stacked matrices that are not of experts",
    "xlm": "the input of `transformer.ffns.1` is not the output of `transformer.ffns.0`",
    "xlnet": "`transformer.layer.0.rel_attn.q` [64, 4, 16]: "
    "stacked matrices that are not of experts",
}


@pytest.mark.parametrize("model_type", WORKING)
def test_quantized_model_gives_the_logits_of_transformers(model_type: str, tmp_path: Path) -> None:
    outcome = try_type(model_type, tmp_path)
    assert (outcome.status, outcome.differences) == ("worked", pytest.approx([0, 0], abs=1e-6)), (
        outcome.why
    )
    assert outcome.quantized >= 8
    assert outcome.share > 0.45


@pytest.mark.parametrize("model_type", REFUSED)
def test_unsupported_architecture_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    outcome = try_type(model_type, tmp_path)
    assert outcome.status == "refused", outcome.why
    assert outcome.why.startswith("E_ARCH: ")
    assert REFUSED[model_type] in outcome.why
    assert not list(tmp_path.glob("*/quantized"))
