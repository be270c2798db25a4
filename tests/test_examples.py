"""Every command in a document runs here, on small files under the names in the documents.

If a command needs more, the line above its block names it: `<!-- needs: network -->`.
"""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptq_cli.calibration import corpus
from gptq_cli.cli.app import COMMANDS, app, load_command
from gptq_cli.config.corpora import BUILT_IN
from gptq_cli.storage.work_directory import work_of
from tests.workspace import ROOT, SMALL, copy_workspace, make_workspace, supply

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)
NEEDS_MORE = {"check-engine": 3, "eval": 3}  # their exit codes without an engine and lm-eval
OTHERS = {"network", "gpu", "the repository", "an adapter", "a vision-language model"}
PROGRAMS = {"mlx-lm", "vLLM", "SGLang", "llama.cpp", "OpenVINO", "docker", "lm-eval"}


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    needs: str | None
    body: str

    @property
    def commands(self) -> list[str]:
        return self.body.replace("\\\n", " ").splitlines()


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, block["language"], block["needs"], block["body"]) for block in found]


def pages_with(language: str) -> list[Path]:
    found = []
    for page in PAGES:
        if any(block.language == language for block in blocks(page)):
            found.append(page)
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("files"))


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a reader's directory current, with a short text in place of the Hub's and our own."""
    text = (files / "heldout.txt").read_text(encoding="utf-8")

    def stand_in(request: object, column: str, template: object) -> tuple[list[str], str]:
        del request, column, template
        return text.split(";"), "0" * 40

    monkeypatch.setattr(corpus, "open_column", stand_in)
    monkeypatch.setattr(corpus, "_built_in", lambda _: corpus.Documents(BUILT_IN, [text]))
    monkeypatch.chdir(copy_workspace(files, tmp_path))
    return tmp_path


def run(command: str, files: Path) -> None:
    """Run one line of a document and compare its exit code with what the line says.

    If the command sets no settings, they are small. Commands with the demo model set all, but run
    in float32: some processors take eight times as long for the 16 bits of that model.
    """
    line, _, expected = command.partition("  # exit code ")
    words, _, target = line.partition(" > ")
    program, *arguments = shlex.split(words, comments=True)
    assert program == "gptq", f"not a command of ours, mark what it needs: {command}"
    outputs = [after for word, after in pairwise(arguments) if word in ("-o", "--output")]
    for word in arguments:
        if word not in outputs and not Path(word).exists():
            supply(files, word)
    if arguments[0] == "resume":
        supply(files, work_of(Path(arguments[1])).name)
    settings = SMALL
    if "scripts/demo" in command:
        settings = {}
        if arguments[0] in ("quantize", "eval-ppl"):
            arguments += ["--dtype", "float32"]
    result = CliRunner().invoke(app, arguments, env=settings)
    allowed = {int(expected or 0)}
    if {"--max-increase", "--max-kl"} & set(arguments):  # these gates may fail
        allowed.add(4)
    assert result.exit_code in allowed, f"{command}\n{result.stdout}{result.stderr}"
    if target:
        Path(target.strip()).write_text(result.stdout, encoding="utf-8")


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language == "bash" and block.needs is None:
            yield from (line for line in block.commands if line and not line.startswith("#"))


@pytest.mark.parametrize("page", pages_with("bash"), ids=name_of)
@pytest.mark.usefixtures("here")
def test_commands_of_a_page_run_in_their_order(page: Path, files: Path) -> None:
    for command in commands(page):
        run(command, files)


@pytest.mark.usefixtures("here")
def test_examples_of_help_run(files: Path) -> None:
    for name in COMMANDS:
        _, *examples = load_command(name).help.split("Example: ")
        assert examples, name
        for example in examples:
            if name in NEEDS_MORE:
                example = f"{example.strip()}  # exit code {NEEDS_MORE[name]}"
            run(example.strip(), files)


@pytest.mark.parametrize("page", pages_with("pycon"), ids=name_of)
@pytest.mark.usefixtures("here")
def test_python_of_a_page_gives_the_output_shown(page: Path) -> None:
    text = "\n".join(block.body for block in blocks(page) if block.language == "pycon")
    names: dict[str, Any] = {}
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, names, name_of(page), None, None)
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert (failed, tried > 3) == (0, True), "".join(said)


def test_commands_stand_in_tested_blocks_with_known_needs() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    hidden = []
    needs: set[str] = set()
    for block in every:
        tested = block.language in ("bash", "text")
        if not tested and re.search(r"^\s*gptq ", block.body, re.M):
            hidden.append((name_of(block.page), block.body))
        if block.needs:
            needs.update(re.split(r", and |, ", block.needs))
    assert hidden == []
    assert needs <= PROGRAMS | OTHERS
    assert sum(block.language == "bash" and block.needs is None for block in every) > 20


def test_some_page_shows_each_command() -> None:
    shown = {line.split()[1] for page in PAGES for line in commands(page)}
    assert set(COMMANDS) <= shown | set(NEEDS_MORE)
