"""Measure the harm of each unit to first order: by the gradients at the outputs of its linears.

If a linear is rounded, its outputs for a token change by ΔW x, and the log-likelihood of the labels
by g · ΔW x, with the gradient g at these outputs. For labels that the model itself draws, half of
the mean of (g · ΔW x)² over tokens is the KL to the unquantized model in the second order (Martens
2014, arXiv 1412.1193). So one pass in reverse (`quantization/reverse_pass.py`) measures all linears
of the model: each block is rounded when the pass goes forward, at one width, the reference, with
the Hessians of the unquantized inputs, and ΔW x is taken on the way back. The harm of a unit is the
sum over its linears. That of the head is the KL itself.

The text of the gradients, the probe, is not that of the Hessians, to which rounding fits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_cli.allocation.harms import Measurement
from gptq_cli.allocation.rounding import (
    put_weights,
    replaced,
    round_layers,
    rounded_head,
    run_batches,
    weights_of,
)
from gptq_cli.allocation.units import Unit
from gptq_cli.config.layer import HEAD
from gptq_cli.events import Report
from gptq_cli.models.block_calls import State
from gptq_cli.models.stream import Batch, LoadedBlock
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.block_loop import block_forwards
from gptq_cli.quantization.layers import LayerSolver
from gptq_cli.quantization.reverse_pass import (
    PassStore,
    ReversePass,
    differentiating,
    not_finite,
)
from gptq_cli.quantization.run_state import Run
from gptq_cli.runtime.open_model import HiddenStates
from gptq_cli.solver.quantized_linear import QuantizedLinear


class HarmPass(ReversePass):
    """The pass that measures the harm of `units` on the `pieces` of the probe.

    `run` has the plan in which every layer is rounded as for the measurement, and the calibration
    batches, which run ahead of the pieces.
    """

    def __init__(
        self,
        run: Run,
        units: Sequence[Unit],
        pieces: Sequence[Batch],
        store: PassStore | None,
        report: Report,
    ) -> None:
        share = run.ranks.share(len(run.batches))
        ahead = run.batches[share.start : share.stop]
        super().__init__(run, pieces, store, ahead, report)
        self._units, self._first_batch = units, share.start
        self._solver = LayerSolver(run)
        run.keep = self._keep
        self._rounded: dict[str, tuple[Any, ...]] = {}
        self._errors: dict[str, Tensor] = {}  # ΔW [O, I] of the block in reverse, by linear
        self._squares: list[defaultdict[str, Tensor]] = []  # sums of (g · ΔW x)² in each piece

    def measure(self) -> Measurement:
        """Return the harms of all units, which are added up without interactions.

        Raises NoGradientError if the gradient of the model cannot be computed block by block.
        """
        # Tensors that are made in inference mode cannot be used by a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self.carry_out()
        of_linears: dict[str, float] = {}
        for found in self.found:
            of_linears |= found or {}
        harms = {}
        for unit in self._units:
            harms[unit.name] = math.fsum(of_linears[name] for name in unit.layers)
        return Measurement(dict(sorted(harms.items())), math.fsum(harms.values()), self.tokens)

    # ------------------------------------------------------------ forward

    def embedded(self, states: Sequence[State]) -> None:
        memory, n_batches = self.run.budget.memory, len(self.run.batches)
        self._hidden = HiddenStates(states, memory, self._first_batch, n_batches)

    def resumed(self, n_steps: int) -> None:
        if n_steps > self.n_blocks:
            return
        saved = None
        if self.store is not None:
            saved = self.store.read(_ahead(n_steps))
        self._hidden.restore(self.ranks.scatter(saved, self._hidden.n_all))

    def forward_block(self, index: int, block: LoadedBlock) -> tuple[dict[str, Any], list[str]]:
        self._rounded = {}
        with block_forwards(block, [self._hidden], self.run) as forwards:
            before = weights_of(forwards.linears)
            gathered = run_batches(forwards, self._hidden, self.run)
            round_layers(gathered, forwards.linears, self._solver)
            put_weights(forwards.linears, before)
        after = self.ranks.gather(self._hidden.stored)
        files = {_rounded(index): self._rounded, _ahead(index + 1): after}
        needless = []
        if index:
            needless = [_ahead(index)]
        return files, needless

    def _keep(self, layers: Sequence[tuple[LayerPlan, QuantizedLinear]]) -> None:
        """Keep the codes of rounded layers on the host."""
        for layer, quantized in layers:
            tensors = (quantized.codes, quantized.scales, quantized.zeros)
            columns = quantized.group_of_column
            found = [tensor.cpu() for tensor in (*tensors, columns)]
            self._rounded[layer.name] = (*found, quantized.bits)

    def at_the_head(self) -> tuple[dict[str, float], list[str]]:
        needless = [_ahead(self.n_blocks)]
        head = rounded_head(self._hidden, self._solver)
        if head is None:
            return {}, needless
        mine: list[float] = []
        self.together(partial(self._compare_head, head, mine))
        total = math.fsum(self.ranks.all_gather(mine))
        if not math.isfinite(total):
            raise not_finite(HEAD, self.stream.dtype)
        return {HEAD: total / self.tokens}, needless

    def _compare_head(self, head: Tensor, kl: list[float]) -> None:
        """Add to `kl` that of each piece if the output head has the weight `head`."""
        with differentiating("the output head"):
            for state in self.states:
                kl.append(self._kl_of_head(state, head))

    def _kl_of_head(self, state: Tensor, head: Tensor) -> float:
        """Return the sum of the KL over the tokens of a piece if the head has another weight."""
        found = []
        with self.stream.head() as logits:
            for few in self.parts_for_logits(state):
                ids = torch.zeros(1, len(few), dtype=torch.long)
                wanted = logits(ids, few[None])[0].float().log_softmax(-1)
                with replaced(self.stream.output_linear, head):
                    got = logits(ids, few[None])[0].float().log_softmax(-1)
                found.append(float((wanted.exp() * (wanted - got)).sum()))
        return math.fsum(found)

    # ------------------------------------------------------------ in reverse

    def reverse_block(self, index: int) -> Sequence[str]:
        saved = None
        if self.store is not None:
            saved = self.store.read(_rounded(index))
        self._errors = {}
        for name, (*tensors, bits) in self.ranks.broadcast(saved).items():
            on_device = [tensor.to(self.stream.device) for tensor in tensors]
            codes, scales, zeros, columns = on_device
            error = QuantizedLinear(codes, scales, zeros, columns, bits).dequantize()
            transposed = self.run.layers[name].transposed
            error -= self.stream.linear_weight(name, transposed=transposed)
            self._errors[name] = error.to(self.stream.dtype)
        self._squares = [defaultdict(self._zero) for _ in self.pieces]
        return list(self._errors)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.stream.device)

    def note(self, piece: int, name: str, inputs: Tensor, gradient: Tensor) -> None:
        changes = (inputs @ self._errors[name].T).float()
        of_tokens = changes.mul_(gradient).sum(-1)
        self._squares[piece][name] += of_tokens.square().sum()

    def end_block(self, index: int) -> tuple[dict[str, Any], list[str], dict[str, float]]:
        mine = []
        for squares in self._squares:
            mine.append({name: float(total) for name, total in squares.items()})
        pieces = self.ranks.all_gather(mine)
        harms = {}
        for name in self._errors:
            total = math.fsum(piece.get(name, 0.0) for piece in pieces)
            if not math.isfinite(total):
                raise not_finite(name, self.stream.dtype)
            harms[name] = total / 2 / self.tokens
        self._errors = {}
        return {}, [_rounded(index)], harms


def _ahead(index: int) -> str:
    """Return the name of the file with the states of the calibration before block `index`."""
    return f"calibration-{index}"


def _rounded(index: int) -> str:
    """Return the name of the file with the codes of the rounded linears of a block."""
    return f"rounded-{index}"
