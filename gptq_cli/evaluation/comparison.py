"""Two checkpoints beside each other: their weights and, on a text, their predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptq_cli.evaluation.perplexity import EvalResult, evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import Report, ignore
from gptq_cli.inspection.compare import Comparison, compare_checkpoints


@dataclass(frozen=True, slots=True)
class CompareResult:
    """The distance of checkpoint `a` from the reference `b`.

    `weights` are the differences of the tensors. `predictions` hold KL and top-1 agreement, those
    of each window too; they are None if there was no text.
    """

    a: str
    b: str
    weights: Comparison
    predictions: EvalResult | None

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        values = {"a": self.a, "b": self.b, **self.weights.to_json()}
        values |= {"predictions": None, "windows": None}
        if self.predictions is not None:
            values["predictions"] = self.predictions.to_json()
            values["windows"] = self.predictions.windows_to_json()
        return values


def compare_models(
    a: str, b: str, request: EvalRequest | None = None, report: Report = ignore
) -> CompareResult:
    """Return the distance of A from B, each a directory or a Hub id, quantized or not.

    The predictions are compared on the text of `request`, of which B is the baseline. Raises what
    `compare_checkpoints` and `evaluate_perplexity` raise.
    """
    weights = compare_checkpoints(a, b, report)
    predictions = None
    if request is not None:
        predictions = evaluate_perplexity(a, request, report)
    return CompareResult(a, b, weights, predictions)
