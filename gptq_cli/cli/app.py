"""The table of commands, and the one place where errors become messages and exit codes.

A command's module is imported when the command runs: `gptq --help` reads only this table.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from gptq_cli.cli.console import (
    COLOURS,
    Console,
    indented,
    libraries_quoted,
    log,
    report_problems,
    write,
    write_result,
)
from gptq_cli.cli.launch import end_process, name_of
from gptq_cli.errors import (
    ConfigError,
    GptqError,
    Problem,
    Stopped,
    __version__,
    one_of,
    shown,
    suggestion,
)
from gptq_cli.files import file_cause, file_errors

# The commands in the groups of `gptq --help`, which are those of the README. A command's function
# has its name, with _ for -, and is in the module of that name unless MODULES names another one.
GROUPS = {
    "Plan": {
        "plan": "Show what quantize would do, without doing it.",
        "validate-config": "Check a configuration file, and show what it does to a model.",
        "recipes": "List the recipes that --config takes by name, or print one.",
        "schema": "Print the JSON Schema of the configuration, or of --json output.",
    },
    "Quantize": {
        "allocate": "Measure which layers need bits, and choose a width for each.",
        "quantize": "Quantize a model to a GPTQ checkpoint.",
        "resume": "Resume a quantization that ended early.",
    },
    "Inspect": {
        "inspect": "Show what a checkpoint holds: layers, sizes, origin.",
        "compare": "Compare two checkpoints: weights and, with --text, predictions.",
        "report": "Write an HTML report about a run: errors, time, memory, the command.",
    },
    "Check": {
        "verify": "Check that a GPTQ checkpoint is sound and means the same to every engine.",
        "eval-ppl": "Measure the perplexity of a checkpoint, quantized or not.",
        "eval": "Measure a checkpoint in tasks of lm-eval, such as hellaswag.",
    },
    "Try": {
        "generate": "Write text with a checkpoint, quantized or not.",
        "check-engine": "Check that an engine computes with a checkpoint what it should.",
    },
    "Convert": {
        "convert": "Write a quantized checkpoint in another format, without a loss.",
        "dequantize": "Turn a quantized checkpoint back into plain weights.",
    },
    "Publish": {
        "push": "Upload a checkpoint with a model card to the Hub.",
    },
    "Look up": {
        "explain": "Explain the code of an error or a warning.",
        "env": "Print versions, devices and variables for a bug report.",
    },
}
COMMANDS: dict[str, str] = {}
for _commands in GROUPS.values():
    COMMANDS |= _commands
MODULES = {"dequantize": "convert", "eval": "eval_tasks", "resume": "quantize"}
OPPOSITES = {"--no-sym": "--asym", "--no-asym": "--sym"}  # which are one pair of names
BUG, USAGE, INTERRUPTED = 1, 2, 130
PLAIN_WORDS = {  # sentences of typer, and their replacements
    r"No such command '(.+)'": r"there is no command `\1`",
    r"No such option: ": "there is no option ",
    r"Missing (argument|option) '(\S+)'( / '\S+')*": r"the \1 \2 is missing",
    r"Got unexpected extra argument\(s\) \((.+)\)": r"the command takes no further argument: `\1`",
    r"Option '(.+)' requires an argument": r"the option \1 needs a value",
    r"Invalid value for '(\S+)'( / '\S+')*: Input should be ": r"\1 must be ",
    r"Invalid value for '(\S+)'( / '\S+')*: ": r"\1: ",
    "a valid integer, unable to parse string as an integer": "a whole number",
    "a valid number, unable to parse string as a number": "a number",
}


class Command(TyperCommand):
    """A command whose --help shows its `everyday` options, if it has a list of them, else all."""

    everyday: Sequence[str] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_option_as_value(self.params, args, ctx.command_path)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from gptq_cli.cli.help_page import command_page

        formatter.write(command_page(ctx, self.everyday))


class Gptq(TyperGroup):
    """The program: it loads a command when it runs, and turns every failure into an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is None:  # while a shell completes words after one that is no command
            return None, None, rest
        return name, load_command(str(name)), rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from gptq_cli.cli.help_page import program_page

        formatter.write(program_page(ctx, GROUPS))

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
        _disable_colour_in_pipes()
        words = _kebab_options(sys.argv[1:] if args is None else args)
        words = _without_aliases(words)
        code = 0
        try:
            log.colour = _colour_of(words)
            with libraries_quoted():
                returned = super().main(
                    words, prog_name or "gptq", complete_var, False, windows_expand_args, **extra
                )
            if returned == INTERRUPTED:  # typer returns this for Ctrl-C
                raise KeyboardInterrupt
            if isinstance(returned, int):
                code = returned
        except (Exception, KeyboardInterrupt, Stopped) as error:  # noqa: BLE001
            code = report_failure(error, as_json="--json" in words)
        finally:
            log.end()
        if standalone_mode:
            end_process(code)
        return code


