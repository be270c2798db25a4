"""What a checkpoint holds, quantized or not, told from its headers and settings alone. Needs no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.source import Checkpoint, read_json
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.targets import Export, Verdict, verdicts
from gptq_cli.errors import InputError
from gptq_cli.pipeline.overview import Row, collapse, kind_of, other_rows, settings

PARTS = ("qweight", "qzeros", "scales", "g_idx")
FROM_CONFIG = ("model_type", "architectures", "transformers_version")
FROM_RUN = ("preset", "dataset", "nsamples", "seqlen", "seed")
_IN_LIST = re.compile(r"^(.*?)\.\d+\.")


@dataclass(frozen=True, slots=True)
class PackedModule:
    """A linear as its packed tensors tell; `nbytes` of all of them."""

    name: str
    out_features: int
    in_features: int
    bits: int
    groups: int
    nbytes: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale, -1 for one group a row."""
        return -1 if self.groups == 1 else self.in_features // self.groups

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Inspection:
    """`method` is None for a checkpoint that is not quantized; of methods other than gptq only tensors are told.

    `parameters` counts a packed linear by the weights it stands for. `provenance` is what files say about how the
    checkpoint came to be.
    """

    method: str | None
    format: str | None
    sym: bool
    desc_act: bool
    modules: tuple[PackedModule, ...]
    quantized: tuple[Row, ...]
    kept: tuple[Row, ...]
    parameters: int
    nbytes: int
    files: dict[str, int]
    provenance: dict[str, Any]

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of the quantized linears, scales, zero points and g_idx included, per weight."""
        weights = sum(module.weights for module in self.modules)
        return 8 * sum(module.nbytes for module in self.modules) / weights if weights else None

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits of everything, per parameter."""
        return 8 * self.nbytes / self.parameters

    def layer_configs(self) -> list[LayerConfig]:
        """The settings that occur, as readers see them."""
        return [
            LayerConfig(bits=m.bits, group_size=m.group_size, sym=self.sym, desc_act=self.desc_act)
            for m in self.modules
        ]

    def readers(self) -> tuple[Verdict, ...]:
        """What each engine makes of it; empty where nothing is quantized."""
        if not self.modules or self.format is None:
            return ()
        names = [module.name for module in self.modules]
        return verdicts(Export.of(self.layer_configs(), self.format, "lm_head" in names, names=names))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """What `checkpoint` holds; InputError E_CKPT_INCOMPLETE if the parts of a linear lack one or do not fit."""
    said = checkpoint.quantization
    method = str(said.get("quant_method", "gptq")).lower() if said is not None else None
    modules = packed_modules(checkpoint.tensors) if method == "gptq" else ()
    packed = {f"{module.name}.{part}" for module in modules for part in PARTS}
    others = [tensor for name, tensor in checkpoint.tensors.items() if name not in packed]
    blocks = _blocks(checkpoint.tensors)
    said = said or {}
    sym = bool(said.get("sym", True))
    return Inspection(
        method=method,
        format=str(said.get("checkpoint_format") or said.get("format") or "gptq") if method == "gptq" else None,
        sym=sym,
        desc_act=bool(said.get("desc_act")),
        modules=modules,
        quantized=tuple(collapse(_row(module, blocks, sym=sym) for module in modules)),
        kept=tuple(replace(row, why="") for row in other_rows(others, blocks)),
        parameters=sum(module.weights for module in modules) + sum(math.prod(tensor.shape) for tensor in others),
        nbytes=checkpoint.nbytes,
        files=_files(checkpoint),
        provenance=_provenance(checkpoint),
    )


def packed_modules(tensors: dict[str, TensorInfo]) -> tuple[PackedModule, ...]:
    """The quantized linears among `tensors`, in file order, each by the shapes of its parts."""
    return tuple(_module(name.removesuffix(".qweight"), tensors) for name in tensors if name.endswith(".qweight"))


def _module(name: str, tensors: dict[str, TensorInfo]) -> PackedModule:
    found = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    absent = [part for part in PARTS[:3] if part not in found]
    if absent:
        raise InputError("E_CKPT_INCOMPLETE", f"`{name}` has a qweight but no {', '.join(absent)}")
    (rows, out_features), (groups, words) = found["qweight"].shape, found["qzeros"].shape
    bits, rest = divmod(words * 32, out_features)
    if rest or not bits or rows * 32 % bits or found["scales"].shape != (groups, out_features) or not groups:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in found.items())
        raise InputError("E_CKPT_INCOMPLETE", f"the parts of `{name}` do not fit each other: {shapes}")
    return PackedModule(
        name, out_features, rows * 32 // bits, bits, groups, sum(tensor.nbytes for tensor in found.values())
    )


def _row(module: PackedModule, blocks: str, *, sym: bool) -> Row:
    how = settings(module.bits, module.group_size, sym=sym)
    return Row(
        kind_of(module.name, blocks), (module.out_features, module.in_features), how, count=1, nbytes=module.nbytes
    )


def _blocks(names: Iterable[str]) -> str:
    lists = Counter(match[1] for name in names if (match := _IN_LIST.match(name)))
    return lists.most_common(1)[0][0] if lists else ""


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of tensors in each file of weights."""
    files: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        files[tensor.file.name] += tensor.nbytes
    return dict(sorted(files.items()))


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    found = {key: checkpoint.config[key] for key in FROM_CONFIG if checkpoint.config.get(key) is not None}
    file = checkpoint.directory / "quantize_config.json"
    content = read_json(file) if file.is_file() else checkpoint.quantization
    meta = content.get("meta") if isinstance(content, dict) else None
    found |= {key: value for key, value in meta.items() if value is not None} if isinstance(meta, dict) else {}
    return found | _run_settings(checkpoint.directory / "gptq_config.yaml")


def _run_settings(file: Path) -> dict[str, Any]:
    """What the configuration of a run of ours says about its text."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get("dataset"), list):
        content["dataset"] = f"{len(content['dataset'])} texts"
    return {key: content[key] for key in FROM_RUN if content.get(key) is not None}
