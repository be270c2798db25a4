"""Generate the pages under reference/, link to them, and draw equations, as a hook of mkdocs.

    python -m mkdocs build

In a clone the pages under reference/ do not exist: documents link to reference/README.md, which
names their commands, and name error codes without a link. In the site these lead to the pages.
Equations become MathML, which browsers draw without a script. Writes the site to build/site.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable
from html import unescape
from importlib.resources import files
from inspect import cleandoc
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert

import gptq_cli
from gptq_cli import api, errors, events
from gptq_cli.cli.app import COMMANDS, app, load_command
from gptq_cli.cli.codes import examples, explanations
from gptq_cli.config.fields import LayerOverrides, accepted_by
from gptq_cli.config.json_schema import config_schema
from gptq_cli.config.layer import DEFAULT_PRESET, PRESETS
from gptq_cli.config.resolve import describe_recipe, recipes
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import ENGINES, Rule

DOCS = Path(__file__).resolve().parents[1] / "docs"
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
VALUE = re.compile(r"<td><code>[^<]*</code>")
WORD = re.compile(r"(<(pre|code|a|h\d)\b.*?</\2>|<[^>]+>)|\b[EW]_[A-Z_]+\b", re.DOTALL)
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
HEAD = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
WIDE = ("architectures.md", "compatibility.md", "peers.md", "tutorial.md")
STACKED = ("architectures.md", "peers.md")
REFERENCE = "reference/README.md"
OUTCOMES = {
    "wrong": "loads it but computes something else",
    "no": "does not load",
    "limited": "loads with limits",
    "yes": "loads",
}
SIGNALS = {
    0: "done; the output is complete",
    1: "a bug in gptq, with a traceback, or stdout could not take the result",
    130: "interrupted by Ctrl-C; finished blocks are kept",
    143: "ended by SIGTERM; 128 + n for another signal n; finished blocks are kept",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the code; mkdocs calls it."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the pages that are generated; give wide pages more room.

    mkdocs calls it.
    """
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    if page.file.src_uri == REFERENCE:
        return re.sub(r"^## (.*)$", _linked_heading, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"(reference/)README\.md#([a-z-]+)\)", r"\1\2.md)", markdown)
    return markdown.replace("(decisions/)", "(decisions/index.md)")


