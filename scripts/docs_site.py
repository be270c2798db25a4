"""A hook of mkdocs that generates the pages under reference/, and equations as MathML.

Browsers draw MathML without a script.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert

import gptq_cli
from gptq_cli import errors, events
from gptq_cli.cli.app import COMMANDS, app, load_command
from gptq_cli.cli.explain import explanations
from gptq_cli.cli.schema import config_schema
from gptq_cli.config.fields import LayerOverrides, accepted_by
from gptq_cli.config.layer import DEFAULT_PRESET, PRESETS
from gptq_cli.config.resolve import describe_recipe, recipes
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import ENGINES

DOCS = Path(__file__).resolve().parents[1] / "docs"
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
OUTCOMES = {
    "wrong": "loads it but computes something else",
    "no": "does not load",
    "limited": "loads with limits",
}
SIGNALS = {
    0: "done; the output is complete",
    1: "a bug in gptq, with a traceback, or stdout could not take the result",
    130: "interrupted by Ctrl-C; finished blocks are kept",
    143: "ended by SIGTERM; 128 + n for another signal n; finished blocks are kept",
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the pages that are made from the code."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs: draw the equations of a page."""

    def draw(found: re.Match[str]) -> str:
        drawn = convert(unescape(found[3]), display="block" if found[2] == "[" else "inline")
        return f'<{found[1]} class="arithmatex">{drawn}</{found[1]}>'

    return EQUATION.sub(draw, html)


