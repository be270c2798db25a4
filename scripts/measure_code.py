#!/usr/bin/env python3
"""Count what makes the code hard to read: dense lines, and the files and calls of one traced run.

    python scripts/measure_code.py [--check] [--static] [--json FILE]

The run is `gptq quantize` of the demo model; a second one after it is `gptq_cli.quantize` of the
same. A file is entered when a function of it runs. Frames are functions of the package on the
stack, without comprehensions. Lines of code are those that are not blank, a comment or part of a
docstring. The complexity of a function is 1, plus 1 for each branch, loop, case, part of a `try`,
`for` and `if` of a comprehension, conditional expression, `and` and `or`.
With `--check` the exit code is 1 if a count is over its limit; with `--static` nothing is run.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gptq_cli"
DEMO = ROOT / "scripts" / "demo"
MODEL = DEMO / "model"
SOLVER = "solve.py"
COLUMN_LOOP = "_round_one_by_one"  # of SOLVER, on the CPU
LOOP = "quantize_blocks"  # the function that holds the loop over blocks
COUNTED = ("plan_checkpoint", "open_checkpoint", "choose")
LONGEST_LINE = 100
COMPLEX = 8
RUN = ["--bits", "4", "--nsamples", "8", "--seqlen", "128", "--device", "cpu"]
RUN += ["--dtype", "float32"]  # 16 bits are slow on some processors
LIMITS = {
    "files entered by gptq quantize": 60,
    "frames from main to the column loop": 15,
    "calls from quantize() to the column loop": 9,
    "calls of plan_checkpoint": 1,
    "calls of open_checkpoint for the model": 1,
    "calls of choose per layer": 1,
    "comprehensions per 1,000 lines": 25,
    "conditional expressions per 1,000 lines": 12,
    "comprehensions and conditional expressions in one another": 0,
    "lines over 100 columns": 0,
    "functions over complexity 8, %": 2,
    "parameters in the block loop": 6,
}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DENSE = (*COMPREHENSIONS, ast.IfExp)
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case, ast.IfExp)
COMPREHENSION_NAMES = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
IS_FUNCTION = 0x1  # co_flags of code that is neither a module's nor a class's


# ---------------------------------------------------------------- sources


@dataclass
class Counts:
    """Counts over the files of one package, or of all."""

    files: int = 0
    code: int = 0
    long_lines: int = 0
    comprehensions: int = 0
    conditionals: int = 0
    nested: int = 0
    complexities: list[int] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.files += other.files
        self.code += other.code
        self.long_lines += other.long_lines
        self.comprehensions += other.comprehensions
        self.conditionals += other.conditionals
        self.nested += other.nested
        self.complexities += other.complexities

    def per_thousand(self, number: int) -> float:
        return round(1000 * number / max(1, self.code), 1)

    @property
    def complex_functions(self) -> int:
        return sum(complexity > COMPLEX for complexity in self.complexities)

    @property
    def complex_percent(self) -> float:
        return round(100 * self.complex_functions / max(1, len(self.complexities)), 1)


def count_file(path: Path) -> Counts:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    counts = Counts(files=1 if text.strip() else 0, code=len(lines_of_code(text, tree)))
    for line in text.splitlines():
        counts.long_lines += len(line) > LONGEST_LINE
    for node in ast.walk(tree):
        counts.comprehensions += isinstance(node, COMPREHENSIONS)
        counts.conditionals += isinstance(node, ast.IfExp)
        if isinstance(node, DENSE):
            counts.nested += sum(isinstance(inner, DENSE) for inner in ast.walk(node)) - 1
        if isinstance(node, FUNCTIONS):
            counts.complexities.append(complexity_of(node))
    return counts


def lines_of_code(text: str, tree: ast.Module) -> set[int]:
    """The numbers of lines that hold code."""
    found: set[int] = set()
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    ignored.add(tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            found.update(range(token.start[0], token.end[0] + 1))
    return found - docstring_lines(tree)


def docstring_lines(tree: ast.Module) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            docstring = node.body[0]
            found.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return found


def complexity_of(function: ast.AST) -> int:
    """The complexity of one function; a function inside it is counted as another one."""
    complexity = 1
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, FUNCTIONS):
            continue
        if isinstance(node, BRANCHES):
            complexity += 1
        elif isinstance(node, ast.comprehension):
            complexity += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            complexity += len(node.values) - 1
        elif isinstance(node, ast.Try):
            complexity += bool(node.orelse) + bool(node.finalbody)
        waiting += ast.iter_child_nodes(node)
    return complexity


def n_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """All parameters but self and cls."""
    named = function.args
    names = [argument.arg for argument in [*named.posonlyargs, *named.args, *named.kwonlyargs]]
    extra = [argument for argument in (named.vararg, named.kwarg) if argument is not None]
    return len([name for name in names if name not in ("self", "cls")]) + len(extra)


def functions_of(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, FUNCTIONS):
            yield node


def longest_parameter_list(stack: list[list[Any]]) -> tuple[int, str]:
    """The most parameters of a function that is in the file of the block loop or below it."""
    names = [name for _, name, _ in stack]
    if LOOP not in names:
        raise SystemExit(f"{LOOP} is not on the way from main to the column loop: {names}")
    inner = stack[names.index(LOOP) :]
    wanted = {(file, line) for file, _, line in inner}
    found = []
    for file in sorted({file for file, _, _ in inner}):
        for function in functions_of(PACKAGE / file):
            first = min([function.lineno, *(node.lineno for node in function.decorator_list)])
            if file == inner[0][0] or (file, first) in wanted:
                found.append((n_parameters(function), f"{file}: {function.name}"))
    return max(found)


# ---------------------------------------------------------------- a run


class Trace:
    """Notes of each call into the package: file, function, the deepest stack at the columns."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, int], str] = {}
        self.calls: Counter[str] = Counter()
        self.deepest: list[tuple[str, str, int]] = []
        self._prefix = str(PACKAGE) + "/"

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._prefix):
            return  # most calls are of other packages
        if not self._is_function(frame):
            return
        file = code.co_filename.removeprefix(self._prefix)
        self.functions[file, code.co_firstlineno] = code.co_name
        if code.co_name == "open_checkpoint" and frame.f_locals["directory"] != MODEL:
            return  # of the output, which is read back before it is published
        if code.co_name in COUNTED:
            self.calls[code.co_name] += 1
        if Path(file).name == SOLVER and code.co_name == COLUMN_LOOP:
            stack = self._stack(frame)
            if len(stack) > len(self.deepest):
                self.deepest = stack

    def _is_function(self, frame: FrameType) -> bool:
        code = frame.f_code
        if code.co_name in COMPREHENSION_NAMES or not code.co_flags & IS_FUNCTION:
            return False
        return code.co_filename.startswith(self._prefix)

    def _stack(self, innermost: FrameType) -> list[tuple[str, str, int]]:
        """(file, function, first line) of the package's functions, the outermost first."""
        stack = []
        frame: FrameType | None = innermost
        while frame is not None:
            code = frame.f_code
            if self._is_function(frame):
                file = code.co_filename.removeprefix(self._prefix)
                stack.append((file, code.co_name, code.co_firstlineno))
            frame = frame.f_back
        return stack[::-1]


