"""Errors for Python callers: they name `bits=4` where the command line names `--bits 4`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from typing import ParamSpec, TypeVar

from pydantic.fields import FieldInfo

from gptq_cli.arguments import KINDS
from gptq_cli.config.layer import FORMATS, PRESETS
from gptq_cli.errors import GptqError, Problem

P = ParamSpec("P")
R = TypeVar("R")
Fields = Mapping[str, FieldInfo]  # the settings, as the model of the configuration has them

# Arguments that are no settings, and of them those that are true or false.
ARGUMENTS = {name for _, names in KINDS.values() for name in names} | {"request", "dtype"}
SWITCHES = set(KINDS["true or false"][1])
# Values of settings that are texts.
WORDS = {*FORMATS, *PRESETS, "auto", "cpu", "cuda", "never", "rtn", "keep", "float32", "bfloat16"}
OTHER_NAMES = {"-o": "output", "--asym": "sym=False"}
# A command in a hint, which a shell has to read; else a flag with the number or word after it.
COMMAND = re.compile(r"`[^`]*`|\bgptq [a-z][^;,]*")
OTHERS = rf"((?:(?:, | or )(?:{'|'.join(sorted(WORDS, reverse=True))})\b)*)"
FLAG = re.compile(rf"(?<![\w-])(-o\b|--[a-z][a-z-]*)(?: (-?\w[\w.-]*\b){OTHERS})?")


def for_python(function: Callable[P, R], fields: Fields) -> Callable[P, R]:
    """Return `function` with the names of Python in the messages and hints of its errors."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except GptqError as error:
            error.problems = tuple([renamed(problem, fields) for problem in error.problems])
            error.args = ("; ".join(problem.message for problem in error.problems),)
            raise

    return call


def renamed(problem: Problem, fields: Fields) -> Problem:
    """Return a problem with settings and arguments in place of flags."""
    hint = problem.hint
    if hint is not None:
        hint = in_python(hint, fields)
    return replace(problem, message=in_python(problem.message, fields), hint=hint)


def in_python(text: str, fields: Fields) -> str:
    """Return a message or hint with settings and arguments in place of flags.

    Commands in it stay as they are.

    >>> from gptq_cli import QuantizeConfig
    >>> fields = QuantizeConfig.model_fields
    >>> in_python("use --bits 4 or 8, or add --lm-head; all of it: gptq plan DIR --json", fields)
    'use bits=4 or 8, or add lm_head=True; all of it: gptq plan DIR --json'
    >>> in_python("use --format mlx or auto-round", fields)
    'use format="mlx" or "auto-round"'
    """
    in_words = partial(_setting, fields)
    parts = []
    end = 0
    for command in COMMAND.finditer(text):
        parts += [FLAG.sub(in_words, text[end : command.start()]), command[0]]
        end = command.end()
    return "".join([*parts, FLAG.sub(in_words, text[end:])])


def _setting(fields: Fields, found: re.Match[str]) -> str:
    """Return a flag as a keyword argument, with its value if one follows."""
    flag, word, others = found[1], found[2], found[3] or ""
    after = "" if word is None else f" {word}{others}"
    if flag in OTHER_NAMES:
        return OTHER_NAMES[flag] + after
    name = flag.removeprefix("--").replace("-", "_")
    if name.startswith("no_") and _is_switch(name.removeprefix("no_"), fields):
        return f"{name.removeprefix('no_')}=False{after}"
    if name not in ARGUMENTS and name not in fields:
        return found[0]
    if word is not None and re.fullmatch(r"-?\d+(\.\d+)?", word):
        return f"{name}={word}{others}"
    if word is not None and (word[0].isdigit() or word in WORDS):
        return f'{name}="{word}"' + re.sub(r"[\w-]{3,}", r'"\g<0>"', others)
    if _is_switch(name, fields):
        return f"{name}=True{after}"
    return name + after


def _is_switch(name: str, fields: Fields) -> bool:
    return name in SWITCHES or (name in fields and fields[name].annotation is bool)
