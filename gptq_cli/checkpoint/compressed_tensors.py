"""Checkpoints of compressed-tensors, format pack-quantized: weights in codes, plain activations.

A linear is stored as (O out_features, I in_features, G groups):

    weight_packed      int32 [O, I * bits / 32]   codes, packed along I
    weight_scale       float16 [O, G]
    weight_shape       int64 [2]                  O and I
    weight_zero_point  int32 [O * bits / 32, G]   zero points, packed along O, if asymmetric

Sources: `compressors/pack_quantized` of compressed-tensors 0.20.1, `compressed_tensors_wNa16.py` of
vLLM 0.33.0. Needs no torch, except to encode.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import Arrays, Pack, Packing, Sizes, quantized_names
from gptq_cli.config.layer import (
    HEAD,
    HOLDS,
    Linears,
    Settings,
    StoredConfig,
    expert_part,
    flaw_of,
    matches,
    runtime_names,
)

if TYPE_CHECKING:
    from gptq_cli.solver.quantized_linear import QuantizedLinear

FORMAT, PACKED, MIXED = "compressed-tensors", "pack-quantized", "mixed-precision"
# The version whose packing this is: earlier ones filled up the words of 3, 5, 6 and 7 bits.
VERSION = "0.20.1"
PATTERN = "re:"
LINEAR = "Linear"  # the class of modules, which every one of them has that is no head


class CompressedTensorsPacking(Packing):
    """The packing of compressed-tensors; `settings` returns those of a stored module."""

    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight_packed": ("I32",),
        "weight_scale": ("F16", "BF16", "F32"),
        "weight_shape": ("I64", "I32"),
        "weight_zero_point": ("I32",),
        "weight_g_idx": ("I32", "I64"),  # of versions before 0.20, with actorder group
    }
    needed: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_shape")
    marks: ClassVar[tuple[str, ...]] = tuple(dtypes)
    codes: ClassVar[str] = "weight_packed"
    scales: ClassVar[str] = "weight_scale"
    g_idx: ClassVar[str | None] = "weight_g_idx"

    def __init__(self, settings: Callable[[str], Settings] | None = None) -> None:
        super().__init__(FORMAT)
        self._settings = settings

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a linear."""
        out_features, in_features, groups = sizes.out_features, sizes.in_features, sizes.groups
        shapes: dict[str, tuple[int, ...]] = {
            "weight_packed": (out_features, in_features * sizes.bits // 32),
            "weight_scale": (out_features, groups),
            "weight_shape": (2,),
        }
        if not sizes.sym:
            shapes["weight_zero_point"] = (out_features * sizes.bits // 32, groups)
        return shapes

    def sizes_of(self, module: str, parts: Mapping[str, TensorInfo]) -> Sizes | None:
        """Return the sizes that the parts of `module` show; None if their shapes do not fit."""
        assert self._settings is not None
        settings = self._settings(module)
        (out_features, words), (_, groups) = (
            parts["weight_packed"].shape,
            parts["weight_scale"].shape,
        )
        in_features = words * 32 // settings.bits
        if settings.group_size != -1 and groups * settings.group_size != in_features:
            return None
        scales = parts["weight_scale"].dtype
        return Sizes(out_features, in_features, groups, settings.bits, settings.sym, scales)

    def out_features(self, parts: Mapping[str, TensorInfo]) -> int:
        """Return the outputs that the codes show, 0 if these have no dimension."""
        return [*parts["weight_packed"].shape, 0][0]

    def in_features(self, parts: Mapping[str, TensorInfo], bits: int) -> int:
        """Return the inputs that the codes show, 0 if these have no dimension."""
        return [0, *parts["weight_packed"].shape][-1] * 32 // bits

    def encode(self, linear: QuantizedLinear, pack: Pack, *, sym: bool) -> dict[str, Any]:
        """Return the tensors of a linear by part."""
        import torch

        tensors = {
            "weight_packed": pack(linear.codes.mT, linear.bits).mT,
            "weight_scale": linear.scales,
            "weight_shape": torch.tensor(linear.codes.shape[-2:]),
        }
        if not sym:
            tensors["weight_zero_point"] = pack(linear.zeros, linear.bits)
        return tensors

    def words(self, tensors: Mapping[str, Any], arrays: Arrays) -> Any:
        """Return the codes as words [I * bits / 32, O], whose columns are streams of bits."""
        del arrays
        return tensors["weight_packed"].T

    def stored_scales(self, tensors: Mapping[str, Any]) -> Any:
        """Return the scales [O, G]."""
        return tensors["weight_scale"]

    def zeros(self, tensors: Mapping[str, Any], bits: int, arrays: Arrays) -> Any:
        """Return the zero points [O, G], None if each is half the number of codes."""
        if "weight_zero_point" not in tensors:
            return None
        return arrays.unpack(tensors["weight_zero_point"], bits)


def packing_for(*, sym: bool) -> Packing:
    """Return how linears are written."""
    del sym
    return CompressedTensorsPacking()


def packing_of(stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Packing:
    """Return how the linears of a readable checkpoint are stored."""
    config, _ = stored_config(stored, tensors)
    if config is None:
        return CompressedTensorsPacking(lambda _: Settings(4, -1, sym=True, desc_act=False))
    return CompressedTensorsPacking(config.settings)


def unreadable(stored: Mapping[str, Any]) -> str:
    """Return what cannot be read here, "" if all can."""
    beside = _unreadable_beside(stored)
    if beside:
        return beside
    groups = stored.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(map(_is_group, groups.values())):
        return "without a mapping config_groups"
    for group in groups.values():
        found = _unreadable_group(group, group.get("format") or stored.get("format"))
        if found:
            return found
    return ""


def _unreadable_beside(stored: Mapping[str, Any]) -> str:
    """Return what changes weights or their use beside the groups, "" if nothing does."""
    for key in ("transform_config", "kv_cache_scheme"):
        if stored.get(key) not in (None, {}):
            return f"with {key}"
    sparsity = stored.get("sparsity_config")
    if sparsity in (None, {}) or _is_dense(sparsity):
        return ""
    return "with sparsity_config"


def _is_dense(sparsity: object) -> bool:
    return isinstance(sparsity, dict) and sparsity.get("format") == "dense"


def _is_group(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("weights"), dict)


def _unreadable_group(group: Mapping[str, Any], format: object) -> str:
    if format != PACKED:
        return str(format)
    if group.get("input_activations") or group.get("output_activations"):
        return "quantized activations"
    weights = group["weights"]
    if weights.get("type", "int") != "int":
        return f"weights of type {weights['type']}"
    if weights.get("dynamic"):
        return "dynamic weights"
    return ""


def settings_of_source(stored: Mapping[str, Any]) -> GroupedConfig | None:
    """Return the settings of packed weights beside which something else is quantized, too.

    That are activations, the key-value cache, or weights in another form. None if there are no such
    weights, all is read as a checkpoint of this format, or a transform or a mask changes weights.
    """
    if not unreadable(stored) or _unreadable_beside({**stored, "kv_cache_scheme": None}):
        return None
    groups = stored.get("config_groups")
    if not isinstance(groups, dict) or not all(map(_is_group, groups.values())):
        return None
    targets: dict[str, Settings] = {}
    for group in groups.values():
        format = group.get("format") or stored.get("format")
        if format in (PACKED, MIXED) and _is_integer(group):
            for target in group["targets"]:
                targets.setdefault(target, _settings(group["weights"]))
    if not targets:
        return None
    base = next(iter(targets.values()))
    return GroupedConfig(base, FORMAT, lm_head=False, dynamic={}, listed=None, targets=targets)


def asymmetric_targets(stored: Mapping[str, Any]) -> dict[str, bool]:
    """Return for each usable target of a `quantization_config` whether it asks for zero points."""
    groups = stored.get("config_groups")
    found: dict[str, bool] = {}
    if not isinstance(groups, dict):
        return found
    for group in filter(_is_group, groups.values()):
        targets = group.get("targets")
        if _are_names(targets):
            for target in filter(_can_match, targets):
                found.setdefault(target, group["weights"].get("symmetric") is False)
    return found


def _can_match(target: str) -> bool:
    return not target.startswith(PATTERN) or not flaw_of(target.removeprefix(PATTERN))


def _is_integer(group: Mapping[str, Any]) -> bool:
    """Return whether a group tells usable settings of weights in integers."""
    weights = group["weights"]
    if weights.get("type", "int") != "int" or not _are_names(group.get("targets")):
        return False
    if weights.get("strategy") == "group" and not _is_group_size(weights.get("group_size")):
        return False
    return all(accepts(weights.get(key)) for key, accepts in _ACCEPTS.items())


@dataclass(frozen=True, slots=True)
class GroupedConfig(StoredConfig):
    """The settings of a checkpoint of compressed-tensors.

    `targets` has the settings of names, patterns `re:...` and classes; `ignore` lists names and
    patterns of modules that are not quantized.
    """

    targets: Mapping[str, Settings]
    ignore: tuple[str, ...] = ()

    def settings(self, module: str) -> Settings:
        """Return the settings of a quantized module."""
        target = deciding_target(self.targets, module)
        if target is None:
            return self.base
        return self.targets[target]

    def skip_rule(self, module: str) -> str | None:
        """Return the entry of `ignore` that excludes `module` from quantization."""
        for name in self.ignore:
            if _names(name, module):
                return f"ignore: {name}"
        return None

    def is_listed(self, module: str) -> bool:
        """Return whether a target names the module."""
        return deciding_target(self.targets, module) is not None


def deciding_target(targets: Collection[str], module: str) -> str | None:
    """Return the target that decides: a name, else a pattern, else the class of linears."""
    if module in targets:
        return module
    for target in targets:
        if _names(target, module):
            return target
    if LINEAR in targets:
        return LINEAR
    return None


def _names(target: str, module: str) -> bool:
    """Return whether a name or a pattern `re:...` matches a module."""
    if target.startswith(PATTERN):
        return matches(target.removeprefix(PATTERN), module)
    return target == module


def stored_config(
    stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[StoredConfig | None, list[Defect]]:
    """Return the configuration of a readable checkpoint, None if it is unusable, and defects."""
    wrong = [*_wrong_groups(stored), *_wrong_patterns(stored)]
    if wrong:
        hint = "correct it in config.json, as it was set in the tool that wrote the weights"
        return None, [Defect("E_CKPT_CONFIG", text, "config.json", hint=hint) for text in wrong]
    targets: dict[str, Settings] = {}
    for group in stored["config_groups"].values():
        for target in group["targets"]:
            targets.setdefault(target, _settings(group["weights"]))
    names = quantized_names(tensors, CompressedTensorsPacking())
    base = next(iter(targets.values()), Settings(4, -1, sym=True, desc_act=False))
    ignore = tuple(stored.get("ignore") or ())
    return GroupedConfig(base, FORMAT, HEAD in names, {}, None, targets, ignore), []


def _settings(weights: Mapping[str, Any]) -> Settings:
    group_size = -1
    if weights["strategy"] == "group":
        group_size = weights["group_size"]
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    return Settings(weights["num_bits"], group_size, weights.get("symmetric") is not False, ordered)


def _wrong_groups(stored: Mapping[str, Any]) -> Iterator[str]:
    groups = stored.get("config_groups")
    if not groups:
        yield "config_groups is missing or empty"
        return
    for name, group in groups.items():
        weights = group["weights"]
        if not _are_names(group.get("targets")):
            yield f"{name}: targets is not a list of names"
        for key, accepts in _ACCEPTS.items():
            if not accepts(weights.get(key)):
                yield f"{name}: {key} is {weights.get(key)!r}"
        if weights.get("strategy") == "group" and not _is_group_size(weights.get("group_size")):
            yield f"{name}: group_size is {weights.get('group_size')!r}"


def _is_bits(value: object) -> bool:
    return type(value) is int and value in HOLDS[FORMAT].bits


def _is_group_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_strategy(value: object) -> bool:
    return value in ("group", "channel")


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


_ACCEPTS = {"num_bits": _is_bits, "strategy": _is_strategy, "symmetric": _is_flag}


def _wrong_patterns(stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield names and patterns of `ignore` and targets that cannot be matched."""
    lists = [stored.get("ignore") or []]
    if not _are_names(lists[0]):
        yield "ignore is not a list of names"
    for group in (stored.get("config_groups") or {}).values():
        lists.append(group.get("targets"))
    for name in chain(*filter(_are_names, lists)):
        if name.startswith(PATTERN):
            reason = flaw_of(name.removeprefix(PATTERN))
            if reason:
                yield f"{name!r} is not a regular expression: {reason}"


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def describe(linears: Linears) -> dict[str, Any]:
    """Return the entries of config.json for a checkpoint of these linears."""
    base, others = linears.usual()
    targets: dict[Settings, list[str]] = {base: [LINEAR]}
    for name, settings in others.items():
        targets.setdefault(settings, []).append(name)
    if linears.quantized.get(HEAD) == base:  # engines have a class of its own for it
        targets[base].append(HEAD)
    sizes = Counter(map(_holder, [*linears.quantized, *linears.kept]))
    groups = {}
    for number, (settings, names) in enumerate(targets.items()):
        groups[f"group_{number}"] = _group(settings, _shortened(names, sizes))
    ignore = _shortened(sorted(linears.kept), sizes)
    if HEAD not in linears.quantized and HEAD not in ignore:
        ignore.append(HEAD)
    described = {
        "quant_method": FORMAT,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "version": VERSION,
    }
    return {"quantization_config": described}


def _holder(name: str) -> str | None:
    """Return the module that holds the expert of a linear, None for a linear of no expert."""
    part = expert_part(name)
    if part is None:
        return None
    return part[0]


def _shortened(names: Sequence[str], sizes: Mapping[str | None, int]) -> list[str]:
    """Return the names, with one pattern for all experts of a layer if all are among them.

    transformers takes the settings of experts from a pattern that says so. `sizes` are the numbers
    of linears of each holder.
    """
    found: dict[str, None] = {}
    here = Counter(map(_holder, names))
    holders = [holder for holder in sizes if holder is not None]
    insides = Counter(map(_inside, holders))
    for name in names:
        holder = _holder(name)
        if holder is None or here[holder] < sizes[holder]:
            found[name] = None
        elif insides[_inside(holder)] == 1:  # vLLM may have another prefix
            found[_all_of(_inside(holder))] = None
        else:  # only the prefix tells a drafting block from a block of the model
            for runtime in runtime_names(holder):
                found[_all_of(runtime)] = None
    return list(found)


def _inside(holder: str) -> str:
    """Return the name of a module without its first part, such as ".layers.0.mlp.experts"."""
    return holder[holder.index(".") :].removeprefix(".language_model")


def _all_of(module: str) -> str:
    return f"{PATTERN}.*{re.escape(module)}[.].*"


def _group(settings: Settings, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.sym,
        "strategy": "channel",
        "dynamic": False,
    }
    if settings.group_size != -1:
        weights |= {"strategy": "group", "group_size": settings.group_size}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": PACKED,
    }