def trace_in_process(folder: Path) -> None:
    """Quantize the demo model by the command, then from Python; print the notes as JSON."""
    sys.path.insert(0, str(ROOT))
    notes = {}
    with redirect_stdout(io.StringIO()):
        # The command is first: what a run keeps for the next one would hide files from it.
        notes["command"] = notes_of(quantize_by_command, folder / "command")
        notes["python"] = notes_of(quantize_from_python, folder / "python")
    print(json.dumps(notes))


def notes_of(run: Callable[[Path], int], output: Path) -> dict[str, Any]:
    """Return what a trace of `run` tells, which quantizes into `output` and counts its layers."""
    trace = Trace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        layers = run(output)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return {
        "files": sorted({file for file, _ in trace.functions}),
        "functions": len(trace.functions),
        "calls": trace.calls,
        "stack": trace.deepest,
        "layers": layers,
    }


def quantize_by_command(output: Path) -> int:
    from gptq_cli.__main__ import main

    text = str(DEMO / "calibration.txt")
    sys.argv = ["gptq", "quantize", str(MODEL), "-o", str(output), "--dataset", text, *RUN]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    return len(json.loads((output / "gptq_manifest.json").read_text(encoding="utf-8"))["layers"])


def quantize_from_python(output: Path) -> int:
    from gptq_cli import QuantizeConfig, quantize

    text = str(DEMO / "calibration.txt")
    config = QuantizeConfig(
        bits=4, nsamples=8, seqlen=128, device="cpu", dtype="float32", dataset=text
    )
    return len(quantize(MODEL, config, output).layers)


