"""Damping and factorisation of the Hessian, done once for all layers that see the same input.

`prepare` computes H + λI = R D Rᵀ with R unit upper triangular and D diagonal, which `solve` needs
to round columns. A Cholesky factor is lower triangular. If rows and columns are reversed before and
after, it becomes upper triangular, and no inverse is needed:
R = flip(cholesky(flip(H + λI))), each column divided by its diagonal entry, in the memory of one
matrix.

Damping by the mean, λ = ρ mean(diag H) for every column, follows the loudest channels and may
exceed the whole energy of a quiet one. Diagonal damping, λ_j = ρ H_jj, shrinks every correlation by
1 + ρ, whatever the units of its channels.

`cholesky_` computes the factor of a large matrix in its own memory, with most of the work in
products. It takes a panel of columns at a time: first its diagonal block A_kk = L_kk L_kkᵀ, then
the rows below it, L_ik = A_ik L_kk⁻ᵀ, then the lower half of the rest of the matrix,
A_ij -= L_ik L_jkᵀ. On CUDA the last products run on tensor cores (see `numerics`), with rows and
columns scaled by powers of two until no entry of L exceeds 1: a float16 number then has 11 bits of
what matters of it, and two of them have 22.

`follow_original` uses the same factors to correct weights for the error of earlier quantized
layers. After them a layer sees inputs x instead of the inputs x₀ of the unquantized model, but its
output should be W x₀. The weight to quantize is therefore the one whose output on x is nearest to
W x₀, by least squares with the damped Hessian:

W* = W + α W C (H + λI)⁻¹,    H = Σ x xᵀ,    C = Σ (x₀ - x) xᵀ

Σ ‖W x₀ - Q x‖² is Σ ‖(W* - Q) x‖² plus a constant, so W* is quantized as any other weight. If the
output is added to a residual r, which is r₀ in the unquantized model, the sum should be r₀ + W x₀.
W C + E then takes the place of W C, with the drift E = Σ (r₀ - r) xᵀ. A
strength α below 1 avoids an overfit to the calibration text. Source: QEP (Arai and Ichikawa 2025,
arXiv 2504.09629).

How much of the correction is overfit shows in two halves of the windows, with shifts C₁ and C₂.
What all text has in common is in both of them. What is peculiar to some text has a random sign and
is as large in the contrast C₁ - C₂ as in C = C₁ + C₂. For a row w of W, with lengths in the metric
of (H + λI)⁻¹, the strength with the least expected error is therefore (a row of the drift is added
to w C in both places)

β = 1 - ‖w (C₁ - C₂)‖² / ‖w C‖²,    or 0 if that is negative.

This is the estimator of James and Stein (1961) in its positive part, with the noise measured. It is
best for one layer alone and for more text of the same kind. α = β / 2 is as good for the whole
model, and better on other text (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_cli.config.layer import LayerConfig, Strength
from gptq_cli.solver.numerics import (
    Parts,
    above,
    add_product_,
    exact_product,
    full_precision,
    multiply,
    multiply_split,
    parts_of,
    permuted,
    row_chunks,
    split,
    splits,
)


@dataclass(frozen=True, slots=True)
class ColumnOrder:
    """The columns in processing order, and the group of each.

    If `static_grid` is false, groups are runs of consecutive positions in that order, and the grid
    of a group is found when its first column is reached.
    """

    permutation: Tensor  # int64 [..., I]: position j of the order is column permutation[j]
    group_of_column: Tensor  # int32 [..., I], the g_idx of the checkpoint
    static_grid: bool  # grids are found from the original weights, before any column is rounded
    scattered: bool  # columns of a group need not be neighbours


def column_order(diagonal: Tensor, config: LayerConfig) -> ColumnOrder:
    """Return the order and the groups that `config` asks for, given diag(H) [..., I].

    Columns with equal entries keep their natural order. Raise ValueError if the group size does not
    divide I.
    """
    in_features = diagonal.shape[-1]
    group_size = config.columns_per_group(in_features)
    if in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide in_features {in_features}")
    positions = torch.arange(in_features, device=diagonal.device).expand_as(diagonal)
    groups = (positions // group_size).int()
    # A group of the whole row gets its grid before any column is rounded: it is static anyway.
    static_grid = config.static_groups or group_size == in_features
    scattered = config.desc_act and not static_grid
    if config.desc_act or (config.act_group_aware and static_grid):
        permutation = diagonal.argsort(descending=True, stable=True)
        if scattered:
            groups = torch.empty_like(groups).scatter_(-1, permutation, groups)
    elif config.act_group_aware:
        permutation = _group_aware(diagonal.unflatten(-1, (-1, group_size)))
    else:
        permutation = positions
    return ColumnOrder(permutation, groups, static_grid, scattered)


def _group_aware(diagonal: Tensor) -> Tensor:
    """Return the order int64 [..., I] of columns for diag(H) as groups [..., G, n].

    Groups are sorted by their largest entry and columns inside a group by their own, largest first.
    """
    n_groups, group_size = diagonal.shape[-2:]
    inside = diagonal.argsort(descending=True, stable=True)
    groups = diagonal.amax(-1).argsort(descending=True, stable=True)
    first_column = torch.arange(n_groups, device=diagonal.device) * group_size
    columns = inside + first_column[:, None]
    return columns.take_along_dim(groups.unsqueeze(-1), dim=-2).flatten(-2)


DAMPING_STEP = 4.0
# Few tokens measure correlations badly: with this many for each column, diagonal damping is 1.
TOKENS_PER_COLUMN = 4
# Smaller matrices on CUDA are factorised as one panel, by its library:
BLOCKED_FROM = 8192
# Share of the strength that two halves of the text support, for layers behind and for other text:
USED_SHARE = 0.5
# Share of the loudest channel's energy. Diagonal damping treats a quieter channel as this loud:
QUIETEST = 1e-10

PANEL = {"cpu": 512, "cuda": 2048}  # columns at a time of `cholesky_`
# The same for several matrices on CUDA, whose library factorises small matrices at once. To be
# measured on a GPU:
PANEL_OF_SEVERAL = 256
SOLVED_COLUMNS = 512  # at a time of `follow_original` on tensor cores, to be measured on a GPU
# Of `follow_together`, times the elements of a chunk: 16 experts with 2048 inputs on CUDA
EXPERTS_TO_FOLLOW = 4


class NotPositiveDefiniteError(ArithmeticError):
    """A Hessian has no Cholesky factor, even with `damp_percent`, the last damping tried.

    `experts` has the numbers of the experts with such a Hessian; a dense layer is expert 0.
    """

    def __init__(self, damp_percent: float, experts: Sequence[int] = (0,)) -> None:
        super().__init__(
            f"the Hessian is not positive definite even with damp_percent {damp_percent:g}"
        )
        self.damp_percent, self.experts = damp_percent, experts


class NonFiniteHessianError(ArithmeticError):
    """The Hessian of each of `experts` holds NaN or infinity: an input was not finite."""

    def __init__(self, experts: Sequence[int] = (0,)) -> None:
        super().__init__("the Hessian is not finite")
        self.experts = experts


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """The factors of a damped Hessian, in processing order; shared by the linears of a stage.

    Tensors have a leading dimension E if they are those of E experts. Lists have E entries; a dense
    layer has one.
    """

    order: ColumnOrder
    R: Tensor  # [..., I, I], unit upper triangular
    D: Tensor  # [..., I], positive
    dead: Tensor  # bool [..., I], columns whose input was always zero, in natural order
    dead_columns: list[int]  # the number of dead columns
    damping: Tensor  # [..., I], added to diag H before the factorisation, in natural order
    damp_percent: list[float]  # the damping in R and D: λ / mean(diag H), or λ_j / H_jj
    retries: list[int]  # number of times that damping was raised before the factorisation succeeded

    def of(self, expert: int) -> HessianFactor:
        """Return the factors of one expert, on the same memory."""
        permutation, group_of = self.order.permutation, self.order.group_of_column
        return HessianFactor(
            order=replace(
                self.order, permutation=permutation[expert], group_of_column=group_of[expert]
            ),
            R=self.R[expert],
            D=self.D[expert],
            dead=self.dead[expert],
            dead_columns=[self.dead_columns[expert]],
            damping=self.damping[expert],
            damp_percent=[self.damp_percent[expert]],
            retries=[self.retries[expert]],
        )


@torch.no_grad()
@full_precision()
def prepare(
    hessian: Tensor, config: LayerConfig, tokens: int | Sequence[int] | None = None
) -> HessianFactor:
    """Return the column order of `config` and the factors of the damped Hessian [I, I].

    With `damp_mode` mean, λ = damp_percent * mean(diag H). With diagonal, λ_j = ρ H_jj, where
    ρ = 4 I / tokens within [damp_percent, 1]; `tokens` is the number of tokens that the Hessian
    sums. If the factorisation fails, ρ is multiplied by 4 as long as it stays below 1 (diagonal: up
    to 1); `retries` counts the multiplications and `damp_percent` holds the value used. The Hessian
    itself is not changed.

    The Hessians [E, I, I] of E experts, with E numbers of tokens, are factorised together. Each
    expert gets the order and the damping that it would get alone.

    Raise NonFiniteHessianError, NotPositiveDefiniteError, and ValueError if the group size does not
    divide I or `tokens` is missing with diagonal damping.
    Source: GPTQ (Frantar et al. 2022), section 3.3, in the LDL form of QuIP (Chee et al. 2023).
    """
    hessians = hessian.reshape(-1, *hessian.shape[-2:])
    energy = hessians.diagonal(dim1=-2, dim2=-1).clone()
    dead = energy == 0
    # Both are asked for together, to wait for the device only once.
    finite, dead_columns = torch.stack([torch.isfinite(energy.mean(-1)), dead.sum(-1)]).tolist()
    if not all(finite):
        raise NonFiniteHessianError([expert for expert, known in enumerate(finite) if not known])
    order = column_order(energy, config)
    undamped, unit = _diagonal(energy, dead, config)
    damp_percent = _first_dampings(config, energy, tokens)
    retries = [0] * len(energy)
    damped = _damped(undamped, unit, damp_percent)
    R, failed = _upper_factors(hessians, damped, order.permutation)
    while failed:
        _raise_dampings(damp_percent, failed, config)
        for expert in failed:
            retries[expert] += 1
        damped = _damped(undamped, unit, damp_percent)
        if len(failed) == len(hessians):
            del R  # the next try takes its memory
            R, failed = _upper_factors(hessians, damped, order.permutation)
            continue
        found, again = _upper_factors(hessians[failed], damped[failed], order.permutation[failed])
        R[failed] = found
        failed = [failed[number] for number in again]
    root = R.diagonal(dim1=-2, dim2=-1).clone()
    R.div_(root.unsqueeze(-2))
    per_column = hessian.shape[:-1]
    order = replace(
        order,
        permutation=order.permutation.view(per_column),
        group_of_column=order.group_of_column.reshape(per_column),
    )
    return HessianFactor(
        order=order,
        R=R.view(hessian.shape),
        D=root.square().view(per_column),
        dead=dead.view(per_column),
        dead_columns=dead_columns,
        damping=(damped - energy).view(per_column),
        damp_percent=damp_percent,
        retries=retries,
    )


def _upper_factors(
    hessians: Tensor, diagonals: Tensor, permutations: Tensor
) -> tuple[Tensor, list[int]]:
    """Return the upper Cholesky factors [E, I, I] of the Hessians, and the experts without one.

    The Hessians get the `diagonals` [E, I] and are put into the order of `permutations` [E, I].
    """
    backwards = permutations.flip(-1)
    matrices = permuted(hessians, backwards)
    matrices.diagonal(dim1=-2, dim2=-1).copy_(diagonals.gather(-1, backwards))
    panel = None
    if matrices.is_cuda and len(matrices) > 1:
        panel = PANEL_OF_SEVERAL
    elif matrices.is_cuda and matrices.shape[-1] < BLOCKED_FROM:
        panel = matrices.shape[-1]
    failed_at = cholesky_(matrices, panel).tolist()
    reverse_(matrices)
    return matrices, [expert for expert, minor in enumerate(failed_at) if minor]


def _diagonal(energy: Tensor, dead: Tensor, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Return the undamped diagonal [E, I], nowhere 0, and the addition [E, I] of a damping of 1."""
    if config.damp_mode == "mean":
        return energy.masked_fill(dead, 1), energy.mean(-1, keepdim=True).expand_as(energy)
    # A dead column becomes 1, not QUIETEST: if all columns are dead, that share is zero too.
    quietest = QUIETEST * energy.amax(-1, keepdim=True)
    diagonal = energy.clamp(min=quietest).masked_fill(dead, 1)
    return diagonal, diagonal


