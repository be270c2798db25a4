"""`gptq eval`: log-likelihoods beside transformers, scores, gate and refusals.

Most tests use a stand-in for lm-eval. The last one compares with its own model for transformers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.evaluation import tasks
from gptq_cli.evaluation.request import TaskRequest
from gptq_cli.events import ignore
from tests.cli.conftest import Run, gptq, stand_in, validate_output  # noqa: F401
from tests.families import save_model

POSITIONS = 48
OURS = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
BEFORE = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    return save_model(
        folder / "model", "qwen3", num_hidden_layers=2, max_position_embeddings=POSITIONS
    )


def streamed(model: Path) -> tasks._Streamed:
    request = TaskRequest(("x",), batch_size=3, device="cpu")
    return tasks._Streamed(open_checkpoint(model), request, torch.device("cpu"), ignore)


def likelihood(whole: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Return the sum of log-probabilities by one forward for each token."""
    total, greedy = 0.0, True
    ids = (context + continuation)[-(POSITIONS + 1) :]
    for place in range(len(ids) - len(continuation), len(ids)):
        with torch.no_grad():
            logits = whole(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[ids[place]])
        greedy &= int(logits.argmax()) == ids[place]
    return total, greedy


def test_likelihoods_are_those_of_single_forwards(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(5)
    requests: list[tasks.Request] = []
    for length, answer in ((1, 1), (7, 2), (7, 2), (20, 5), (46, 2), (60, 3)):
        ids = torch.randint(3, 259, (length + answer,), generator=draw).tolist()
        requests.append((None, ids[:length], ids[length:]))
    with torch.no_grad():
        prompt = requests[1][1]
        best = int(whole(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    requests += [(None, prompt, [best]), (None, prompt, [best + 1]), requests[3]]
    few = 4 * 64 * 30 / tasks.STATES_SHARE  # 30 tokens at a time
    with torch.inference_mode():
        found = streamed(model).loglikelihoods(requests)
        monkeypatch.setattr("gptq_cli.runtime.memory.free_bytes", lambda _: int(few))
        in_portions = streamed(model).loglikelihoods(requests)
    for (_, context, continuation), value, again in zip(requests, found, in_portions, strict=True):
        wanted, greedy = likelihood(whole, context, continuation)
        assert value[0] == pytest.approx(wanted, abs=2e-4)
        assert again[0] == pytest.approx(wanted, abs=2e-4)
        assert value[1] == again[1] == greedy
    assert [greedy for _, greedy in found[-3:-1]] == [True, False]


# ---------------------------------------------------------------- with a stand-in for lm-eval


class Task:
    """Stands for a task of lm-eval: 12 questions, which are its examples too."""

    fewshot_cfg = SimpleNamespace(split="test")
    config = SimpleNamespace(test_split="test")
    sampler = SimpleNamespace(fewshot_docs=lambda: [{"q": number} for number in range(12)])

    def __init__(self, name: str) -> None:
        kinds = {"gsm8k": "generate_until", "wikitext": "loglikelihood_rolling"}
        self.OUTPUT_TYPE = kinds.get(name, "multiple_choice")
        self._name = name

    def aggregation(self) -> dict[str, Any]:
        if self._name == "unmeasured":
            return {}
        return {"acc": statistics.mean}

    def get_config(self, key: str) -> int | None:
        if self._name == "zero_shot":
            return {"num_fewshot": 0}.get(key)
        return None


class Manager:
    """Stands for lm-eval's TaskManager: it knows some tasks, one of which cannot be loaded."""

    all_tasks = ("ai2_arc", "arc_easy", "gsm8k", "unmeasured", "unreachable", "wikitext")
    all_tasks += ("zero_shot",)

    def __init__(self, include_path: str | None = None) -> None:
        self.include_path = include_path

    def load(self, names: list[str]) -> dict[str, Any]:
        if "unreachable" in names:
            raise ConnectionError("no route to host\nand more")
        found = {}
        for name in names:
            if name == "ai2_arc":
                name = "arc_easy"  # a tag stands for its tasks
            found[name] = Task(name)
        return {"tasks": found}


class Base:
    """Stands for lm-eval's TemplateLM, which draws a bar while it makes tokens."""

    def loglikelihood(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        if not disable_tqdm:
            sys.stderr.write("Tokenizing inputs: 100%\n")
        made = []
        for request in requests:
            context, answer = request.args
            made.append((None, self.tok_encode(context), self.tok_encode(answer, False)))
        return list(self._loglikelihood_tokens(made))


class Harness:
    """Stands for `simple_evaluate`: asks the model, and returns the answers of each in turn."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.likelihoods: list[list[tuple[float, bool]]] = []

    def __call__(self, *, model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        self.calls.append({"tasks": tasks, **options})
        logging.getLogger("lm_eval.api.task").warning("a metric has no aggregation")
        request = SimpleNamespace(args=("the quick", " brown"))
        self.likelihoods.append(model.loglikelihood([request]))
        sys.stdout.write("bootstrapping for stddev: perplexity\n")
        values = (OURS, BEFORE)[len(self.calls) - 1]
        error = statistics.stdev(values) / math.sqrt(len(values))
        samples = []
        for number, value in enumerate(values):
            samples.append({"doc_id": number, "filter": "none", "acc": value})
        measured = {"alias": "a", "acc,none": statistics.mean(values), "acc_stderr,none": error}
        return {
            "results": {"arc_easy": measured},
            "samples": {"arc_easy": samples},
            "higher_is_better": {"arc_easy": {"acc": True}},
        }


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    fake = Harness()
    stand_in(monkeypatch, "lm_eval", simple_evaluate=fake, __version__="0.4.13")
    stand_in(monkeypatch, "lm_eval.evaluator")
    stand_in(monkeypatch, "lm_eval.tasks", TaskManager=Manager)
    stand_in(monkeypatch, "lm_eval.api.model", TemplateLM=Base)
    yield fake
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)


def test_the_difference_has_the_error_of_paired_answers(
    model: Path,
    harness: Harness,
    gptq: Run,  # noqa: F811
) -> None:
    words = ["eval", model, "--tasks", "arc_easy", "--baseline", model, "--device", "cpu"]
    done = gptq(*words, "--limit", 6, "--num-fewshot", 2, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    validate_output(data, "eval")
    (score,) = data["scores"]
    assert (score["task"], score["metric"], score["questions"]) == ("arc_easy", "acc", 6)
    assert (score["value"], score["baseline"]) == (pytest.approx(0.5), pytest.approx(4 / 6))
    differences = [ours - before for ours, before in zip(OURS, BEFORE, strict=True)]
    paired = statistics.stdev(differences) / math.sqrt(6)
    assert score["difference"] == pytest.approx(statistics.mean(differences))
    assert score["paired_stderr"] == pytest.approx(paired)
    assert paired < score["stderr"]
    assert [(call["limit"], call["num_fewshot"]) for call in harness.calls] == [(6, 2), (6, 2)]
    ((ours, _),), ((same, _),) = harness.likelihoods
    assert ours == same < 0


def test_a_drop_beyond_the_limit_is_a_failed_gate(
    model: Path,
    harness: Harness,
    gptq: Run,  # noqa: F811
) -> None:
    words = ["eval", model, "--tasks", "arc_easy", "--baseline", model, "--device", "cpu"]
    passed = gptq(*words, "--max-drop", "0.2")
    assert passed.exit_code == 0, passed.stderr
    rows = [line.split() for line in passed.stdout.splitlines()[:2]]
    assert rows[0] == [
        "task",
        "metric",
        "value",
        "stderr",
        "baseline",
        "difference",
        "paired",
        "stderr",
    ]
    assert rows[1] == ["arc_easy", "acc", "0.5000", "0.2236", "0.6667", "-0.1667", "0.1667"]
    harness.calls.clear()
    failed = gptq(*words, "--max-drop", "0.1", "-q")
    assert (failed.exit_code, failed.stdout) == (4, "0.5\n")
    assert failed.stderr.splitlines()[-3:] == [
        "error[E_GATE_TASK]: acc of arc_easy went from 0.6667 to 0.5000, but --max-drop allows 0.1",
        "",
        "hint: try more bits, a smaller --group-size, more calibration text, "
        "or --preset best or max",
    ]


def test_quiet_hides_the_notes_of_lm_eval(
    model: Path,
    harness: Harness,
    gptq: Run,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["eval", model, "--tasks", "arc_easy", "--device", "cpu"]
    told = gptq(*words)
    assert told.exit_code == 0
    assert "a metric has no aggregation" in caplog.text
    assert "bootstrapping for stddev" in told.stderr
    caplog.clear()
    harness.calls.clear()
    quiet = gptq(*words, "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "0.5\n", "")
    assert not caplog.text


def test_a_tag_is_judged_by_its_tasks(
    model: Path,
    harness: Harness,
    gptq: Run,  # noqa: F811
) -> None:
    words = ["eval", model, "--tasks", "ai2_arc", "--baseline", model, "--device", "cpu", "-q"]
    failed = gptq(*words, "--max-drop", "0.1")
    assert (failed.exit_code, failed.stdout) == (4, "0.5\n")
    assert "acc of arc_easy went from 0.6667 to 0.5000" in failed.stderr
    harness.calls.clear()
    assert gptq(*words, "--max-drop", "0.2").exit_code == 0


def judged(results: dict[str, dict[str, float]], groups: dict[str, list[str]]) -> set[str]:
    found = {"results": results, "group_subtasks": groups}
    return {f"{score.task} {score.metric}" for score in tasks._scores([found]) if score.is_main}


def test_a_group_is_judged_by_its_metric_or_by_its_tasks() -> None:
    both = {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}
    texts = {"word_perplexity,none": 9.0}
    empty: dict[str, float] = {}
    assert judged({"a": both, "b": texts, "g": empty}, {"g": ["a", "b"]}) == {
        "a acc_norm",
        "b word_perplexity",
    }
    nested = {"outer": ["inner", "b"], "inner": ["a"]}
    assert judged({"a": both, "b": both, "inner": empty, "outer": empty}, nested) == {
        "a acc_norm",
        "b acc_norm",
    }
    mean = {"acc,none": 0.5}
    assert judged({"a": both, "b": both, "inner": empty, "outer": mean}, nested) == {"outer acc"}
    # The group's metric says nothing about a task without it.
    assert judged({"a": both, "b": texts, "g": mean}, {"g": ["a", "b"]}) == {
        "g acc",
        "b word_perplexity",
    }


def test_a_missing_baseline_is_found_before_the_model_is_measured(
    model: Path,
    harness: Harness,
    gptq: Run,  # noqa: F811
) -> None:
    done = gptq("eval", model, "--tasks", "arc_easy", "--baseline", "./none", "--device", "cpu")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "error[E_MODEL_NOT_FOUND]: `./none` is not a directory" in done.stderr
    assert not harness.calls


def test_a_limit_beyond_the_questions_is_told_as_a_limit(
    model: Path,
    harness: Harness,
    gptq: Run,  # noqa: F811
) -> None:
    words = ["eval", model, "--tasks", "arc_easy", "--device", "cpu", "--limit", "100"]
    done = gptq(*words, "--num-fewshot", "11")
    assert done.exit_code == 0, done.stderr
    assert "at most 100 questions of each task, 11 examples" in done.stdout
    assert harness.calls[0]["num_fewshot"] == 11


def test_large_numbers_have_an_exponent_in_the_table() -> None:
    from gptq_cli.cli.eval_tasks import _decimal

    assert [_decimal(value) for value in (121903031906579.7031, 12.34567, None)] == [
        "1.219e+14",
        "12.3457",
        "-",
    ]
    assert [_decimal(value, "+") for value in (2e6, 0.25, -0.25)] == [
        "+2e+06",
        "+0.2500",
        "-0.2500",
    ]


@pytest.mark.parametrize(
    ("words", "code", "exit_code", "message", "hint"),
    [
        (
            ["--tasks", "unmeasured"],
            "E_EVAL_TASK",
            2,
            "task `unmeasured` has no metric",
            "name one under metric_list in the task's file",
        ),
        (
            ["--tasks", "arc_easy", "--num-fewshot", "12"],
            "E_EVAL_TASK",
            2,
            "task `arc_easy` has 11 examples, but num_fewshot is 12",
            "use --num-fewshot 11 or fewer",
        ),
        (
            ["--tasks", "arc_easy,wikitext", "--num-fewshot", "3"],
            "E_EVAL_TASK",
            2,
            "task `wikitext` scores whole texts, so num_fewshot has no effect on it",
            "omit --num-fewshot",
        ),
        (
            ["--tasks", "zero_shot", "--num-fewshot", "3"],
            "E_EVAL_TASK",
            2,
            "task `zero_shot` has num_fewshot 0 in its file, which lm-eval does not change",
            "omit --num-fewshot",
        ),
        (["--tasks", "arc_eazy"], "E_EVAL_TASK", 2, "lm-eval has no task `arc_eazy`", "arc_easy?"),
        (
            ["--tasks", "arc_easy,gsm8k"],
            "E_EVAL_TASK",
            2,
            "task `gsm8k` generates text, but gptq eval measures log-likelihoods only",
            "use lm-eval with an engine that serves the checkpoint",
        ),
        (
            ["--tasks", "unreachable"],
            "E_EVAL_DATA",
            3,
            "cannot load the data of unreachable: no route to host",
            "--include-path DIR",
        ),
        (["--tasks", ""], "E_USAGE", 2, "empty argument after", ""),
        (["--tasks", "a,,b"], "E_CFG_RANGE", 2, "tasks must be names with commas", ""),
        (
            ["--tasks", "arc_easy", "--max-drop", "0.1"],
            "E_CFG_CONFLICT",
            2,
            "--max-drop needs --baseline",
            "add --baseline MODEL",
        ),
        (
            ["--tasks", "arc_easy", "--baseline", "m", "--max-drop", "-1"],
            "E_CFG_RANGE",
            2,
            "--max-drop must be a number of 0 or more, got -1.0",
            "",
        ),
        (
            ["--tasks", "arc_easy", "--num-fewshot", "-1"],
            "E_CFG_RANGE",
            2,
            "num_fewshot must be a whole number of 0 or more, got -1",
            "",
        ),
        (
            ["--tasks", "arc_easy", "--include-path", "nowhere"],
            "E_CFG_RANGE",
            2,
            "include_path must be a folder of task files, got 'nowhere'",
            "",
        ),
    ],
)
@pytest.mark.usefixtures("harness")
def test_what_cannot_be_evaluated_is_refused_first(
    words: list[str],
    code: str,
    exit_code: int,
    message: str,
    hint: str,
    gptq: Run,  # noqa: F811
) -> None:
    done = gptq("eval", "nowhere", *words)
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert f"error[{code}]: {message}" in done.stderr
    assert hint in done.stderr


def test_a_missing_lm_eval_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="gptq eval needs lm-eval") as refused:
        tasks.evaluate_tasks("nowhere", TaskRequest(("arc_easy",)))
    assert (refused.value.code, refused.value.exit_code) == ("E_LM_EVAL", 3)
    assert refused.value.hint == "install it: pip install 'gptq_cli[eval]'"


def test_a_value_that_is_no_number_fails_the_gate() -> None:
    score = tasks.Score("t", "acc", True, True, 2, math.nan, None, 0.5, None, math.nan, None)
    from gptq_cli.cli.eval_tasks import _failed

    assert [problem.code for problem in _failed([score], 0.5)] == ["E_GATE_TASK"]
    better = tasks.Score("t", "ppl", False, True, 2, 9.0, None, 10.0, None, -1.0, None)
    worse = tasks.Score("t", "ppl", False, True, 2, 12.0, None, 10.0, None, 2.0, None)
    assert (better.drop, worse.drop) == (-1.0, 2.0)
    assert len(_failed([better, worse], 0.5)) == 1


# ---------------------------------------------------------------- beside lm-eval itself

CHOICES = """task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WHOLE = """task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.filterwarnings("default")
def test_scores_are_those_of_lm_eval_with_transformers(model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lines = []
    for number in range(8):
        question = "the quick brown fox jumps " * (number % 4) + f"over {number}"
        choices = ["the lazy dog", "nothing", "a fence", "it all"]
        lines.append(json.dumps({"q": question, "choices": choices, "gold": number % 4}))
    for name in ("choices", "texts"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "choices.yaml").write_text(CHOICES.format(folder=tmp_path), encoding="utf-8")
    (tmp_path / "texts.yaml").write_text(WHOLE.format(folder=tmp_path), encoding="utf-8")
    names = ("local_choices", "local_texts")
    request = TaskRequest(names, include_path=str(tmp_path), device="cpu", dtype="float32")
    ours = tasks.evaluate_tasks(str(model), request)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=2),
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=10,
    )["results"]
    assert {score.metric for score in ours.scores} == {"acc", "acc_norm", "bits_per_byte"}
    for score in ours.scores:
        wanted = theirs[score.task]
        assert score.value == pytest.approx(wanted[f"{score.metric},none"], rel=1e-6)
        if score.stderr is not None:
            assert score.stderr == pytest.approx(wanted[f"{score.metric}_stderr,none"])
