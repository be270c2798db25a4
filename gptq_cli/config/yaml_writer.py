"""A configuration as YAML that any reader, 1.1 or 1.2, takes for the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.strict_yaml import CORE_SCHEMA


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