def _damped(undamped: Tensor, unit: Tensor, damp_percent: Sequence[float]) -> Tensor:
    """Return the damped diagonals [E, I]."""
    if len(set(damp_percent)) == 1:  # then the device needs no tensor from the host
        return undamped + damp_percent[0] * unit
    return undamped + undamped.new_tensor(damp_percent)[:, None] * unit


def _first_dampings(
    config: LayerConfig, energy: Tensor, tokens: int | Sequence[int] | None
) -> list[float]:
    """Return for each diag(H) of `energy` [E, I] the damping ρ that is tried first."""
    n_experts, in_features = energy.shape
    if config.damp_mode == "mean":
        return [config.damp_percent] * n_experts
    if tokens is None:
        raise ValueError("diagonal damping needs the number of tokens")
    if isinstance(tokens, int):
        tokens = [tokens]
    found = []
    for seen in tokens:
        share = TOKENS_PER_COLUMN * in_features / max(seen, 1)
        found.append(min(1.0, max(config.damp_percent, share)))
    return found


def _raise_dampings(damp_percent: list[float], failed: Sequence[int], config: LayerConfig) -> None:
    """Replace the dampings of the experts that `failed` with those to try next.

    Raise NotPositiveDefiniteError for the experts that have tried all.
    """
    last = [expert for expert in failed if _next_damping(damp_percent[expert], config) is None]
    if last:
        raise NotPositiveDefiniteError(damp_percent[last[0]], last)
    for expert in failed:
        damp_percent[expert] = _next_damping(damp_percent[expert], config) or 1.0