def _linked_heading(heading: re.Match[str]) -> str:
    page = heading[1].lower().replace(" ", "-")
    return f"## [{heading[1]}]({page}.md)"


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Draw the equations of a page, link error codes, and prepare tables for narrow windows.

    mkdocs calls it.
    """

    def draw(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        drawn = convert(unescape(found[3]), display=display)
        return f'<{found[1]} class="arithmatex">{drawn}</{found[1]}>'

    source = page.file.src_uri
    html = EQUATION.sub(draw, html)
    html = CELL.sub(lambda found: found[0].replace(r"\|", "|"), html)  # as other readers show it
    if source != "reference/error-codes.md":
        html = _link_codes(html, "../" * source.count("/"))
    if source in STACKED:
        html = TABLE.sub(lambda found: _labelled(found[0]), html)
        html = f'<div class="stacked">{html}</div>'
    if source.startswith("reference/") and source != REFERENCE:
        html = VALUE.sub(lambda found: found[0].replace("|", "|<wbr>"), html)
        html = f'<div class="reference">{html}</div>'
    return html


def _link_codes(html: str, root: str) -> str:
    """Link each code of an error or a warning to its text; `root` is the way to the first page."""
    codes = set(explanations())

    def link(found: re.Match[str]) -> str:
        if found[0] not in codes:
            return found[0]
        return f'<a href="{root}reference/error-codes.html#{found[0].lower()}">{found[0]}</a>'

    return WORD.sub(link, html)


def _labelled(table: str) -> str:
    """Give each cell the heading of its column, which narrow windows show beside it."""
    heads = [re.sub(r"<[^>]+>", "", head) for head in HEAD.findall(table)]

    def label(row: re.Match[str]) -> str:
        parts = row[0].split("<td")
        cells = [
            f'<td data-label="{head}"{part}' for head, part in zip(heads, parts[1:], strict=False)
        ]
        return "".join([parts[0], *cells])

    return ROW.sub(label, table)


def pages() -> dict[str, str]:
    """Return the generated pages and files by their path under docs/."""
    return {
        "reference/command-line.md": command_line(),
        "reference/configuration.md": configuration(),
        "reference/python.md": python_api(),
        "reference/json-output.md": json_output(),
        "reference/exit-codes.md": exit_codes(),
        "reference/error-codes.md": error_codes(),
        "reference/engines.md": engines(),
        "reference/gptq.schema.json": json.dumps(config_schema(), indent=2, ensure_ascii=False),
        "reference/output.schema.json": _output_schema(),
        "decisions/index.md": decisions(),
    }


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a table of Markdown; line breaks in cells become blanks."""
    lines = [""]
    for row in (head, ("---",) * len(head), *rows):
        cells = [" ".join(cell.split()) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _code(text: object) -> str:
    return f"`{text}`"


def _text(words: str) -> str:
    """Escape the characters that mean something in Markdown, and mark options as code."""
    parts = words.split("`")  # every second part is code already
    for index in range(0, len(parts), 2):
        escaped = re.sub(r"([<*_\[|])", r"\\\1", parts[index])
        parts[index] = re.sub(r"(?<![\w-])(--?[a-z][a-z-]*\b)", r"`\1`", escaped)
    return "`".join(parts)


def command_line() -> str:
    """Return the page of every command with its options, as `--help` shows them."""
    lines = ["# Command line", "", "`gptq COMMAND --help` prints the same in a terminal.", ""]
    for name in COMMANDS:
        command = load_command(name)
        about, _, example = cleandoc(command.help).partition("Example: ")
        words = [p.metavar for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["gptq", name, *words, "[OPTIONS]"])
        lines += [f"## gptq {name}", ""]
        for paragraph in about.strip().split("\n\n"):
            if "\n  " in paragraph:
                lines += ["```text", paragraph, "```", ""]
            else:
                lines += [_text(paragraph), ""]
        examples = example.replace("Example: ", "").strip()
        lines += ["```text", usage, "```", "", "```bash", examples, "```"]
        rows = [_parameter(p) for p in command.params if p.name != "help"]
        lines += table(("option", "value", "meaning"), rows)
    top = typer.main.get_command(app)
    lines += ["## gptq", "", "Options of the program itself."]
    lines += table(("option", "value", "meaning"), map(_parameter, top.params))
    return "\n".join(lines)


def _parameter(parameter: Any) -> tuple[str, str, str]:
    names, value = [parameter.metavar], ""
    if parameter.param_type_name == "option":
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.metavar:
            value = _code(parameter.metavar)
    return " ".join(map(_code, names)), value, _text(parameter.help or "")


def configuration() -> str:
    """Return the page of the fields of the configuration, the presets and the recipes."""
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
    lines += table(("key", "default", "meaning"), map(_field, QuantizeConfig.model_fields))
    overrides = ", ".join(map(_code, LayerOverrides.__annotations__))
    lines += [
        f"Settings of single layers, in rules of `dynamic`: {overrides}",
        "",
        "## Presets",
        "",
        f"A preset sets the keys that are not given. `{DEFAULT_PRESET}` is the default preset.",
    ]
    descriptions = [(_code(name), preset.description) for name, preset in PRESETS.items()]
    lines += table(("preset", "description"), descriptions)
    lines += ["Settings of the presets:", *_settings_of_presets(), "## Recipes", ""]
    lines += ["`--config NAME` uses a recipe, `gptq recipes NAME` prints it.", ""]
    for name, file in recipes().items():
        content = file.read_text(encoding="utf-8").strip()
        lines += [f"### {name}", "", describe_recipe(file), "", "```yaml", content, "```", ""]
    return "\n".join(lines)


def _settings_of_presets() -> list[str]:
    """Return a table with a column for each preset."""
    keys: set[str] = set()
    for preset in PRESETS.values():
        keys |= set(preset.settings)
    configs = [QuantizeConfig(bits=4, preset=name) for name in PRESETS]
    rows = []
    for key in sorted(keys):
        values = [_value(getattr(config, key)) for config in configs]
        rows.append((_code(key), *values))
    return table(("key", *map(_code, PRESETS)), rows)


def _field(name: str) -> tuple[str, str, str]:
    info = QuantizeConfig.model_fields[name]
    default = "required"
    if not info.is_required():
        default = _value(getattr(QuantizeConfig(bits=4), name))
    return _code(name), default, _text(f"{info.description}. Accepts {accepted_by(info)}.")


def _value(value: object) -> str:
    return _code(json.dumps(value))


def exit_codes() -> str:
    """Return the page of the exit codes of a process."""
    meanings = dict(SIGNALS)
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.GptqError):
            meaning = f"{inspect.getdoc(kind)} (`{kind.__name__}`)"
            meanings.setdefault(kind.exit_code, meaning)
    lines = ["# Exit codes", "", "Each code stands for one possible reaction of a script."]
    rows = [(str(code), meanings[code]) for code in sorted(meanings)]
    lines += table(("code", "meaning"), rows)
    lines += [
        "137 comes from the kernel, most often because memory ran out: run the same command to",
        "resume.",
    ]
    return "\n".join(lines)


