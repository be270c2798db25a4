"""The functions of the package, for the command line and for Python callers.

They refuse what they can before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_cli.config.fields import seconds
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.evaluation.request import EvalRequest, GenerateRequest
from gptq_cli.events import Report, ignore
from gptq_cli.files import file_errors
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.planning.run_plan import default_name
from gptq_cli.publish.report import check_report, write_page
from gptq_cli.storage.manifest import REPORT_PAGE, write_report_data

if TYPE_CHECKING:
    from gptq_cli.evaluation.generate import GenerateResult
    from gptq_cli.evaluation.perplexity import EvalResult
    from gptq_cli.quantization.run import QuantizeResult


@file_errors()
def quantize(
    model: str | Path,
    config: QuantizeConfig,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    resume: str = "auto",
    max_runtime: str | None = None,
    allow_network_fs: bool = False,
    report: bool = False,
    command: str = "gptq_cli.quantize",
    on_event: Report = ignore,
) -> QuantizeResult:
    """Quantize `model` (a directory or a Hub id) into the directory `output`.

    The output appears complete or not at all. The arguments are the options of `gptq quantize`:
    `output` defaults to NAME-GPTQ-Int4-g128 in the current directory, `resume` is "auto",
    "require" or "never", and `max_runtime` is a time such as "3h30m", after which PausedError is
    raised; the same call then resumes the run. The output gets a gptq_report.json about the run and
    its `command`, and with `report` an HTML page that shows it. `on_event` is called in this thread
    with each of `gptq_cli.events` when it happens; if it raises, the run ends, but finished blocks
    are kept.

    Every expected failure raises a GptqError: ConfigError, InputError, GateError, ResourceError,
    ExistsError or PausedError, with `code`, `hint` and the `exit_code` of the command.

    >>> from gptq_cli import QuantizeConfig, events, quantize
    >>> def show(event):
    ...     if isinstance(event, events.BlockFinished):
    ...         print(f"block {event.index + 1} of {event.n_blocks}: {event.name}")
    >>> text = "calibration.txt"
    >>> config = QuantizeConfig(bits=4, group_size=32, dataset=text, nsamples=8, seqlen=64)
    >>> result = quantize("Qwen3-0.6B", config, on_event=show)
    block 1 of 2: model.layers.0
    block 2 of 2: model.layers.1
    >>> result.output
    PosixPath('Qwen3-0.6B-GPTQ-Int4-g32')
    >>> all(layer.relative_error < layer.rtn_relative_error for layer in result.layers)
    True
    """
    if report:
        check_report()
    options = RunOptions(revision, overwrite, resume, seconds(max_runtime), allow_network_fs)
    output = Path(output or default_name(str(model), config))
    if config.allocates:
        from gptq_cli.allocation.goals import starting_config
        from gptq_cli.allocation.run import allocate_run

        start = starting_config(config)
        prepared = prepare_run(str(model), output, start, options)
        prepared, _, _ = allocate_run(prepared, config, on_event)
    else:
        prepared = prepare_run(str(model), output, config, options)
    from gptq_cli.quantization.run import carry_out

    result = carry_out(prepared, on_event)
    write_report_data(prepared.output, result.to_json(), command)
    if report:
        write_page(prepared.output, prepared.output / REPORT_PAGE)
    return result


@file_errors()
def evaluate_perplexity(
    model: str | Path, request: EvalRequest | None = None, *, on_event: Report = ignore
) -> EvalResult:
    """Return the perplexity of `model`, a directory or a Hub id, quantized or not.

    The result also holds the protocol. If `request` has a `baseline`, it holds the baseline's
    perplexity, the KL divergence from it in nats per token, and the share of tokens with the same
    first choice. `on_event` is called, and GptqError is raised, as in `quantize`.

    >>> from gptq_cli import EvalRequest, evaluate_perplexity
    >>> request = EvalRequest(dataset="heldout.txt", seqlen=64, baseline="Qwen3-0.6B")
    >>> measured = evaluate_perplexity("Qwen3-0.6B-GPTQ-Int4-g128", request)
    >>> 0 < measured.kl < 0.1
    True
    >>> abs(measured.perplexity / measured.baseline_perplexity - 1) < 0.1
    True
    """
    from gptq_cli.evaluation.perplexity import evaluate_perplexity as evaluate

    return evaluate(str(model), request or EvalRequest(), on_event)


@file_errors()
def generate(
    model: str | Path,
    request: GenerateRequest | str,
    *,
    on_text: Callable[[str], object] | None = None,
    on_event: Report = ignore,
) -> GenerateResult:
    """Return the text that `model`, a directory or a Hub id, quantized or not, writes.

    `request` is a prompt, or a GenerateRequest. `on_text` is called with each piece of the text as
    soon as it is written. `on_event` is called, and GptqError is raised, as in `quantize`.

    >>> from gptq_cli import GenerateRequest, generate
    >>> request = GenerateRequest("the quick brown", max_new_tokens=5)
    >>> result = generate("Qwen3-0.6B-GPTQ-Int4-g128", request)
    >>> result.tokens, result.chat
    (5, True)
    """
    from gptq_cli.evaluation.generate import generate_text

    if isinstance(request, str):
        request = GenerateRequest(request)
    return generate_text(str(model), request, on_text or _discard, on_event)


def _discard(text: str) -> None:
    """Do nothing with `text`."""
    del text
