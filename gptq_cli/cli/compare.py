"""`gptq compare`: the distance between two checkpoints, by weights and by predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, aligned, indented_lines, joined
from gptq_cli.cli.progress import Progress
from gptq_cli.config.resolve import check_flags, with_variables
from gptq_cli.errors import clock, counted
from gptq_cli.evaluation.verdict import verdict_lines

if TYPE_CHECKING:
    from gptq_cli.evaluation.perplexity import EvalResult
    from gptq_cli.inspection.compare import Comparison

WORST = 10  # tensors in the table
WORST_WINDOWS = 5
SHOWN_NAMES = 3  # of tensors that only one checkpoint has
WITH_TEXT = ("seqlen", "device", "dtype", "trust_remote_code")
A = Annotated[
    str,
    typer.Argument(
        metavar="A", help="checkpoint to judge: directory or Hub id", show_default=False
    ),
]
B = Annotated[
    str, typer.Argument(metavar="B", help="reference, most often the original", show_default=False)
]
Text = Annotated[
    str | None,
    o.plain(
        "--text",
        help="dataset, file or folder on which to measure KL and top-1 agreement",
        metavar="TEXT",
    ),
]


@o.takes_settings(*WITH_TEXT)
def compare(
    a: A,
    b: B,
    *,
    text: Text = None,
    settings: o.Settings,
    max_windows: o.MaxWindows = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare two checkpoints: weights and, with --text, predictions.

    Each may be quantized or not. The weight error is |A-B|^2 / |B|^2.
    With --text both models run block by block on the CPU or one GPU. The
    windows of text with the largest divergence are listed; --json shows
    all of them.

    Example: gptq compare ./Qwen3-0.6B-GPTQ-Int4-g128 ./Qwen3-0.6B
    """
    check_flags(settings)
    if text is not None:
        settings = with_variables(settings, os.environ)
    console = Console(as_json, quiet)
    from gptq_cli.api import compare

    with Progress(console) as progress:
        found = compare(a, b, text, max_windows=max_windows, on_event=progress, **settings)
    lines = _lines(found.weights, found.predictions)
    short = f"{found.weights.mean_error:.6g}"
    if found.predictions is not None:
        short = f"{found.predictions.kl:.6g}"
    console.result(found.to_json(), joined(lines), short)


def _lines(found: Comparison, predictions: EvalResult | None) -> list[str]:
    n_different, n_tensors = len(found.different), len(found.tensors)
    first = f"{n_tensors - n_different} of {n_tensors} tensors are the same, {n_different} differ"
    if n_different:
        lines = [f"{first}: mean weight error {found.mean_error:.2e}", *_worst_lines(found)]
    else:
        lines = [first]
    lines += _missing_lines("A", found.only_a) + _missing_lines("B", found.only_b)
    if predictions is not None:
        lines += _prediction_lines(predictions)
    return lines


def _worst_lines(found: Comparison) -> list[str]:
    """Return a table of the tensors with the largest weight errors."""
    worst = sorted(found.different, key=lambda tensor: -tensor.relative_error)[:WORST]
    cells = [("weight error", "largest", "tensor")]
    for tensor in worst:
        cells.append((f"{tensor.relative_error:.2e}", f"{tensor.largest:.2e}", tensor.name))
    return ["worst", *indented_lines(aligned(cells))]


def _missing_lines(label: str, names: Sequence[str]) -> list[str]:
    """Return a line about tensors that only the checkpoint `label` has, if there are some."""
    if not names:
        return []
    more = " ..." if len(names) > SHOWN_NAMES else ""
    return [f"only in {label}  {', '.join(names[:SHOWN_NAMES])}{more}"]


def _prediction_lines(found: EvalResult) -> list[str]:
    windows = f"{counted(found.windows, 'window')} of {found.seqlen} tokens"
    assert found.kl is not None
    lines = [
        f"perplexity  {found.perplexity:.4f}, reference {found.baseline_perplexity:.4f}",
        f"agreement   KL {found.kl:.4g}, top-1 {found.top1_agreement:.2%}",
        *verdict_lines(found.kl),
        f"protocol    {found.dataset}, {windows}, {found.dtype}, {clock(found.seconds)}",
        "worst windows",
    ]
    worst = sorted(found.per_window, key=lambda window: -window.kl)[:WORST_WINDOWS]
    cells = [("KL", "top-1", "perplexity", "reference", "first token")]
    for w in worst:
        perplexities = (f"{w.perplexity:.4f}", f"{w.baseline_perplexity:.4f}")
        cells.append((f"{w.kl:.4g}", f"{w.top1_agreement:.2%}", *perplexities, str(w.first_token)))
    return lines + indented_lines(aligned(cells, right={4}))
