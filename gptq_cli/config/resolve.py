"""One configuration from all its sources:  flag > GPTQ_* variable > file > preset > default.

Precedence goes key by key; `dynamic` and lists are replaced whole, not merged. Every source is
checked by itself, so that a wrong value in a file is found even if a flag overrides it. Conflicts
are looked for in the result. A variable `GPTQ_X` sets the field x, written as in a file. A variable
that looks like a misspelt field is an error; any other unknown one may belong to another program,
so it is only noted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from gptq_cli.config.layer import LayerConfig, keeps
from gptq_cli.config.optimum import adopt
from gptq_cli.config.schema import FIELDS, QuantizeConfig, conflicts, field_findings, fill
from gptq_cli.config.serving import Export, export_of, target_problems
from gptq_cli.config.strict_yaml import CORE_SCHEMA, Place, load, parse_scalar
from gptq_cli.errors import (
    ConfigError,
    Finding,
    KeyPath,
    Location,
    Problem,
    name_of,
    nearest,
    shown,
)
from gptq_cli.files import file_errors

ENVIRONMENT = "GPTQ_"
RUNNING = ("device", "dtype")
AT_KEY = {"E_CFG_UNKNOWN_KEY", "E_CFG_REGEX"}
SETTING = re.compile(r"set (\w+) to (\w+)(, or remove it)?")  # in hints

FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, the origin of each of its values, and notes for the user about the input."""

    config: QuantizeConfig
    origins: dict[str, str]
    notes: tuple[str, ...]

    @property
    def has_goal(self) -> bool:
        """True if the user gave a number of bits, or another goal for which widths are chosen."""
        return self.config.allocates or self.origins["bits"] != "default"


@dataclass(slots=True)
class _Source:
    """The values of one source, and its names for places; this class is for the command line."""

    values: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def name(self, path: KeyPath) -> str:
        """Return the user's name for the place `path`."""
        head, *rest = path
        return name_of(("--" + str(head).replace("_", "-"), *rest))

    def origin(self, key: str) -> str:
        """Return the words for the place that gives the field `key`."""
        return self.name((key,))

    def locate(self, path: KeyPath, at_key: bool) -> Location | None:  # noqa: ARG002
        """Return the location in a file of the key or the value at `path`."""
        return None


class _Environment(_Source):
    def name(self, path: KeyPath) -> str:
        head, *rest = path
        return name_of((ENVIRONMENT + str(head).upper(), *rest))


@dataclass(slots=True)
class _Mapping(_Source):
    """The values of a mapping; `renamed` has the keys of other tools as they were written."""

    renamed: dict[KeyPath, KeyPath] = field(default_factory=dict)

    def name(self, path: KeyPath) -> str:
        return name_of(self._as_written(path))

    def _as_written(self, path: KeyPath) -> KeyPath:
        return self.renamed.get(path[:1], path[:1]) + path[1:]


@dataclass(slots=True)
class _File(_Mapping):
    path: str = ""
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        place = self.places.get(self._as_written((key,)))
        if place is None:
            return self.path
        return f"{self.path}:{place.key.line}"

    def locate(self, path: KeyPath, at_key: bool) -> Location | None:
        path = self._as_written(path)
        while path and path not in self.places:
            path = path[:-1]  # the nearest place around it
        if not path:
            return Location(self.path, 1, 1)
        place = self.places[path]
        return place.key if at_key else place.value


def resolve(
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    file: Path | None = None,
    *,
    bits: int | None = None,
) -> Resolved:
    """Return the configuration of flags (None: not given), environment and file together.

    `bits` is another default of that field.

    Raises ConfigError with every problem of every source: E_CFG_FILE, E_CFG_YAML,
    E_CFG_UNKNOWN_KEY, E_CFG_TYPE, E_CFG_RANGE, E_CFG_REGEX, E_CFG_CONFLICT; if there is no other
    problem, E_TARGET.
    """
    sources = [_Source(dict(flags)), _read_environment(env)]
    if file is not None:
        sources.append(_read_file(find_config(file)))
    return _combined(sources, bits)


def resolve_arguments(
    config: QuantizeConfig | Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    *,
    bits: int | None = None,
) -> Resolved:
    """Return the configuration of a Python call: a whole one, or a mapping with `settings` over it.

    A mapping may be one that Optimum, transformers or GPTQModel writes. GPTQ_* variables are not
    read. `bits` and the errors are those of `resolve`; E_CFG_CONFLICT for a `QuantizeConfig` beside
    settings.
    """
    if not isinstance(config, QuantizeConfig):
        return _resolve_mapping(config or {}, settings, bits)
    if settings:
        message = f"config is complete, but {next(iter(settings))} is given beside it"
        hint = "give all settings in one of them; a dict as config can be overridden"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)
    return Resolved(config, dict.fromkeys(FIELDS, "config"), ())