def report_failure(error: BaseException, *, as_json: bool) -> int:
    """Write why a command failed, and return its exit code; call it where `error` is handled.

    The code is 1 for a bug, 2 for a usage error, 128 + n for signal n, else that of the error.
    """
    if isinstance(error, OSError):
        error = file_cause(error) or error
    problems: Sequence[Problem]
    match error:
        case TyperException():
            problems, exit_code = (_usage(error),), USAGE
        case GptqError():
            _log_traceback()
            problems, exit_code = error.problems, error.exit_code
        case Stopped():
            problems, exit_code = (_stopped(error),), error.exit_code
        case KeyboardInterrupt():
            problems, exit_code = (Problem("E_INTERRUPTED", "interrupted"),), INTERRUPTED
        case _:
            write(sys.stderr, indented(traceback.format_exc().rstrip("\n")))
            problems, exit_code = (_bug(error),), BUG
    try:
        report_problems(problems, exit_code, as_json=as_json)
    except GptqError as unwritten:  # stdout does not take the JSON object
        report_problems(unwritten.problems, exit_code, as_json=False)
    return exit_code


def _log_traceback() -> None:
    for line in indented(traceback.format_exc()).splitlines():
        Console().detail(line)


def _bug(error: BaseException) -> Problem:
    hint = "this is a bug in gptq: please report it with the lines above"
    return Problem("E_BUG", f"{type(error).__name__}: {error}", hint)


def _stopped(stop: Stopped) -> Problem:
    return Problem("E_INTERRUPTED", f"stopped by {name_of(stop.exit_code)}")


def _usage(error: TyperException) -> Problem:
    message, _, near = error.format_message().partition(" Did you mean ")
    possible = getattr(error, "possibilities", None)
    if possible:
        message, typed = error.message, getattr(error, "option_name", "")
        near = "".join(get_close_matches(typed, possible, 1, cutoff=0.7))
        if OPPOSITES.get(typed) in possible:
            near = OPPOSITES[typed]
    first = near.split(",")[0].strip("'?")
    hint = f"did you mean {first}?"
    if not near:
        hint = _where_to_look(error, message)
    for of_typer, plain in PLAIN_WORDS.items():
        message = re.sub(of_typer, plain, message)
    return Problem("E_USAGE", message.rstrip("."), hint)


def _where_to_look(error: TyperException, message: str) -> str:
    context = getattr(error, "ctx", None)
    if context is None:
        return "see --help"
    hint = f"see {context.command_path} --help"
    takes_output = any("-o" in parameter.opts for parameter in context.command.params)
    if "unexpected extra argument" in message and takes_output:
        hint = f"give the output with -o; {hint}"
    return hint


def _disable_colour_in_pipes() -> None:
    """Let typer write plain text into a pipe, even if it detects a CI system."""
    if os.environ.get("NO_COLOR") or sys.stdout is None or not sys.stdout.isatty():
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")


