"""The command table, and the one place where errors become messages and exit codes.

A command's module is imported when the command runs: `gptq --help` knows only this table.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from gptq_cli.cli.console import (
    Console,
    indented,
    libraries_quoted,
    log,
    report_problems,
    write,
    write_result,
)
from gptq_cli.cli.launch import name_of
from gptq_cli.errors import ConfigError, GptqError, Problem, Stopped, __version__
from gptq_cli.files import file_cause, file_errors

# command -> what it does; the function of that name lives in the module of that name, with _ for -,
# or in the one that MODULES names
COMMANDS = {
    "quantize": "Quantize a model to a GPTQ checkpoint.",
    "plan": "Show what quantize would do, without doing it.",
    "resume": "Go on with a quantization that ended early.",
    "validate-config": "Check a configuration file, and with a model what it would do.",
    "inspect": "Show what a checkpoint holds: what is quantized how, sizes, origin.",
    "compare": "Compare two checkpoints: weights, and with --text what they predict.",
    "convert": "Convert a GPTQ checkpoint between the formats gptq and gptq_v2.",
    "dequantize": "Turn a GPTQ checkpoint back into plain weights.",
    "verify": "Check that a GPTQ checkpoint is whole and means the same to every reader.",
    "eval-ppl": "Measure the perplexity of a checkpoint, quantized or not.",
    "report": "Write a page about a run: errors, time, memory, the command.",
    "push": "Send a checkpoint with a model card to the Hub.",
    "recipes": "List the recipes that --config takes by name, or print one.",
    "schema": "Print the JSON Schema of the configuration, or of --json output.",
    "explain": "Explain the code of an error or a warning.",
    "env": "Print versions, devices and variables for a bug report.",
}
MODULES = {"dequantize": "convert", "resume": "quantize"}
BUG, USAGE, INTERRUPTED = 1, 2, 130
PLAIN_WORDS = {  # what typer's checks say of a value: what it means
    "Input should be a valid integer, unable to parse string as an integer": "this is not a whole number",
    "Input should be a valid number, unable to parse string as a number": "this is not a number",
}


class Gptq(TyperGroup):
    """The program: loads a command when it is its turn and turns whatever ends it into an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)), rest

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_empty(args)
        return super().parse_args(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        _stay_plain_in_pipes()
        words = _kebab_options(sys.argv[1:] if args is None else args)
        run = partial(
            super().main,
            words,
            prog_name or "gptq",
            complete_var,
            False,
            windows_expand_args,
            **extra,
        )
        try:
            with libraries_quoted():
                code = exit_code_of(run, as_json="--json" in words)
        finally:
            log.end()
        if standalone_mode:
            sys.exit(code)
        return code


def exit_code_of(run: Callable[[], Any], *, as_json: bool) -> int:
    """What `run` ends with as an exit code (0, 1 for a bug, 128 + n for signal n, else the error's own); says why."""
    try:
        code = run()
    except TyperException as error:
        return _fail((_usage(error),), USAGE, as_json)
    except GptqError as error:
        _detail_traceback()
        return _fail(error.problems, error.exit_code, as_json)
    except Stopped as stop:
        return _fail((_stopped(stop),), stop.exit_code, as_json)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001
        if isinstance(error, OSError) and (refused := file_cause(error)):
            _detail_traceback()
            return _fail(refused.problems, refused.exit_code, as_json)
        write(sys.stderr, indented(traceback.format_exc().rstrip("\n")))
        hint = "this is a bug in gptq: please report it with the lines above"
        return _fail((Problem("E_BUG", f"{type(error).__name__}: {error}", hint),), BUG, as_json)
    if code == INTERRUPTED:
        return _fail((Problem("E_INTERRUPTED", "interrupted"),), INTERRUPTED, as_json)
    return code if isinstance(code, int) else 0


def _detail_traceback() -> None:
    for line in indented(traceback.format_exc()).splitlines():
        Console().detail(line)


def _fail(problems: Sequence[Problem], exit_code: int, as_json: bool) -> int:
    try:
        report_problems(problems, exit_code, as_json=as_json)
    except GptqError as error:
        report_problems(error.problems, exit_code, as_json=False)
    return exit_code


def _stopped(stop: Stopped) -> Problem:
    hint = "run the same command again to go on; what was not saved yet is done again"
    return Problem("E_INTERRUPTED", f"stopped by {name_of(stop.exit_code)}", hint)


def _usage(error: TyperException) -> Problem:
    message, _, near = error.format_message().partition(" Did you mean ")
    if possible := getattr(error, "possibilities", None):
        message, near = (
            error.message,
            f"{get_close_matches(error.message, possible, n=1, cutoff=0)[0]}?",
        )
    nearest = near.split(",")[0].rstrip("?")
    hint = f"did you mean {nearest}?" if near else _where_to_look(error, message)
    for said, plain in PLAIN_WORDS.items():
        message = message.replace(said, plain)
    return Problem("E_USAGE", message.rstrip("."), hint)


def _where_to_look(error: TyperException, message: str) -> str:
    context = getattr(error, "ctx", None)
    if context is None:
        return "see --help"
    takes_output = any("-o" in parameter.opts for parameter in context.command.params)
    output = (
        "the output is given with -o; "
        if "unexpected extra argument" in message and takes_output
        else ""
    )
    return f"{output}see {context.command_path} --help"


def _stay_plain_in_pipes() -> None:
    """Typer would colour its help wherever it sees a CI system; a pipe gets text."""
    if os.environ.get("NO_COLOR") or sys.stdout is None or not sys.stdout.isatty():
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")


def _kebab_options(words: Sequence[str]) -> list[str]:
    """`words` with options in kebab case; what comes after `--` is no option, whatever it looks like."""
    end = list(words).index("--") if "--" in words else len(words)
    return [*map(_kebab, words[:end]), *words[end:]]


def _kebab(word: str) -> str:
    """`--group_size` as `--group-size`: people come from tools that spell it so."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _refuse_empty(words: Sequence[str]) -> None:
    """An empty word for a path is the current directory, which nobody meant."""
    if "" in words:
        before = " ".join(["gptq", *words[: words.index("")]])
        hint = "is a variable of the shell not set? leave the word out if it is not needed"
        raise ConfigError("E_USAGE", f"the word after `{before}` is empty", hint=hint)


def load_command(name: str) -> Any:
    """The command `name` from its module."""
    from gptq_cli.cli.options import as_typer_sees

    function = name.replace("-", "_")
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    command = getattr(import_module(f"gptq_cli.cli.{MODULES.get(function, function)}"), function)
    single.command(name=name)(as_typer_sees(command, begin=_begin_talk))
    return typer.main.get_command(single)


def _begin_talk(verbose: bool, log_file: Path | None, values: Mapping[str, Any]) -> None:
    with file_errors():
        Path.cwd()  # where it is gone some libraries end the process at once
    if log_file is not None:
        from gptq_cli.cli.log_file import check_log_file

        check_log_file(log_file, values)
    log.begin(verbose=verbose, log_file=log_file)


app = typer.Typer(
    name="gptq",
    cls=Gptq,
    help="Quantize Hugging Face models with GPTQ, one transformer block at a time.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        write_result(f"gptq {__version__}")
        raise typer.Exit


@app.callback()
def _gptq(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version and leave", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    del version
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(USAGE)


def _stub() -> None:
    """Stands in the table for a command whose module is not loaded."""


for _name, _summary in COMMANDS.items():
    app.command(name=_name, help=_summary)(_stub)
