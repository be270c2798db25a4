"""Every code that the program can print is explained, and no other."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import yaml

from gptq_cli.cli import codes
from gptq_cli.cli.codes import explanations
from tests.families import save_model

from .conftest import Run

PACKAGE = Path(__file__).parents[2] / "gptq_cli"
CODES = PACKAGE / "cli" / "codes.yaml"


STOPS = ("E_INTERRUPTED", "E_PAUSED")  # printed without a code
OF_OTHERS = ("E_BUG", "E_FILE", "E_NUM_HESSIAN", "E_VERIFY", "W_DATA_CHATS")  # said elsewhere
# Examples that need nothing but a model and the files that they name.
RUN = (
    "E_ALLOC_GOAL", "E_CFG_CONFLICT", "E_CFG_FILE", "E_CFG_FORMAT", "E_CFG_MISSING",
    "E_CFG_NOTHING_TO_DO", "E_CFG_NO_MATCH", "E_CFG_RANGE", "E_CFG_RANKS", "E_CFG_REGEX",
    "E_CFG_SEQLEN", "E_CFG_TYPE", "E_CFG_UNKNOWN_KEY", "E_CFG_YAML", "E_CKPT_CONFIG",
    "E_CKPT_CORRUPT", "E_CKPT_INDEX", "E_CKPT_KIND", "E_CKPT_MISSING", "E_CKPT_PICKLE", "E_CODE",
    "E_DATA_CHAT", "E_DATA_COLUMN", "E_DATA_FORMAT", "E_DATA_NOT_FOUND", "E_DATA_SCRIPT",
    "E_DATA_SHORT", "E_DATA_TEMPLATE", "E_LOG_FILE", "E_LORA", "E_MODEL_NOT_FOUND",
    "E_OUT_EXISTS", "E_OUT_FOREIGN", "E_OUT_IS_INPUT", "E_REPORT", "E_RESUME_NOTHING", "E_SHAPE",
    "E_TARGET", "E_USAGE", "W_CFG_FUSED", "W_CFG_HEAD", "W_CFG_UNFIT", "W_CKPT_ADAPTER",
    "W_TARGET",
)  # fmt: skip


@cache
def examples() -> dict[str, str]:
    """Return the examples by code, which take a tenth of a second to read."""
    return codes.examples()


def used_codes() -> set[str]:
    """Return the codes of errors and warnings that the sources name."""
    codes: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        codes.update(re.findall(r"[\"']([EW]_[A-Z0-9_]+)[\"']", file.read_text()))
    return codes


def test_every_code_of_the_sources_has_a_text() -> None:
    missing = sorted(used_codes() - set(explanations()))
    file = CODES.relative_to(PACKAGE.parent)
    assert not missing, f"explain in {file} their cause and remedy: {missing}"


def test_every_text_has_a_code_in_the_sources() -> None:
    stale = sorted(set(explanations()) - used_codes())
    file = CODES.relative_to(PACKAGE.parent)
    assert not stale, f"no source has these codes, delete them from {file}: {stale}"


def test_texts_are_sorted_and_give_a_cause_and_a_remedy() -> None:
    texts = explanations()
    assert list(texts) == sorted(texts)
    for code, text in texts.items():
        first, *rest = text.splitlines()
        assert first.endswith("."), code
        assert rest, code
        assert max(map(len, text.splitlines())) <= 120
    keys = re.findall(r"^([EW]_\w+):", CODES.read_text(), flags=re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(yaml.safe_load(CODES.read_text()))


def test_explain_takes_a_code_in_any_spelling(gptq: Run) -> None:
    for code in ("E_SHAPE", "e_shape", "e-shape"):
        result = gptq("explain", code)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("E_SHAPE\n\nA layer's size does not fit the group size")
        assert "\n\nExample:\n  $ gptq plan ./model --group-size 96\n  error[" in result.stdout
    data = json.loads(gptq("explain", "E_SHAPE", "--json").stdout)
    assert (data["code"], data["example"]) == ("E_SHAPE", examples()["E_SHAPE"])
    listing = gptq("explain").stdout.splitlines()
    assert len(listing) == len(explanations())


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("E_SHAP", "did you mean E_SHAPE?"),
        ("E_ALOC", "did you mean E_ALLOC_GOAL?"),
        ("e_out_exist", "did you mean E_OUT_EXISTS?"),
        ("zzz", "gptq explain lists all codes"),
        ("E_XY", "gptq explain lists all codes"),
        ("E_NOPE", "gptq explain lists all codes"),
    ],
)
def test_an_unknown_code_gets_the_nearest_as_hint(code: str, hint: str, gptq: Run) -> None:
    result = gptq("explain", code)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error[E_CODE]: there is no code `{code}`\n\nhint: {hint}\n"


def test_every_code_has_an_example_with_its_command() -> None:
    for code, example in examples().items():
        *before, command = [line for line in example.splitlines() if line.startswith(("#", "$"))]
        assert command.startswith("$ gptq "), code
        assert all(line.startswith("# ") for line in before), code
        says = example.partition(f"{command}\n")[2]
        assert f"[{code}]: " in says or f"{code} " in says or code in STOPS, code
        assert says, code


def pattern_of(node: ast.AST) -> str:
    """Return the pattern of the texts that a string of the sources makes; "" for other nodes."""
    match node:
        case ast.Constant(value=str()):
            return re.escape(node.value)
        case ast.JoinedStr():
            return "".join(pattern_of(part) for part in node.values)
        case ast.FormattedValue():
            return ".*"
    return ""


def patterns_by_code() -> dict[str, set[str]]:
    """Return the patterns of all strings in the functions that name a code."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                nodes = list(ast.walk(function))
                parts: set[ast.AST] = set()
                for node in nodes:
                    if isinstance(node, ast.JoinedStr):
                        parts.update(node.values)
                patterns = set(map(pattern_of, set(nodes) - parts))
                for code in filter(re.compile("[EW]_[A-Z0-9_]+").fullmatch, patterns):
                    found[code] |= patterns
    return found


def test_examples_say_what_the_sources_say() -> None:
    patterns = patterns_by_code()
    checked = set(explanations()) - set(OF_OTHERS) - set(RUN)
    for code in checked:
        said = examples()[code].partition("$ gptq ")[2].partition("\n")[2]
        said = said.replace(code, "")
        long = [pattern for pattern in patterns[code] if len(pattern.replace(".*", "")) > 8]
        assert any(re.search(pattern, said) for pattern in long), f"{code}: who says {said!r}?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return save_model(tmp_path_factory.mktemp("explained") / "model", **sizes)


@pytest.mark.parametrize("code", RUN)
def test_an_example_prints_what_it_shows(
    code: str, gptq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *before, command, message = examples()[code].splitlines()
    shutil.copytree(model, tmp_path / "model")
    for line in before:
        name, content = line.removeprefix("# ").split(": ", 1)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.chdir(tmp_path)
    result = gptq(*shlex.split(command)[2:])
    printed = result.stderr.replace(str(tmp_path), "/data").splitlines()
    assert message in printed
    assert result.exit_code == 0 if code.startswith("W_") else result.exit_code in (2, 3, 6)
