"""GPTQ as its authors published it, dense in float64, one column after the other.

It shares no code with the package. H⁻¹ = UᵀU with U upper triangular; column j is rounded, and its
error over U_jj is spread over the columns to its right. The additions to the publication are here
as plainly: grids by trying every candidate for each row, refinement by trying every code of each
weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig


@dataclass
class Reference:
    codes: Tensor  # [O, I]
    scales: Tensor  # [O, G]
    zeros: Tensor  # [O, G]
    g_idx: list[int]  # [I]


def order_and_groups(
    energy: list[float], config: LayerConfig, group_size: int
) -> tuple[list[int], list[int]]:
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
    """Return scale and zero of each row of one group [O, n]; a float16 holds each scale."""
    maxq = 2**config.bits - 1
    low, high = weights.min(dim=1).values.clamp(max=0), weights.max(dim=1).values.clamp(min=0)
    if config.sym:
        scale = in_float16(2 * torch.maximum(-low, high) / maxq)
        return scale, torch.full_like(low, 2 ** (config.bits - 1))
    scale = in_float16((high - low) / maxq)
    zero = torch.round(-low / scale).clamp(max=maxq)
    # A zero of 0 cannot be stored: one step stays below zero, and the rest must reach the maximum.
    raised = zero == 0
    scale[raised] = in_float16(torch.maximum(high / (maxq - 1), -low))[raised]
    zero[raised] = 1
    return scale, zero


def in_float16(scale: Tensor) -> Tensor:
    sizes = [storable(value) for value in scale.tolist()]
    return torch.tensor(sizes, dtype=torch.float64).half().double()


def storable(scale: float) -> float:
    """Return a scale of 0 or more as a float16 can hold it, before it is rounded to its digits."""
    return scale if scale >= 2.0**-14 else subnormal(scale)


def subnormal(scale: float) -> float:
    """Return the next multiple of 2**-24 for a number below 2**-14; 0 means a group of zeros."""
    return math.ceil(scale * 2.0**24) / 2.0**24 if scale > 0 else 2.0**-14


def in_both(scale: float) -> float:
    """The nearest number that float16 and bfloat16 both hold: 8 significant bits."""
    mantissa, exponent = math.frexp(storable(abs(scale)))
    return math.copysign(math.ldexp(round(mantissa * 256), exponent - 8), scale)


def row_error(row: list[float], scale: float, zero: int, config: LayerConfig) -> float:
    error = 0.0
    for w in row:
        code = min(max(round(w / scale) + zero, 0), 2**config.bits - 1)
        error += abs(w - scale * (code - zero)) ** 2.4
    return error


def fit_row(row: list[float], config: LayerConfig) -> tuple[float, int]:
    """Scale and zero of one row of one group by trying all candidates; the first of equals wins."""
    half = 2 ** (config.bits - 1)
    if config.signed_scales:
        largest = max(row) if max(row) > -min(row) else min(row)
        scale, zero = in_both(-largest / half), half
    else:
        scales, zeros = fit(torch.tensor([row], dtype=torch.float64), config)
        scale, zero = scales.item(), int(zeros.item())
    if config.scale_search == "none":
        return scale, zero
    signs = [1, -1] if config.signed_scales else [1]
    offsets = [0] if config.sym else [0, -1, 1]
    tried = []
    for step, sign, offset in product(range(25), signs, offsets):
        clipped = in_both(scale * (sign * (1 - step / 40)))
        tried.append((clipped, min(max(zero + offset, 1), 2 * half - 1)))
    return min(tried, key=lambda grid: row_error(row, *grid, config))


def fit_any(weights: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Return scale and zero of each row, for all grids of a configuration."""
    if not config.signed_scales and config.scale_search == "none":
        return fit(weights, config)
    grids = [fit_row(row, config) for row in weights.tolist()]
    scales, zeros = torch.tensor(grids, dtype=torch.float64).T
    return scales, zeros


def damping_of(energy: Tensor, config: LayerConfig, tokens: int | None) -> Tensor:
    """Return the addition to the diagonal [I], for columns that are not dead."""
    if config.damp_mode == "mean":
        return config.damp_percent * energy.mean().expand_as(energy)
    share = min(1.0, max(config.damp_percent, 4 * len(energy) / tokens))
    return share * energy


def limited(inputs: Tensor, others: Sequence[Tensor], batch: int, longest: float) -> None:
    """Halve long tokens of the inputs [tokens, I], and the same of others; a batch has `batch`."""
    for start in range(0, len(inputs), batch):
        lengths = inputs[start : start + batch].norm(dim=1)
        most = longest * lengths.median()
        for token, length in enumerate(lengths.tolist(), start):
            while length > most:
                length /= 2
                for tensor in (inputs, *others):
                    tensor[token] /= 2


