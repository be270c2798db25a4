"""`gptq compare`: how far one checkpoint is from another, by weights and by what they predict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, on_one_line
from gptq_cli.cli.progress import Progress
from gptq_cli.cli.table import aligned
from gptq_cli.config.resolve import check_flags
from gptq_cli.config.units import clock
from gptq_cli.errors import ConfigError

if TYPE_CHECKING:
    from gptq_cli.pipeline.compare import Comparison
    from gptq_cli.pipeline.evaluate import EvalResult

WORST = 10
WORST_WINDOWS = 5
WITH_TEXT = ("seqlen", "max_windows", "device", "dtype")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="checkpoint to judge: directory or Hub id", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="reference, most often the original", show_default=False)],
    text: Annotated[
        str | None,
        o.plain("--text", help="measure KL and top-1 agreement on it: a dataset, a file or a folder", metavar="TEXT"),
    ] = None,
    seqlen: o.SeqLen = None,
    max_windows: o.MaxWindows = None,
    device: o.Device = None,
    dtype: o.DType = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare two checkpoints: weights, and with --text what they predict.

    Each may be quantized or not. The error of a weight is |A-B|^2 / |B|^2.
    With --text both models run block by block on the CPU or one GPU; the
    windows of text with the largest divergence are listed, --json has all.

    Example: gptq compare ./Qwen3-0.6B-GPTQ-Int4-g128 ./Qwen3-0.6B
    """
    said = {key: value for key, value in locals().items() if value is not None}
    _check(said)
    console = Console(as_json, quiet)
    from gptq_cli.pipeline.compare import compare_checkpoints

    weights = compare_checkpoints(a, b)
    predictions = _evaluate(console, said) if text is not None else None
    data = {"a": a, "b": b, **weights.to_json(), "predictions": predictions.to_json() if predictions else None}
    data["windows"] = [asdict(window) for window in predictions.per_window] if predictions else None
    console.result(data, "\n".join(_lines(weights, predictions)), f"{_mean_error(weights):.6g}")


def _check(said: dict[str, Any]) -> None:
    alone = [key for key in WITH_TEXT if key in said and "text" not in said]
    if alone:
        name = alone[0].replace("_", "-")
        raise ConfigError("E_CFG_CONFLICT", f"--{name} needs --text", hint="add --text, or leave it out")
    check_flags(said)


def _evaluate(console: Console, said: dict[str, Any]) -> EvalResult:
    from gptq_cli.pipeline.eval_request import EvalRequest
    from gptq_cli.pipeline.run import evaluate_perplexity

    request = EvalRequest(
        dataset=said["text"], baseline=said["b"], **{key: said[key] for key in WITH_TEXT if key in said}
    )
    with Progress(console) as progress:
        return evaluate_perplexity(said["a"], request, on_event=progress)


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
        cells += [(f"{t.relative_error:.2e}", f"{t.largest:.2e}", t.name) for t in different[:WORST]]
        lines += [f"  {line}" for line in aligned(cells)]
    for label, names in (("A", found.only_a), ("B", found.only_b)):
        shown = f"only in {label}  {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        lines += [on_one_line(shown)] if names else []
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
