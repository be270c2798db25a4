"""`gptq generate`: only the text is on stdout, in pieces; the prompt may come from stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from gptq_cli.cli import generate as command
from gptq_cli.cli.app import app
from gptq_cli.evaluation.generate import GenerateResult
from gptq_cli.evaluation.request import GenerateRequest
from gptq_cli.events import PhaseStarted, Report, Warned

from .conftest import Run, stand_in

Write = Callable[[str], object]
MODULE = "gptq_cli.evaluation.generate"


class FakeGenerator:
    """Stands for `generate_text`: records its calls and writes `pieces`."""

    def __init__(self) -> None:
        self.pieces = ["a fox", " \x1b[31m", "é\n", "end"]
        self.calls: list[tuple[str, GenerateRequest]] = []
        self.error: BaseException | None = None

    def __call__(
        self, model: str, request: GenerateRequest, write: Write, report: Report
    ) -> GenerateResult:
        self.calls.append((model, request))
        report(PhaseStarted("model", "1 MB of weights in bfloat16 on cpu, 2 MB free"))
        report(Warned("W_TEST", "a warning"))
        for piece in self.pieces:
            write(piece)
        if self.error:
            raise self.error
        text = "".join(self.pieces)
        return GenerateResult(
            model, request.prompt, text, True, 7, 40, "end", "bfloat16", "cpu", 2, 2, 2.0
        )


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> FakeGenerator:
    fake = FakeGenerator()
    stand_in(monkeypatch, MODULE, generate_text=fake)
    return fake


def test_stdout_holds_the_text_and_nothing_else(gptq: Run, generator: FakeGenerator) -> None:
    result = gptq("generate", "m", "why?")
    assert result.stdout == "a fox \x1b[31mé\nend\n"
    assert result.stderr.splitlines() == [
        "model: 1 MB of weights in bfloat16 on cpu, 2 MB free",
        "warning[W_TEST]: a warning",
        "prompt: 7 tokens as a chat; 40 new tokens, 20 a second; the model ended the text",
    ]
    assert generator.calls == [("m", GenerateRequest("why?"))]
    quiet = gptq("generate", "m", "why?", "-q")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "warning[W_TEST]: a warning\n")


def test_json_is_one_object(gptq: Run, generator: FakeGenerator) -> None:
    result = gptq("generate", "m", "why?", "--json")
    data = json.loads(result.stdout)
    assert (data["text"], data["stopped"]) == ("".join(generator.pieces), "end")


def test_every_flag_of_generate_reaches_the_request(gptq: Run, generator: FakeGenerator) -> None:
    words = ["--raw", "--max-new-tokens=5", "--temperature=0.5", "--top-p=0.9", "--seed=3"]
    words += ["--device=cuda:1", "--dtype=float16", "--revision=v1", "--trust-remote-code"]
    assert gptq("generate", "m", "why?", *words).exit_code == 0
    assert gptq("generate", "m", "why?", "--chat-template=t.jinja").exit_code == 0
    expected = GenerateRequest("why?", True, None, 5, 0.5, 0.9, 3, "cuda:1", "float16", "v1", True)
    assert [call[1] for call in generator.calls] == [
        expected,
        GenerateRequest("why?", chat_template="t.jinja"),
    ]


@pytest.mark.parametrize(
    ("content", "prompt"), [(b"one\ntwo\r\n", "one\ntwo"), ("é\n\n".encode(), "é\n")]
)
def test_the_prompt_may_come_from_stdin(
    content: bytes, prompt: str, generator: FakeGenerator
) -> None:
    assert CliRunner().invoke(app, ["generate", "m", "-"], input=content).exit_code == 0
    assert generator.calls[0][1].prompt == prompt


@pytest.mark.parametrize(
    ("content", "code", "message", "hint"),
    [
        (b"\n", "E_DATA_EMPTY", "there is no prompt on stdin", "write it to stdin"),
        (b"ab\xff", "E_DATA_ENCODING", "is not UTF-8: invalid start byte at offset 2", "iconv"),
    ],
)
def test_stdin_without_a_text_is_refused(
    content: bytes, code: str, message: str, hint: str, generator: FakeGenerator
) -> None:
    result = CliRunner().invoke(app, ["generate", "m", "-"], input=content)
    assert (result.exit_code, result.stdout, generator.calls) == (3, "", [])
    assert f"error[{code}]: " in result.stderr
    assert message in result.stderr
    assert hint in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-p", "0.5"], "error[E_CFG_CONFLICT]: top_p has no effect without a temperature"),
        (["--temperature", "-1"], "error[E_CFG_RANGE]: temperature must be a number of 0 or more"),
        (
            ["--temperature", "1e-300"],
            "error[E_CFG_RANGE]: temperature must be 0 or at least 1e-05",
        ),
        (["--max-new-tokens", "0"], "error[E_USAGE]: --max-new-tokens must be "),
        (["--device", "gpu"], "error[E_CFG_RANGE]: --device must be"),
    ],
)
def test_a_wrong_option_of_generate_exits_2(
    words: list[str], message: str, gptq: Run, generator: FakeGenerator
) -> None:
    result = gptq("generate", "m", "why?", *words)
    assert (result.exit_code, result.stdout, generator.calls) == (2, "", [])
    assert message in result.stderr


def test_an_interrupted_text_ends_with_its_line(gptq: Run, generator: FakeGenerator) -> None:
    generator.error = KeyboardInterrupt()
    result = gptq("generate", "m", "why?")
    assert (result.exit_code, result.stdout) == (130, "a fox \x1b[31mé\nend\n")
    assert result.stderr.splitlines()[-1] == "interrupted"


def test_a_terminal_gets_escapes_made_visible(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command.write_piece("a\x1b[31m\n")
    assert capfdbinary.readouterr().out == b"a\\x1b[31m\n"
