"""The options of commands.

Options for fields of the configuration are made from the schema, which has their type, description,
panel and default. A command with such options names the fields with `@takes_settings`, and its
parameter `settings` is a mapping of those that were given. Other options that several commands
share are defined here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from gptq_cli.config.corpora import ACCEPTED_TEXT, DEFAULT_DATASET
from gptq_cli.config.fields import Option, Panel
from gptq_cli.config.layer import parse_rule
from gptq_cli.config.schema import DEFAULTS, QuantizeConfig
from gptq_cli.errors import ConfigError

DATASET = f"{ACCEPTED_TEXT}; default {DEFAULT_DATASET}"
Command = TypeVar("Command", bound=Callable[..., None])
Begin = Callable[[bool, Path | None, Mapping[str, Any]], None]
Settings = Mapping[str, Any]  # fields of the configuration that were given as options


def configurable_fields() -> list[str]:
    """Return the fields of the configuration that have an option."""
    return [name for name in QuantizeConfig.model_fields if _option_of(name) is not None]


def run_settings() -> list[str]:
    """Return the fields of `configurable_fields` that concern a run.

    The kernel that runs quantized linears matters only when a checkpoint is evaluated.
    """
    return [name for name in configurable_fields() if name != "backend"]


def takes_settings(*fields: str) -> Callable[[Command], Command]:
    """Mark a command as having an option for each of `fields`, passed to it as `settings`."""

    def mark(command: Command) -> Command:
        command.fields = fields  # type: ignore[attr-defined]
        return command

    return mark


def shows_first(*names: str) -> Callable[[Command], Command]:
    """Mark what --help shows of a command, in this order; --help-all shows all of it."""

    def mark(command: Command) -> Command:
        command.everyday = (*names, "help_all")  # type: ignore[attr-defined]
        return command

    return mark


def with_options(command: Callable[..., None], begin: Begin) -> Callable[..., None]:
    """Return `command` as a function whose signature names every option, for typer.

    The options of its fields replace `settings`. Each command also takes --verbose, --log-file and
    --color; before the command, `begin` is called with the first two and a mapping of all values of
    its own.
    """
    fields = getattr(command, "fields", ())
    parameters: list[Parameter] = []
    for parameter in signature(command, eval_str=True).parameters.values():
        if parameter.name == "settings":
            parameters += [_parameter(name, _annotation(name), None) for name in fields]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    parameters += [_parameter("verbose", Verbose, False), _parameter("log_file", LogFile, None)]
    parameters.append(_parameter("color", Color, None))
    if hasattr(command, "everyday"):
        parameters.append(_parameter("help_all", HelpAll, False))
    for parameter in parameters:
        for info in getattr(parameter.annotation, "__metadata__", ()):
            info.readable = False  # no check by typer: the code that opens a path reports more
            info.autocompletion = _completing(command.__name__, parameter.name)

    def run(
        *,
        verbose: bool,
        log_file: Path | None,
        color: str | None,
        help_all: bool = False,
        **values: Any,
    ) -> None:
        del color  # it counts from the first word on, so `Gptq.main` has read it
        del help_all  # its callback has shown the help
        settings = _given({name: values.pop(name) for name in fields})
        begin(verbose, log_file, {**values, **settings})
        if fields:
            values["settings"] = settings
        command(**values)

    whole = signature(command).replace(parameters=parameters)
    run.__signature__ = whole  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def _completing(command: str, parameter: str) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function that completes values of a parameter, for typer."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        from gptq_cli.cli.completion import completed_values

        return completed_values(command, parameter, incomplete)

    return complete


def _parameter(name: str, annotation: Any, default: object) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, with the types of the configuration."""
    given = {}
    for name, value in values.items():
        if value is None or value == []:
            continue
        if name in CONVERTED:
            value = CONVERTED[name](value)
        given[name] = value
    return given


