"""`gptq eval-ppl`: measure the perplexity of a checkpoint, and check it against limits."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, fitted_lines, time_line
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel
from gptq_cli.config.resolve import with_variables
from gptq_cli.errors import ConfigError, GateError, Problem, counted
from gptq_cli.evaluation.verdict import BETTER, verdict_lines

if TYPE_CHECKING:
    from gptq_cli.evaluation.perplexity import EvalResult

MAX_PPL = 10_000.0  # far above the perplexity of any language model whose weights are intact
OTHER_TEXT = "measure on text like that of its training: --dataset FILE"

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
    str | None,
    o.plain(
        "--max-increase",
        help="exit 4 if perplexity exceeds the baseline's by more: 0.2, or 2% of it",
        metavar="X|X%",
        panel=Panel.GATE,
    ),
]
MaxKl = Annotated[
    float | None,
    o.plain(
        "--max-kl",
        help="exit 4 if the KL from the baseline is larger",
        metavar="X",
        panel=Panel.GATE,
    ),
]
MinTop1 = Annotated[
    str | None,
    o.plain(
        "--min-top1",
        help="exit 4 if the top-1 agreement with the baseline is smaller: 0.95, or 95%",
        metavar="X|X%",
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
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    max_ppl: MaxPpl = MAX_PPL,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure the perplexity of a checkpoint, quantized or not.

    The protocol is that of the GPTQ paper: the test split of
    wikitext-2-raw-v1 in windows of seqlen tokens that do not overlap; the
    rest at the end is dropped.

    Example: gptq eval-ppl ./out --baseline ./Qwen3-0.6B --max-increase 2%
    """
    settings = with_variables({**settings, "batch_size": batch_size}, os.environ)
    limits = _limits(baseline, max_increase, max_kl, min_top1, max_ppl)
    console = Console(as_json, quiet)
    from gptq_cli.api import evaluate_perplexity
    from gptq_cli.evaluation.request import EvalRequest

    request = EvalRequest(
        dataset=dataset,
        max_windows=max_windows,
        baseline=baseline,
        revision=revision,
        **settings,
    )
    with Progress(console) as progress:
        result = evaluate_perplexity(model, request, on_event=progress)
    lines = fitted_lines([*summary_of(result), time_line(result.seconds, 11)], indent=12)
    output = (result.to_json(), "\n".join(lines), f"{result.perplexity:.6g}")
    failed = _failed_gates(result, limits)
    if failed:
        console.refused(*output, GateError.of(failed))
    console.result(*output)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the gates; None stands for no limit. A `relative` increase is a share."""

    max_ppl: float
    max_increase: float | None = None
    relative: bool = False
    max_kl: float | None = None
    min_top1: float | None = None


def _limits(
    baseline: str | None,
    max_increase: str | None,
    max_kl: float | None,
    min_top1: str | None,
    max_ppl: float,
) -> Limits:
    """Return the limits; ConfigError for one out of range, or that lacks a baseline."""
    if not max_ppl > 0:
        raise ConfigError("E_CFG_RANGE", f"--max-ppl must be a number above 0, got {max_ppl}")
    given = {"--max-increase": max_increase, "--max-kl": max_kl, "--min-top1": min_top1}
    for flag, value in given.items():
        if value is not None and baseline is None:
            message = f"{flag} needs --baseline to compare with"
            hint = "add --baseline MODEL, most often the model before quantization"
            raise ConfigError("E_CFG_CONFLICT", message, hint=hint)
    increase, relative = _number_or_share("--max-increase", max_increase, math.inf)
    _check_range("--max-kl", max_kl, max_kl, math.inf)
    top1, _ = _number_or_share("--min-top1", min_top1, 1.0)
    return Limits(max_ppl, increase, relative, max_kl, top1)


def _number_or_share(flag: str, text: str | None, most: float) -> tuple[float | None, bool]:
    """Return the number that `text` stands for, 0.02 for 2%, and whether it has a percent sign."""
    if text is None:
        return None, False
    is_share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        message = f"{flag} must be a number such as 0.2, or a share such as 2%, got {text!r}"
        raise ConfigError("E_CFG_RANGE", message) from None
    if is_share:
        number /= 100
    _check_range(flag, number, text, most)
    return number, is_share


def _check_range(flag: str, number: float | None, given: object, most: float) -> None:
    """Raise ConfigError E_CFG_RANGE for a number below 0, above `most`, or not finite."""
    if number is None or (0 <= number <= most and math.isfinite(number)):
        return
    accepted = "a number of 0 or more"
    if most < math.inf:
        accepted = f"a number from 0 to {most:g}"
    raise ConfigError("E_CFG_RANGE", f"{flag} must be {accepted}, got {given}")


def _failed_gates(result: EvalResult, limits: Limits) -> list[Problem]:
    """Return a problem for each limit that the result is beyond."""
    problems = (
        _unusable(result, limits.max_ppl) or _too_much_increase(result, limits),
        _too_far(result, limits),
        _too_little_agreement(result, limits),
    )
    return [problem for problem in problems if problem is not None]


def _too_far(result: EvalResult, limits: Limits) -> Problem | None:
    """Return the problem if KL is above its limit or not a number, else None."""
    if limits.max_kl is None:
        return None
    assert result.kl is not None
    if result.kl <= limits.max_kl:
        return None
    message = f"KL {result.kl:.4g} is above the {limits.max_kl:g} of --max-kl"
    return Problem("E_GATE_KL", message, BETTER)


def _too_little_agreement(result: EvalResult, limits: Limits) -> Problem | None:
    """Return the problem if top-1 agreement is below its limit or not a number, else None."""
    if limits.min_top1 is None:
        return None
    assert result.top1_agreement is not None
    if result.top1_agreement >= limits.min_top1:
        return None
    message = f"top-1 agreement {result.top1_agreement:.2%} is below"
    return Problem("E_GATE_TOP1", f"{message} the {limits.min_top1:.2%} of --min-top1", BETTER)


def _unusable(result: EvalResult, max_ppl: float) -> Problem | None:
    """Return the problem if perplexity is above its limit or not finite, else None."""
    ppl, before = result.perplexity, result.baseline_perplexity
    if before is not None and max_ppl < before < math.inf and ppl < math.inf:
        message = f"perplexity {ppl:.6g} is above the {max_ppl:g} of --max-ppl"
        message += f", but so is the {before:.6g} of the baseline: the text does not suit the model"
        return Problem("E_NUM_PPL", message, OTHER_TEXT)
    if ppl > max_ppl:
        message = f"perplexity {ppl:.6g} is above the {max_ppl:g} of --max-ppl"
        if max_ppl < MAX_PPL:
            return Problem("E_NUM_PPL", message)
        message += ": such a model predicts nothing"
        return Problem("E_NUM_PPL", message, _hint_for_unusable(result.dtype))
    if not math.isfinite(ppl):
        message = f"perplexity is {ppl}: the model's outputs are not usable"
        return Problem("E_NUM_PPL", message, _hint_for_unusable(result.dtype))
    return None


def _hint_for_unusable(dtype: str) -> str:
    """Return the hint for outputs in `dtype` that predict nothing."""
    other = "other text if the model does not know this one"
    if dtype != "float32":
        other = f"--dtype float32, or {other}"
    return f"try {other}; for a quantized model: gptq verify DIR --full"


def _too_much_increase(result: EvalResult, limits: Limits) -> Problem | None:
    """Return the problem if perplexity rose by more than its limit, else None."""
    if limits.max_increase is None:
        return None
    ppl, before = result.perplexity, result.baseline_perplexity
    assert before is not None
    increase, by, allowed = ppl - before, f"{ppl - before:.4g}", f"{limits.max_increase:g}"
    if limits.relative:
        increase = ppl / before - 1
        by, allowed = f"{increase:.3%}", f"{100 * limits.max_increase:g}%"
    if increase <= limits.max_increase:
        return None
    rose = f"perplexity rose by {by}, from {before:.6g} to {ppl:.6g}"
    return Problem("E_GATE_PPL", f"{rose}, but --max-increase allows {allowed}", BETTER)


def summary_of(result: EvalResult) -> list[str]:
    """Return lines about an evaluation, and a verdict if there is a baseline."""
    windows = f"{counted(result.windows, 'window')} of {result.seqlen} tokens"
    lines = [f"perplexity  {result.perplexity:.4f}"]
    if result.baseline_perplexity is not None:
        increase = result.perplexity - result.baseline_perplexity
        lines.append(f"baseline    {result.baseline_perplexity:.4f} ({increase:+.4f})")
        lines.append(f"agreement   KL {result.kl:.4g}, top-1 {result.top1_agreement:.2%}")
        assert result.kl is not None
        lines += verdict_lines(result.kl)
    lines.append(f"protocol    {result.dataset}, {windows}, {result.dtype}")
    return lines