def _resolve_mapping(
    values: Mapping[str, Any], settings: Mapping[str, Any], bits: int | None
) -> Resolved:
    if not isinstance(values, Mapping):
        message = f"config must be a QuantizeConfig or a dict, got {shown(values)}"
        hint = "load a file or a recipe with load_config"
        raise ConfigError("E_CFG_TYPE", message, hint=hint)
    adopted = adopt(values)
    given = _Mapping(adopted.values, adopted.findings, adopted.notes, renamed=adopted.renamed)
    return _combined([_Mapping(dict(settings)), given], bits)


def _combined(sources: Sequence[_Source], bits: int | None) -> Resolved:
    """Return the configuration of `sources`, of which the first that gives a value decides."""
    chosen = _choose(sources)
    filled, reasons = fill({key: source.values[key] for key, source in chosen.items()})
    if bits is not None and reasons.get("bits") == "default":
        filled["bits"] = bits

    problems: list[Problem] = []
    notes: list[str] = []
    for source in sources:
        problems += source.problems
        problems += _problems_of(source)
        notes += source.notes
    problems += [_conflict(finding, chosen, reasons) for finding in conflicts(filled)]
    if problems:
        raise ConfigError.of(sorted(problems, key=_position))

    config = QuantizeConfig.model_validate(filled)
    _check_target(config, chosen)
    origins = dict.fromkeys(FIELDS, "default") | reasons
    for key, source in chosen.items():
        origins[key] = source.origin(key)
    return Resolved(config, origins, tuple(notes))


