"""One configuration from all who have a say:  flag > GPTQ_* environment > file > preset > default.

Precedence goes key by key; `dynamic` and lists are replaced whole, not merged. Every source is checked for itself, so
that a wrong value in a file is found even where a flag overrules it; conflicts are looked for in what results. A
variable `GPTQ_X` sets the field x, written as in a file. One that looks like a misspelt field is an error; any other
unknown one may belong to another program and is only noted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from gptq_cli.config.finding import Finding, KeyPath, name_of, nearest
from gptq_cli.config.optimum import adopt
from gptq_cli.config.schema import FIELDS, QuantizeConfig, conflicts, field_findings, fill
from gptq_cli.config.serving import settings_export, target_problems
from gptq_cli.config.strict_yaml import CORE_SCHEMA, Place, load, parse_scalar
from gptq_cli.errors import ConfigError, Location, Problem
from gptq_cli.files import file_errors

ENVIRONMENT = "GPTQ_"
AT_KEY = {"E_CFG_UNKNOWN_KEY", "E_CFG_REGEX"}

FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True, slots=True)
class Resolved:
    """The configuration, where each of its values comes from, and what the user should know about the input."""

    config: QuantizeConfig
    origins: dict[str, str]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Source:
    """What one of the sources said, and how to speak of it to the user; this one is the command line."""

    values: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def name(self, path: KeyPath) -> str:
        """What the user calls the place `path`."""
        head, *rest = path
        return name_of(("--" + str(head).replace("_", "-"), *rest))

    def origin(self, key: str) -> str:
        """Who said the field `key`."""
        return self.name((key,))

    def locate(self, path: KeyPath, at_key: bool) -> Location | None:  # noqa: ARG002
        """Where in a file the place `path` stands: its key or its value."""
        return None


class _Environment(_Source):
    def name(self, path: KeyPath) -> str:
        head, *rest = path
        return name_of((ENVIRONMENT + str(head).upper(), *rest))


@dataclass(slots=True)
class _File(_Source):
    path: str = ""
    places: dict[KeyPath, Place] = field(default_factory=dict)
    renamed: dict[KeyPath, KeyPath] = field(default_factory=dict)

    def name(self, path: KeyPath) -> str:
        return name_of(self._as_written(path))

    def origin(self, key: str) -> str:
        place = self.places.get(self._as_written((key,)))
        return f"{self.path}:{place.key.line}" if place else self.path

    def locate(self, path: KeyPath, at_key: bool) -> Location | None:
        path = self._as_written(path)
        place = next(
            (self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places),
            None,
        )
        if place is None:
            return Location(self.path, 1, 1)
        return place.key if at_key else place.value

    def _as_written(self, path: KeyPath) -> KeyPath:
        return self.renamed.get(path[:1], path[:1]) + path[1:]


def resolve(flags: Mapping[str, Any], env: Mapping[str, str], file: Path | None = None) -> Resolved:
    """The configuration that flags (None: not said), environment and file give together.

    Raises ConfigError with every problem of every source: E_CFG_FILE, E_CFG_YAML, E_CFG_UNKNOWN_KEY, E_CFG_TYPE,
    E_CFG_RANGE, E_CFG_REGEX, E_CFG_MISSING, E_CFG_CONFLICT; when all is well otherwise, E_TARGET.
    """
    from_file, problems = _read_file(find_config(file)) if file else (_File({}), [])
    readable = not problems
    sources = [_Source(dict(flags)), _read_environment(env), from_file]
    said_by = {
        key: source
        for source in reversed(sources)
        for key, value in source.values.items()
        if value is not None
    }
    said = {key: source.values[key] for key, source in said_by.items()}
    filled, why = fill(said)

    problems += [_problem(finding, source) for source in sources for finding in _findings(source)]
    problems += [_conflict(finding, said_by, why) for finding in conflicts(filled)]
    if "bits" not in filled and readable:
        at = Location(from_file.path, 1, 1) if file else None
        problems.append(
            Problem("E_CFG_MISSING", "bits is required", "4 is the usual choice: --bits 4", at)
        )
    if problems:
        raise ConfigError.of(sorted(problems, key=_position))

    origins = {key: why.get(key, "default") for key in FIELDS}
    origins |= {key: source.origin(key) for key, source in said_by.items()}
    config = QuantizeConfig.model_validate(filled)
    if refused := target_problems(settings_export(config), config.target):
        at = said_by["target"].locate(("target",), at_key=False)
        raise ConfigError.of([replace(problem, location=at) for problem in refused])
    return Resolved(config, origins, tuple(note for source in sources for note in source.notes))


@file_errors()
def load_config(file: str | Path) -> QuantizeConfig:
    """The configuration of a YAML or JSON file, or of the recipe of that name; ConfigError as `resolve`.

    GPTQ_* variables have no say in it.

    >>> from gptq_cli import load_config
    >>> load_config("vllm-4bit").bits
    4
    """
    return resolve({}, {}, Path(file)).config


def check_flags(flags: Mapping[str, Any]) -> None:
    """Refuse flags whose values their fields do not accept (None: not said), for commands without a configuration."""
    source = _Source(
        {key: value for key, value in flags.items() if value is not None and key in FIELDS}
    )
    if problems := [_problem(finding, source) for finding in _findings(source)]:
        raise ConfigError.of(problems)


def _read_file(path: Path) -> tuple[_File, list[Problem]]:
    document = load(path)
    adopted = adopt(document.values)
    source = _File(
        adopted.values, adopted.findings, adopted.notes, str(path), document.places, adopted.renamed
    )
    return source, list(document.problems)


def _read_environment(env: Mapping[str, str]) -> _Environment:
    source = _Environment({})
    for variable in sorted(env):
        key = variable.removeprefix(ENVIRONMENT).lower()
        if not variable.startswith(ENVIRONMENT):
            continue
        if key in FIELDS:
            source.values[key] = parse_scalar(env[variable])
        elif near := nearest(key, FIELDS, cutoff=0.7):
            hint = f"did you mean {ENVIRONMENT}{near.upper()}?"
            source.findings.append(
                Finding(((key,),), "E_CFG_UNKNOWN_KEY", "sets no known field", hint)
            )
        else:
            source.notes.append(f"{variable} is not a setting of this tool and has no effect")
    return source


def _findings(source: _Source) -> list[Finding]:
    return source.findings + field_findings(source.values)


def _problem(finding: Finding, source: _Source) -> Problem:
    message = f"{' and '.join(map(source.name, finding.paths))} {finding.predicate}"
    location = source.locate(finding.paths[0], at_key=finding.code in AT_KEY)
    return Problem(finding.code, message, finding.hint, location)


def _conflict(finding: Finding, said_by: Mapping[str, _Source], why: Mapping[str, str]) -> Problem:
    """The finding with the origin of each side, since the two may come from two places."""
    if len(finding.paths) == 1:
        return _problem(finding, said_by[str(finding.paths[0][0])])
    names, locations = [], []
    for path in finding.paths:
        key = str(path[0])
        at = said_by[key].locate(path, at_key=False) if key in said_by else None
        origin = at or (None if key in said_by else why.get(key, "default"))
        name = said_by[key].name(path) if key in said_by else name_of(path)
        names.append(f"{name} ({origin})" if origin else name)
        locations += [at] if at else []
    message = f"{' and '.join(names)} {finding.predicate}"
    return Problem(finding.code, message, finding.hint, locations[0] if locations else None)


def _position(problem: Problem) -> tuple[bool, int, int]:
    at = problem.location
    return (at is not None, at.line if at else 0, at.column if at else 0)


def recipes() -> dict[str, Path]:
    """The file of each recipe by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def describe_recipe(file: Path) -> str:
    """What a recipe is for: its first comment that is not for editors."""
    comments = (
        line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")
    )
    return next(comment for comment in comments if not comment.startswith("yaml-language-server"))