def follow(
    weight: Tensor,
    inputs: Tensor,
    originals: Tensor,
    config: LayerConfig,
    sides: Tensor | None = None,
    drift: Tensor | float = 0.0,
) -> Tensor:
    """Return the weight [O, I] to quantize for inputs [tokens, I]; the original inputs differ.

    Ridge regression of what the outputs lack on the inputs, as rows of one least-squares problem.
    `sides` are 1 for tokens of one half of the text and -1 for those of the other, for "auto".
    `drift` [tokens, O] is what the hidden states lack to which the outputs are added.
    """
    energy = inputs.square().sum(0)
    damping = damping_of(energy, config, len(inputs))
    damping[energy == 0] = 1.0
    rows = torch.cat([inputs, damping.sqrt().diag()])

    def regression(lacking: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights [O, I] that lacking outputs call for, and what they explain [O]."""
        targets = torch.cat([lacking, torch.zeros(len(energy), len(weight)).double()])
        found = torch.linalg.lstsq(rows, targets).solution.T
        return found, (found * (lacking.T @ inputs)).sum(1)

    lacking = (originals - inputs) @ weight.T + drift
    change, explained = regression(lacking)
    strength = config.asymmetric_calibration
    if strength == "auto":
        assert sides is not None
        _, by_chance = regression(lacking * sides[:, None])
        shares = by_chance / explained
        return weight + 0.5 * (1 - shares).clamp(min=0).nan_to_num()[:, None] * change
    return weight + strength * change


def refine(
    weight: Tensor, damped: Tensor, found: Reference, config: LayerConfig, sweeps: int
) -> list[float]:
    """Improve `found` in place for the damped Hessian; return the losses after each step.

    First fit all scales; then, in each sweep, a group's scale and its columns. A scale is fitted by
    least squares, a weight by trying all codes.
    """
    L = torch.linalg.cholesky(damped)
    groups = range(found.scales.shape[1])
    members: list[list[int]] = [[] for _ in groups]
    for column, group in enumerate(found.g_idx):
        members[group].append(column)
    losses = [loss(weight, L, found)]
    for sweep in range(1 + sweeps):
        for group in groups:
            for row in range(len(weight)):
                refine_scale(weight, L, found, config, row, group, members[group])
            losses.append(loss(weight, L, found))
            if sweep == 0:
                continue
            for column in members[group]:
                refine_code(weight, L, found, config.bits, column)
                losses.append(loss(weight, L, found))
    return losses


def loss(weight: Tensor, L: Tensor, found: Reference) -> float:
    return ((weight - values(found)) @ L).square().sum().item()


def values(found: Reference) -> Tensor:
    return found.scales[:, found.g_idx] * (found.codes - found.zeros[:, found.g_idx])


def refine_scale(
    weight: Tensor,
    L: Tensor,
    found: Reference,
    config: LayerConfig,
    row: int,
    group: int,
    members: list[int],
) -> None:
    level = torch.zeros_like(weight[row])
    level[members] = found.codes[row, members] - found.zeros[row, group]
    if not level.any():
        return
    old = found.scales[row, group].item()
    rest = (weight[row] - values(found)[row] + old * level) @ L
    best = torch.linalg.lstsq((level @ L)[:, None], rest[:, None]).solution.item()
    new = in_both(best if config.signed_scales else max(best, 0.0))
    if (rest - new * level @ L).square().sum() < (rest - old * level @ L).square().sum():
        found.scales[row, group] = new


def refine_code(weight: Tensor, L: Tensor, found: Reference, bits: int, column: int) -> None:
    error = weight - values(found)
    group = found.g_idx[column]
    tried = torch.arange(2**bits, dtype=torch.float64)
    change = found.scales[:, group, None] * (tried - found.codes[:, column, None])  # [O, codes]
    losses = (error[:, None, :] @ L - change[..., None] * L[column]).square().sum(-1)
    found.codes[:, column] = tried[losses.argmin(dim=1)]


def gptq(
    weight: Tensor, hessian: Tensor, config: LayerConfig, tokens: int | None = None
) -> Reference:
    """Codes, scales and zeros of weight [O, I] in the natural order of columns."""
    n_rows, n = weight.shape
    group_size = n if config.group_size == -1 else config.group_size
    W, H = weight.double().clone(), hessian.double().clone()
    energy = H.diagonal().clone()
    W[:, energy == 0] = 0
    H.diagonal()[energy == 0] = 1
    H += damping_of(energy, config, tokens).diag()

    order, group = order_and_groups(energy.tolist(), config, group_size)
    scales = torch.zeros(n_rows, n // group_size).double()
    zeros = torch.zeros_like(scales)
    if config.static_groups:
        for g in range(n // group_size):
            members = slice(g * group_size, (g + 1) * group_size)
            scales[:, g], zeros[:, g] = fit_any(W[:, members], config)
    original, damped = W, H
    W, H = W[:, order], H[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)

    codes = torch.zeros(n_rows, n, dtype=torch.float64)
    for j, column in enumerate(order):
        g = group[column]
        if j % group_size == 0 and not config.static_groups:
            scales[:, g], zeros[:, g] = fit_any(W[:, j : j + group_size], config)
        s, z = scales[:, g], zeros[:, g]
        codes[:, column] = torch.clamp(torch.round(W[:, j] / s) + z, 0, 2**config.bits - 1)
        error = (W[:, j] - s * (codes[:, column] - z)) / U[j, j]
        W[:, j + 1 :] -= torch.outer(error, U[j, j + 1 :])
    found = Reference(codes, scales, zeros, group)
    if config.refine_sweeps:
        refine(original, damped, found, config, config.refine_sweeps)
    return found
