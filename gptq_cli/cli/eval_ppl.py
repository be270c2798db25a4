"""`gptq eval-ppl`: measure the perplexity of a checkpoint, and check it against limits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, joined
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel
from gptq_cli.config.resolve import check_flags
from gptq_cli.errors import ConfigError, GateError, clock

if TYPE_CHECKING:
    from gptq_cli.evaluation.perplexity import EvalResult

MAX_PPL = 10_000.0  # far above the perplexity of any language model whose weights are intact

TEXT = ("dataset_config", "dataset_split", "text_column", "chat_template", "seqlen")
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

    The protocol is that of the GPTQ paper: the test split of
    wikitext-2-raw-v1 in windows of seqlen tokens that do not overlap; the
    rest at the end is dropped.

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
    output = (result.to_json(), _summary(result), f"{result.perplexity:.6g}")
    failure = _failed_gate(result, max_increase, max_ppl)
    if failure:
        console.refused(*output, failure)
    console.result(*output)


def _check_gates(baseline: str | None, max_increase: float | None, max_ppl: float) -> None:
    """Raise ConfigError for a limit out of range, or for --max-increase without a baseline."""
    if not max_ppl > 0:
        raise ConfigError("E_CFG_RANGE", f"--max-ppl must be a number above 0, got {max_ppl}")
    if max_increase is None:
        return
    if baseline is None:
        message = "--max-increase needs --baseline to compare with"
        hint = "add --baseline MODEL, most often the model before quantization"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)
    if not 0 <= max_increase < math.inf:
        message = f"--max-increase must be a number of 0 or more, got {max_increase}"
        raise ConfigError("E_CFG_RANGE", message)


def _failed_gate(
    result: EvalResult, max_increase: float | None, max_ppl: float
) -> GateError | None:
    """Return the error if perplexity is above a limit or not finite, else None."""
    ppl = result.perplexity
    hint = "try --dtype float32; for a quantized model: gptq verify DIR --full"
    if ppl > max_ppl:
        message = f"perplexity {ppl:.6g} is above the {max_ppl:g} of --max-ppl"
        if max_ppl < MAX_PPL:
            return GateError("E_NUM_PPL", message)
        return GateError("E_NUM_PPL", f"{message}: such a model predicts nothing", hint=hint)
    if not math.isfinite(ppl):
        message = f"perplexity is {ppl}: the model's outputs are not usable"
        return GateError("E_NUM_PPL", message, hint=hint)
    if max_increase is None:
        return None
    assert result.baseline_perplexity is not None
    increase = ppl - result.baseline_perplexity
    if increase <= max_increase:
        return None
    rose = f"perplexity rose by {increase:.4g}, from {result.baseline_perplexity:.6g} to {ppl:.6g}"
    return GateError("E_GATE_PPL", f"{rose}, but --max-increase allows {max_increase:g}")


def _summary(result: EvalResult) -> str:
    windows = f"{result.windows} windows of {result.seqlen} tokens"
    lines = [f"perplexity  {result.perplexity:.4f}"]
    if result.baseline_perplexity is not None:
        increase = result.perplexity - result.baseline_perplexity
        lines.append(f"baseline    {result.baseline_perplexity:.4f} ({increase:+.4f})")
        lines.append(f"agreement   KL {result.kl:.4g}, top-1 {result.top1_agreement:.2%}")
    lines.append(f"protocol    {result.dataset}, {windows}, {result.dtype}")
    lines.append(f"time        {clock(result.seconds)}")
    return joined(lines)
