"""The settings of one linear layer that the solver needs, the values they take, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

BitWidth = Literal[2, 3, 4, 8]
Format = Literal["gptq", "gptq_v2"]
ScaleSearch = Literal["none", "mse"]
DampMode = Literal["mean", "diagonal"]
Uncovered = Literal["error", "rtn", "all-tokens"]
OnFault = Literal["error", "rtn"]

BITS: tuple[int, ...] = get_args(BitWidth)
FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class Preset:
    """A named starting point: its `settings` fill only the fields that the user left open."""

    description: str
    settings: Mapping[str, Any]


DEFAULT_PRESET = "balanced"
BALANCED: dict[str, Any] = {
    "static_groups": True,
    "signed_scales": True,
    "scale_search": "mse",
    "refine_sweeps": 4,
    "damp_mode": "diagonal",
    "damp_percent": 0.05,
}

# docs/accuracy.md has the effect of each on the divergence from the original model.
PRESETS: dict[str, Preset] = {
    "gptq": Preset(
        "the published algorithm with the defaults of Optimum's GPTQQuantizer: group-aware order, "
        "min/max scales, mean damping of 0.1",
        {},
    ),
    "act-order": Preset(
        "`gptq` with static groups: columns in activation order, but g_idx stays trivial",
        {"static_groups": True},
    ),
    "balanced": Preset(
        "static groups in activation order, signed scales with a search, diagonal damping, "
        "four rounds of refinement",
        BALANCED,
    ),
    "fast": Preset(
        "`balanced` without search and refinement",
        BALANCED | {"scale_search": "none", "refine_sweeps": 0},
    ),
    "best": Preset(
        "`balanced` and asymmetric calibration: the unquantized model runs beside the quantized "
        "one, block by block",
        BALANCED | {"asymmetric_calibration": 0.75},
    ),
}


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    """The treatment of layers with unusable numbers, and of experts without tokens."""

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

    @property
    def has_trivial_g_idx(self) -> bool:
        """True if the columns of each group follow one another: readers need no g_idx."""
        return self.static_groups or not self.desc_act

    def columns_per_group(self, in_features: int) -> int:
        """Return the number of input columns that share one scale."""
        if self.group_size == -1:
            return in_features
        return self.group_size
