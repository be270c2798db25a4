"""`gptq eval`: measure a checkpoint in tasks of lm-eval, and check it against a limit."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Annotated, TextIO

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, aligned, joined, time_line
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel
from gptq_cli.config.resolve import with_variables
from gptq_cli.errors import ConfigError, GateError, Problem

if TYPE_CHECKING:
    from gptq_cli.evaluation.tasks import Score, TasksResult

LARGE = 1e6  # numbers from here on are shown with four digits and an exponent
BETTER = "try more bits, a smaller --group-size, more calibration text, or --preset best or max"
Tasks = Annotated[
    str,
    o.plain(
        "--tasks",
        help="names of lm-eval, with commas between them",
        metavar="TASK,TASK,..",
        panel=Panel.TEXT,
    ),
]
IncludePath = Annotated[
    str | None,
    o.plain(
        "--include-path",
        help="folder with YAML files of further tasks, whose data may be local",
        metavar="DIR",
        panel=Panel.TEXT,
    ),
]
NumFewshot = Annotated[
    int | None,
    o.plain(
        "--num-fewshot",
        help="examples before each question; default: as many as the task says",
        metavar="N",
        panel=Panel.TEXT,
    ),
]
Limit = Annotated[
    int | None,
    o.plain(
        "--limit",
        help="take at most this many questions of each task",
        metavar="N",
        panel=Panel.TEXT,
        min=1,
    ),
]
BatchSize = Annotated[
    int,
    o.plain(
        "--batch-size",
        help="texts of one length per forward pass; default 8",
        metavar="N",
        panel=Panel.RUN,
    ),
]
Baseline = Annotated[
    str | None,
    o.plain("--baseline", help="model to compare with", metavar="MODEL", panel=Panel.GATE),
]
MaxDrop = Annotated[
    float | None,
    o.plain(
        "--max-drop",
        help="exit 4 if the main metric of a task is worse than the baseline's by more: 0.01",
        metavar="X",
        panel=Panel.GATE,
    ),
]


@o.takes_settings("device", "dtype", "trust_remote_code")
def eval(
    model: o.Model,
    tasks: Tasks,
    *,
    include_path: IncludePath = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    settings: o.Settings,
    batch_size: BatchSize = 8,
    baseline: Baseline = None,
    max_drop: MaxDrop = None,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a checkpoint in tasks of lm-eval, such as hellaswag.

    Takes tasks that compare log-likelihoods; one block is in memory at a
    time. With --baseline both models answer the same questions, and the
    difference has a standard error of its own. The main metric of a task
    is acc_norm if it has one, else acc. --max-drop judges each task, but
    a group by its own metric if it has one. Needs the extra `eval`.

    Example: gptq eval ./out --tasks arc_easy,hellaswag --baseline ./Qwen3-0.6B --max-drop 0.01
    """
    settings = with_variables({**settings, "batch_size": batch_size}, os.environ)
    _check_limit(baseline, max_drop)
    console = Console(as_json, quiet)
    from gptq_cli.evaluation.request import TaskRequest

    request = TaskRequest(
        tasks=tuple(tasks.split(",")),
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        baseline=baseline,
        revision=revision,
        **settings,
    )
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of lm-eval and datasets; read on import
    if quiet:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from gptq_cli.evaluation.tasks import evaluate_tasks

    with Progress(console) as progress, redirect_stdout(_notes(quiet)):
        result = evaluate_tasks(model, request, progress)
    output = (result.to_json(), joined(_lines(result)), _short(result.scores))
    failed = _failed(result.scores, max_drop)
    if failed:
        console.refused(*output, GateError.of(failed))
    console.result(*output)


def _notes(quiet: bool) -> TextIO:
    """Return where lm-eval and the files of tasks print: stdout belongs to the result."""
    if quiet:
        return StringIO()
    return sys.stderr


def _check_limit(baseline: str | None, max_drop: float | None) -> None:
    """Raise ConfigError for a limit that is no number of 0 or more, or that lacks a baseline."""
    if max_drop is None:
        return
    if baseline is None:
        hint = "add --baseline MODEL, most often the model before quantization"
        raise ConfigError(
            "E_CFG_CONFLICT", "--max-drop needs --baseline to compare with", hint=hint
        )
    if not 0 <= max_drop < float("inf"):
        message = f"--max-drop must be a number of 0 or more, got {max_drop}"
        raise ConfigError("E_CFG_RANGE", message)


def _failed(scores: Sequence[Score], max_drop: float | None) -> list[Problem]:
    """Return a problem for each task whose main metric dropped by more than the limit."""
    if max_drop is None:
        return []
    problems = []
    for score in scores:
        drop = score.drop
        if not score.is_main or (drop is not None and drop <= max_drop):
            continue
        change = f"{score.metric} of {score.task} went from {score.baseline:.4f}"
        message = f"{change} to {score.value:.4f}, but --max-drop allows {max_drop:g}"
        problems.append(Problem("E_GATE_TASK", message, BETTER))
    return problems


def _short(scores: Sequence[Score]) -> str:
    """Return the value of each main metric, a line for each task."""
    return "\n".join(f"{score.value:.6g}" for score in scores if score.is_main)


def _lines(result: TasksResult) -> list[str]:
    head = ["task", "metric", "value", "stderr"]
    if result.baseline is not None:
        head += ["baseline", "difference", "paired stderr"]
    rows = [tuple(head)]
    for score in result.scores:
        cells = [score.task, score.metric, _decimal(score.value), _decimal(score.stderr)]
        if result.baseline is not None:
            difference = _decimal(score.difference, "+")
            cells += [_decimal(score.baseline), difference, _decimal(score.paired_stderr)]
        rows.append(tuple(cells))
    shots = "as many examples as the task says"
    if result.num_fewshot is not None:
        shots = f"{result.num_fewshot} examples"
    questions = "all questions"
    if result.limit is not None:
        questions = f"at most {result.limit} questions of each task"
    protocol = f"lm-eval {result.lm_eval}, {questions}, {shots}, {result.dtype}"
    table = aligned(rows, right=set(range(2, len(head))))
    return [*table, "", f"protocol  {protocol}", time_line(result.seconds, 9)]


def _decimal(number: float | None, sign: str = "") -> str:
    """Return a number in a few digits; with the `sign` "+", positive ones have a sign too."""
    if number is None:
        return "-"
    if abs(number) >= LARGE:
        return f"{number:{sign}.4g}"
    return f"{number:{sign}.4f}"
