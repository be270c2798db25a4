"""Adapters of peft that are merged into a model while its tensors are read.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024), with the arithmetic
of peft's `merge_and_unload`: in float32, one adapter after the other, each rounded to the dtype of
the weight; of an embedding the product is rounded first. Tensors of `modules_to_save`, and biases
that were trained, replace those of the model.
Headers and settings are read without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_cli.checkpoint.decoded import Plain
from gptq_cli.checkpoint.headers import TensorInfo, read_header
from gptq_cli.checkpoint.model_files import ADAPTER_CONFIG, read_json
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import InputError
from gptq_cli.files import Stamp, expanded, is_directory, is_file, stamp_of, status_of
from gptq_cli.storage.manifest import file_hash

if TYPE_CHECKING:
    from torch import Tensor

    from gptq_cli.checkpoint.reader import PlainReader

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
# Settings of peft that change the arithmetic in ways that are not read here.
UNREAD = ("layer_replication", "target_parameters", "lora_bias", "megatron_config", "use_qalora")
_SCALE = re.compile(r"(.+):([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})", re.DOTALL)
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(\.weight)?"
)


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one tensor of a model by one adapter.

    `parts` are names in the adapter's file: those of LoRA by kind, or one under "whole" for a
    tensor that replaces the model's. `scaling` multiplies the product of a LoRA. If `transposed`,
    the product is turned.
    """

    adapter: Adapter
    parts: Mapping[str, str]
    scaling: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter in a directory, of which `scale` times the product is added to the model."""

    directory: Path
    scale: float
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stamps: Mapping[Path, Stamp]

    def identity(self) -> dict[str, Any]:
        """Return the scale and the hash of each file, whatever the path."""
        files = {path.name: file_hash(path) for path in sorted(self.stamps)}
        return {"scale": self.scale, "files": files}

    def provenance(self) -> dict[str, Any]:
        """Return the name, the scale and the hash of the weights, for the configuration files."""
        sha256 = file_hash(self.directory / WEIGHTS)
        return {"adapter": self.directory.name, "scale": self.scale, "sha256": sha256}


def with_adapters(source: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """Return `source` as the model into which the adapters `DIR` or `DIR:SCALE` are merged.

    Raises InputError E_LORA for an adapter that is none, or that does not fit the model.
    """
    adapters = tuple(open_adapter(name) for name in names)
    remarks = source.remarks
    if any(adapter.directory.resolve() == source.directory.resolve() for adapter in adapters):
        remarks = tuple(remark for remark in remarks if remark[0] != "W_CKPT_ADAPTER")
    merged = replace(source, adapters=adapters, remarks=remarks)
    changes_of(merged, source.tensors)  # raises if an adapter does not fit
    return merged


def open_adapter(name: str) -> Adapter:
    """Return the adapter in a directory; raises InputError E_LORA if there is none that is read."""
    path, scale = _split(name)
    directory = expanded(path)
    if not is_directory(directory):
        hint = f"give a directory that holds {ADAPTER_CONFIG} and {WEIGHTS}"
        raise InputError("E_LORA", f"adapter `{path}` is not a directory", hint=hint)
    config_file, weights = directory / ADAPTER_CONFIG, directory / WEIGHTS
    for file in (config_file, weights):
        if not is_file(file):
            hint = "save the adapter with peft's save_pretrained, which writes both files"
            raise InputError("E_LORA", f"adapter `{path}` has no {file.name}", hint=hint)
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise _unread(path, f"its {ADAPTER_CONFIG} holds no object")
    _check_config(path, config)
    stamps = {}
    for file in (config_file, weights):
        stamp = stamp_of(file)
        if stamp is not None:
            stamps[file] = stamp
    return Adapter(directory, scale, config, read_header(weights), stamps)


def _split(name: str) -> tuple[str, float]:
    match = _SCALE.fullmatch(name)
    if match is None or status_of(expanded(name)) is not None:
        return name, 1.0
    return match[1], float(match[2])


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _unread(path, f"its peft_type is {kind!r}, not 'LORA'")
    for key in UNREAD:
        if config.get(key):
            raise _unread(path, f"it uses {key}")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise _unread(path, f"its {key} is {value!r}, not a number")


def _unread(path: str, reason: str) -> InputError:
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
    parts: dict[str, dict[str, str]] = {}
    for stored in adapter.tensors:
        name = stored.removeprefix(PREFIX)
        match = _PART.fullmatch(name)
        if match is None:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            parts.setdefault(name, {})["whole"] = stored
        else:
            parts.setdefault(f"{match['module']}.weight", {})[match["part"]] = stored
    changes = {}
    for name, of_name in parts.items():
        is_embedding = EMBEDDING[0] in of_name
        transposed = is_embedding or bool(adapter.config.get("fan_in_fan_out"))
        changes[name] = Change(adapter, of_name, _scaling(adapter, name, of_name), transposed)
    return changes


def _scaling(adapter: Adapter, name: str, parts: Mapping[str, str]) -> float:
    """Return the factor of a LoRA: alpha / r, or alpha / sqrt(r) for rsLoRA, times the scale."""
    first = parts.get(LINEAR[0]) or parts.get(EMBEDDING[0])
    if first is None:
        return adapter.scale
    rank = adapter.tensors[first].shape[0]
    alpha = adapter.config["lora_alpha"]
    for pattern, value in (adapter.config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name.removesuffix(".weight")):
            alpha = value
            break
    if adapter.config.get("use_rslora"):
        return float(adapter.scale * (alpha / sqrt(rank)))
    return float(adapter.scale * (alpha / rank))


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
    shapes = {part: adapter.tensors[stored].shape for part, stored in change.parts.items()}
    made = _shape_of(shapes, transposed=change.transposed)
    if made is None:
        raise _unread(path, f"`{name}` has the parts {', '.join(sorted(shapes))}")
    if made != weight.shape:
        message = f"adapter `{path}` changes `{name}` of shape {list(made)}"
        hint = "give the model that the adapter was trained on"
        raise InputError("E_LORA", f"{message}, but it is {list(weight.shape)}", hint=hint)
    if "whole" in change.parts and adapter.scale != 1:
        hint = "leave out the scale, or merge the adapter with peft"
        message = f"adapter `{path}` replaces `{name}` as a whole, which has no scale"
        raise InputError("E_LORA", message, hint=hint)
    _check_tied(source, path, name, change)


def _check_tied(source: Checkpoint, path: str, name: str, change: Change) -> None:
    """Raise InputError E_LORA if one of two tied tensors would be replaced."""
    is_tied = source.text_config.get("tie_word_embeddings", False)
    if is_tied and set(change.parts) == {"whole"} and "embed" in name:
        raise _unread(path, f"it replaces `{name}`, but the output head is tied to it")


def _shape_of(shapes: Mapping[str, tuple[int, ...]], *, transposed: bool) -> tuple[int, ...] | None:
    """Return the shape of the tensor that parts of these shapes change, None if they do not fit."""
    factors = set(shapes) - {"whole", MAGNITUDE}
    if not factors:
        return shapes.get("whole")
    if factors not in (set(LINEAR), set(EMBEDDING)):
        return None
    first, second = sorted(factors)  # A before B
    if len(shapes[first]) != 2 or len(shapes[second]) != 2:
        return None
    if shapes[first][0] != shapes[second][1]:
        return None
    made = (shapes[second][0], shapes[first][1])
    if transposed:
        return made[::-1]
    return made


def merged_view(source: Checkpoint, plain: Plain) -> Plain:
    """Return `plain` with the changed tensors as decoded ones, which are read and not copied.

    Raises InputError E_LORA for a source in packed codes.
    """
    if plain.packed:
        path = str(source.adapters[0].directory)
        raise _unread(path, f"the weights of `{source.directory}` are {plain.how}")
    parts = dict(plain.parts)
    for name in changes_of(source, plain.tensors):
        parts.setdefault(name, (name,))
    return replace(plain, parts=parts)


class MergingReader:
    """Reads a model with its adapters merged, in the dtypes of the model."""

    def __init__(self, reader: PlainReader, source: Checkpoint) -> None:
        self._reader = reader
        self._changes = changes_of(source, source.tensors)

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
