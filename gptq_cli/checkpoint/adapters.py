"""Adapters of peft that are merged into a model while its tensors are read.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024), with the arithmetic
of peft's `merge_and_unload`: in float32, one adapter after the other, each rounded to the dtype of
the weight; of an embedding the product is rounded first. Tensors of `modules_to_save`, and biases
that were trained, replace those of the model.
Headers and settings are read without torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any

from gptq_cli.checkpoint.headers import PlainReader, TensorInfo, read_header
from gptq_cli.checkpoint.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from gptq_cli.checkpoint.source import Adapter, Checkpoint
from gptq_cli.config.layer import SECONDS, matches_in_time
from gptq_cli.errors import InputError, shown
from gptq_cli.files import expanded, is_directory, is_file, stamp_of, status_of

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
# Settings of peft that change the arithmetic in ways that are not read here.
UNREAD = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
    "megatron_config",
    "use_qalora",
)
FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")
FLOATS = ("F16", "BF16", "F32", "F64")
_SCALE = re.compile(r"(.+):([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})", re.DOTALL)
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(\.weight)?"
)


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one tensor of a model by one adapter.

    `parts` are names in the adapter's file: those of LoRA by kind, or one under "whole" for a
    tensor that replaces the model's. `scaling` multiplies the product of a LoRA of this `rank`. If
    `transposed`, the product is turned.
    """

    adapter: Adapter
    parts: Mapping[str, str]
    rank: float
    scaling: float
    transposed: bool


def open_adapters(names: Iterable[str]) -> tuple[Adapter, ...]:
    """Return the adapters `DIR` or `DIR:SCALE`.

    Raises InputError E_LORA for an adapter that is none, and for one that is given twice.
    """
    adapters = tuple(open_adapter(name) for name in names)
    _check_distinct(adapters)
    return adapters


def _check_distinct(adapters: Iterable[Adapter]) -> None:
    seen = set()
    for adapter in adapters:
        directory = adapter.directory.resolve()
        if directory in seen:
            message = f"adapter `{adapter.directory}` is given twice"
            hint = "give it once; a scale such as DIR:2 adds more of it"
            raise InputError("E_LORA", message, hint=hint)
        seen.add(directory)


def open_adapter(name: str) -> Adapter:
    """Return the adapter in a directory; raises InputError E_LORA if there is none that is read."""
    path, scale = _split(name)
    directory = expanded(path)
    if not is_directory(directory):
        hint = f"give a directory that holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        raise InputError("E_LORA", f"adapter `{path}` is not a directory", hint=hint)
    config_file, weights = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    for file in (config_file, weights):
        if not is_file(file):
            hint = "save the adapter with peft's save_pretrained, which writes both files"
            raise InputError("E_LORA", f"adapter `{path}` has no {file.name}", hint=hint)
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise unmergeable(path, f"its {ADAPTER_CONFIG} holds no object")
    _check_config(path, config)
    stamps = {}
    for file in (config_file, weights):
        stamp = stamp_of(file)
        if stamp is not None:
            stamps[file] = stamp
    tensors = read_header(weights)
    if not tensors:
        raise unmergeable(path, f"its {ADAPTER_WEIGHTS} holds no tensor")
    return Adapter(directory, scale, config, tensors, stamps)


def _split(name: str) -> tuple[str, float]:
    match = _SCALE.fullmatch(name)
    if match is None or status_of(expanded(name)) is not None:
        return name, 1.0
    return match[1], float(match[2])


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise unmergeable(path, f"its peft_type is {kind!r}, not 'LORA'")
    for key in UNREAD:
        if config.get(key):
            raise unmergeable(path, f"it uses {key}")
    for key in FLAGS:
        if config.get(key) not in (None, False, True):
            raise unmergeable(path, f"its {key} is {shown(config[key])}, not true or false")
    _check_numbers(path, "r", config.get("rank_pattern"), config.get("r"))
    _check_numbers(path, "lora_alpha", config.get("alpha_pattern"), config.get("lora_alpha"))
    _check_ranks(path, [config["r"], *(config.get("rank_pattern") or {}).values()])


def _check_ranks(path: str, ranks: Iterable[float]) -> None:
    for rank in ranks:
        if rank <= 0:
            raise unmergeable(path, f"it has the rank {shown(rank)}")


