"""Which models store the weights of their linears [I, O]: a fact of their code that no file of a checkpoint tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The causal language models of transformers whose blocks are made of Conv1D; a test compares this with its sources.
TRANSPOSED = frozenset({"gpt2", "gpt-sw3", "openai-gpt"})


def stores_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the model of this config.json stores the linears of its blocks [I, O]; quantized they are [O, I]."""
    return config.get("model_type") in TRANSPOSED


def is_stored_transposed(config: Mapping[str, Any], module: str) -> bool:
    """Whether the model of this config.json stores the linear `module` [I, O]; its head is no part of the blocks."""
    return stores_transposed(config) and module != "lm_head"
