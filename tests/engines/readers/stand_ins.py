"""Mock modules in place of packages that an engine imports, but that nothing here needs."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterable
from types import ModuleType
from unittest.mock import MagicMock

# These ask whether packages are there, so they are imported before any stand-in is.
from transformers import AutoImageProcessor, AutoProcessor

__all__ = ["AutoImageProcessor", "AutoProcessor", "stand_in_for"]


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name not in self._names and name.partition(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        module.__spec__ = spec
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for(names: Iterable[str]) -> None:
    """Let these modules and what is below them be mocks from now on."""
    sys.meta_path.insert(0, _StandIns(names))
