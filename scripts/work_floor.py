"""The least work of quantizing one block, and the least time that it takes at given rates.

The floor of a part is the largest of three times: its products at the highest rate that keeps their
precision; its bytes in the memory of the device, each tensor read or written once; and its steps on
single weights in kernels. No launch, no wait, no row of tiles that is partly filled, and no pass
over memory that another order of the work could spare is in it. The parts are those of
`count_gpu_work.py`:

forward   products of bfloat16 with each weight and of causal attention; weights and states once
hessian   the half of x xᵀ on and above the diagonal, for each input of linears; inputs once
shift     (x₀ - x) xᵀ in bfloat16 for each input, if the layers follow the unquantized model, and
          (r₀ - r) xᵀ if one of them writes into the hidden states r; or in place of both, if it is
          less, W (x₀ - x), to which r₀ - r is added, and the product of this with xᵀ
factor    I³ / 3 operations in the precision of float32
follow    two triangular solutions in that of float32, and with `auto` a third one in bfloat16; and
          if C is summed, its products with the weight: two of bfloat16, since a weight has no more
          bits, and with `auto` a third one for the contrast of two halves
search    each candidate for the scale once on each weight
columns   the feedback between columns, half a product; each weight rounded once
refine    one product for all scales and one for each sweep, which rounds each weight again
errors    half a product for the energy of a weight and half for that of its error, in float32's
put back  codes read and weights written once
pack      codes read and packed codes written once
copy      weights from the host or packed codes to it, whichever takes longer, beside other parts

A product is that of the weights with a matrix [I, I]. Those of `columns` and `refine` take factors
of 16 bits, as the program takes of float16; those in the precision of float32 are three of
bfloat16, or one in float32 if that is faster. Routers and norms are left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shapes import Shape

from gptq_cli.config.layer import LayerConfig
from gptq_cli.planning.device_rates import DeviceRates, n_candidates

WEIGHT, CODE, FLOAT = 2, 1, 4  # bytes
COPY = "copy"  # the part that runs beside the others


@dataclass(frozen=True, slots=True)
class Text:
    """The calibration text: its tokens, in windows of `seqlen`."""

    tokens: int
    seqlen: int


class BlockWork:
    """The least work of one block of `shape`, by part and kind; see the module."""

    def __init__(self, shape: Shape, config: LayerConfig, text: Text) -> None:
        self.shape, self.config, self.text = shape, config, text
        self.streams = 1
        if config.follows_original:
            self.streams = 2
        self.parts: dict[str, Counter[str]] = defaultdict(Counter)
        self._add_attention()
        for in_features, outs, copies in shape.inputs:
            tokens = float(text.tokens)
            if copies > 1:
                tokens *= shape.experts_per_token / copies
            self._add_input(in_features, tokens, copies)
            if config.follows_original:
                self._add_shift(in_features, outs, tokens, copies)
            self._add_weights(in_features, copies * sum(outs), tokens)

    def _add(self, part: str, **work: float) -> None:
        """Add to a part: operations by precision, bytes, and steps by kind."""
        for kind, amount in work.items():
            self.parts[part][kind] += amount

    def _add_attention(self) -> None:
        """Add the products of each token with the tokens before it, and the hidden states."""
        text, streams = self.text, self.streams
        pairs = text.tokens * (text.seqlen + 1) / 2
        states = 2 * WEIGHT * text.tokens * self.shape.hidden
        products = 2 * pairs * self.shape.attended
        self._add("forward", bfloat16=streams * products, bytes=streams * states)

    def _add_input(self, n: int, tokens: float, copies: int) -> None:
        """Add what linears with one input of `n` features share, in each of `copies`."""
        inputs = copies * WEIGHT * tokens * n
        matrix = copies * FLOAT * n**2
        self._add("hessian", bfloat16=copies * tokens * n * (n + 1), bytes=inputs + matrix)
        self._add("factor", float32=copies * n**3 / 3, bytes=2 * matrix)

    def _add_shift(self, n: int, outs: Sequence[int], tokens: float, copies: int) -> None:
        """Add the shift of an input of `n` features, and what its linears take to follow it."""
        rows, written = sum(outs), self._written(n, outs)
        sums = products = n + written
        with_shifts, contrast = 2.0, 0.0
        if self.config.asymmetric_calibration == "auto":
            with_shifts, contrast = 3.0, 0.5
        if 2 * rows < products:  # W C is summed in place of C and the drift
            sums, products, with_shifts = rows, 2 * rows, 0.0
        states = 2 * WEIGHT * tokens * (n + written)
        self._add(
            "shift",
            bfloat16=2.0 * copies * tokens * n * products,
            bytes=copies * (states + FLOAT * n * sums),
        )
        weights = copies * rows * n
        self._add(
            "follow",
            float32=2.0 * weights * n,
            bfloat16=2.0 * weights * n * (with_shifts + contrast),
            bytes=2 * FLOAT * weights,
        )

    def _written(self, n: int, outs: Sequence[int]) -> int:
        """Return to how many numbers of the hidden states a linear with `n` inputs adds outputs.

        Those of a mixture add to none by themselves, as their outputs are summed first.
        """
        is_of_mixture = self.shape.experts and n == self.shape.intermediate
        if is_of_mixture or list(outs) != [self.shape.hidden]:
            return 0
        return self.shape.hidden

    def _add_weights(self, n: int, rows: int, tokens: float) -> None:
        """Add what linears with `n` inputs and `rows` outputs together take for their weights."""
        config, streams, weights = self.config, self.streams, rows * n
        product = 2.0 * weights * n  # of the weights with a matrix [n, n]
        coded = config.bits / 8 * weights
        products = streams * 2 * weights * tokens
        self._add("forward", bfloat16=products, bytes=streams * WEIGHT * weights)
        self._add("columns", bfloat16=product / 2, bytes=(WEIGHT + CODE) * weights, rounded=weights)
        self._add("errors", float32=product, bytes=(WEIGHT + CODE) * weights)
        self._add("put back", bytes=(CODE + WEIGHT) * weights)
        self._add("pack", bytes=CODE * weights + coded)
        self._add(COPY, to_device=WEIGHT * weights, to_host=coded)
        tried = n_candidates(config) * weights
        if tried:
            self._add("search", tried=tried, bytes=WEIGHT * weights)
        if config.refine_sweeps:
            sweeps = 1 + config.refine_sweeps
            moved = sweeps * 2 * FLOAT * weights
            rounded = config.refine_sweeps * weights
            self._add("refine", bfloat16=sweeps * product, bytes=moved, rounded=rounded)


def floors(shape: Shape, config: LayerConfig, text: Text, rates: DeviceRates) -> dict[str, float]:
    """Return the least seconds of each part of a block."""
    exact = max(rates.float32, rates.bfloat16 / 3)
    found = {}
    for name, work in BlockWork(shape, config, text).parts.items():
        products = work["bfloat16"] / rates.bfloat16 + work["float32"] / exact
        moving = work["bytes"] / rates.memory
        stepping = work["rounded"] / rates.column_rows + work["tried"] / rates.candidates
        copying = max(work["to_device"], work["to_host"]) / rates.pinned_copy
        found[name] = max(products, moving, stepping, copying)
    return found


def floor_of_block(parts: Mapping[str, float]) -> float:
    """Return the least seconds of a block whose parts have these floors; copies run beside."""
    working = sum(seconds for name, seconds in parts.items() if name != COPY)
    return max(working, parts[COPY])