def pages() -> dict[str, str]:
    """The generated pages and files by their place under docs/."""
    return {
        "reference/cli.md": command_line(),
        "reference/configuration.md": configuration(),
        "reference/python.md": python_api(),
        "reference/json.md": json_output(),
        "reference/exit-codes.md": exit_codes(),
        "reference/error-codes.md": error_codes(),
        "reference/engines.md": engines(),
        "reference/gptq.schema.json": json.dumps(config_schema(), indent=2, ensure_ascii=False),
        "reference/output.schema.json": _output_schema(),
        "decisions/index.md": decisions(),
    }


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A table of Markdown; cells are Markdown on one line."""
    lines = [head, ("---",) * len(head), *rows]
    return [
        "",
        *("| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in lines),
        "",
    ]


def _code(text: object) -> str:
    return f"`{text}`"


def _text(words: str) -> str:
    """Words that are no Markdown: `<`, `*`, `_`, `[` and `|` stand for themselves."""
    return re.sub(r"([<*_\[|])", r"\\\1", words)


def command_line() -> str:
    """Every command with its options, as `--help` has them."""
    lines = ["# Command line", "", "`gptq COMMAND --help` prints the same in a terminal.", ""]
    for name in COMMANDS:
        command = load_command(name)
        about, _, example = command.help.partition("Example: ")
        words = [p.metavar for p in command.params if p.param_type_name == "argument"]
        lines += [f"## gptq {name}", "", _text(about.strip()), "", "```text"]
        lines += [
            " ".join(["gptq", name, *words, "[OPTIONS]"]),
            "```",
            "",
            "```bash",
            example.strip(),
            "```",
        ]
        lines += table(
            ("option", "value", "meaning"),
            [_parameter(p) for p in command.params if p.name != "help"],
        )
    top = typer.main.get_command(app)
    lines += ["## gptq", "", "Options of the program itself."]
    lines += table(("option", "value", "meaning"), [_parameter(p) for p in top.params])
    return "\n".join(lines)


def _parameter(parameter: Any) -> tuple[str, str, str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    is_option = parameter.param_type_name == "option"
    called = " ".join(map(_code, names if is_option else [parameter.metavar]))
    return (
        called,
        _code(parameter.metavar) if is_option and parameter.metavar else "",
        _text(parameter.help or ""),
    )


def configuration() -> str:
    """Every field of the configuration, the presets and the recipes."""
    lines = [
        "# Configuration",
        "",
        "A setting has one name in four places: a key of a YAML or JSON file, a field of",
        "`gptq_cli.QuantizeConfig`, an option of `gptq quantize` (with `-` for `_`), and an",
        "environment variable (`GPTQ_` and the name in capitals). Its value comes from the first",
        "of these sources that has one: flag, environment, file, preset, default. An unknown",
        "setting is an error.",
        "",
        "Editors complete and check a file that begins with",
        "`# yaml-language-server: $schema=gptq.schema.json`, if the",
        "[JSON Schema](gptq.schema.json) that `gptq schema` prints lies beside it.",
        "",
    ]
    lines += table(
        ("key", "default", "meaning"), [_field(name) for name in QuantizeConfig.model_fields]
    )
    lines += [
        "Settings of single layers, in rules of `dynamic`: "
        + ", ".join(map(_code, LayerOverrides.__annotations__))
    ]
    lines += [
        "",
        "## Presets",
        "",
        f"A preset sets the keys that are not given. `{DEFAULT_PRESET}` is the default preset.",
    ]
    lines += table(
        ("preset", "description"),
        [(_code(name), preset.description) for name, preset in PRESETS.items()],
    )
    lines += ["Settings of the presets:"]
    keys = sorted({key for preset in PRESETS.values() for key in preset.settings})
    chosen = {name: QuantizeConfig(bits=4, preset=name) for name in PRESETS}
    rows = [
        (_code(key), *(_value(getattr(config, key)) for config in chosen.values())) for key in keys
    ]
    lines += table(("key", *map(_code, chosen)), rows)
    lines += [
        "## Recipes",
        "",
        "`--config NAME` uses a recipe, `gptq recipes NAME` prints it.",
        "",
    ]
    for name, file in recipes().items():
        lines += [
            f"### {name}",
            "",
            describe_recipe(file),
            "",
            "```yaml",
            file.read_text(encoding="utf-8").strip(),
            "```",
            "",
        ]
    return "\n".join(lines)


def _field(name: str) -> tuple[str, str, str]:
    info = QuantizeConfig.model_fields[name]
    accepts = accepted_by(info)
    default = "required" if info.is_required() else _value(getattr(QuantizeConfig(bits=4), name))
    return _code(name), default, _text(f"{info.description}. Accepts {accepts}.")


def _value(value: object) -> str:
    return _code(json.dumps(value))


def exit_codes() -> str:
    """The exit codes of a process."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.GptqError)
    ]
    rows = {
        kind.exit_code: f"{inspect.getdoc(kind)} (`{kind.__name__}`)" for kind in kinds
    } | SIGNALS
    lines = ["# Exit codes", "", "Each code stands for one possible reaction of a script."]
    lines += table(("code", "meaning"), [(str(code), rows[code]) for code in sorted(rows)])
    lines += [
        "137 comes from the kernel, most often because memory ran out: run the same command to",
        "resume.",
    ]
    return "\n".join(lines)


def error_codes() -> str:
    """The text of `gptq explain` for every code."""
    lines = [
        "# Error codes",
        "",
        "`gptq explain CODE` prints the same. Codes are stable; messages are not.",
    ]
    for code, text in explanations().items():
        first, _, rest = text.partition("\n")
        lines += ["", f"## {code}", "", f"**{_prose(first)}**", "", _prose(rest)]
    return "\n".join(lines)


def _prose(text: str) -> str:
    return re.sub(r"([<*\[])(?![^`]*`[^`]*$)", r"\\\1", text)


def json_output() -> str:
    """The parts of the schema of `--json` as tables."""
    schema = json.loads(_output_schema())
    lines = [
        "# JSON output",
        "",
        _text(schema["description"]),
        "",
        "[The schema](output.schema.json), which",
    ]
    lines += ["`gptq schema output` prints.", ""]
    parts = sorted(
        schema["$defs"].items(), key=lambda part: part[0] not in COMMANDS
    )  # what commands share comes after
    for name, part in parts:
        rows = [(_code(path), kind, _text(about)) for path, kind, about in _fields(part)]
        lines += [
            f"## {name}",
            "",
            _text(part.get("description", "")),
            *table(("field", "type", ""), rows),
        ]
    return "\n".join(lines)


