"""Named starting points: each fills only the fields that the user left open."""

from __future__ import annotations

from typing import Any

DEFAULT_PRESET = "gptq"

ACT_ORDER = {"static_groups": True}  # columns in activation order, groups by position: g_idx stays trivial
SIGNED = ACT_ORDER | {"signed_scales": True, "damp_mode": "diagonal", "damp_percent": 0.05}

PRESETS: dict[str, dict[str, Any]] = {
    "gptq": {},  # the published algorithm with the defaults of Optimum's GPTQQuantizer
    "act-order": ACT_ORDER,
    "balanced": SIGNED | {"refine_sweeps": 2},  # all that lowers KL and leaves the checkpoint plain
    "fast": SIGNED | {"true_sequential": False},  # two passes over each block instead of one a stage and one
}
