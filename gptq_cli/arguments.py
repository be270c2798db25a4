"""The arguments of the Python functions by their names: which types they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gptq_cli.errors import ConfigError, shown

P = ParamSpec("P")
R = TypeVar("R")


def _is_path(value: object) -> bool:
    return isinstance(value, str | Path) and value != ""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


KINDS: dict[str, tuple[Callable[[object], bool], tuple[str, ...]]] = {
    "a directory or a Hub id": (_is_path, ("model", "a", "b")),
    "a path": (_is_path, ("directory", "output", "file", "evaluation", "card")),
    "a dataset, a file or a folder": (_is_path, ("text",)),
    "a time such as 3h30m, 90m or 45s": (_is_text, ("max_runtime",)),
    "a text": (
        _is_text,
        ("base_model", "command", "layer", "prompt", "repo", "resume", "revision", "to"),
    ),
    "true or false": (
        _is_switch,
        (
            *("allow_network_fs", "dry_run", "full", "overwrite", "public", "raw"),
            *("report", "stream_download", "time"),
        ),
    ),
    "a whole number": (_is_whole, ("devices", "max_new_tokens", "max_windows", "seed")),
    "a number": (_is_number, ("temperature", "top_p")),
}


def check_arguments(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ConfigError E_CFG_TYPE for a value of a wrong type; None is one if it is the default.

    Names that are not in KINDS are not checked.
    """
    for kind, (accepts, names) in KINDS.items():
        for name in names:
            if name not in values or accepts(values[name]):
                continue
            if values[name] is not None or defaults.get(name, name) is not None:
                message = f"{name} must be {kind}, got {shown(values[name])}"
                raise ConfigError("E_CFG_TYPE", message)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, which checks the types of its arguments when it is called."""
    parameters = signature(function).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_arguments(signature(function).bind(*args, **kwargs).arguments, defaults)
        return function(*args, **kwargs)

    return call
