"""The values that a shell completes, by command and parameter. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gptq_cli.cli.schema import KINDS
from gptq_cli.config.corpora import CORPORA
from gptq_cli.config.fields import AUTO, words_of
from gptq_cli.config.layer import BITS, FORMATS, PRESETS
from gptq_cli.config.resolve import describe_recipe, recipes
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import shell_word
from gptq_cli.evaluation.request import CHECKED_ENGINES
from gptq_cli.planning.checks import RESUME
from gptq_cli.planning.plan import USUAL_GROUP_SIZES
from gptq_cli.storage.work_directory import RUN, SUFFIX

Values = dict[str, str]  # a value, and a few words about it, which may be empty


def completed_values(command: str, parameter: str, begun: str) -> list[tuple[str, str]]:
    """Return the values of a parameter that continue the text `begun`, with words about each.

    If a parameter takes names or paths, paths follow matching names; if no name matches, nothing is
    returned, and the shell completes paths by itself.
    """
    name = NAMES.get(f"{command} {parameter}", parameter)
    found = []
    for value, about in _values(name, begun).items():
        if value.startswith(begun):
            found.append((value, about))
    if found and parameter in NAMES_OR_PATHS:
        found += [(path, "") for path in _paths(begun)]
    return found


def _values(name: str, begun: str) -> Values:
    if name in VALUES:
        return VALUES[name](begun)
    if name in QuantizeConfig.model_fields:
        return _named(words_of(name, QuantizeConfig))
    return {}


def _named(words: Iterable[object]) -> Values:
    return dict.fromkeys(map(str, words), "")


def _presets() -> Values:
    return {name: preset.description for name, preset in PRESETS.items()}


def _recipes() -> Values:
    return {name: describe_recipe(file) for name, file in recipes().items()}


def _datasets() -> Values:
    return {name: corpus.repo for name, corpus in CORPORA.items()}


def _codes() -> Values:
    from gptq_cli.cli.codes import explanations

    return {code: text.partition("\n")[0] for code, text in explanations().items()}


def _lists_of_widths(begun: str) -> Values:
    """Return the lists that begin with the widths that are there, and have one more."""
    before, comma, _ = begun.rpartition(",")
    given = before.split(",")
    return _named(f"{before}{comma}{width}" for width in BITS if str(width) not in given)


def _work_directories(begun: str) -> Values:
    """Return the work directories beside the path `begun` that hold an unfinished run."""
    folder, _ = os.path.split(begun)
    found = {}
    for path in sorted(Path(folder or ".").glob(f".*{SUFFIX}")):
        if (path / RUN).is_file():
            found[os.path.join(folder, path.name)] = "unfinished run"  # noqa: PTH118, keeps a ./
    return found


def _paths(begun: str) -> list[str]:
    """Return the paths that continue `begun`, with a slash after a folder.

    Names that a shell would have to quote are left out.
    """
    folder, start = os.path.split(begun)
    found = []
    for path in sorted(Path(folder or ".").glob(f"{start}*")):
        text = os.path.join(folder, path.name)  # noqa: PTH118, keeps a ./
        if path.is_dir():
            text += "/"
        if shell_word(text) == text and (start.startswith(".") or not path.name.startswith(".")):
            found.append(text)
    return found


def _constant(values: Callable[[], Values]) -> Callable[[str], Values]:
    """Return `values` as a function of the text that was begun."""
    return lambda begun: values()  # noqa: ARG005


# by the name of a parameter, or the name that it has in NAMES
VALUES: Mapping[str, Callable[[str], Values]] = {
    "preset": _constant(_presets),
    "recipe": _constant(_recipes),
    "code": _constant(_codes),
    "dataset": _constant(_datasets),
    "bits": _constant(lambda: _named(BITS)),
    "allow_bits": _lists_of_widths,
    "group_size": _constant(lambda: _named([AUTO, *USUAL_GROUP_SIZES, -1])),
    "device": _constant(lambda: _named(["auto", "cpu", "cuda"])),
    "to": _constant(lambda: _named(FORMATS)),
    "engine": _constant(lambda: _named(CHECKED_ENGINES)),
    "resume": _constant(lambda: _named(RESUME)),
    "schema": _constant(lambda: _named(KINDS)),
    "work_directory": _work_directories,
}
NAMES = {  # of parameters that mean something else in another command
    "recipes name": "recipe",
    "resume unfinished": "work_directory",
    "schema kind": "schema",
    "validate_config file": "recipe",
    "compare text": "dataset",
}
for _command in ("quantize", "plan", "allocate"):
    NAMES[f"{_command} config"] = "recipe"
NAMES_OR_PATHS = {"config", "dataset", "file", "text"}
