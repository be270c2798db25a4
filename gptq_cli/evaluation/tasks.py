"""`gptq eval`: the tasks of lm-eval on a checkpoint, quantized or not, with one block in memory.

lm-eval (EleutherAI's lm-evaluation-harness) makes the prompts and scores the answers; this module
gives it log-likelihoods as its own model for transformers defines them. Two models answer the same
questions, so their difference has a standard error of its own: that of the mean over the questions
of the difference, which is smaller than the error of either mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partialmethod
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gptq_cli.calibration.windows import Encoder, check_token_ids, load_encoder
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.errors import ConfigError, GptqError, InputError, nearest, to_json
from gptq_cli.evaluation.forward import run_blocks
from gptq_cli.evaluation.request import TaskRequest
from gptq_cli.events import PhaseStarted, Report, ignore
from gptq_cli.hub_errors import first_line
from gptq_cli.planning.run_plan import positions
from gptq_cli.runtime.device import resolve_device
from gptq_cli.runtime.memory import Memory, device_errors
from gptq_cli.runtime.open_model import warn_of

DEFAULT_POSITIONS = 2048  # of a model whose config.json names none, as in lm-eval
STATES_SHARE = 0.4  # of the free memory, for the hidden states of the questions
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity")
# lm-eval computes the errors of means exactly, and draws samples for others only
DRAWN_SAMPLES = 1000
INSTALL = "install it: pip install 'gptq_cli[eval]'"

Request = tuple[Any, list[int], list[int]]  # anything, the context, its continuation


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of a task, or of a group of tasks, with its standard error.

    With a baseline, `difference` is that of the model from the baseline, and `paired_stderr` the
    standard error of this difference; None for a group or for a metric that is no mean over
    questions. `is_main` marks what the gate judges: the main metric of each task. But a group
    with a metric of its own stands for those of its tasks that have this metric, too.
    """

    task: str
    metric: str
    higher_is_better: bool
    is_main: bool
    questions: int | None
    value: float
    stderr: float | None
    baseline: float | None = None
    baseline_stderr: float | None = None
    difference: float | None = None
    paired_stderr: float | None = None

    @property
    def drop(self) -> float | None:
        """How much worse than the baseline the model is; below 0 if it is better."""
        if self.difference is None:
            return None
        if self.higher_is_better:
            return -self.difference
        return self.difference


@dataclass(frozen=True, slots=True)
class TasksResult:
    """The scores of the tasks, and how they were measured."""

    model: str
    baseline: str | None
    scores: tuple[Score, ...]
    num_fewshot: int | None
    limit: int | None
    dtype: str
    lm_eval: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return to_json(self)


def evaluate_tasks(model: str, request: TaskRequest, report: Report = ignore) -> TasksResult:
    """Return the scores of MODEL (a directory or a Hub id) in tasks of lm-eval.

    Raises InputError E_LM_EVAL without lm-eval; ConfigError E_EVAL_TASK for tasks that it does not
    know, that generate text, have no metric or cannot have `num_fewshot` examples; InputError
    E_EVAL_DATA if the data of a task cannot be loaded; and what opening a model raises, for both
    models before the first is measured.
    """
    started = time.perf_counter()
    harness = _harness()
    manager = _task_manager(request)
    _check_tasks(manager, request)
    device = resolve_device(request.device)
    checkpoints = [open_decodable(locate_model(model, request.revision).directory)]
    if request.baseline is not None:
        checkpoints.append(open_decodable(locate_model(request.baseline).directory))
    found, dtype = [], ""
    for checkpoint in checkpoints:
        warn_of(checkpoint, report)
        streamed = _Streamed(checkpoint, request, device, report)
        with torch.inference_mode(), device_errors():
            found.append(_carried_out(harness, manager, streamed, request))
        dtype = dtype or streamed.dtype
    return TasksResult(
        model=model,
        baseline=request.baseline,
        scores=tuple(_scores(found)),
        num_fewshot=request.num_fewshot,
        limit=request.limit,
        dtype=dtype,
        lm_eval=str(getattr(harness, "__version__", "")),
        seconds=time.perf_counter() - started,
    )


# ---------------------------------------------------------------- lm-eval