def _number_or_word(text: str) -> float | str:
    """Return the number that a text is, or the text, for the schema to judge."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _one_or_all(values: list[str]) -> str | list[str]:
    """Return the only value of an option that may be repeated, or the list of them."""
    if len(values) == 1:
        return values[0]
    return values


def _widths(texts: list[str]) -> list[Any]:
    """Return the widths of --allow-bits, which may be repeated or have commas."""
    return list(map(_number_or_word, ",".join(texts).split(",")))


def _rules(texts: Iterable[str]) -> dict[str, Any]:
    """Return the rules of --dynamic as a mapping.

    Raise ConfigError for a rule that is given twice or changes nothing.
    """
    rules: dict[str, Any] = {}
    for text in texts:
        rule, settings = parse_rule(text)
        if rule in rules:
            message = f"--dynamic has {rule!r} twice"
            raise ConfigError("E_CFG_CONFLICT", message, hint="keep one of them")
        if not settings and not rule.startswith("-:"):
            message = f"--dynamic {rule!r} changes nothing"
            layers = rule.removeprefix("+:")
            hint = f"write '{rule}={{bits: 8}}', or '-:{layers}' to keep the layers unquantized"
            raise ConfigError("E_CFG_MISSING", message, hint=hint)
        rules[rule] = settings
    return rules


CONVERTED: dict[str, Callable[[Any], Any]] = {
    "allow_bits": _widths,
    "asymmetric_calibration": _number_or_word,
    "bits": _number_or_word,
    "dataset": _one_or_all,
    "dynamic": _rules,
    "group_size": _number_or_word,
    "lora": _one_or_all,
    "text_column": _one_or_all,
}


def _option_of(field: str) -> Option | None:
    for item in QuantizeConfig.model_fields[field].metadata:
        if isinstance(item, Option):
            return item
    return None


def _annotation(field: str) -> Any:
    """Return the annotation that makes typer show the option of `field`; None is "not given"."""
    info = QuantizeConfig.model_fields[field]
    option = _option_of(field)
    assert option is not None
    kind = _value_type(info.annotation)
    default = getattr(DEFAULTS, field)
    # A flag that is left out has no value, which a file writes as null.
    help_text = f"{info.description}{option.note}".replace("; null:", "; default:")
    if default:
        help_text += f"; default {_word(default)}"
    spellings = option.names or _spellings(field, kind)
    shown = plain(
        *spellings,
        help=help_text,
        panel=option.panel,
        metavar=option.metavar or _metavar(info.annotation),
    )
    return Annotated[kind | None, shown]


def _spellings(field: str, kind: type) -> tuple[str, ...]:
    word = field.replace("_", "-")
    if kind is bool:
        return (f"--{word}/--no-{word}",)
    return (f"--{word}",)


def _value_type(annotation: Any) -> Any:
    """Return the type of an option's value: a plain type, or list[str] if it may be repeated."""
    if annotation in (bool, int, float):
        return annotation
    if get_origin(annotation) is dict:
        return list[str]
    members = get_args(annotation)
    if get_origin(annotation) is Literal:
        return type(members[0])
    if any(get_origin(member) is list for member in members):
        return list[str]
    if str in members:
        return str
    return next((kind for kind in (int, float) if kind in members), str)


def _metavar(annotation: Any) -> str | None:
    """Return what the help shows as the value: the words of a literal type, or a letter."""
    members = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "|".join(map(str, members))
    for member in members:
        if get_origin(member) is Literal:
            return "|".join(map(str, get_args(member)))
    return {int: "N", float: "X", bool: None}.get(annotation, "TEXT")


def _word(default: object) -> str:
    if isinstance(default, bool):
        return {True: "on", False: "off"}[default]
    return str(default)