def find_config(file: Path) -> Path:
    """`file`, or the recipe of that name if there is no such file; ConfigError E_CFG_FILE if it could be neither."""
    known = recipes()
    name = str(file)
    if os.path.lexists(file) or file.name != name or file.suffix:
        return file
    if name in known:
        return known[name]
    near = nearest(name, known)
    hint = (
        f"did you mean the recipe {near}?"
        if near
        else "`gptq recipes` lists the names; a file needs its suffix"
    )
    raise ConfigError("E_CFG_FILE", f"there is no file and no recipe `{name}`", hint=hint)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or YAML 1.2 would read as something else, and never writes an alias."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds NEL and its like to blanks in every style but this one
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in CORE_SCHEMA:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, [*_first])


def to_yaml(config: QuantizeConfig, origins: Mapping[str, str] | None = None) -> str:
    """`config` as YAML, each value with its entry in `origins` as a comment; loading the text gives an equal config."""
    blocks = []
    for key, value in config.model_dump().items():
        block = printable_yaml({key: value})
        origin = _one_line((origins or {}).get(key))
        if origin is None:
            blocks.append(block)
        elif block.count("\n") == 1:
            blocks.append(f"{block.rstrip()}  # {origin}\n")
        else:
            blocks.append(f"# {origin}\n{block}")
    return "".join(blocks)


def printable_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML in which every letter prints: one that does not is an escape, as a terminal needs it."""
    text = _as_yaml(values, allow_unicode=True)
    return text if text.replace("\n", "").isprintable() else _as_yaml(values, allow_unicode=False)


def _as_yaml(values: Mapping[str, Any], *, allow_unicode: bool) -> str:
    return str(
        yaml.dump(values, Dumper=_Dumper, allow_unicode=allow_unicode, width=10**9, sort_keys=False)
    )


def _one_line(origin: str | None) -> str | None:
    """`origin` as a comment can hold it: a file's name may break lines."""
    if origin is None or origin.isprintable():
        return origin
    return origin.encode("unicode-escape", "surrogatepass").decode("ascii")