def _next_damping(tried: float, config: LayerConfig) -> float | None:
    """Return the damping to try after `tried`, None if there is none."""
    stronger = tried * DAMPING_STEP
    if config.damp_mode == "diagonal" and tried < 1:
        return min(1.0, stronger)
    if stronger >= 1:
        return None
    return stronger


@torch.no_grad()
def cholesky_(matrix: Tensor, panel: int | None = None) -> Tensor:
    """Turn symmetric positive definite matrices [..., n, n] into lower Cholesky factors, in place.

    `panel` is the number of columns that are done at a time; the default depends on the device.
    Return int32 [...]: 0 on success, else, as `torch.linalg.cholesky_ex` does, the order of the
    first leading minor that is not positive; the contents of the matrix are then undefined. Only
    lower triangles are read. Never waits for the device.
    """
    size = matrix.shape[-1]
    panel = panel or PANEL[matrix.device.type]
    if panel < size and splits(matrix) and matrix.shape[:-2].numel() == 1:
        return _scaled_cholesky_(matrix.view(size, size), panel).view(matrix.shape[:-2])
    return _cholesky_(matrix, panel)


def _scaled_cholesky_(matrix: Tensor, panel: int) -> Tensor:
    """Do what `cholesky_` does to one matrix, with its diagonal scaled to numbers below 1."""
    diagonal = matrix.diagonal()
    units = above(diagonal.sqrt().where(diagonal > 0, 1))
    matrix.div_(units[:, None]).div_(units)
    failed_at = _cholesky_(matrix, panel)
    matrix.mul_(units[:, None])
    return failed_at