def _colour_of(words: Sequence[str]) -> str:
    """Return the value of --color, which counts before anything else is read; auto without one.

    Raise ConfigError E_CFG_RANGE for a value that is none.
    """
    found = COLOURS[0]
    for word, following in pairwise([*words, ""]):
        if word == "--":
            break
        if word == "--color":
            found = following
        elif word.startswith("--color="):
            found = word.partition("=")[2]
    if found not in COLOURS:
        message = f"--color must be {one_of(COLOURS)}, got {shown(found)}"
        raise ConfigError("E_CFG_RANGE", message, hint=suggestion(found, COLOURS))
    return found


def _kebab_options(words: Sequence[str]) -> list[str]:
    """Return `words` with options in kebab case; words after `--` are no options."""
    end = len(words)
    if "--" in words:
        end = list(words).index("--")
    return [*map(_kebab, words[:end]), *words[end:]]


def _without_aliases(words: list[str]) -> list[str]:
    """Return `help` and `version` as the options that they stand for."""
    match words:
        case ["version"]:
            return ["--version"]
        case ["help", "help" | "version"]:
            return ["--help"]  # which shows both
        case ["help", *rest]:
            return [*rest, "--help"]
    return words


def _kebab(word: str) -> str:
    """Return `--group_size` as `--group-size`: other tools spell their options with `_`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _refuse_empty(words: Sequence[str]) -> None:
    """Raise ConfigError E_USAGE for an empty word, which as a path means the current directory."""
    if "" in words:
        before = " ".join(["gptq", *words[: words.index("")]])
        hint = "is a variable of the shell not set? omit the argument if it is not needed"
        raise ConfigError("E_USAGE", f"empty argument after `{before}`", hint=hint)


def _refuse_option_as_value(parameters: Sequence[Any], words: Sequence[str], command: str) -> None:
    """Raise ConfigError E_USAGE if an option would take the option behind it as its value."""
    takers: dict[str, str] = {}
    known: set[str] = set()
    for parameter in parameters:
        names = [name for name in parameter.opts if name.startswith("-")]
        known.update(names, parameter.secondary_opts)
        if not getattr(parameter, "is_flag", True):
            takers |= dict.fromkeys(names, parameter.metavar)
    for word, following in pairwise(words):
        if word == "--":
            return
        if word in takers and following in known:
            message = f"{word} needs a value, but the option {following} follows"
            hint = f"give a value: {word} {takers[word]}; see {command} --help"
            raise ConfigError("E_USAGE", message, hint=hint)


def load_command(name: str) -> Any:
    """Import the module of the command `name` and return the command."""
    from gptq_cli.cli.options import with_options

    function = name.replace("-", "_")
    module = import_module(f"gptq_cli.cli.{MODULES.get(function, function)}")
    body = getattr(module, function)
    single = typer.Typer(add_completion=False)
    single.command(name=name, cls=Command)(with_options(body, begin=_begin_log))
    command: Any = typer.main.get_command(single)
    command.everyday = getattr(body, "everyday", ())
    return command


def _begin_log(verbose: bool, log_file: Path | None, values: Mapping[str, Any]) -> None:
    with file_errors():
        Path.cwd()  # if it was removed, some libraries end the process without a message
    if log_file is not None:
        from gptq_cli.cli.log_file import check_log_file

        check_log_file(log_file, values)
    log.begin(verbose=verbose, log_file=log_file)


app = typer.Typer(
    name="gptq",
    cls=Gptq,
    help="Quantize Hugging Face models with GPTQ, one transformer block at a time.\n\n"
    "gptq help COMMAND shows examples and options of a command.",
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
            "--version", "-V", help="print the version and exit", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    del version
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(USAGE)


def _stub() -> None:
    """Stand in for a command whose module is not loaded."""


for _name, _summary in COMMANDS.items():
    app.command(name=_name, help=_summary)(_stub)
