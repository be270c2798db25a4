"""`gptq compare`: how far one checkpoint is from another, by weights and by what they predict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, aligned, joined
from gptq_cli.cli.progress import Progress
from gptq_cli.config.finding import clock
from gptq_cli.config.resolve import check_flags
from gptq_cli.errors import ConfigError

if TYPE_CHECKING:
    from gptq_cli.evaluation.perplexity import EvalResult
    from gptq_cli.inspection.compare import Comparison

WORST = 10
WORST_WINDOWS = 5
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
        help="measure KL and top-1 agreement on it: a dataset, a file or a folder",
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
    """Compare two checkpoints: weights, and with --text what they predict.

    Each may be quantized or not. The error of a weight is |A-B|^2 / |B|^2.
    With --text both models run block by block on the CPU or one GPU; the
    windows of text with the largest divergence are listed, --json has all.

    Example: gptq compare ./Qwen3-0.6B-GPTQ-Int4-g128 ./Qwen3-0.6B
    """
    if text is None:
        _check_alone(settings, max_windows)
    check_flags(settings)
    console = Console(as_json, quiet)
    from gptq_cli.inspection.compare import compare_checkpoints

    weights = compare_checkpoints(a, b)
    data = {"a": a, "b": b, **weights.to_json(), "predictions": None, "windows": None}
    predictions = None
    if text is not None:
        predictions = _evaluate(console, a, b, text, settings, max_windows)
        data["predictions"] = predictions.to_json()
        data["windows"] = [asdict(window) for window in predictions.per_window]
    console.result(data, joined(_lines(weights, predictions)), f"{_mean_error(weights):.6g}")


def _check_alone(settings: o.Settings, max_windows: int | None) -> None:
    """ConfigError E_CFG_CONFLICT for options that mean nothing without --text."""
    alone = list(settings)
    if max_windows is not None:
        alone.append("max_windows")
    if alone:
        name = alone[0].replace("_", "-")
        raise ConfigError(
            "E_CFG_CONFLICT", f"--{name} needs --text", hint="add --text, or leave it out"
        )


def _evaluate(
    console: Console,
    model: str,
    baseline: str,
    text: str,
    settings: o.Settings,
    max_windows: int | None,
) -> EvalResult:
    from gptq_cli.api import evaluate_perplexity
    from gptq_cli.evaluation.request import EvalRequest

    request = EvalRequest(dataset=text, baseline=baseline, max_windows=max_windows, **settings)
    with Progress(console) as progress:
        return evaluate_perplexity(model, request, on_event=progress)


def _mean_error(found: Comparison) -> float:
    """Mean over the tensors that differ."""
    errors = [tensor.relative_error for tensor in found.different]
    return sum(errors) / len(errors) if errors else 0.0


def _lines(found: Comparison, predictions: EvalResult | None) -> list[str]:
    different = sorted(found.different, key=lambda tensor: -tensor.relative_error)
    same = len(found.tensors) - len(different)
    lines = [f"{same} of {len(found.tensors)} tensors are the same, {len(different)} differ"]
    if different:
        lines[0] += f": mean error {_mean_error(found):.2e}"
        lines.append("worst")
        cells = [("error", "largest", "tensor")]
        cells += [
            (f"{t.relative_error:.2e}", f"{t.largest:.2e}", t.name) for t in different[:WORST]
        ]
        lines += [f"  {line}" for line in aligned(cells)]
    for label, names in (("A", found.only_a), ("B", found.only_b)):
        lines += (
            [f"only in {label}  {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"]
            if names
            else []
        )
    if predictions is not None:
        p = predictions
        lines.append(f"perplexity  {p.perplexity:.4f}, reference {p.baseline_perplexity:.4f}")
        lines.append(f"agreement   KL {p.kl:.4g}, top-1 {p.top1_agreement:.2%}")
        lines.append(
            f"protocol    {p.dataset}, {p.windows} windows of {p.seqlen} tokens, {p.dtype}, {clock(p.seconds)}"
        )
        lines += _window_lines(p)
    return lines


def _window_lines(found: EvalResult) -> list[str]:
    """The windows where the two diverge most."""
    worst = sorted(found.per_window, key=lambda window: -window.kl)[:WORST_WINDOWS]
    cells = [("KL", "top-1", "perplexity", "reference", "first token")]
    for w in worst:
        perplexities = (f"{w.perplexity:.4f}", f"{w.baseline_perplexity:.4f}")
        cells.append((f"{w.kl:.4g}", f"{w.top1_agreement:.2%}", *perplexities, str(w.first_token)))
    return ["worst windows", *(f"  {line}" for line in aligned(cells, right={4}))]
