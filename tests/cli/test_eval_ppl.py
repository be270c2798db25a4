"""`gptq eval-ppl`: the request, the answer, the gate."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.evaluation.verdict import BETTER, VERDICTS, WORST, verdict_lines

from .conftest import FakeEvaluated, FakeEvaluator, Run

ROOT = Path(__file__).resolve().parents[2]
COMPARED = FakeEvaluated(
    perplexity=12.5, baseline_perplexity=12.25, kl=0.0123, top1_agreement=0.956
)


def test_without_flags_the_request_has_its_defaults(gptq: Run, evaluator: FakeEvaluator) -> None:
    assert gptq("eval-ppl", "m").exit_code == 0
    assert evaluator.calls == [("m", EvalRequest())]


def test_every_flag_reaches_the_request(gptq: Run, evaluator: FakeEvaluator) -> None:
    words = [
        "--dataset=c4",
        "--dataset-config=en",
        "--dataset-split=validation",
        "--text-column=body",
        "--chat-template=t.jinja",
        "--seqlen=64",
        "--batch-size=2",
        "--max-windows=5",
        "--device=cuda:1",
        "--dtype=float16",
        "--backend=torch",
        "--baseline=b",
        "--max-increase=0.5",
        "--revision=v1",
        "--trust-remote-code",
    ]
    evaluator.result = COMPARED
    assert gptq("eval-ppl", "m", *words).exit_code == 0
    request = EvalRequest(
        "c4", "en", "validation", "body", 64, 2, 5, "cuda:1", "float16", "torch", "v1", True, "b",
        chat_template="t.jinja",
    )  # fmt: skip
    assert evaluator.calls == [("m", request)]


@pytest.mark.parametrize(("words", "dtype"), [([], "float32"), (["--dtype=bfloat16"], "bfloat16")])
def test_variables_say_where_and_how_a_model_runs_but_not_on_which_text(
    words: list[str],
    dtype: str,
    gptq: Run,
    evaluator: FakeEvaluator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"DTYPE": "float32", "DEVICE": "cuda:1", "SEQLEN": "64"}.items():
        monkeypatch.setenv(f"GPTQ_{name}", value)
    assert gptq("eval-ppl", "m", *words).exit_code == 0
    assert evaluator.calls == [("m", EvalRequest(device="cuda:1", dtype=dtype))]
    monkeypatch.setenv("GPTQ_DTYPE", "float33")
    refused = gptq("eval-ppl", "m")
    assert refused.exit_code == 2
    assert "error[E_CFG_RANGE]: GPTQ_DTYPE must be " in refused.stderr


def test_the_answer_states_its_protocol(gptq: Run, evaluator: FakeEvaluator) -> None:
    evaluator.result = COMPARED
    result = gptq("eval-ppl", "m", "--baseline", "b")
    assert (
        result.stdout
        == """\
