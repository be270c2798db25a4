"""Results as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@overload
def to_json(value: DataclassInstance) -> dict[str, Any]: ...
@overload
def to_json(value: object) -> Any: ...
def to_json(value: Any) -> Any:
    """Return `value` as JSON knows it: dataclasses become dicts, tuples lists, paths text.

    A configuration becomes the dict that a configuration file would hold.
    """
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(to_json, value))
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):  # asked this way, since pydantic is slow to import
        return value.model_dump(mode="json")
    return value