def traced(folder: Path) -> dict[str, Any]:
    """Return the notes of both runs by "command" and "python"; they get a process of their own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--trace", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    notes: dict[str, Any] = json.loads(done.stdout)
    return notes


# ---------------------------------------------------------------- the table


def packages() -> dict[str, Counts]:
    """Counts of each package, by name; files of the top level are one."""
    found: dict[str, Counts] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).parts
        name = parts[0] if len(parts) > 1 else "top level"
        found.setdefault(name, Counts()).add(count_file(file))
    return found


def folder_counts(folder: Path) -> Counts:
    counts = Counts()
    for file in sorted(folder.rglob("*.py")):
        counts.add(count_file(file))
    return counts


def print_packages(found: dict[str, Counts]) -> None:
    heads = f"{'files':>6}{'code':>8}{'compr./1k':>11}{'cond./1k':>10}{'> 100':>7}{'> cx 8':>8}"
    print(" " * 12 + heads)
    for name, counts in found.items():
        comprehensions = counts.per_thousand(counts.comprehensions)
        conditionals = counts.per_thousand(counts.conditionals)
        print(
            f"{name:12}{counts.files:6}{counts.code:8}{comprehensions:11}{conditionals:10}"
            f"{counts.long_lines:7}{counts.complex_functions:8}"
        )


def source_figures(found: dict[str, Counts]) -> dict[str, float]:
    """Return the counts of the sources that have a limit, from those of each package."""
    whole = Counts()
    for counts in found.values():
        whole.add(counts)
    return {
        "comprehensions per 1,000 lines": whole.per_thousand(whole.comprehensions),
        "conditional expressions per 1,000 lines": whole.per_thousand(whole.conditionals),
        "comprehensions and conditional expressions in one another": whole.nested,
        "lines over 100 columns": whole.long_lines,
        "functions over complexity 8, %": whole.complex_percent,
        "lines of code": whole.code,
    }


def run_figures() -> tuple[dict[str, float], dict[str, Any]]:
    """The counts of a traced run that have a limit, and the notes behind them."""
    with tempfile.TemporaryDirectory() as folder:
        runs = traced(Path(folder))
    command, python = runs["command"], runs["python"]
    for name in COUNTED:
        if not command["calls"].get(name):
            raise SystemExit(f"{name} is never called: has it another name now?")
    frames = [name for _, name, _ in command["stack"]]
    called = [name for _, name, _ in python["stack"]]
    called = called[called.index("quantize") :]  # not the check of its arguments around it
    parameters, where = longest_parameter_list(command["stack"])
    figures = {
        "files entered by gptq quantize": len(command["files"]),
        "frames from main to the column loop": len(frames),
        "calls from quantize() to the column loop": len(called) - 1,
        "calls of plan_checkpoint": command["calls"]["plan_checkpoint"],
        "calls of open_checkpoint for the model": command["calls"]["open_checkpoint"],
        "calls of choose per layer": command["calls"]["choose"] / command["layers"],
        "parameters in the block loop": parameters,
    }
    notes = {"files": command["files"], "frames": frames, "calls": called, "parameters": where}
    return figures, notes | {"functions": command["functions"]}


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--check", action="store_true", help="exit with 1 if over a limit")
    parser.add_argument("--static", action="store_true", help="count the sources, run nothing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trace:
        trace_in_process(arguments.trace)
        return
    found = packages()
    figures, notes = source_figures(found), {}
    if not arguments.static:
        of_a_run, notes = run_figures()
        figures |= of_a_run
        print(f"{notes['functions']} functions ran; {notes['parameters']} has the most parameters")
        print("frames: " + ", ".join(notes["frames"]))
        print("from quantize(): " + ", ".join(notes["calls"]) + "\n")
    found["tests"] = folder_counts(ROOT / "tests")
    found["scripts"] = folder_counts(ROOT / "scripts")
    print_packages(found)
    print()
    over = []
    for name, figure in figures.items():
        limit = LIMITS.get(name)
        if limit is None:  # the lines of code, see decision 25
            print(f"{name:58}{figure:>10,}")
            continue
        mark = ""
        if figure > limit:
            over.append(name)
            mark = "over"
        print(f"{name:58}{figure:>10,}  of {limit:>6,}  {mark}")
    if arguments.json:
        text = json.dumps({"figures": figures, "limits": LIMITS, **notes}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.check and over:
        sys.exit(1)


if __name__ == "__main__":
    main()
