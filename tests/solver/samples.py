"""Small layers with correlated inputs of uneven energy, as real layers have."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig

# Every way in which columns can be ordered and grouped.
ORDERS = {
    "natural": {"act_group_aware": False},
    "group aware": {},
    "desc_act": {"desc_act": True},
    "static natural": {"static_groups": True, "act_group_aware": False},
    "static group aware": {"static_groups": True},
    "static desc_act": {"static_groups": True, "desc_act": True},
}


def layer_config(order: str, **fields: object) -> LayerConfig:
    return LayerConfig(**{"damp_percent": 0.01, **ORDERS[order], **fields})


def correlated_inputs(n_tokens: int, in_features: int, seed: int = 0) -> Tensor:
    """Tokens [n_tokens, I] in float64: mixed channels, a few of them loud."""
    random = torch.Generator().manual_seed(seed)
    loudness = torch.exp(0.7 * torch.randn(in_features, generator=random, dtype=torch.float64))
    mixture = (
        torch.randn(in_features, in_features, generator=random, dtype=torch.float64) * loudness
    )
    return torch.randn(n_tokens, in_features, generator=random, dtype=torch.float64) @ mixture


def correlated_layer(out_features: int, in_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and a Hessian [I, I] in float64."""
    inputs = correlated_inputs(4 * in_features, in_features, seed)
    random = torch.Generator().manual_seed(seed + 1)
    weight = 0.05 * torch.randn(out_features, in_features, generator=random, dtype=torch.float64)
    return weight, inputs.T @ inputs / in_features