def _fields(part: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    rows = []
    for name, field in part.get("properties", {}).items():
        rows.append((prefix + name, _kind(field), field.get("description", "")))
        inner = field.get("items", field)
        rows += _fields(inner, f"{prefix}{name}{'[]' if inner is not field else ''}.")
    return rows


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "const" in field:
        return _code(json.dumps(field["const"]))
    if "enum" in field:
        return " or ".join(_code(json.dumps(value)) for value in field["enum"])
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_kind(option) for option in options)
    kinds = field.get("type", "any value")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    more = f" of {_kind(field['items'])}" if isinstance(field.get("items"), dict) else ""
    return " or ".join("list" + more if kind == "array" else kind for kind in kinds)


def _output_schema() -> str:
    return files("gptq_cli.cli").joinpath("output.schema.json").read_text(encoding="utf-8")


def python_api() -> str:
    """The public names of the package with their docstrings; examples are run by the tests."""
    lines = [
        "# Python",
        "",
        "Import these names from `gptq_cli`. The import loads neither torch nor transformers.",
    ]
    for name in ("quantize", "evaluate_perplexity"):
        lines += _object(name, getattr(gptq_cli, name), 2)
    for name in sorted(set(gptq_cli.__all__) - {"quantize", "evaluate_perplexity", "events"}):
        lines += _object(name, getattr(gptq_cli, name), 2)
    lines += [
        "",
        "## events",
        "",
        "`quantize` calls `on_event` with these objects, one after the other, in the thread of the",
        "run.",
    ]
    for name, kind in vars(events).items():
        if dataclasses.is_dataclass(kind):
            lines += _object(name, kind, 3)
    return "\n".join(lines)


def _object(name: str, thing: Any, level: int) -> list[str]:
    lines = ["", f"{'#' * level} {name}", ""]
    if inspect.isfunction(thing):
        parameters = [f"    {parameter}," for parameter in _parameters(thing)]
        returns = inspect.signature(thing).return_annotation
        lines += ["```python", f"{name}(", *parameters, f") -> {returns}", "```", ""]
    document = "" if (thing.__doc__ or "").startswith(f"{name}(") else inspect.getdoc(thing) or ""
    lines += _docstring(document)
    if dataclasses.is_dataclass(thing):
        lines += table(
            ("field", "type"), [(_code(f.name), _code(f.type)) for f in dataclasses.fields(thing)]
        )
    if thing is QuantizeConfig:
        lines += ["", "The fields are those of the [configuration](configuration.md)."]
    return lines


def _parameters(function: Any) -> list[str]:
    words, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words, keyword_only = [*words, "*"], True
        default = (
            "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        )
        words.append(f"{parameter.name}: {parameter.annotation}{default}")
    return words


def _default(value: object) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


def _docstring(text: str) -> list[str]:
    """Paragraphs as Markdown, examples as code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\n+", text):
        is_example = paragraph.startswith(">>>")
        lines += ["```pycon", paragraph, "```", ""] if is_example else [paragraph, ""]
    return lines


def engines() -> str:
    """The table of engines by which `plan`, `inspect` and `validate-config --model` judge."""
    lines = [
        "# Engines",
        "",
        "`gptq plan`, `gptq inspect` and `gptq validate-config --model` judge by these tables. The",
        "first row that applies decides. If no row applies, the engine loads the checkpoint.",
    ]
    for engine in ENGINES:
        lines += ["", f"## {engine.name}", "", f"Source: {_text(engine.source)}."]
        lines += table(
            ("", "reason"), [(OUTCOMES[rule.outcome], _text(rule.reason)) for rule in engine.rules]
        )
    return "\n".join(lines)


def decisions() -> str:
    """All decisions with their titles."""
    lines = [
        "# Decisions",
        "",
        "Each page records one decision about the program: context, decision and consequences.",
        "",
    ]
    for file in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"* [{_text(title)}]({file.name})")
    return "\n".join(lines)