def _harness() -> Any:
    """Return lm-eval; raise InputError E_LM_EVAL if it is missing."""
    try:
        # Outside of a repository, git would write "fatal" beside the messages of this program.
        evaluator: Any = import_module("lm_eval.evaluator")
        evaluator.get_git_commit_hash = lambda: None
        return import_module("lm_eval")
    except ModuleNotFoundError as error:
        message = f"gptq eval needs lm-eval: there is no package `{error.name}`"
        raise InputError("E_LM_EVAL", message, hint=INSTALL) from error


def _task_manager(request: TaskRequest) -> Any:
    tasks = import_module("lm_eval.tasks")
    try:
        return tasks.TaskManager(include_path=request.include_path)
    except Exception as error:
        message = f"cannot read the tasks in `{request.include_path}`: {first_line(error)}"
        raise InputError("E_EVAL_DATA", message) from error


def _check_tasks(manager: Any, request: TaskRequest) -> None:
    """Load the tasks, and refuse those that are unknown or cannot be judged as requested."""
    _check_names(set(manager.all_tasks), request.tasks)
    try:
        loaded = manager.load(list(request.tasks))["tasks"]
    except Exception as error:
        message = f"cannot load the data of {', '.join(request.tasks)}: {first_line(error)}"
        hint = "without a network, give tasks whose data are on this machine: --include-path DIR"
        raise InputError("E_EVAL_DATA", message, hint=hint) from error
    for name, task in loaded.items():
        if task.OUTPUT_TYPE == "generate_until":
            message = f"task `{name}` generates text, but gptq eval measures log-likelihoods only"
            hint = "use lm-eval with an engine that serves the checkpoint, such as vLLM"
            raise ConfigError("E_EVAL_TASK", message, hint=hint)
        if not task.aggregation():
            message = f"task `{name}` has no metric"
            hint = "name one under metric_list in the task's file, such as acc"
            raise ConfigError("E_EVAL_TASK", message, hint=hint)
        if request.num_fewshot:
            _check_examples(name, task, request.num_fewshot)