def _check_numbers(path: str, key: str, patterns: Any, common: Any) -> None:
    """Raise InputError E_LORA if a setting, of all modules or of a pattern, is not usable."""
    if patterns is not None and not isinstance(patterns, dict):
        raise unmergeable(path, f"its patterns for {key} are {shown(patterns)}, not an object")
    for pattern, value in (patterns or {}).items():
        _check_number(path, f"{key} for the pattern {shown(pattern)}", value)
        try:
            re.compile(_for_names(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            reason = f"its pattern {shown(pattern)} is not a regular expression: {error}"
            raise unmergeable(path, reason) from None
    _check_number(path, key, common)


def _check_number(path: str, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unmergeable(path, f"its {key} is {shown(value)}, not a number")
    if not abs(value) <= sys.float_info.max:  # so that an integer of 400 digits is refused too
        raise unmergeable(path, f"its {key} is {shown(value)}, not a finite number")


def _for_names(pattern: str) -> str:
    """Return a pattern of peft as it is matched with the whole name of a module."""
    return rf"(.*\.)?({pattern})$"


def unmergeable(path: str, reason: str) -> InputError:
    """Return the error E_LORA for an adapter that cannot be merged here."""
    message = f"adapter `{path}` cannot be merged: {reason}"
    hint = "merge it with peft's merge_and_unload, and quantize the merged model"
    return InputError("E_LORA", message, hint=hint)


def changes_of(
    source: Checkpoint, tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[Change, ...]]:
    """Return the changes of each tensor of the model by its adapters, in their order.

    Raises InputError E_LORA for tensors that the model does not have, of other shapes, or unpaired.
    """
    found: dict[str, tuple[Change, ...]] = {}
    for adapter in source.adapters:
        for name, change in _changes(adapter).items():
            _check_fit(source, adapter, name, change, tensors.get(name))
            found[name] = (*found.get(name, ()), change)
    return found


def _changes(adapter: Adapter) -> dict[str, Change]:
    changes = {}
    for name, parts in _parts(adapter).items():
        transposed = EMBEDDING[0] in parts or bool(adapter.config.get("fan_in_fan_out"))
        rank = _of_module(adapter, name, "rank_pattern", "r")
        scaling = adapter.scale
        if set(parts) != {"whole"}:
            scaling = _scaling(adapter, name, rank)
        changes[name] = Change(adapter, parts, rank, scaling, transposed)
    return changes


def _parts(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Return the names in the file by tensor of the model and by kind."""
    parts: dict[str, dict[str, str]] = {}
    for stored in adapter.tensors:
        name, part = stored.removeprefix(PREFIX), "whole"
        match = _PART.fullmatch(name)
        if match is None:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        else:
            name, part = f"{match['module']}.weight", match["part"]
        of_name = parts.setdefault(name, {})
        if part in of_name:
            reason = f"`{of_name[part]}` and `{stored}` are the same part of `{name}`"
            raise unmergeable(str(adapter.directory), reason)
        of_name[part] = stored
    return parts


def _scaling(adapter: Adapter, name: str, rank: float) -> float:
    """Return the factor of a LoRA: alpha / r, or alpha / sqrt(r) for rsLoRA, times the scale."""
    alpha = _of_module(adapter, name, "alpha_pattern", "lora_alpha")
    divisor = rank
    if adapter.config.get("use_rslora"):
        divisor = sqrt(rank)
    scaling = float(adapter.scale * (alpha / divisor))
    if scaling == 0 or not isfinite(scaling):
        message = f"adapter `{adapter.directory}` is multiplied by {scaling:g} for `{name}`"
        hint = "give a scale above 0 and an adapter with a lora_alpha, or leave out the adapter"
        raise InputError("E_LORA", message, hint=hint)
    return scaling


def _of_module(adapter: Adapter, name: str, patterns: str, key: str) -> float:
    """Return the number of the first pattern that matches the module, or that of all modules."""
    found: float = adapter.config[key]
    for pattern, value in (adapter.config.get(patterns) or {}).items():
        try:
            is_match = matches_in_time(_for_names(pattern), name.removesuffix(".weight"))
        except TimeoutError:
            reason = f"its pattern {shown(pattern)} takes more than {SECONDS:g} s to match `{name}`"
            raise unmergeable(str(adapter.directory), reason) from None
        if is_match:
            found = value
            break
    return found


def _check_fit(
    source: Checkpoint,
    adapter: Adapter,
    name: str,
    change: Change,
    weight: TensorInfo | None,
) -> None:
    """Raise InputError E_LORA if a change does not fit the tensor of the model."""
    path = str(adapter.directory)
    if weight is None:
        hint = "give the model that the adapter was trained on"
        if name == "lm_head.weight":
            hint = "the head is tied to the embeddings: save the merged model with peft first"
        message = f"adapter `{path}` changes `{name}`, which `{source.directory}` does not have"
        raise InputError("E_LORA", message, hint=hint)
    _check_parts(path, name, change, weight)
    if "whole" in change.parts and adapter.scale != 1:
        hint = "leave out the scale, or merge the adapter with peft"
        message = f"adapter `{path}` replaces `{name}` as a whole, which has no scale"
        raise InputError("E_LORA", message, hint=hint)
    _check_tied(source, path, name, change)


def _check_tied(source: Checkpoint, path: str, name: str, change: Change) -> None:
    """Raise InputError E_LORA if one of two tied tensors would be replaced."""
    is_tied = source.text_config.get("tie_word_embeddings", False)
    if is_tied and set(change.parts) == {"whole"} and "embed" in name:
        raise unmergeable(path, f"it replaces `{name}`, but the output head is tied to it")


def _check_parts(path: str, name: str, change: Change, weight: TensorInfo) -> None:
    """Raise InputError E_LORA if a part is missing, or has another dtype or shape than it must."""
    factors = set(change.parts) - {"whole"}
    wanted = _wanted_shapes(change, weight)
    if factors and (factors != set(wanted) - {"whole"} or len(weight.shape) != 2):
        has = f"`{name}` of shape {list(weight.shape)} has the parts {', '.join(sorted(factors))}"
        use_dora = shown(bool(change.adapter.config.get("use_dora")))
        raise unmergeable(path, f"{has}, and use_dora is {use_dora}")
    for part, stored in change.parts.items():
        info = change.adapter.tensors[stored]
        if info.dtype not in FLOATS:
            raise unmergeable(path, f"`{stored}` has the dtype {info.dtype}, not a float type")
        if info.shape != wanted[part]:
            message = f"adapter `{path}` has `{stored}` of shape {list(info.shape)}"
            must = f"it must be {list(wanted[part])} for `{name}` of shape {list(weight.shape)}"
            if factors:
                must += f" and rank {change.rank:g}"
            hint = f"give the model that the adapter was trained on, and its own {ADAPTER_CONFIG}"
            raise InputError("E_LORA", f"{message}, but {must}", hint=hint)


def _wanted_shapes(change: Change, weight: TensorInfo) -> dict[str, tuple[float, ...]]:
    """Return the shape that each part must have for a weight [outputs, inputs]."""
    pair = LINEAR
    if EMBEDDING[0] in change.parts:
        pair = EMBEDDING
    shape = weight.shape
    if change.transposed:
        shape = shape[::-1]
    wanted: dict[str, tuple[float, ...]] = {
        "whole": weight.shape,
        pair[0]: (change.rank, *shape[1:]),
        pair[1]: (*shape[:1], change.rank),
    }
    if change.adapter.config.get("use_dora"):
        wanted[MAGNITUDE] = shape[:1]
    return wanted


class MergingReader:
    """Reads a model with its adapters merged, in the dtypes of the model."""

    def __init__(self, reader: PlainReader, changes: Mapping[str, tuple[Change, ...]]) -> None:
        self._reader, self._changes = reader, changes

    def names(self) -> list[str]:
        return self._reader.names()

    def read(self, name: str) -> Tensor:
        """Return the tensor, merged if an adapter changes it."""
        tensor = self._reader.read(name)
        base = tensor
        for change in self._changes.get(name, ()):
            if "whole" in change.parts:
                whole = _read(change, "whole").to(tensor.dtype)
                tensor, base = whole, whole
            tensor = _merged(tensor, base, change)
        return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Do the same as TensorReader."""
        self._reader.prefetch(names)

    def check_unchanged(self) -> None:
        """Do the same as TensorReader."""
        self._reader.check_unchanged()

    def release(self) -> None:
        """Do the same as TensorReader."""
        self._reader.release()


def _read(change: Change, part: str) -> Tensor:
    from safetensors import safe_open

    file = change.adapter.tensors[change.parts[part]].file
    with safe_open(str(file), framework="pt", device="cpu") as opened:
        tensor: Tensor = opened.get_tensor(change.parts[part])
    return tensor


def _merged(weight: Tensor, base: Tensor, change: Change) -> Tensor:
    """Return a weight with the product of a LoRA added; `base` is the weight without adapters."""
    pair = LINEAR
    if EMBEDDING[0] in change.parts:
        pair = EMBEDDING
    if pair[0] not in change.parts:
        return weight
    product = _read(change, pair[1]).float() @ _read(change, pair[0]).float()
    if change.transposed:
        product = product.T
    delta = product * change.scaling
    if pair is EMBEDDING:
        delta = delta.to(weight.dtype)  # as in peft, which keeps float32 for linears only
    total = weight + delta
    if MAGNITUDE in change.parts:
        total = _dora_factor(base + delta, _read(change, MAGNITUDE).float(), change) * total
    return total.to(weight.dtype).contiguous()


def _dora_factor(total: Tensor, magnitude: Tensor, change: Change) -> Tensor:
    """Return the factor of each output: its trained magnitude over the norm of its weights."""
    from torch.linalg import norm

    if change.transposed:
        total = total.T
    factor: Tensor = magnitude / norm(total, dim=1)
    if change.transposed:
        return factor.view(1, -1)
    return factor.view(-1, 1)
