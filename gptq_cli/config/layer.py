"""The settings of one linear layer that the solver needs, after all rules have been applied, and
the presets.

A preset is a named starting point: it fills only the fields that the user left open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ScaleSearch = Literal["none", "mse"]
DampMode = Literal["mean", "diagonal"]
Uncovered = Literal["error", "rtn", "all-tokens"]
OnFault = Literal["error", "rtn"]

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


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    """What becomes of layers that cannot be calibrated: numbers that are of no use, experts without a token."""

    on_numeric_fault: OnFault = "error"
    moe_uncovered: Uncovered = "error"


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Quantization settings of one linear layer; `group_size` -1 means one group per row."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_group_aware: bool = True
    static_groups: bool = False
    signed_scales: bool = False
    scale_search: ScaleSearch = "none"
    refine_sweeps: int = 0
    asymmetric_calibration: float = 0.0
    damp_mode: DampMode = "mean"
    damp_percent: float = 0.1

    def columns_per_group(self, in_features: int) -> int:
        """Number of input columns that share one scale."""
        return in_features if self.group_size == -1 else self.group_size