def _cholesky_(matrix: Tensor, panel: int) -> Tensor:
    size = matrix.shape[-1]
    failed_at = torch.zeros(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        corner = matrix[..., start:stop, start:stop]
        factor, failed_here = torch.linalg.cholesky_ex(corner)
        first_failure = (failed_at == 0) & (failed_here > 0)
        failed_at = torch.where(first_failure, failed_here + start, failed_at)
        if matrix.is_cpu and bool((failed_at > 0).all()):
            break
        corner.copy_(factor)
        matrix[..., start:stop, stop:] = 0
        if stop < size:
            below = matrix[..., stop:, start:stop]
            below.copy_(torch.linalg.solve_triangular(factor.mT, below, upper=True, left=False))
            _subtract_square_(matrix[..., stop:, stop:], below, panel)
    return failed_at


def reverse_(matrix: Tensor) -> None:
    """Reverse the rows and the columns of contiguous matrices [..., n, n] in place."""
    size = matrix.shape[-1] ** 2
    numbers = matrix.view(-1, size)
    for part in row_chunks(numbers.T[: size // 2]):
        front, back = numbers[:, part], numbers[:, size - part.stop : size - part.start]
        kept = front.flip(1)
        front.copy_(back.flip(1))
        back.copy_(kept)


def _subtract_square_(matrix: Tensor, factor: Tensor, panel: int) -> None:
    """Subtract factor factorᵀ from the matrix on and below the diagonal.

    Entries above the diagonal change too if they are in a diagonal block of `panel` columns. The
    products of a single matrix on CUDA run on tensor cores: no entry of its factor exceeds 1.
    """
    on_tensor_cores = splits(factor) and factor.dim() == 2
    left = right = factor
    if on_tensor_cores:
        high, low = split(factor, torch.float16)
        # One product of all parts, except that of the two low ones
        left, right = torch.cat([high, high, low], 1), torch.cat([high, low, high], 1)
    for start in range(0, matrix.shape[-1], panel):
        stop = min(start + panel, matrix.shape[-1])
        target, own = matrix[..., start:, start:stop], right[..., start:stop, :].mT
        if on_tensor_cores:
            target.sub_(exact_product(left[start:], own))
            continue
        add_product_(target, left[..., start:, :], own, alpha=-1)


@torch.no_grad()
@full_precision()
def follow_original(
    weight: Tensor,
    shifts: Sequence[Tensor],
    prepared: HessianFactor,
    strength: Strength,
    drifts: Sequence[Tensor] = (),
    *,
    of_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return W* [O, I], which makes up for the changed inputs of a layer, and its strengths [O].

    `weight` is W [O, I], `shifts` are C₁ and C₂ [I, I], or W C₁ and W C₂ [O, I] if they are
    `of_rows`, `drifts` are E₁ and E₂ [O, I] or none, and `strength` is α (see the module). If it is
    "auto", each row gets the strength that both halves of the text support. W* has the dtype of
    the factors.
    Source: QEP (Arai and Ichikawa 2025, arXiv 2504.09629); James and Stein (1961).
    """
    if of_rows:
        pulls = _sum_and_contrast(shifts, drifts)
    else:
        pulls = _pulls(weight, shifts, drifts, prepared.R.dtype)
    order = prepared.order.permutation
    change, strengths = _change(pulls, prepared.R, prepared.D, order, strength)
    return weight.to(change.dtype) + change, strengths


@torch.no_grad()
@full_precision()
def follow_together(
    weights: Tensor,
    shifts: Sequence[Sequence[Tensor]],
    prepared: HessianFactor,
    strength: Strength,
) -> tuple[Tensor, Tensor]:
    """Return `follow_original` of the weights [E, O, I] of E experts: [E, O, I] and [E, O].

    `shifts` are the two of each expert. A few experts are taken at a time, in the same launches.
    """
    R, D, order = prepared.R, prepared.D, prepared.order.permutation
    followed = weights.to(R.dtype, copy=True)
    strengths = followed.new_empty(weights.shape[:2])
    for some in row_chunks(R, EXPERTS_TO_FOLLOW):
        halves = [torch.stack(half) for half in zip(*shifts[some], strict=True)]
        pulls = _pulls(weights[some], halves, (), R.dtype)
        change, strengths[some] = _change(pulls, R[some], D[some], order[some], strength)
        followed[some].add_(change)
    return followed, strengths


def _change(
    pulls: tuple[Tensor, Tensor], R: Tensor, D: Tensor, order: Tensor, strength: Strength
) -> tuple[Tensor, Tensor]:
    """Return α X [..., O, I] with X (H + λI) = W C + E, and α of each row [..., O].

    `pulls` are W C + E and its contrast of two halves of the text.
    """
    triangle = _Triangle.of(R)
    # Solve X R D Rᵀ = W C + E from the right: first with Rᵀ, then with R.
    pull = triangle.solve(_columns(pulls[0], order), transposed=True)
    if strength == "auto":
        noise = triangle.solve(_columns(pulls[1], order), transposed=True, exact=False)
        strengths = _supported(pull, noise, D.unsqueeze(-2))
    else:
        strengths = torch.full_like(pull[..., 0], strength)
    found = triangle.solve(pull.div_(D.unsqueeze(-2)))
    return strengths.unsqueeze(-1) * _columns(found, order.argsort()), strengths


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of matrices [..., O, I] in the `order` [..., I]."""
    return matrix.gather(-1, order.unsqueeze(-2).expand(matrix.shape))


def _pulls(
    weight: Tensor, shifts: Sequence[Tensor], drifts: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return W C₁ + E₁ + W C₂ + E₂ [..., O, I], and the same with the second half subtracted.

    On tensor cores the factors of this contrast are rounded to bfloat16, because it only decides
    the strength.
    """
    if not splits(shifts[0]):
        weight = weight.to(dtype)
        return _sum_and_contrast([weight @ shift.to(dtype) for shift in shifts], drifts)
    both, contrast = _sum_and_contrast(shifts, ())
    both = multiply(weight, both)
    contrast = exact_product(weight.bfloat16(), contrast.bfloat16())
    if drifts:
        drift, of_drifts = _sum_and_contrast(drifts, ())
        both, contrast = both.add_(drift), contrast.add_(of_drifts)
    return both, contrast


def _sum_and_contrast(halves: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum and the difference of two halves, after `others` were added if there are."""
    first, second = halves
    if others:
        first, second = first + others[0], second + others[1]
    return first + second, first - second


def _supported(pull: Tensor, noise: Tensor, D: Tensor) -> Tensor:
    """Return α of each row [..., O], 0 for a row without a pull."""
    whole, peculiar = (pull.square() / D).sum(-1), (noise.square() / D).sum(-1)
    smallest = torch.finfo(whole.dtype).tiny
    best = (1 - peculiar / whole.clamp(min=smallest)).clamp(min=0).masked_fill(whole == 0, 0)
    return USED_SHARE * best


@dataclass(frozen=True, slots=True)
class _Triangle:
    """Upper triangles R [..., I, I] with a diagonal of ones."""

    R: Tensor
    parts: Parts  # on tensor cores; elsewhere none

    @classmethod
    def of(cls, R: Tensor) -> _Triangle:
        """Return the triangle, with its parts if products of them run on tensor cores."""
        if splits(R):
            return cls(R, split(R))
        return cls(R, ())

    def solve(self, matrix: Tensor, *, transposed: bool = False, exact: bool = True) -> Tensor:
        """Return the X [..., O, I] with X R = `matrix`, or X Rᵀ = `matrix` if it is `transposed`.

        On tensor cores each panel of columns receives the panels before it in one product; if R is
        transposed, those after it. If X need not be `exact`, the factors are rounded to bfloat16.
        """
        triangle, parts = self.R, self.parts[: 1 + exact]
        if transposed:
            triangle, parts = triangle.mT, [part.mT for part in parts]
        if not parts:
            return _solve_directly(matrix, triangle, upper=not transposed)
        solved = torch.empty_like(matrix)
        done = [torch.empty_like(matrix, dtype=torch.bfloat16) for _ in parts]
        for own, known in _panels(matrix.shape[-1], backwards=transposed):
            rest = matrix[..., own]
            if known.start < known.stop:
                before = [part[..., known] for part in done]
                factors = [part[..., known, own] for part in parts]
                rest = rest - multiply_split(before, factors)
            found = _solve_directly(rest, triangle[..., own, own], upper=not transposed)
            solved[..., own] = found
            if known.stop - known.start + found.shape[-1] == matrix.shape[-1]:
                break  # the last panel
            if not exact:
                found = found.bfloat16()
            for part, of_found in zip(done, parts_of(found), strict=True):
                part[..., own] = of_found
        return solved


def _panels(size: int, *, backwards: bool) -> list[tuple[slice, slice]]:
    """Return each panel of columns, in the order of solution, and those that are solved before."""
    panels = []
    for start in range(0, size, SOLVED_COLUMNS):
        own, known = slice(start, min(start + SOLVED_COLUMNS, size)), slice(0, start)
        if backwards:
            known = slice(own.stop, size)
        panels.append((own, known))
    if backwards:
        panels.reverse()
    return panels


def _solve_directly(matrix: Tensor, triangle: Tensor, *, upper: bool) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(
        triangle, matrix, upper=upper, left=False, unitriangular=True
    )
    return solved
