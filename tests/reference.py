"""GPTQ as its authors published it, dense in float64, one column after the other; it shares no code with the package.

H⁻¹ = UᵀU with U upper triangular; column j is rounded, and its error over U_jj is spread over the columns to its right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig


@dataclass
class Reference:
    codes: Tensor  # [O, I]
    scales: Tensor  # [O, G]
    zeros: Tensor  # [O, G]
    g_idx: list[int]  # [I]


def order_and_groups(energy: list[float], config: LayerConfig, group_size: int) -> tuple[list[int], list[int]]:
    """The processing order of the columns, and the group of every column."""
    n = len(energy)
    natural = [column // group_size for column in range(n)]
    by_energy = sorted(range(n), key=lambda column: -energy[column])
    if config.desc_act:
        if config.static_groups:
            return by_energy, natural
        return by_energy, [by_energy.index(column) // group_size for column in range(n)]
    if config.act_group_aware and config.static_groups:
        return by_energy, natural
    if config.act_group_aware:
        peak = [max(energy[start : start + group_size]) for start in range(0, n, group_size)]
        return sorted(range(n), key=lambda c: (-peak[natural[c]], natural[c], -energy[c])), natural
    return list(range(n)), natural


def fit(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row of one group [O, n]; the scale is what a float16 holds."""
    maxq = 2**config.bits - 1
    low, high = weights.min(dim=1).values.clamp(max=0), weights.max(dim=1).values.clamp(min=0)
    if config.sym:
        return in_float16(2 * torch.maximum(-low, high) / maxq), torch.full_like(low, 2 ** (config.bits - 1))
    scale = in_float16((high - low) / maxq)
    zero = torch.round(-low / scale).clamp(max=maxq)
    # A zero of 0 cannot be stored: one step is left below zero, and the rest must reach the largest weight.
    raised = zero == 0
    scale[raised] = in_float16(torch.maximum(high / (maxq - 1), -low))[raised]
    zero[raised] = 1
    return scale, zero


def in_float16(scale: Tensor) -> Tensor:
    return scale.clamp(min=2.0**-14).half().double()


def gptq(weight: Tensor, hessian: Tensor, config: LayerConfig) -> Reference:
    """Codes, scales and zeros of weight [O, I] in the natural order of columns."""
    n_rows, n = weight.shape
    group_size = n if config.group_size == -1 else config.group_size
    W, H = weight.double().clone(), hessian.double().clone()
    energy = H.diagonal().clone()
    W[:, energy == 0] = 0
    H.diagonal()[energy == 0] = 1
    H += config.damp_percent * energy.mean() * torch.eye(n, dtype=torch.float64)

    order, group = order_and_groups(energy.tolist(), config, group_size)
    scales, zeros = torch.zeros(n_rows, n // group_size).double(), torch.zeros(n_rows, n // group_size).double()
    if config.static_groups:
        for g in range(n // group_size):
            scales[:, g], zeros[:, g] = fit(W[:, g * group_size : (g + 1) * group_size], config)
    W, H = W[:, order], H[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)

    codes = torch.zeros(n_rows, n, dtype=torch.float64)
    for j, column in enumerate(order):
        g = group[column]
        if j % group_size == 0 and not config.static_groups:
            scales[:, g], zeros[:, g] = fit(W[:, j : j + group_size], config)
        s, z = scales[:, g], zeros[:, g]
        codes[:, column] = torch.clamp(torch.round(W[:, j] / s) + z, 0, 2**config.bits - 1)
        error = (W[:, j] - s * (codes[:, column] - z)) / U[j, j]
        W[:, j + 1 :] -= torch.outer(error, U[j, j + 1 :])
    return Reference(codes, scales, zeros, group)
