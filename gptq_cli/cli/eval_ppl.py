"""`gptq eval-ppl`: parse, call the pipeline, show, judge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console
from gptq_cli.cli.progress import Progress
from gptq_cli.config.resolve import check_flags
from gptq_cli.config.units import clock
from gptq_cli.errors import ConfigError, GateError

if TYPE_CHECKING:
    from gptq_cli.pipeline.evaluate import EvalResult

MAX_PPL = 10_000.0  # far above what any model of language gives that is read rightly


def eval_ppl(
    model: o.Model,
    dataset: o.Dataset = None,
    dataset_config: o.DatasetConfig = None,
    dataset_split: o.DatasetSplit = None,
    text_column: o.TextColumn = None,
    seqlen: o.SeqLen = None,
    batch_size: Annotated[
        int | None, o.plain("--batch-size", help="windows per forward pass; default 1", metavar="N", panel=o.RUN)
    ] = None,
    max_windows: o.MaxWindows = None,
    baseline: Annotated[
        str | None, o.plain("--baseline", help="model to compare with", metavar="MODEL", panel=o.GATE)
    ] = None,
    max_increase: Annotated[
        float | None,
        o.plain(
            "--max-increase", help="exit 4 if perplexity exceeds the baseline's by more", metavar="X", panel=o.GATE
        ),
    ] = None,
    max_ppl: Annotated[
        float, o.plain("--max-ppl", help="exit 4 if perplexity is higher than this", metavar="X", panel=o.GATE)
    ] = MAX_PPL,
    device: o.Device = None,
    dtype: o.DType = None,
    backend: o.Backend = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure the perplexity of a checkpoint, quantized or not.

    The protocol of the GPTQ paper: the test split of wikitext-2-raw-v1,
    windows of seqlen tokens that do not overlap, the tail dropped.

    Example: gptq eval-ppl ./out --baseline ./Qwen3-0.6B --max-increase 0.2
    """
    said = {key: value for key, value in locals().items() if value is not None}
    _check(said)
    console = Console(as_json, quiet)
    from gptq_cli.pipeline.eval_request import EvalRequest
    from gptq_cli.pipeline.run import evaluate_perplexity

    request = EvalRequest(**{key: value for key, value in said.items() if key in EvalRequest.__slots__})
    with Progress(console) as progress:
        result = evaluate_perplexity(model, request, on_event=progress)
    spoken = (result.to_json(), _summary(result), f"{result.perplexity:.6g}")
    failure = _gate(result, max_increase, max_ppl)
    if failure:
        console.refused(*spoken, failure)
    console.result(*spoken)


def _check(said: dict[str, Any]) -> None:
    check_flags(said)
    if not said["max_ppl"] > 0:
        raise ConfigError("E_CFG_RANGE", f"--max-ppl must be a number above 0, got {said['max_ppl']}")
    increase = said.get("max_increase")
    if increase is None:
        return
    if "baseline" not in said:
        hint = "add --baseline MODEL, most often the model before quantization"
        raise ConfigError("E_CFG_CONFLICT", "--max-increase needs --baseline to compare with", hint=hint)
    if not 0 <= increase < math.inf:
        raise ConfigError("E_CFG_RANGE", f"--max-increase must be a number of 0 or more, got {increase}")


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
            "E_NUM_PPL", f"perplexity is {result.perplexity}: the model's outputs are not usable", hint=hint
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
    return "\n".join(lines)