def error_codes() -> str:
    """Return the page with the text of `gptq explain` for every code."""
    lines = [
        "# Error codes",
        "",
        "`gptq explain CODE` prints the same. Codes are stable; messages are not.",
    ]
    shown = examples()
    for code, text in explanations().items():
        first, _, rest = text.partition("\n")
        lines += ["", f"## {code}", "", f"**{_prose(first)}**", "", _prose(rest)]
        lines += ["", "```text", shown[code], "```"]
    return "\n".join(lines)


def _prose(text: str) -> str:
    return re.sub(r"([<*\[])(?![^`]*`[^`]*$)", r"\\\1", text)


def json_output() -> str:
    """Return the page with the parts of the schema of `--json` as tables."""
    schema = json.loads(_output_schema())
    lines = [
        "# JSON output",
        "",
        _text(schema["description"]),
        "",
        "[The schema](output.schema.json), which",
        "`gptq schema output` prints.",
        "",
    ]
    # the parts of commands first, then the parts that commands share
    for name in sorted(schema["$defs"], key=lambda name: name not in COMMANDS):
        part = schema["$defs"][name]
        rows = [(_code(path), kind, _text(about)) for path, kind, about in _fields(part)]
        lines += [f"## {name}", "", _text(part.get("description", ""))]
        if "$ref" in part:
            lines.append(f"The same as {_kind(part)}.")
        if rows:
            lines += table(("field", "type", ""), rows)
    return "\n".join(lines)


