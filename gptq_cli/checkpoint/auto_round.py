"""Checkpoints of auto-round: the tensors of GPTQ without g_idx, and settings of their own.

Sources: `export_to_autoround` and `inference/convert_model.py` of auto-round 0.16.1, and `inc` of
vLLM 0.33.0. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import Packing, Sizes, quantized_names
from gptq_cli.config.layer import (
    HEAD,
    HOLDS,
    Linears,
    Settings,
    StoredConfig,
    flaw_of,
    list_item,
    matches,
)

FORMAT = "auto-round"
PLAIN_BITS = 16
PLAIN = {"bits": PLAIN_BITS, "group_size": -1, "sym": True}
# What readers add to stored zero points. auto-round writes the first one if all grids are
# symmetric, which is the only one that vLLM reads, and the second one if some are not.
ZERO_OFFSETS = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0}
SYMMETRIC, ASYMMETRIC = "auto_round:auto_gptq", "auto_round"
_OF_PATTERNS = set("*+?^$()[]{}|\\")  # a name with one of these is a regular expression


class AutoRoundPacking(Packing):
    """The packing of auto-round: that of GPTQ, and the columns of groups follow one another."""

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a linear."""
        shapes = super().shapes(sizes)
        del shapes["g_idx"]
        return shapes

    def encode(self, linear: Any, pack: Any, *, sym: bool) -> dict[str, Any]:
        """Return the tensors of a linear by part."""
        tensors = super().encode(linear, pack, sym=sym)
        del tensors["g_idx"]
        return tensors


def packing_for(*, sym: bool) -> Packing:
    """Return how linears are written; `sym` tells whether all of them are symmetric."""
    return AutoRoundPacking(FORMAT, ZERO_OFFSETS[_written_format(sym=sym)])


def _written_format(*, sym: bool) -> str:
    if sym:
        return SYMMETRIC
    return ASYMMETRIC


def packing_of(stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Packing:
    """Return how the linears of a readable checkpoint are stored."""
    del tensors
    return AutoRoundPacking(FORMAT, ZERO_OFFSETS[_packing_format(stored)])


def _packing_format(stored: Mapping[str, Any]) -> str:
    format = stored.get("packing_format")
    if format in (None, ""):
        return SYMMETRIC
    return str(format)


def unreadable(stored: Mapping[str, Any]) -> str:
    """Return what cannot be read here, "" if all can."""
    format = _packing_format(stored)
    if format not in ZERO_OFFSETS:
        return format
    if stored.get("data_type", "int") != "int":
        return f"data_type {stored['data_type']}"
    if stored.get("act_bits") not in (None, PLAIN_BITS):
        return f"activations of {stored['act_bits']} bits"
    return ""


def _pattern(name: str) -> str:
    return f".*(?:{name})"


@dataclass(frozen=True, slots=True)
class AutoRoundConfig(StoredConfig):
    """The settings of a checkpoint of auto-round; `extra` has those that differ, by name."""

    extra: Mapping[str, Mapping[str, Any]]

    def _changes(self, module: str) -> Mapping[str, Any]:
        if module in self.extra:
            return self.extra[module]
        for name, values in self.extra.items():
            if _OF_PATTERNS & set(name) and matches(_pattern(name), module):
                return values
        return {}

    def settings(self, module: str) -> Settings:
        """Return the settings of a quantized module."""
        changes = self._changes(module)
        return Settings(
            changes.get("bits", self.base.bits),
            changes.get("group_size", self.base.group_size),
            changes.get("sym", self.base.sym),
            desc_act=False,
        )

    def skip_rule(self, module: str) -> str | None:
        """Return the name of the entry that excludes `module` from quantization."""
        if self._changes(module).get("bits", self.base.bits) >= PLAIN_BITS:
            return f"extra_config: {module}"
        return None


def stored_config(
    stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[StoredConfig | None, list[Defect]]:
    """Return the configuration of a readable checkpoint, None if it is unusable, and defects."""
    extra = stored.get("extra_config") or {}
    wrong = _wrong_values({"sym": True, **stored})
    if not isinstance(extra, dict) or not all(isinstance(item, dict) for item in extra.values()):
        wrong.append("extra_config is not a mapping from names to settings")
        extra = {}
    for name, values in extra.items():
        wrong += _wrong_values({**PLAIN, **values})
        wrong += _wrong_pattern(name)
    if wrong:
        hint = "correct it in config.json, as it was set in the tool that wrote the weights"
        return None, [Defect("E_CKPT_CONFIG", text, "config.json", hint=hint) for text in wrong]
    base = Settings(stored["bits"], stored["group_size"], stored.get("sym", True), desc_act=False)
    names = quantized_names(tensors)
    return AutoRoundConfig(base, FORMAT, HEAD in names, {}, None, extra), []


def _wrong_pattern(name: str) -> list[str]:
    """Return the error in a name of `extra_config` that is a regular expression, if it has one."""
    reason = None
    if _OF_PATTERNS & set(name):
        reason = flaw_of(_pattern(name))
    if reason is None:
        return []
    return [f"extra_config: {name!r} is not a regular expression: {reason}"]


def _wrong_values(values: Mapping[str, Any]) -> list[str]:
    """Return errors in the settings of all modules or of one, where plain ones have 16 bits."""
    bits, group_size, sym = values.get("bits"), values.get("group_size"), values.get("sym")
    wrong = []
    if type(bits) is not int or bits not in (*HOLDS[FORMAT].bits, PLAIN_BITS):
        wrong.append(f"bits is {bits!r}")
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        wrong.append(f"group_size is {group_size!r}")
    if not isinstance(sym, bool):
        wrong.append(f"sym is {sym!r}")
    return wrong


def describe(linears: Linears) -> dict[str, Any]:
    """Return the entries of config.json for a checkpoint of these linears."""
    base, others = linears.usual()
    extra: dict[str, dict[str, Any]] = {}
    for name, settings in others.items():
        extra[name] = {
            "bits": settings.bits,
            "group_size": settings.group_size,
            "sym": settings.sym,
        }
    if HEAD in linears.quantized:  # it is in no block
        head = linears.quantized[HEAD]
        extra[HEAD] = {"bits": head.bits, "group_size": head.group_size, "sym": head.sym}
    blocks = _blocks(linears)
    for name in linears.kept:
        if name.startswith(f"{blocks}."):
            extra[name] = {"bits": PLAIN_BITS, "data_type": "float"}
    described: dict[str, Any] = {
        "quant_method": FORMAT,
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": base.sym,
        "data_type": "int",
        "packing_format": _written_format(sym=linears.sym),
        "block_name_to_quantize": blocks,
    }
    if extra:
        described["extra_config"] = extra
    return {"quantization_config": described}


def _blocks(linears: Linears) -> str:
    """Return the name of the list of blocks."""
    for name in linears.quantized:
        item = list_item(name)
        if item is not None:
            return item.list_name
    return ""
