"""What the solver needs to know about one linear layer, after all rules have been applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScaleSearch = Literal["none", "mse", "activation"]
DampMode = Literal["mean", "diagonal"]
Uncovered = Literal["error", "rtn", "all-tokens"]
OnFault = Literal["error", "rtn"]


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