def plain(
    *names: str,
    help: str,
    panel: str | None = None,
    metavar: str | None = None,
    min: int | None = None,
) -> Any:
    """Return a typer option that shows no default."""
    return typer.Option(
        *names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False, min=min
    )


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="model directory or Hub id",
        show_default=False,
        rich_help_panel="Input",
    ),
]
ConfigFile = Annotated[
    Path | None,
    plain(
        "--config",
        "-c",
        help="YAML or JSON file, or a recipe's name; flags and GPTQ_* variables override it",
        metavar="FILE",
    ),
]
Revision = Annotated[
    str | None,
    plain("--revision", help="branch, tag or commit of a Hub model", metavar="REV", panel="Input"),
]

Dataset = Annotated[
    str | None,
    plain("--dataset", help=DATASET, metavar="TEXT", panel=Panel.TEXT),
]
MaxWindows = Annotated[
    int | None,
    plain(
        "--max-windows", help="stop after this many windows", metavar="N", panel=Panel.TEXT, min=1
    ),
]

Output = Annotated[
    Path | None,
    plain(
        "--output",
        "-o",
        help="directory to write; default ./NAME-GPTQ-Int4-g128",
        panel=Panel.OUTPUT,
        metavar="DIR",
    ),
]
Overwrite = Annotated[
    bool,
    plain(
        "--overwrite",
        help="replace a checkpoint at the output when the new one is complete",
        panel=Panel.OUTPUT,
    ),
]

WithReport = Annotated[
    bool,
    plain("--report", help="write an HTML report into the output directory", panel=Panel.OUTPUT),
]
WithEvaluation = Annotated[
    bool,
    plain(
        "--eval",
        help="at the end measure perplexity, and KL to the original; the report gets them",
        panel=Panel.OUTPUT,
    ),
]
PrintConfig = Annotated[
    bool, plain("--print-config", help="print the resolved configuration and exit")
]
DryRun = Annotated[bool, plain("--dry-run", "-n", help="show the plan and exit, like gptq plan")]

Resume = Annotated[
    str | None,
    plain(
        "--resume",
        help="resume unfinished work: auto = if there is any, require = fail if there is none, "
        "never = start over; default auto",
        panel=Panel.RUN,
        metavar="auto|require|never",
    ),
]
MaxRuntime = Annotated[
    str | None,
    plain(
        "--max-runtime",
        help="stop before this much time has passed; finished blocks are kept (exit code 75)",
        panel=Panel.RUN,
        metavar="3h30m",
    ),
]
StreamDownload = Annotated[
    bool,
    plain(
        "--stream-download",
        help="fetch the blocks of a Hub model when they are needed, and drop them when they are "
        "done: the disk never holds the whole model",
        panel=Panel.RUN,
    ),
]
AllowNetworkFs = Annotated[
    bool,
    plain(
        "--allow-network-fs",
        help="allow an output on a network file system, whose locks may not hold",
        panel=Panel.RUN,
    ),
]
Devices = Annotated[
    str | None,
    plain(
        "--devices",
        help="devices that share the work, one process each: GPUs, or cpu:N; "
        "the result is the same",
        panel=Panel.RUN,
        metavar="0,1,..",
    ),
]
AsJson = Annotated[
    bool, plain("--json", help="print the result or the error as one JSON object on stdout")
]
Quiet = Annotated[bool, plain("--quiet", "-q", help="show no progress and the shortest result")]
Verbose = Annotated[
    bool,
    plain("--verbose", "-v", help="show a line for each layer, and the traceback of a failure"),
]
LogFile = Annotated[
    Path | None,
    plain(
        "--log-file",
        help="also write messages, including --verbose details, to this file",
        metavar="FILE",
    ),
]


Color = Annotated[
    str | None,
    plain(
        "--color",
        help="colours of messages; auto = on a terminal, unless NO_COLOR is set, and with "
        "FORCE_COLOR in a pipe too; default auto",
        metavar="auto|always|never",
    ),
]


def _show_all_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.command.everyday = ()  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        help="show all options and exit",
        callback=_show_all_help,
        is_eager=True,
        show_default=False,
    ),
]