def _check_names(known: set[str], names: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = "`lm-eval ls tasks` lists the tasks; --include-path adds a folder of your own"
            if near is not None:
                hint = f"did you mean {near}?"
            raise ConfigError("E_EVAL_TASK", f"lm-eval has no task `{name}`", hint=hint)


def _check_examples(name: str, task: Any, wanted: int) -> None:
    """Raise ConfigError E_EVAL_TASK if lm-eval would not put `wanted` examples before questions."""
    hint = "omit --num-fewshot, or measure this task without the others"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        message = f"task `{name}` scores whole texts, so num_fewshot has no effect on it"
        raise ConfigError("E_EVAL_TASK", message, hint=hint)
    if task.get_config("num_fewshot") == 0:
        message = f"task `{name}` has num_fewshot 0 in its file, which lm-eval does not change"
        raise ConfigError("E_EVAL_TASK", message, hint=hint)
    if not hasattr(task, "sampler"):
        return
    available = len(task.sampler.fewshot_docs())
    if task.fewshot_cfg.split == task.config.test_split:
        available -= 1  # the question itself is no example
    if wanted > available:
        message = f"task `{name}` has {available} examples, but num_fewshot is {wanted}"
        hint = f"use --num-fewshot {available} or fewer"
        raise ConfigError("E_EVAL_TASK", message, hint=hint)


def _carried_out(
    harness: Any, manager: Any, streamed: _Streamed, request: TaskRequest
) -> dict[str, Any]:
    """Return what lm-eval found out about a model."""
    adapter = _adapter()(streamed)
    try:
        found = harness.simple_evaluate(
            model=adapter,
            tasks=list(request.tasks),
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            task_manager=manager,
            bootstrap_iters=DRAWN_SAMPLES,
            log_samples=True,
        )
    except (GptqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = f"lm-eval failed: {type(error).__name__}: {first_line(error)}"
        raise InputError("E_EVAL_DATA", message) from error
    return dict(found)


def _adapter() -> Any:
    """Return the class of lm-eval's models that asks a `_Streamed` for log-likelihoods."""
    base: Any = import_module("lm_eval.api.model").TemplateLM

    class Adapter(base):  # type: ignore[misc]
        # The events of this program tell the progress; lm-eval's bar would ignore TQDM_DISABLE.
        loglikelihood = partialmethod(base.loglikelihood, disable_tqdm=True)

        def __init__(self, streamed: _Streamed) -> None:
            super().__init__()
            self._streamed = streamed
            self.tokenizer = streamed.encoder.tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return self._streamed.prefix_token

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return self._streamed.encode(string, add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: list[Request], **_: Any
        ) -> list[tuple[float, bool]]:
            return self._streamed.loglikelihoods(requests)

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            return self._streamed.of_whole_texts([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            raise NotImplementedError("tasks that generate text are refused before")

    return Adapter


# ---------------------------------------------------------------- log-likelihoods


class _Streamed:
    """The log-likelihoods of a checkpoint, which is read one block at a time."""

    def __init__(
        self, checkpoint: Checkpoint, request: TaskRequest, device: torch.device, report: Report
    ) -> None:
        self._checkpoint, self._request = checkpoint, request
        self._device, self._report = device, report
        self.encoder: Encoder = load_encoder(
            checkpoint.directory, trust_remote_code=request.trust_remote_code
        )
        tokenizer = self.encoder.tokenizer
        prefix = tokenizer.bos_token_id
        if prefix is None:
            prefix = tokenizer.eos_token_id
        if prefix is None:
            message = f"the tokenizer in `{checkpoint.directory}` has neither BOS nor EOS"
            raise InputError("E_TOKENIZER", message)
        self.prefix_token = int(prefix)
        self.max_length = positions(checkpoint) or DEFAULT_POSITIONS
        self.dtype = ""

    def encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        """Return the token ids of a text; None leaves the special tokens to the tokenizer.

        A text that begins with BOS gets no second one, as in lm-eval.
        """
        tokenizer = self.encoder.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(tokenizer.decode([self.prefix_token]))
        return self.encoder(text, add_special_tokens)

    def loglikelihoods(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return, for each request, the log-likelihood of its continuation in nats.

        The second value tells whether the model would have chosen each token of it. A text that is
        longer than the model's positions loses its beginning. Requests with the same input share
        one forward; inputs of one length share a batch, so nothing is padded.
        """
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            text = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            wanted.setdefault(text, []).append(number)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for portion in self._portions(sorted(wanted, key=len)):
            self._report(PhaseStarted("tasks", f"{len(portion)} of {len(wanted)} texts"))
            batches = list(_batches(portion, self._request.batch_size))
            forward = run_blocks(
                self._checkpoint,
                [torch.tensor(batch) for batch in batches],
                self._report,
                device=self._device,
                dtype=self._request.dtype,
                trust_remote_code=self._request.trust_remote_code,
            )
            self.dtype = str(forward.stream.dtype).removeprefix("torch.")
            with forward.stream.head() as head:
                for index, batch in enumerate(batches):
                    rows = head(torch.tensor(batch), forward.hidden[index])
                    for ids, logits in zip(batch, rows, strict=True):
                        for number in wanted[ids]:
                            found[number] = _likelihood(logits, requests[number][2])
        return found

    def of_whole_texts(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each text in nats, in windows as lm-eval cuts them."""
        windows = import_module("lm_eval.utils")
        pieces: list[Request] = []
        owners = []
        for number, text in enumerate(texts):
            rolled = windows.get_rolling_token_windows(
                token_list=self.encode(text, None),
                prefix_token=self.prefix_token,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(windows.make_disjoint_window, rolled):
                pieces.append((None, context, continuation))
                owners.append(number)
        sums = [0.0] * len(texts)
        for number, (likelihood, _) in zip(owners, self.loglikelihoods(pieces), strict=True):
            sums[number] += likelihood
        return sums

    def _portions(self, texts: list[tuple[int, ...]]) -> Iterable[list[tuple[int, ...]]]:
        """Yield the texts in portions whose hidden states fit into memory."""
        hidden = self._checkpoint.text_config.get("hidden_size")
        if not isinstance(hidden, int):
            hidden = 8192
        free = Memory(torch.device("cpu")).free()
        most = max(1, int(free * STATES_SHARE) // (4 * hidden))  # tokens in float32
        portion: list[tuple[int, ...]] = []
        n_tokens = 0
        for ids in texts:
            if portion and n_tokens + len(ids) > most:
                yield portion
                portion, n_tokens = [], 0
            portion.append(ids)
            n_tokens += len(ids)
        if portion:
            yield portion


def _batches(texts: Sequence[tuple[int, ...]], size: int) -> Iterable[list[tuple[int, ...]]]:
    """Yield batches of up to `size` texts of one length; `texts` are sorted by length."""
    batch: list[tuple[int, ...]] = []
    for ids in texts:
        if batch and (len(batch) == size or len(batch[0]) != len(ids)):
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _likelihood(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return the log-likelihood of the last tokens of a text, logits [tokens, V]."""
    if not continuation:
        return 0.0, True
    rows = logits[-len(continuation) :].float().log_softmax(-1)
    ids = torch.tensor(continuation[-len(rows) :], device=rows.device)
    check_token_ids(ids, rows.shape[-1])
    total = float(rows.gather(-1, ids[:, None]).sum())
    return total, bool((rows.argmax(-1) == ids).all())


# ---------------------------------------------------------------- scores


def _scores(found: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return the scores of a model, beside those of the baseline if it was evaluated."""
    scores = []
    judged = _judged(found[0])
    for task, values in found[0]["results"].items():
        for key in _metrics(values):
            better = found[0].get("higher_is_better", {}).get(task, {})
            scores.append(
                _score(
                    found,
                    task,
                    key,
                    higher_is_better=better.get(key.partition(",")[0]) is not False,
                    is_main=judged.get(task) == key,
                )
            )
    return scores


def _judged(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the tasks and groups that the gate judges, each with its main metric.

    A tag, and a group without a metric of its own, is judged by its tasks. A group with a metric
    stands for its members that have this metric.
    """
    results, groups = found["results"], found.get("group_subtasks", {})
    judged = {}
    for task, values in results.items():
        metric = _main_metric(_metrics(values))
        if metric is not None:
            judged[task] = metric
    for group in groups:
        metric = _main_metric(_metrics(results.get(group, {})))
        for member in _members(group, groups):
            if metric in results.get(member, {}):
                judged.pop(member, None)
    return judged


def _members(group: str, groups: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """Yield the tasks and groups below a group, at any depth."""
    for name in groups.get(group, ()):
        yield name
        yield from _members(name, groups)


def _metrics(values: Mapping[str, Any]) -> list[str]:
    return [key for key in values if _is_metric(key, values)]


def _is_metric(key: str, values: Mapping[str, Any]) -> bool:
    """Return whether an entry of lm-eval is a metric: "acc,none", but not "acc_stderr,none"."""
    name, comma, _ = key.partition(",")
    return bool(comma) and not name.endswith("_stderr") and _number(values[key]) is not None


def _main_metric(keys: Sequence[str]) -> str | None:
    for name in MAIN_METRICS:
        for key in keys:
            if key.partition(",")[0] == name:
                return key
    return next(iter(keys), None)


def _score(
    found: Sequence[Mapping[str, Any]],
    task: str,
    key: str,
    *,
    higher_is_better: bool,
    is_main: bool,
) -> Score:
    name, _, filter = key.partition(",")
    values = [each["results"][task] for each in found]
    errors = [_number(each.get(f"{name}_stderr,{filter}")) for each in values]
    answers = [_answers(each, task, name, filter) for each in found]
    numbers = [float(each[key]) for each in values]
    score = Score(
        task=task,
        metric=name if filter == "none" else f"{name},{filter}",
        higher_is_better=higher_is_better,
        is_main=is_main,
        questions=len(answers[0]) or None,
        value=numbers[0],
        stderr=errors[0],
    )
    if len(found) == 1:
        return score
    return Score(
        **{
            **to_json(score),
            "baseline": numbers[1],
            "baseline_stderr": errors[1],
            "difference": numbers[0] - numbers[1],
            "paired_stderr": _paired_error(answers[0], answers[1]),
        }
    )


def _answers(found: Mapping[str, Any], task: str, metric: str, filter: str) -> dict[Any, float]:
    """Return the value of a metric for each question of a task, if it has such values."""
    answers = {}
    for sample in found.get("samples", {}).get(task, ()):
        value = _number(sample.get(metric))
        if value is not None and sample.get("filter", filter) == filter:
            answers[sample["doc_id"]] = value
    return answers


def _paired_error(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> float | None:
    """Return the standard error of the mean difference over the same questions."""
    if len(ours) < 2 or ours.keys() != theirs.keys():
        return None
    differences = [value - theirs[question] for question, value in ours.items()]
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((each - mean) ** 2 for each in differences) / (len(differences) - 1)
    return math.sqrt(variance / len(differences))


def _number(value: Any) -> float | None:
    """Return a number of any library as a float; None for anything else."""
    if value is None or isinstance(value, str | list | tuple | dict):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
