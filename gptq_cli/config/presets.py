"""Named starting points: each fills only the fields that the user left open."""

from __future__ import annotations

from typing import Any

DEFAULT_PRESET = "gptq"

PRESETS: dict[str, dict[str, Any]] = {
    "gptq": {},  # the published algorithm with the defaults of Optimum's GPTQQuantizer
    "act-order": {"static_groups": True},  # columns in activation order, groups by position: g_idx stays trivial
}