@file_errors()
def load_config(file: str | Path) -> QuantizeConfig:
    """Return the configuration of a YAML or JSON file or of a recipe; ConfigError as `resolve`.

    GPTQ_* variables are not read.

    >>> from gptq_cli import load_config
    >>> load_config("vllm-4bit").bits
    4
    """
    from gptq_cli.arguments import check_arguments

    check_arguments({"file": file}, {})
    return resolve({}, {}, Path(file)).config


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for flags whose values their fields do not accept (None: not given).

    It is for commands that take some fields but no configuration.
    """
    given = {}
    for key, value in flags.items():
        if value is not None and key in FIELDS:
            given[key] = value
    problems = _problems_of(_Source(given))
    if problems:
        raise ConfigError.of(problems)


def with_variables(flags: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """Return `flags` with GPTQ_* variables for where and in what dtype a model runs.

    It is for commands that take these fields but no configuration. Variables for the text would
    change what is measured, so they count in a configuration only. Raises what `check_flags`
    raises, also for the variables.
    """
    check_flags(flags)
    found = _Environment({})
    for key in RUNNING:
        variable = f"{ENVIRONMENT}{key.upper()}"
        if variable in env and flags.get(key) is None:
            found.values[key] = parse_scalar(env[variable])
    problems = _problems_of(found)
    if problems:
        raise ConfigError.of(problems)
    return {**flags, **found.values}


def _choose(sources: Sequence[_Source]) -> dict[str, _Source]:
    """Return the source that decides about each field: the first one that gives a value."""
    chosen = {}
    for source in reversed(sources):
        for key, value in source.values.items():
            if value is not None:
                chosen[key] = source
    return chosen


def _read_file(path: Path) -> _File:
    document = load(path)
    adopted = adopt(document.values)
    return _File(
        adopted.values,
        adopted.findings,
        adopted.notes,
        list(document.problems),
        adopted.renamed,
        str(path),
        document.places,
    )


def _read_environment(env: Mapping[str, str]) -> _Environment:
    source = _Environment({})
    for variable in sorted(env):
        if not variable.startswith(ENVIRONMENT):
            continue
        key = variable.removeprefix(ENVIRONMENT).lower()
        near = nearest(key, FIELDS, cutoff=0.7)
        if key in FIELDS:
            source.values[key] = parse_scalar(env[variable])
        elif near is not None:
            hint = f"did you mean {ENVIRONMENT}{near.upper()}?"
            source.findings.append(
                Finding(((key,),), "E_CFG_UNKNOWN_KEY", "sets no known field", hint)
            )
        else:
            source.notes.append(f"{variable} is not a setting of this tool and has no effect")
    return source


def _problems_of(source: _Source) -> list[Problem]:
    findings = source.findings + field_findings(source.values)
    return [_problem(finding, source) for finding in findings]


def _problem(finding: Finding, source: _Source) -> Problem:
    location = source.locate(finding.paths[0], at_key=finding.code in AT_KEY)
    return Problem(finding.code, finding.message(source.name), finding.hint, location)


def _conflict(
    finding: Finding, chosen: Mapping[str, _Source], reasons: Mapping[str, str]
) -> Problem:
    """Return the conflict with the origin of each side, since the sides may have two sources."""
    if len(finding.paths) == 1:
        return _problem(finding, chosen[str(finding.paths[0][0])])
    locations: list[Location] = []

    def side(path: KeyPath) -> str:
        key = str(path[0])
        if key not in chosen:
            return f"{name_of(path)} ({reasons.get(key, 'default')})"
        at = chosen[key].locate(path, at_key=False)
        name = chosen[key].name(path)
        if at is None:
            return name
        locations.append(at)
        return f"{name} ({at})"

    message = finding.message(side)
    hint = finding.hint and SETTING.sub(partial(_as_flag, chosen), finding.hint)
    return Problem(finding.code, message, hint, next(iter(locations), None))


def _as_flag(chosen: Mapping[str, _Source], found: re.Match[str]) -> str:
    """Return the advice about a setting in the words of the flag, if a flag has set it."""
    key, value = found[1], found[2]
    name = ""
    if key in chosen:
        name = chosen[key].name((key,))
    if not name.startswith("--"):
        return found[0]
    if value == "false":
        return f"use {name.replace('--', '--no-', 1)}, or leave out {name}"
    return f"use {name} {value}"


def _check_target(config: QuantizeConfig, chosen: Mapping[str, _Source]) -> None:
    """Raise ConfigError E_TARGET if the target cannot load any output of the configuration."""
    if config.allocates:
        return  # which widths the target takes is decided when they are allocated
    refused = target_problems(settings_export(config), config.target)
    if refused:
        at = chosen["target"].locate(("target",), at_key=False)
        raise ConfigError.of([replace(problem, location=at) for problem in refused])


def _position(problem: Problem) -> tuple[int, int]:
    """Return the sorting key of a problem: those without a place come first."""
    if problem.location is None:
        return (0, 0)
    return (problem.location.line, problem.location.column)


def recipes() -> dict[str, Path]:
    """Return the file of each recipe by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def describe_recipe(file: Path) -> str:
    """Return the purpose of a recipe: its first comment that is not for editors."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# yaml-language-server"):
            return line[2:]
    raise ValueError(f"the recipe {file} has no comment")


def find_config(file: Path) -> Path:
    """Return `file`, or the recipe of that name if there is no such file.

    Raises ConfigError E_CFG_FILE if it could be neither.
    """
    known = recipes()
    name = str(file)
    if os.path.lexists(file) or file.name != name or file.suffix:
        return file
    if name in known:
        return known[name]
    near = nearest(name, known)
    hint = "`gptq recipes` lists the names; a file needs its suffix"
    if near:
        hint = f"did you mean the recipe {near}?"
    raise ConfigError("E_CFG_FILE", f"there is no file and no recipe `{name}`", hint=hint)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes texts which YAML 1.1 or 1.2 would misread, and writes no alias."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # In every other style PyYAML folds NEL and its like to blanks.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in CORE_SCHEMA:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, [*_first])


def to_yaml(config: QuantizeConfig, origins: Mapping[str, str] | None = None) -> str:
    """Return `config` as YAML, each value with its entry in `origins` as a comment.

    Loading the text gives an equal configuration.
    """
    values = config.model_dump()
    if not origins:
        return printable_yaml(values)
    blocks = []
    for key, value in values.items():
        block = printable_yaml({key: value})
        origin = _one_line(origins.get(key))
        if origin is None:
            blocks.append(block)
        elif block.count("\n") == 1:
            blocks.append(f"{block.rstrip()}  # {origin}\n")
        else:
            blocks.append(f"# {origin}\n{block}")
    return "".join(blocks)


def shortened_yaml(config: QuantizeConfig) -> str:
    """Return `config` as YAML without the values that follow from the others.

    Loading the text gives an equal configuration.
    """
    wanted = config.model_dump()
    given = {key: wanted[key] for key in ("bits", "group_size", "preset")}
    for key, value in wanted.items():
        if QuantizeConfig.model_validate(given).model_dump()[key] != value:
            given[key] = value
    return printable_yaml(given)


def printable_yaml(values: Mapping[str, Any]) -> str:
    """Return `values` as YAML for a terminal: letters that do not print are escaped."""
    text = _as_yaml(values, allow_unicode=True)
    if text.replace("\n", "").isprintable():
        return text
    return _as_yaml(values, allow_unicode=False)


def _as_yaml(values: Mapping[str, Any], *, allow_unicode: bool) -> str:
    return str(
        yaml.dump(values, Dumper=_Dumper, allow_unicode=allow_unicode, width=10**9, sort_keys=False)
    )


def _one_line(origin: str | None) -> str | None:
    """Return `origin` as a comment can hold it, since the name of a file may break lines."""
    if origin is None or origin.isprintable():
        return origin
    return origin.encode("unicode-escape", "surrogatepass").decode("ascii")


def settings_export(config: QuantizeConfig) -> Export:
    """Return the export that a configuration implies by itself, whatever the model."""
    layers: dict[str, LayerConfig | None] = {"": config.base}
    for rule in config.dynamic:
        if not keeps(rule):
            layers[rule] = config.changed_by(rule)
    return export_of(layers, config.format, lm_head=config.lm_head)
