"""`gptq eval-ppl`: parse, call the program, show, judge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, joined
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel
from gptq_cli.config.finding import clock
from gptq_cli.config.resolve import check_flags
from gptq_cli.errors import ConfigError, GateError

if TYPE_CHECKING:
    from gptq_cli.evaluation.perplexity import EvalResult

MAX_PPL = 10_000.0  # far above what any model of language gives that is read rightly


TEXT = ("dataset_config", "dataset_split", "text_column", "seqlen")
RUN = ("device", "dtype", "backend", "trust_remote_code")
BatchSize = Annotated[
    int,
    o.plain(
        "--batch-size", help="windows per forward pass; default 1", metavar="N", panel=Panel.RUN
    ),
]
Baseline = Annotated[
    str | None,
    o.plain("--baseline", help="model to compare with", metavar="MODEL", panel=Panel.GATE),
]
MaxIncrease = Annotated[
    float | None,
    o.plain(
        "--max-increase",
        help="exit 4 if perplexity exceeds the baseline's by more",
        metavar="X",
        panel=Panel.GATE,
    ),
]
MaxPpl = Annotated[
    float,
    o.plain(
        "--max-ppl", help="exit 4 if perplexity is higher than this", metavar="X", panel=Panel.GATE
    ),
]


@o.takes_settings(*TEXT, *RUN)
def eval_ppl(
    model: o.Model,
    *,
    dataset: o.Dataset = None,
    settings: o.Settings,
    max_windows: o.MaxWindows = None,
    batch_size: BatchSize = 1,
    baseline: Baseline = None,
    max_increase: MaxIncrease = None,
    max_ppl: MaxPpl = MAX_PPL,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure the perplexity of a checkpoint, quantized or not.

    The protocol of the GPTQ paper: the test split of wikitext-2-raw-v1,
    windows of seqlen tokens that do not overlap, the tail dropped.

    Example: gptq eval-ppl ./out --baseline ./Qwen3-0.6B --max-increase 0.2
    """
    check_flags({**settings, "batch_size": batch_size})
    _check_gates(baseline, max_increase, max_ppl)
    console = Console(as_json, quiet)
    from gptq_cli.api import evaluate_perplexity
    from gptq_cli.evaluation.request import EvalRequest

    request = EvalRequest(
        dataset=dataset,
        batch_size=batch_size,
        max_windows=max_windows,
        baseline=baseline,
        revision=revision,
        **settings,
    )
    with Progress(console) as progress:
        result = evaluate_perplexity(model, request, on_event=progress)
    spoken = (result.to_json(), _summary(result), f"{result.perplexity:.6g}")
    failure = _gate(result, max_increase, max_ppl)
    if failure:
        console.refused(*spoken, failure)
    console.result(*spoken)


def _check_gates(baseline: str | None, max_increase: float | None, max_ppl: float) -> None:
    """ConfigError for a threshold out of range, or for one without the baseline that it needs."""
    if not max_ppl > 0:
        raise ConfigError("E_CFG_RANGE", f"--max-ppl must be a number above 0, got {max_ppl}")
    if max_increase is None:
        return
    if baseline is None:
        hint = "add --baseline MODEL, most often the model before quantization"
        raise ConfigError(
            "E_CFG_CONFLICT", "--max-increase needs --baseline to compare with", hint=hint
        )
    if not 0 <= max_increase < math.inf:
        raise ConfigError(
            "E_CFG_RANGE", f"--max-increase must be a number of 0 or more, got {max_increase}"
        )


def _gate(result: EvalResult, max_increase: float | None, max_ppl: float) -> GateError | None:
    """The failure if perplexity is not a finite number, is above `max_ppl`, or rose by more than `max_increase`."""
    hint = "try --dtype float32; for a quantized model: gptq verify DIR --full"
    if result.perplexity > max_ppl:
        says = f"perplexity {result.perplexity:.6g} is above the {max_ppl:g} of --max-ppl"
        if max_ppl < MAX_PPL:
            return GateError("E_NUM_PPL", says)
        return GateError("E_NUM_PPL", f"{says}: such a model predicts nothing", hint=hint)
    if not math.isfinite(result.perplexity):
        return GateError(
            "E_NUM_PPL",
            f"perplexity is {result.perplexity}: the model's outputs are not usable",
            hint=hint,
        )
    if max_increase is None:
        return None
    assert result.baseline_perplexity is not None
    increase = result.perplexity - result.baseline_perplexity
    if increase <= max_increase:
        return None
    rose = f"perplexity rose by {increase:.4g}, from {result.baseline_perplexity:.6g} to {result.perplexity:.6g}"
    return GateError("E_GATE_PPL", f"{rose}; --max-increase allows {max_increase:g}")


def _summary(result: EvalResult) -> str:
    lines = [
        f"perplexity  {result.perplexity:.4f}",
        f"protocol    {result.dataset}, {result.windows} windows of {result.seqlen} tokens, {result.dtype}",
        f"time        {clock(result.seconds)}",
    ]
    if result.baseline_perplexity is not None:
        increase = result.perplexity - result.baseline_perplexity
        lines.insert(1, f"baseline    {result.baseline_perplexity:.4f} ({increase:+.4f})")
        lines.insert(2, f"agreement   KL {result.kl:.4g}, top-1 {result.top1_agreement:.2%}")
    return joined(lines)