perplexity  12.5000
baseline    12.2500 (+0.2500)
agreement   KL 0.0123, top-1 95.60%
verdict     the model is close to the original: KL is below 0.05
protocol    wikitext2, 3 windows of 128 tokens, bfloat16
time        0:01:01
"""
    )
    assert "block 1/1 model.layers.0 1.0 s eta 0:00:00 mem 1.07 GB device 3.22 GB" in result.stderr


def test_quiet_prints_the_number_alone(gptq: Run, evaluator: FakeEvaluator) -> None:
    result = gptq("eval-ppl", "m", "-q")
    assert (result.stdout, result.stderr) == ("12.5\n", "")
    assert len(evaluator.calls) == 1


GATE = ["eval-ppl", "m", "--baseline", "b", "--max-increase", "0.2"]
GATE_ERROR = (
    "error[E_GATE_PPL]: perplexity rose by 0.25, from 12.25 to 12.5, but --max-increase allows 0.2"
)


def test_a_failed_gate_prints_the_result_and_exits_4(gptq: Run, evaluator: FakeEvaluator) -> None:
    evaluator.result = COMPARED
    result = gptq(*GATE)
    assert result.exit_code == 4
    assert GATE_ERROR in result.stderr
    assert result.stdout.startswith("perplexity  12.5000\n")


def test_a_failed_gate_prints_result_and_problem_as_json(
    gptq: Run, evaluator: FakeEvaluator
) -> None:
    evaluator.result = COMPARED
    result = gptq(*GATE, "--json")
    assert result.exit_code == 4
    assert GATE_ERROR in result.stderr
    data = json.loads(result.stdout)
    assert (data["status"], data["exit_code"], data["perplexity"]) == ("error", 4, 12.5)
    assert data["problems"][0]["code"] == "E_GATE_PPL"


def test_a_gate_passes_at_its_limit_and_fails_on_nan(gptq: Run, evaluator: FakeEvaluator) -> None:
    evaluator.result = COMPARED
    assert gptq("eval-ppl", "m", "--baseline", "b", "--max-increase", "0.25").exit_code == 0
    evaluator.result = FakeEvaluated(math.nan, 12.25, 0.0, 0.0)
    assert gptq("eval-ppl", "m", "--baseline", "b", "--max-increase", "0.25").exit_code == 4


HINT = (
    "hint: try more bits, a smaller --group-size, more calibration text, or --preset best or max\n"
)


@pytest.mark.parametrize(
    ("limit", "passes", "fails", "error"),
    [
        (
            "--max-increase",
            "2.05%",
            "2.04%",
            "error[E_GATE_PPL]: perplexity rose by 2.041%, from 12.25 to 12.5, but --max-increase "
            "allows 2.04%",
        ),
        (
            "--max-kl",
            "0.0123",
            "0.0122",
            "error[E_GATE_KL]: KL 0.0123 is above the 0.0122 of --max-kl",
        ),
        (
            "--min-top1",
            "0.956",
            "95.7%",
            "error[E_GATE_TOP1]: top-1 agreement 95.60% is below the 95.70% of --min-top1",
        ),
    ],
)
def test_each_gate_passes_at_its_limit_and_fails_beyond(
    limit: str, passes: str, fails: str, error: str, gptq: Run, evaluator: FakeEvaluator
) -> None:
    evaluator.result = COMPARED
    words = ["eval-ppl", "m", "--baseline", "b", limit]
    assert gptq(*words, passes).exit_code == 0
    result = gptq(*words, fails)
    assert result.exit_code == 4
    assert result.stderr.endswith(f"{error}\n\n{HINT}")
    evaluator.result = FakeEvaluated(math.nan, 12.25, math.nan, math.nan)
    assert gptq(*words, passes).exit_code == 4


def test_all_failed_gates_are_told_at_once(gptq: Run, evaluator: FakeEvaluator) -> None:
    evaluator.result = COMPARED
    limits = ["--max-increase=0", "--max-kl=0", "--min-top1=1", "--max-ppl=13"]
    result = gptq("eval-ppl", "m", "--baseline", "b", *limits, "--json")
    problems = json.loads(result.stdout)["problems"]
    assert [problem["code"] for problem in problems] == ["E_GATE_PPL", "E_GATE_KL", "E_GATE_TOP1"]
    assert [f"hint: {problem['hint']}\n" for problem in problems] == [HINT] * 3
    assert result.stderr.count(HINT) == 1  # of the last one
    assert result.stderr.endswith(f"\n\n{HINT}\n3 problems\n")
    assert result.exit_code == 4


ABOVE_LIMIT = "error[E_NUM_PPL]: perplexity 10001 is above the 10000 of --max-ppl"


@pytest.mark.parametrize("limit", [[], ["--max-ppl", "1e4"]])
def test_a_perplexity_above_the_limit_fails_the_gate(
    limit: list[str], gptq: Run, evaluator: FakeEvaluator
) -> None:
    evaluator.result = FakeEvaluated(10_001.0, None, None, None)
    result = gptq("eval-ppl", "m", *limit)
    assert result.exit_code == 4
    assert ABOVE_LIMIT in result.stderr
    assert "gptq verify DIR --full" in result.stderr


@pytest.mark.parametrize("perplexity", [10_001.0, math.nan])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_hint_for_an_unusable_model_does_not_name_the_dtype_that_was_used(
    dtype: str, perplexity: float, gptq: Run, evaluator: FakeEvaluator
) -> None:
    evaluator.result = FakeEvaluated(perplexity, dtype=dtype)
    hint = gptq("eval-ppl", "m").stderr.splitlines()[-1]
    assert hint.startswith("hint: try ")
    assert ("--dtype float32" in hint) == (dtype != "float32")


def test_a_text_that_does_not_suit_the_baseline_is_told(
    gptq: Run, evaluator: FakeEvaluator
) -> None:
    evaluator.result = FakeEvaluated(740_505.0, 714_977.0, 0.001, 0.99)
    result = gptq("eval-ppl", "m", "--baseline", "b")
    assert result.exit_code == 4
    assert result.stderr.endswith(
        "error[E_NUM_PPL]: perplexity 740505 is above the 10000 of --max-ppl, but so is the 714977 "
        "of the baseline: the text does not suit the model\n\n"
        "hint: measure on text like that of its training: --dataset FILE\n"
    )
    evaluator.result = FakeEvaluated(740_505.0, 12.0, 3.0, 0.1)
    assert "gptq verify DIR --full" in gptq("eval-ppl", "m", "--baseline", "b").stderr


def test_a_perplexity_below_a_raised_limit_passes(gptq: Run, evaluator: FakeEvaluator) -> None:
    evaluator.result = FakeEvaluated(10_001.0, None, None, None)
    result = gptq("eval-ppl", "m", "--max-ppl", "1e5")
    assert result.exit_code == 0
    assert ABOVE_LIMIT not in result.stderr
    assert "gptq verify DIR --full" not in result.stderr


@pytest.mark.usefixtures("evaluator")
def test_the_error_of_a_limit_set_by_the_user_has_no_hint(gptq: Run) -> None:
    result = gptq("eval-ppl", "m", "--max-ppl", "12")
    assert result.exit_code == 4
    expected = "error[E_NUM_PPL]: perplexity 12.5 is above the 12 of --max-ppl"
    assert result.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-increase", "1"], "--max-increase needs --baseline to compare with"),
        (
            ["--max-increase", "nan", "--baseline", "b"],
            "--max-increase must be a number of 0 or more, got nan",
        ),
        (
            ["--max-increase", "-1", "--baseline", "b"],
            "--max-increase must be a number of 0 or more, got -1",
        ),
        (["--max-increase", "2x", "--baseline", "b"], "or a share such as 2%, got '2x'"),
        (["--max-increase=-2%", "--baseline", "b"], "a number of 0 or more, got -2%"),
        (["--max-kl", "1"], "--max-kl needs --baseline to compare with"),
        (["--max-kl", "nan", "--baseline", "b"], "--max-kl must be a number of 0 or more, got nan"),
        (["--min-top1", "0.9"], "--min-top1 needs --baseline to compare with"),
        (["--min-top1", "101%", "--baseline", "b"], "must be a number from 0 to 1, got 101%"),
        (["--seqlen", "0"], "--seqlen must be a whole number of 1 or more, got 0"),
        (["--max-windows", "0"], "--max-windows must be greater than or equal to 1"),
        (["--backend", "marlin"], '--backend must be auto, torch, triton or null, got "marlin"'),
    ],
)
def test_wrong_settings_are_refused_before_loading(
    words: list[str], message: str, gptq: Run, evaluator: FakeEvaluator
) -> None:
    result = gptq("eval-ppl", "m", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert evaluator.calls == []


@pytest.mark.parametrize(
    ("kl", "words", "advised"),
    [
        (-1e-9, "hardly differs from the original: KL is below 0.01", False),
        (0.00999, "hardly differs from the original: KL is below 0.01", False),
        (0.01, "is close to the original: KL is below 0.05", False),
        (0.05, "differs noticeably from the original: KL is below 0.2", True),
        (0.19, "differs noticeably from the original: KL is below 0.2", True),
        (0.2, "has lost much of the original: KL is below 0.5", True),
        (0.5, "is badly damaged: KL is 0.5 or more", True),
        (math.inf, "is badly damaged: KL is 0.5 or more", True),
        (math.nan, "is badly damaged: KL is 0.5 or more", True),
    ],
)
def test_a_verdict_has_words_and_what_to_try(kl: float, words: str, advised: bool) -> None:
    first, *rest = verdict_lines(kl)
    assert first == f"verdict     the model {words}"
    assert [line.strip() for line in rest] == [BETTER] * advised


def test_the_documents_have_the_limits_of_the_verdicts() -> None:
    section = (ROOT / "docs" / "accuracy.md").read_text().partition("## Verdicts")[2]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    expected = [["KL", "verdict"]]
    expected += [[f"below {limit}", words] for limit, words in VERDICTS.items()]
    expected.append([f"{max(VERDICTS)} or more", WORST])
    assert [[cell.strip() for cell in row] for row in rows[: len(expected)]] == expected
