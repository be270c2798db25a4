"""Named starting points: each fills only the fields that the user left open."""

from __future__ import annotations

from typing import Any

DEFAULT_PRESET = "balanced"
BALANCED: dict[str, Any] = {
    "static_groups": True,
    "signed_scales": True,
    "scale_search": "mse",
    "refine_sweeps": 4,
    "damp_mode": "diagonal",
    "damp_percent": 0.05,
}

PRESETS: dict[str, dict[str, Any]] = {
    # the published algorithm with the defaults of Optimum's GPTQQuantizer
    "gptq": {},
    # columns in activation order, groups by position: g_idx stays trivial
    "act-order": {"static_groups": True},
    # what lowers the divergence from the original in the same kind of checkpoint: docs/accuracy.md
    "balanced": BALANCED,
    # of `balanced` what costs no time
    "fast": BALANCED | {"scale_search": "none", "refine_sweeps": 0},
    # a second, unquantized stream of hidden states on top
    "best": BALANCED | {"asymmetric_calibration": 0.75},
}
