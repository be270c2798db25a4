"""The gradients of the model's loss at the outputs of linears, which loss-aware rounding needs.

`sum_gradients` runs before the block loop. For each loss-aware linear the energy ‖g‖² of the
gradient g of each token is written, and for most of them G = Σ g gᵀ [O, O], which is a factor of
the Fisher information. The pass itself is in `reverse_pass.py`.

The sums are Hessians of gradients: tokens are limited, and batches are added in an order that does
not depend on the number of processes. They stay on the disk until the output is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_cli.errors import InputError
from gptq_cli.events import PhaseStarted
from gptq_cli.models.stream import token_ids
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.resume import Identity
from gptq_cli.quantization.reverse_pass import (
    NoGradientError,
    PassStore,
    ReversePass,
    not_finite,
    pieces_of,
)
from gptq_cli.quantization.run_state import OutputGradients, Run
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.hessian import HessianAccumulator, HessianOfBatches, factors_of_tokens
from gptq_cli.storage.durable import remove
from gptq_cli.storage.manifest import digest
from gptq_cli.storage.work_directory import WorkDirectory

WITHOUT = "leave out loss_aware (--no-loss-aware)"


def sum_gradients(run: Run, work: WorkDirectory | None, identity: Identity) -> None:
    """Give `run` the gradients of its loss-aware layers, summed now or by an earlier call.

    `work` is None on processes that write nothing. Raises InputError E_GRADIENT if the gradient of
    the model cannot be computed block by block, or is not finite.
    """
    store = None
    if work is not None:
        store = PassStore(work.gradients, digest(identity), run.report)
    summing = _Summing(run, pieces_of(run.batches), store)
    done = None
    if store is not None:
        done = store.n_steps
    if run.ranks.broadcast(done) == summing.n_steps:
        run.report(PhaseStarted("resume", "using the gradients of an earlier call"))
    else:
        try:
            with torch.inference_mode(False), torch.no_grad():
                summing.carry_out()
        except NoGradientError as error:
            if work is not None:
                remove(work.gradients)  # the next call would only find the same
            raise _refused(error) from error
    sizes = [token_ids(batch).numel() for batch in run.batches]
    run.gradients = SummedGradients(run.ranks, run.stream.device, store, summing.tokens, sizes)


def _refused(error: NoGradientError) -> InputError:
    hint = WITHOUT
    if error.hint:
        hint = f"{error.hint}, or {WITHOUT}"
    return InputError(
        "E_GRADIENT", f"loss_aware needs the model's gradient, but {error}", hint=hint
    )


@dataclass(frozen=True, slots=True)
class SummedGradients:
    """The gradients of all loss-aware layers over `tokens`, which the leader has in its `store`.

    `sizes` are the numbers of tokens of all batches, which may be more.
    """

    ranks: Ranks
    device: torch.device
    store: PassStore | None
    tokens: int
    sizes: Sequence[int]

    def of(self, layer: LayerPlan) -> OutputGradients:
        """Return the gradients of a layer, on the device of every process; all of them must ask."""
        found = None
        if self.store is not None:
            sums, _ = self.store.read(_file(layer.block))
            found = sums[layer.name].clone()
        sums = self.ranks.broadcast(found).to(self.device)
        return OutputGradients(sums, self.tokens)

    def factors(self, layers: Sequence[LayerPlan]) -> Sequence[Tensor]:
        """Return the factors of tokens [n] for each batch, for layers with the same inputs.

        There are none if some layer is not loss-aware, or does not see each token once. Tokens
        behind those of the pass count as the median token. All processes must ask for it.
        """
        if not all(layer.is_loss_aware for layer in layers):
            return ()
        found = None
        if self.store is not None:
            _, energies_of_block = self.store.read(_file(layers[0].block))
            found = energies_of_all(layers, energies_of_block)
        energies = self.ranks.broadcast(found)
        if not len(energies):
            return ()
        of_all = torch.ones(sum(self.sizes), device=self.device)
        of_all[: self.tokens] = factors_of_tokens(energies.to(self.device))
        factors: Sequence[Tensor] = of_all.split(self.sizes)
        return factors


class _Summing(ReversePass):
    """The pass that sums the gradients of loss-aware layers, block by block."""

    def reverse_block(self, index: int) -> Sequence[str]:
        self._sums: dict[str, HessianOfBatches] = {}
        self._seen: list[list[tuple[str, Tensor]]] = [[] for _ in self.pieces]
        layers = [layer for layer in self.run.plan.loss_aware if layer.block == index]
        for layer in layers:
            if layer.sums_gradients:
                rows, device = layer.out_features, self.stream.device
                self._sums[layer.name] = HessianOfBatches(rows, device, limited=True)
        return [layer.name for layer in layers]

    def note(self, piece: int, name: str, inputs: Tensor, gradient: Tensor) -> None:
        del inputs
        energies = gradient.float().square().sum(-1).flatten()
        self._seen[piece].append((name, energies))
        if name in self._sums:
            self._sums[name].add(self.share.start + piece, gradient)

    def end_block(self, index: int) -> tuple[dict[str, Any], list[str], Any]:
        sums = {name: self._whole(name, seen).cpu() for name, seen in self._sums.items()}
        return {_file(index): (sums, self._joined())}, [], None

    def _joined(self) -> dict[str, Tensor]:
        """Return the energies of the tokens of all pieces; a linear must have those of each."""
        mine = []
        for seen, piece in zip(self._seen, self.pieces, strict=True):
            mine.append(energies_of(seen, token_ids(piece).numel()))
        pieces = self.ranks.all_gather(mine)
        joined = {}
        for name in pieces[0]:
            if not all(name in piece for piece in pieces):
                continue
            joined[name] = torch.cat([piece[name] for piece in pieces]).cpu()
            if not joined[name].isfinite().all():
                raise not_finite(name, self.stream.dtype)
        return joined

    def _whole(self, name: str, seen: HessianOfBatches) -> Tensor:
        """Return the sum [O, O] over all processes."""
        whole: HessianAccumulator = self.ranks.sum_hessians(seen, self.n_pieces)
        if whole.first_not_finite() is not None:
            raise not_finite(name, self.stream.dtype)
        return whole.hessian


def _file(block: int) -> str:
    """Return the name of the file with the sums and the energies of a block, by linear."""
    return f"sums-{block}"


def energies_of(seen: Sequence[tuple[str, Tensor]], tokens: int) -> dict[str, Tensor]:
    """Return the energies [tokens] of each linear that sees every token once.

    `seen` are the energies of the tokens of each call, by the name of the linear.
    """
    calls = Counter(name for name, _ in seen)
    energies = {}
    for name, of_call in seen:
        if calls[name] == 1 and len(of_call) == tokens:
            energies[name] = of_call
    return energies


def energies_of_all(layers: Sequence[LayerPlan], known: Mapping[str, Tensor]) -> Tensor:
    """Return the energies [tokens], summed over layers of a block; [0] if one has none."""
    found = []
    for layer in layers:
        if layer.name not in known:
            return torch.zeros(0)
        found.append(known[layer.name])
    return torch.stack(found).sum(0)