def _fields(part: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    rows = []
    for name, field in part.get("properties", {}).items():
        rows.append((prefix + name, _kind(field), field.get("description", "")))
        if "items" in field:
            rows += _fields(field["items"], f"{prefix}{name}[].")
        else:
            rows += _fields(field, f"{prefix}{name}.")
    return rows


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "const" in field:
        return _value(field["const"])
    if "enum" in field:
        return " or ".join(map(_value, field["enum"]))
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return " or ".join(map(_kind, options))
    return _kind_of_type(field)


def _kind_of_type(field: dict[str, Any]) -> str:
    kinds = field.get("type", "any value")
    if not isinstance(kinds, list):
        kinds = [kinds]
    words = []
    for kind in kinds:
        if kind != "array":
            words.append(kind)
        elif isinstance(field.get("items"), dict):
            words.append(f"list of {_kind(field['items'])}")
        else:
            words.append("list")
    return " or ".join(words)


def _output_schema() -> str:
    return files("gptq_cli.cli").joinpath("output.schema.json").read_text(encoding="utf-8")


def python_api() -> str:
    """Return the page of the public names with their docstrings; tests run the examples."""
    lines = [
        "# Python",
        "",
        "Import these names from `gptq_cli`. The import loads neither torch nor transformers.",
        "",
        *_docstring(inspect.getdoc(api) or ""),
    ]
    functions = []
    for name, thing in vars(api).items():  # in the order of the file
        if name in gptq_cli.__all__ and inspect.isfunction(thing):
            functions.append(name)
    others = set(gptq_cli.__all__) - {*functions, "events"}
    for name in [*functions, *sorted(others)]:
        lines += _object(name, getattr(gptq_cli, name), 2)
    lines += [
        "",
        "## events",
        "",
        "Functions call `on_event` with these objects, one after the other, in the thread of the",
        "call.",
    ]
    for name, kind in vars(events).items():
        if dataclasses.is_dataclass(kind):
            lines += _object(name, kind, 3)
    return "\n".join(lines)


def _object(name: str, thing: Any, level: int) -> list[str]:
    lines = ["", f"{'#' * level} {name}", ""]
    if inspect.isfunction(thing):
        lines += _signature(name, thing)
    document = thing.__doc__ or ""
    if not document.startswith(f"{name}("):  # the docstring that a dataclass gets if it has none
        lines += _docstring(inspect.getdoc(thing) or "")
    if dataclasses.is_dataclass(thing):
        rows = [(_code(field.name), _code(field.type)) for field in dataclasses.fields(thing)]
        lines += table(("field", "type"), rows)
    if thing is QuantizeConfig:
        lines += ["", "The fields are those of the [configuration](configuration.md)."]
    return lines


def _signature(name: str, function: Any) -> list[str]:
    """Return the signature as code, a parameter a line."""
    signature = inspect.signature(function)
    lines = ["```python", f"{name}("]
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        words = f"    {_stars(parameter)}{parameter.name}: {parameter.annotation}"
        if parameter.default is not parameter.empty:
            words += f" = {_default(parameter.default)}"
        lines.append(f"{words},")
    return [*lines, f") -> {signature.return_annotation}", "```", ""]


def _stars(parameter: inspect.Parameter) -> str:
    """Return the stars before a parameter that takes all other keywords."""
    if parameter.kind is parameter.VAR_KEYWORD:
        return "**"
    return ""


def _default(value: object) -> str:
    if inspect.isfunction(value):
        return value.__name__
    return repr(value)


def _docstring(text: str) -> list[str]:
    """Return paragraphs as Markdown and examples as code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\n+", text):
        if paragraph.startswith(">>>"):
            lines += ["```pycon", paragraph, "```", ""]
        else:
            lines += [paragraph, ""]
    return lines


def engines() -> str:
    """Return the page of engines, by which `plan`, `inspect` and `validate-config` judge."""
    lines = [
        "# Engines",
        "",
        "`gptq plan`, `gptq inspect` and `gptq validate-config --model` judge by these tables. The",
        "first row that applies decides. If no row applies, the engine loads the checkpoint. If",
        "an engine has no table for a format, it does not read it.",
    ]
    for engine in ENGINES:
        lines += ["", f"## {engine.name}"]
        for reader in engine.readers:
            formats = ", ".join(map(_code, sorted(reader.formats)))
            lines += ["", f"Formats: {formats}.", f"Read: {_text(reader.read)}."]
            if reader.run:
                lines.append(f"Run: {_text(reader.run)}.")
            lines.append(f"Date: {reader.date}.")
            rows = [_rule(rule) for rule in reader.rules]
            if engine.reads(min(reader.formats)):
                rows.append((OUTCOMES["yes"], "every other checkpoint", "", "", reader.loads))
            lines += table(("", "reason", "versions", "platform", "seen"), rows)
    return "\n".join(lines)


def _rule(rule: Rule) -> tuple[str, ...]:
    versions = []
    if rule.since:
        versions.append(f"from {rule.since}")
    if rule.until:
        versions.append(f"before {rule.until}")
    return (OUTCOMES[rule.outcome], _text(rule.reason), ", ".join(versions), rule.on, rule.seen)


def decisions() -> str:
    """Return the index page of the decisions."""
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
